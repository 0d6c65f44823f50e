// How the kernels see tensors: a box of elements, cut into chunks, of operands with any strides.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace dg {

constexpr int kMaxDims = 7;                    // of one latent
constexpr int64_t kSerialElements = 1 << 15;   // below this, waking threads costs more

// One tensor: rows (states or children), each with a latent. Strides count elements.
struct Operand {
  const void* data = nullptr;  // null: there is no such tensor
  Dtype dtype = Dtype::float32;
  int64_t base = 0;                // the box's first element
  int64_t row = 0;                 // stride of a row
  int64_t strides[kMaxDims] = {};  // of the grid's dimensions
  bool past_cache = false;         // written past the cache

  explicit operator bool() const { return data != nullptr; }
};

// The box of a latent after merging the dimensions that all operands allow to merge.
struct Grid {
  int dims = 0;
  int64_t extents[kMaxDims] = {};
  int64_t elements = 1;

  Grid() = default;
  int64_t chunks() const { return (elements + kChunk - 1) / kChunk; }

  // The box [start, stop) of latents. Every operand comes with the strides of the latent's
  // dimensions and leaves with those of the grid, and its `base`.
  Grid(int latent_dims, const int64_t* start, const int64_t* stop,
       const std::vector<Operand*>& operands);
};

// Children in order of their states. offsets null: one each.
struct Families {
  int64_t states = 0, children = 0;
  const int64_t* offsets = nullptr;

  int64_t first(int64_t state) const { return offsets ? offsets[state] : state; }
  int64_t last(int64_t state) const { return offsets ? offsets[state + 1] : state + 1; }
};

// Elements first .. first + count - 1 of a row, as T: the tensor's own memory if it will do, else
// `tile`, filled. count <= kTile.
template <class T>
const T* load(const Operand& from, const Grid& grid, int64_t row, int64_t first, int64_t count,
              T* tile);

// Where to write these elements: the tensor's own memory if it will do, else `tile`, which `store`
// then converts and copies.
template <class T>
T* target(const Operand& to, const Grid& grid, int64_t row, int64_t first, T* tile);
template <class T>
void store(const Operand& to, const Grid& grid, int64_t row, int64_t first, int64_t count,
           const T* values);

// The normals of these elements; `index` is an operand without memory whose strides give each
// element's number. block: kTile + 8 floats of scratch.
template <class T>
const T* draw(const uint64_t* key, const Operand& index, const Grid& grid, int64_t first,
              int64_t count, T* tile, float* block);

// Runs body(task) for every task; `elements` says how much work that is in all.
template <class Body>
void parallel(int64_t tasks, int64_t elements, int threads, const Body& body) {
#ifdef _OPENMP
  const int team = usable_threads(threads);
  if (team > 1 && elements > kSerialElements) {
    // Several blocks for each thread: states may have very different numbers of children.
    const int64_t block = std::min<int64_t>(std::max<int64_t>(tasks / (4 * team), 1), 8);
#pragma omp parallel for schedule(static, block) num_threads(team)
    for (int64_t t = 0; t < tasks; ++t) body(t);
    return;
  }
#else
  (void)elements, (void)threads;
#endif
  for (int64_t t = 0; t < tasks; ++t) body(t);
}

// Calls body(start, stop) for disjoint boxes that make up what [start, stop) leaves of a latent.
template <class Body>
void outside(int dims, const int64_t* sizes, const int64_t* start, const int64_t* stop,
             const Body& body) {
  int64_t low[kMaxDims] = {}, high[kMaxDims];
  std::copy_n(sizes, dims, high);
  for (int d = 0; d < dims; ++d) {
    high[d] = start[d];
    if (start[d] > 0) body(low, high);
    low[d] = stop[d], high[d] = sizes[d];
    if (stop[d] < sizes[d]) body(low, high);
    low[d] = start[d], high[d] = stop[d];
  }
}

}  // namespace dg
