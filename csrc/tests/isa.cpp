// noise_cpu.cpp with a C interface, to be loaded by ctypes: one library per instruction set.
#include "../noise_cpu.cpp"

extern "C" void dg_normal(float* out, const uint64_t* keys, int64_t n, int64_t elements) {
  const int64_t stride = 1;
  dg::normal_cpu(out, dg::Dtype::float32, keys, n, {0, 1, &elements, &stride}, 1);
}
