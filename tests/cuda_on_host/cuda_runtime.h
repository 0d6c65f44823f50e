// As much of CUDA as csrc/noise_cuda.cu uses, on the host, one thread after the other: so that its
// indexing is tested where there is no GPU. Vector accesses check their alignment.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct float4 { float x, y, z, w; };
struct double2 { double x, y; };
struct uint2 { unsigned x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

template <class T>
T* aligned(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) == 0) return p;
  std::fprintf(stderr, "a vector access is not aligned\n");
  std::abort();
}
template <class T>
T __ldcg(const T* p) { return *aligned(p); }
template <class T>
void __stcg(T* p, T value) { *aligned(p) = value; }

struct dim3 {
  unsigned x, y;
  explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 blockIdx(0, 0), threadIdx(0, 0), gridDim(0, 0);

using cudaError_t = int;
using cudaStream_t = void*;
struct cudaFuncAttributes {};
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum { cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 0 };
inline int processors = 1;  // few, so that the loops over the grid turn more than once
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = processors, 0; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, 0; }
inline cudaError_t cudaSetDevice(int) { return 0; }
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return 0; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return 0; }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
