// Exact normals on the CPU. Compile with -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math.
#include "noise_cpu.h"

#include <unistd.h>

#include <algorithm>

#include "clones.h"
#include "normal.h"

namespace dg {
namespace {

constexpr int64_t kTileBlocks = 256;           // 4 KiB of float32: stays in the first cache
constexpr int64_t kChunk = 1 << 14;            // elements per task; a multiple of 4
constexpr int64_t kSerialElements = 1 << 15;   // below this, waking threads costs more
const pid_t load_pid = getpid();

}  // namespace

DG_CLONES void draw_blocks(float* out, uint64_t counter, int64_t blocks, uint64_t seed) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Words x = philox_block(counter + static_cast<uint64_t>(i), seed);
    const Pair a = box_muller(x.x0, x.x1), b = box_muller(x.x2, x.x3);
    out[4 * i] = a.z0;
    out[4 * i + 1] = a.z1;
    out[4 * i + 2] = b.z0;
    out[4 * i + 3] = b.z1;
  }
}

namespace {

DG_CLONES void store_bfloat16(uint16_t* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(in[i]);
}

DG_CLONES void store_float16(uint16_t* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float16(in[i]);
}

void store(void* out, int64_t position, Dtype dtype, const float* in, int64_t n) {
  switch (dtype) {
    case Dtype::float32:
      std::copy_n(in, n, static_cast<float*>(out) + position);
      break;
    case Dtype::bfloat16:
      store_bfloat16(static_cast<uint16_t*>(out) + position, in, n);
      break;
    case Dtype::float16:
      store_float16(static_cast<uint16_t*>(out) + position, in, n);
      break;
    case Dtype::float64:
      std::copy_n(in, n, static_cast<double*>(out) + position);
      break;
  }
}

// Elements first .. first + n - 1 of a key go to out[position ...].
void draw_run(void* out, int64_t position, Dtype dtype, uint64_t seed, uint64_t offset,
              uint64_t first, int64_t n) {
  float tile[4 * kTileBlocks];
  while (n > 0) {
    const int64_t lane = static_cast<int64_t>(first % 4);
    const int64_t count = std::min(n, 4 * kTileBlocks - lane);
    draw_blocks(tile, offset + first / 4, (lane + count + 3) / 4, seed);
    store(out, position, dtype, tile + lane, count);
    position += count;
    first += static_cast<uint64_t>(count);
    n -= count;
  }
}

// Task t is one chunk of one row of one key. Chunks start at multiples of kChunk counted from
// the row's first block, so no block but a row's first and last is drawn twice.
struct Tasks {
  int64_t rows, chunks, row_length;

  explicit Tasks(const Runs& runs) : rows(1), row_length(runs.extents[runs.dims - 1]) {
    for (int d = 0; d + 1 < runs.dims; ++d) rows *= runs.extents[d];
    chunks = (row_length + 3 + kChunk - 1) / kChunk;
  }
};

void draw_task(void* out, Dtype dtype, const uint64_t* keys, const Runs& runs, const Tasks& tasks,
               int64_t task) {
  const int64_t chunk = task % tasks.chunks;
  const int64_t row_of_all = task / tasks.chunks;
  const uint64_t* key = keys + 2 * (row_of_all / tasks.rows);
  int64_t row = row_of_all % tasks.rows;
  int64_t start = runs.base;
  for (int d = runs.dims - 2; d >= 0; --d) {
    start += row % runs.extents[d] * runs.strides[d];
    row /= runs.extents[d];
  }
  const int64_t aligned = start - start % 4 + chunk * kChunk;
  const int64_t first = std::max(start, aligned);
  const int64_t last = std::min(start + tasks.row_length, aligned + kChunk);
  const int64_t position = row_of_all * tasks.row_length + first - start;
  draw_run(out, position, dtype, key[0], key[1], static_cast<uint64_t>(first), last - first);
}

}  // namespace

int usable_threads(int requested) { return getpid() == load_pid ? std::max(requested, 1) : 1; }

void normal_cpu(void* out, Dtype dtype, const uint64_t* keys, int64_t n, const Runs& runs,
                int threads) {
  const Tasks tasks(runs);
  const int64_t count = n * tasks.rows * tasks.chunks;
#ifdef _OPENMP
  const int team = usable_threads(threads);
  if (team > 1 && n * tasks.rows * tasks.row_length > kSerialElements) {
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t t = 0; t < count; ++t) draw_task(out, dtype, keys, runs, tasks, t);
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t t = 0; t < count; ++t) draw_task(out, dtype, keys, runs, tasks, t);
}

}  // namespace dg
