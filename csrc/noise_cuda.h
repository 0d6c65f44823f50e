// Drawing boxes of normals on a GPU. No CUDA header: bindings_cuda.cpp is compiled without nvcc.
#pragma once
#include <cstdint>
#include <string>

#include "noise_cpu.h"

namespace dg {

constexpr int kMaxCudaDims = 8;  // of Runs, after collapsing

// What a launch needs; all memory is on `device`, `stream` is a cudaStream_t.
struct CudaDraw {
  void* memory;          // [n, copies, box], contiguous
  Dtype dtype;
  const uint64_t* keys;  // [n, 2] (seed, offset), read by the kernel
  int64_t n, copies;
  Runs runs;
  int device;
  uintptr_t stream;
};

// Each returns an empty string, or CUDA's error by name and description. The current device is
// restored. Nothing waits for the GPU.

// Loads the kernels on a device, so that the first launch may be inside a graph capture.
std::string load_cuda(int device);

// Fills memory; each draw is written `copies` times.
std::string normal_cuda(const CudaDraw& draw);

// memory += scale * normal: one product, one sum, one rounding to dtype (not float64; copies 1).
// `scales` [n] float32, read by the kernel, or null for `scale`. A scale of 0 leaves its row alone.
std::string add_normal_cuda(const CudaDraw& draw, float scale, const float* scales);

}  // namespace dg
