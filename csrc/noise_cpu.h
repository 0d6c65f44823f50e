// Drawing boxes of normals on the CPU.
#pragma once
#include <cstdint>

namespace dg {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A box of a tensor as nested runs of linear indices, outermost first; the last stride is 1.
// Element (i_0, i_1, ...) of the box has the linear index base + sum i_d * strides[d].
struct Runs {
  int64_t base;
  int dims;
  const int64_t* extents;
  const int64_t* strides;
};

// The number of threads to use: 1 in a forked child, where an OpenMP team of the parent is gone
// and starting another one hangs.
int usable_threads(int requested);

// Blocks counter .. counter + blocks - 1 of a seed: float32 normals, four each.
void draw_blocks(float* out, uint64_t counter, int64_t blocks, uint64_t seed);

// Fills out [n, box] from keys [n, 2] (seed, offset). The result does not depend on `threads`.
void normal_cpu(void* out, Dtype dtype, const uint64_t* keys, int64_t n, const Runs& runs,
                int threads);

}  // namespace dg
