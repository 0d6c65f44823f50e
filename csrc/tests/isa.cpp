// The kernels with a C interface, to be loaded by ctypes: one library per instruction set.
#include "../ops_cpu.h"

extern "C" void dg_normal(float* out, const uint64_t* keys, int64_t n, int64_t elements) {
  const int64_t stride = 1;
  dg::normal_cpu(out, dg::Dtype::float32, keys, n, {0, 1, &elements, &stride}, 1);
}

// Draws y of one child each from float32 m and bfloat16 x, all [rows, elements]; then y's log-probs
// [rows] and the gradient for factors [rows, 3].
extern "C" void dg_transition(const float* m, const uint16_t* x, const float* table,
                              const uint64_t* keys, const float* factors, int64_t rows,
                              int64_t elements, float* y, float* log_prob, float* gradient) {
  using dg::Dtype;
  const auto contiguous = [&](const void* data, Dtype dtype) {
    return dg::Operand{data, dtype, 0, elements, {1}};
  };
  dg::Batch batch;
  batch.families.states = batch.families.children = rows;
  batch.m = contiguous(m, Dtype::float32);
  batch.x = contiguous(x, Dtype::bfloat16);
  batch.y = contiguous(y, Dtype::float32);
  batch.index = contiguous(nullptr, Dtype::float32);
  dg::Operand out = contiguous(gradient, Dtype::float32);
  const int64_t start = 0;
  batch.grid =
      dg::Grid(1, &start, &elements, {&batch.m, &batch.x, &batch.y, &batch.index, &out});
  dg::sample_transition(batch, table, keys, log_prob);
  dg::transition_gradient(batch, table, factors, out);
}
