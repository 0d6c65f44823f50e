#include "layout.h"

namespace dg {
namespace {

size_t bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

const char* address(const Operand& o, int64_t element) {
  return static_cast<const char*>(o.data) + element * static_cast<int64_t>(bytes(o.dtype));
}

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;

bool one_run(const Operand& o, const Grid& grid) { return grid.dims == 1 && o.strides[0] == 1; }

// Calls body(position of the run in these elements, its first element in the operand, length) for
// each run along the grid's last dimension.
template <class Body>
void for_runs(const Operand& o, const Grid& grid, int64_t first, int64_t count, const Body& body) {
  const int last = grid.dims - 1;
  int64_t index[kMaxDims];
  for (int d = last; d >= 0; --d) {
    index[d] = first % grid.extents[d];
    first /= grid.extents[d];
  }
  for (int64_t done = 0; done < count;) {
    const int64_t length = std::min(grid.extents[last] - index[last], count - done);
    int64_t element = 0;
    for (int d = 0; d <= last; ++d) element += index[d] * o.strides[d];
    body(done, element, length);
    done += length;
    index[last] = 0;
    for (int d = last - 1; d >= 0 && ++index[d] == grid.extents[d]; --d) index[d] = 0;
  }
}

// Copies elements of `size` bytes between memory with strides counted in elements.
template <class U>
void copy(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t n) {
  U* out = static_cast<U*>(to);
  const U* in = static_cast<const U*>(from);
  for (int64_t i = 0; i < n; ++i) out[i * to_stride] = in[i * from_stride];
}

void copy(size_t size, void* to, int64_t to_stride, const void* from, int64_t from_stride,
          int64_t n) {
  if (size == 2) copy<uint16_t>(to, to_stride, from, from_stride, n);
  if (size == 4) copy<uint32_t>(to, to_stride, from, from_stride, n);
  if (size == 8) copy<uint64_t>(to, to_stride, from, from_stride, n);
}

}  // namespace

Grid::Grid(int latent_dims, const int64_t* start, const int64_t* stop,
           const std::vector<Operand*>& operands) {
  for (Operand* o : operands)
    for (int d = 0; d < latent_dims; ++d) o->base += start[d] * o->strides[d];
  int kept[kMaxDims];  // a dimension's innermost part, which gives its stride; innermost first
  for (int d = latent_dims - 1; d >= 0; --d) {
    const int64_t extent = stop[d] - start[d];
    elements *= extent;
    if (extent == 1) continue;
    const bool merges = dims > 0 && std::all_of(operands.begin(), operands.end(), [&](Operand* o) {
      return o->strides[d] == o->strides[kept[dims - 1]] * extents[dims - 1];
    });
    if (merges) {
      extents[dims - 1] *= extent;
    } else {
      extents[dims] = extent;
      kept[dims++] = d;
    }
  }
  for (Operand* o : operands) {
    int64_t strides[kMaxDims] = {1};  // of a box of one element
    for (int k = 0; k < dims; ++k) strides[dims - 1 - k] = o->strides[kept[k]];
    std::copy_n(strides, kMaxDims, o->strides);
  }
  if (dims == 0) extents[dims++] = 1;
  std::reverse(extents, extents + dims);
}

template <class T>
const T* load(const Operand& from, const Grid& grid, int64_t row, int64_t first, int64_t count,
              T* tile) {
  const int64_t start = from.base + row * from.row;
  if (one_run(from, grid)) {
    const char* memory = address(from, start + first);
    if (from.dtype == dtype_of<T>) return reinterpret_cast<const T*>(memory);
    widen(tile, memory, from.dtype, count);
    return tile;
  }
  alignas(64) char gathered[8 * kTile];
  const size_t size = bytes(from.dtype);
  char* const out = from.dtype == dtype_of<T> ? reinterpret_cast<char*>(tile) : gathered;
  for_runs(from, grid, first, count, [&](int64_t position, int64_t element, int64_t n) {
    const char* memory = address(from, start + element);
    copy(size, out + position * size, 1, memory, from.strides[grid.dims - 1], n);
  });
  if (out == gathered) widen(tile, gathered, from.dtype, count);
  return tile;
}

template <class T>
T* target(const Operand& to, const Grid& grid, int64_t row, int64_t first, T* tile) {
  if (!one_run(to, grid) || to.dtype != dtype_of<T>) return tile;
  return reinterpret_cast<T*>(const_cast<char*>(address(to, to.base + row * to.row + first)));
}

template <class T>
void store(const Operand& to, const Grid& grid, int64_t row, int64_t first, int64_t count,
           const T* values) {
  const int64_t start = to.base + row * to.row;
  if (one_run(to, grid)) {
    char* memory = const_cast<char*>(address(to, start + first));
    if (memory != reinterpret_cast<const char*>(values))
      narrow(memory, to.dtype, values, count, to.past_cache);
    return;
  }
  alignas(64) char rounded[8 * kTile];
  const size_t size = bytes(to.dtype);
  narrow(rounded, to.dtype, values, count);
  for_runs(to, grid, first, count, [&](int64_t position, int64_t element, int64_t n) {
    char* memory = const_cast<char*>(address(to, start + element));
    copy(size, memory, to.strides[grid.dims - 1], rounded + position * size, 1, n);
  });
}

template <class T>
const T* draw(const uint64_t* key, const Operand& index, const Grid& grid, int64_t first,
              int64_t count, T* tile, float* block) {
  // A box one element wide in the last dimension leaves gaps: then each run is one element.
  const int64_t step = index.strides[grid.dims - 1];
  for_runs(index, grid, first, count, [&](int64_t position, int64_t element, int64_t n) {
    const int64_t length = step == 1 ? n : 1;
    for (int64_t i = 0; i < n; i += length) {
      const int64_t start = index.base + element + i * step, lane = start % 4;
      draw_blocks(block, key[1] + static_cast<uint64_t>(start / 4), (lane + length + 3) / 4,
                  key[0]);
      widen(tile + position + i, block + lane, Dtype::float32, length);
    }
  });
  return tile;
}

#define DG_INSTANCE(T)                                                                      \
  template const T* load(const Operand&, const Grid&, int64_t, int64_t, int64_t, T*);       \
  template T* target(const Operand&, const Grid&, int64_t, int64_t, T*);                    \
  template void store(const Operand&, const Grid&, int64_t, int64_t, int64_t, const T*);    \
  template const T* draw(const uint64_t*, const Operand&, const Grid&, int64_t, int64_t, T*, \
                         float*);
DG_INSTANCE(float)
DG_INSTANCE(double)
#undef DG_INSTANCE

}  // namespace dg
