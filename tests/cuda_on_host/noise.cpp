// csrc/noise_cuda.cu compiled for the host, for ctypes.
#include "../../csrc/noise_cuda.cu"

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  using Kernel = void(void*, const uint64_t*, const float*, const dg::Plan);
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x)
        reinterpret_cast<Kernel*>(const_cast<void*>(kernel))(
            *static_cast<void**>(arguments[0]), *static_cast<const uint64_t**>(arguments[1]),
            *static_cast<const float**>(arguments[2]), *static_cast<dg::Plan*>(arguments[3]));
  return cudaSuccess;
}

namespace {
dg::CudaDraw draw(void* memory, int dtype, const uint64_t* keys, int64_t n, int64_t copies,
                  int64_t base, int dims, const int64_t* extents, const int64_t* strides) {
  return {memory, static_cast<dg::Dtype>(dtype), keys, n, copies, {base, dims, extents, strides},
          0, 0};
}
}  // namespace

extern "C" {
void dg_normal(void* memory, int dtype, const uint64_t* keys, int64_t n, int64_t copies,
               int64_t base, int dims, const int64_t* extents, const int64_t* strides) {
  dg::normal_cuda(draw(memory, dtype, keys, n, copies, base, dims, extents, strides));
}
void dg_add_normal(void* memory, int dtype, const uint64_t* keys, int64_t n, int64_t base, int dims,
                   const int64_t* extents, const int64_t* strides, float scale,
                   const float* scales) {
  dg::add_normal_cuda(draw(memory, dtype, keys, n, 1, base, dims, extents, strides), scale, scales);
}
}
