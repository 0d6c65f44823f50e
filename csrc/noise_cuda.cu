// Exact normals on a GPU, the bits of noise_cpu.cpp. Flags: DG_NVCC_EXACT in CMakeLists.txt.
//
// A thread draws whole Philox blocks, four elements each, and writes each as one vector where the
// memory is aligned. It reads its key from device memory, so a captured graph follows the table.
// At 53 instructions per element (sm_90) arithmetic is what limits it, not memory.
#include <cuda_runtime.h>

#include <algorithm>

#include "noise_cuda.h"
#include "normal.h"

namespace dg {
namespace {

constexpr int kThreads = 128;            // few: a FLUX latent then still reaches 127 processors
constexpr int kBlocksPerProcessor = 64;  // several waves: an uneven last one costs little
constexpr int64_t kMaxGridY = 65535;

struct Plan {
  int64_t n, copies, count;  // count: elements of one draw
  int64_t rows, row_length, row_blocks, base;
  int64_t shift;  // elements from the last 4-element boundary below the memory's start
  int outer;      // dimensions outside a row
  int64_t extents[kMaxCudaDims], strides[kMaxCudaDims];
  float scale;
};

// ---------------------------------------------------------------------------- memory

// One instruction each; they round to nearest even, as to_bfloat16 and to_float16 do (only the
// payload of a NaN may differ). On the host only tests/cuda_on_host compiles this.
template <bool kBfloat16>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (kBfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto round = [](float v) { return kBfloat16 ? to_bfloat16(v) : to_float16(v); };
  return round(low) | uint32_t{round(high)} << 16;
#endif
}

template <bool kBfloat16>
__device__ __forceinline__ float unpack(uint16_t half) {
  if constexpr (kBfloat16) return from_bfloat16(half);
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return from_float16(half);
#endif
}

template <Dtype kDtype>
__device__ __forceinline__ void load_vector(float (&v)[4], const void* memory, int64_t at) {
  if constexpr (kDtype == Dtype::float32) {
    const float* in = static_cast<const float*>(memory) + at;
    const float4 x = __ldcg(reinterpret_cast<const float4*>(in));
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
  } else {
    constexpr bool b = kDtype == Dtype::bfloat16;
    const uint16_t* in = static_cast<const uint16_t*>(memory) + at;
    const uint2 x = __ldcg(reinterpret_cast<const uint2*>(in));
    v[0] = unpack<b>(static_cast<uint16_t>(x.x));
    v[1] = unpack<b>(static_cast<uint16_t>(x.x >> 16));
    v[2] = unpack<b>(static_cast<uint16_t>(x.y));
    v[3] = unpack<b>(static_cast<uint16_t>(x.y >> 16));
  }
}

template <Dtype kDtype>
__device__ __forceinline__ float load_one(const void* memory, int64_t at) {
  if constexpr (kDtype == Dtype::float32) return static_cast<const float*>(memory)[at];
  return unpack<kDtype == Dtype::bfloat16>(static_cast<const uint16_t*>(memory)[at]);
}

// __stcg: nvcc would merge plain stores with the scalar ones of the other branch and split them.
template <Dtype kDtype>
__device__ __forceinline__ void store_vector(void* memory, int64_t at, const float (&v)[4]) {
  if constexpr (kDtype == Dtype::float32) {
    float4* out = reinterpret_cast<float4*>(static_cast<float*>(memory) + at);
    __stcg(out, make_float4(v[0], v[1], v[2], v[3]));
  } else if constexpr (kDtype == Dtype::float64) {
    double2* out = reinterpret_cast<double2*>(static_cast<double*>(memory) + at);
    __stcg(out, make_double2(v[0], v[1]));
    __stcg(out + 1, make_double2(v[2], v[3]));
  } else {
    constexpr bool b = kDtype == Dtype::bfloat16;
    uint2* out = reinterpret_cast<uint2*>(static_cast<uint16_t*>(memory) + at);
    __stcg(out, make_uint2(pack<b>(v[0], v[1]), pack<b>(v[2], v[3])));
  }
}

template <Dtype kDtype>
__device__ __forceinline__ void store_one(void* memory, int64_t at, float value) {
  if constexpr (kDtype == Dtype::float32)
    static_cast<float*>(memory)[at] = value;
  else if constexpr (kDtype == Dtype::float64)
    static_cast<double*>(memory)[at] = value;
  else
    static_cast<uint16_t*>(memory)[at] =
        static_cast<uint16_t>(pack<kDtype == Dtype::bfloat16>(value, 0.0f));
}

// ---------------------------------------------------------------------------- kernels

struct Four {
  float z[4];
};

__device__ __forceinline__ Four draw_block(uint64_t counter, uint64_t seed) {
  const Words x = philox_block(counter, seed);
  const Pair a = box_muller(x.x0, x.x1), b = box_muller(x.x2, x.x3);
  return {{a.z0, a.z1, b.z0, b.z1}};
}

template <Dtype kDtype, bool kAdd>
__device__ __forceinline__ void write_vector(void* memory, int64_t at, const float (&z)[4],
                                             float scale) {
  if constexpr (kAdd) {
    float v[4];
    load_vector<kDtype>(v, memory, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = add(v[i], mul(scale, z[i]));
    store_vector<kDtype>(memory, at, v);
  } else {
    store_vector<kDtype>(memory, at, z);
  }
}

// Whole draws of a multiple of 4 elements in aligned memory: the usual case.
template <Dtype kDtype, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    whole_kernel(void* memory, const uint64_t* keys, const float* scales, const Plan p) {
  const uint64_t blocks = static_cast<uint64_t>(p.count) / 4;
  for (int64_t key = blockIdx.y; key < p.n; key += gridDim.y) {
    const uint64_t seed = keys[2 * key], offset = keys[2 * key + 1] + p.base / 4;
    const float scale = kAdd && scales != nullptr ? scales[key] : p.scale;
    if (kAdd && scale == 0.0f) continue;
    const int64_t first = key * p.copies * p.count;
    const uint64_t step = uint64_t{gridDim.x} * kThreads;
    for (uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x; i < blocks; i += 2 * step) {
      // Two at a time: they share the key schedule and the loop.
      const uint64_t j = i + step;
      const Four one = draw_block(offset + i, seed), two = draw_block(offset + j, seed);
      int64_t at = first + 4 * static_cast<int64_t>(i);
#pragma unroll 1
      for (int64_t copy = p.copies; copy > 0; --copy, at += p.count) {
        write_vector<kDtype, kAdd>(memory, at, one.z, scale);
        if (j < blocks) write_vector<kDtype, kAdd>(memory, at + 4 * step, two.z, scale);
      }
    }
  }
}

// A Philox block of one row. `position`: where in the draw its element 0 would lie, were it all in
// the row; elements low .. high - 1 are.
struct Item {
  uint64_t block;
  int64_t position;
  int low, high;
};

__device__ __forceinline__ Item locate(const Plan& p, uint64_t item) {
  // nvcc's 64-bit division is short where both numbers fit in 32 bits.
  const uint64_t row = item / p.row_blocks;
  const uint64_t block = item - row * p.row_blocks;
  uint64_t rest = row;
  int64_t start = p.base;
#pragma unroll 1
  for (int d = p.outer - 1; d >= 0; --d) {
    const uint64_t next = rest / p.extents[d];
    start += (rest - next * p.extents[d]) * p.strides[d];
    rest = next;
  }
  const int64_t within = 4 * static_cast<int64_t>(block) - (start & 3);
  const int64_t left = p.row_length - within;
  return {static_cast<uint64_t>(start >> 2) + block,
          static_cast<int64_t>(row) * p.row_length + within,
          within < 0 ? static_cast<int>(-within) : 0, left < 4 ? static_cast<int>(left) : 4};
}

// Any box at any address: the body of a row is still written as vectors where they are aligned.
template <Dtype kDtype, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    box_kernel(void* memory, const uint64_t* keys, const float* scales, const Plan p) {
  const uint64_t items = static_cast<uint64_t>(p.rows) * p.row_blocks;
  for (int64_t key = blockIdx.y; key < p.n; key += gridDim.y) {
    const uint64_t seed = keys[2 * key], offset = keys[2 * key + 1];
    const float scale = kAdd && scales != nullptr ? scales[key] : p.scale;
    if (kAdd && scale == 0.0f) continue;
    for (uint64_t i = uint64_t{blockIdx.x} * kThreads + threadIdx.x; i < items;
         i += uint64_t{gridDim.x} * kThreads) {
      const Item item = locate(p, i);
      const Four four = draw_block(offset + item.block, seed);
      int64_t at = key * p.copies * p.count + item.position;
#pragma unroll 1
      for (int64_t copy = p.copies; copy > 0; --copy, at += p.count) {
        if (item.low == 0 && item.high == 4 && ((at + p.shift) & 3) == 0) {
          write_vector<kDtype, kAdd>(memory, at, four.z, scale);
          continue;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (e < item.low || e >= item.high) continue;
          float value = four.z[e];
          if constexpr (kAdd) value = add(load_one<kDtype>(memory, at + e), mul(scale, four.z[e]));
          store_one<kDtype>(memory, at + e, value);
        }
      }
    }
  }
}

template <Dtype kDtype>
const void* kernel_of(bool adds, bool whole) {
  if constexpr (kDtype != Dtype::float64) {
    if (adds)
      return whole ? reinterpret_cast<const void*>(whole_kernel<kDtype, true>)
                   : reinterpret_cast<const void*>(box_kernel<kDtype, true>);
  }
  return whole ? reinterpret_cast<const void*>(whole_kernel<kDtype, false>)
               : reinterpret_cast<const void*>(box_kernel<kDtype, false>);
}

const void* kernel(Dtype dtype, bool adds, bool whole) {
  switch (dtype) {
    case Dtype::float32: return kernel_of<Dtype::float32>(adds, whole);
    case Dtype::bfloat16: return kernel_of<Dtype::bfloat16>(adds, whole);
    case Dtype::float16: return kernel_of<Dtype::float16>(adds, whole);
    case Dtype::float64: break;
  }
  return kernel_of<Dtype::float64>(adds, whole);
}

// ---------------------------------------------------------------------------- host

std::string describe(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // ours alone: the runtime is linked statically, so torch's is untouched
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// Makes a device current, and what was current again at the end of the scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : error_(cudaGetDevice(&before_)), device_(device) {
    if (error_ == cudaSuccess && before_ != device_) error_ = cudaSetDevice(device_);
  }
  ~CurrentDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
  int device_;
};

int element_bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

Plan make_plan(const CudaDraw& draw, float scale) {
  const Runs& runs = draw.runs;
  Plan p{};
  p.n = draw.n;
  p.copies = draw.copies;
  p.outer = runs.dims - 1;
  p.rows = 1;
  p.base = runs.base;
  p.row_length = runs.extents[p.outer];
  bool aligned = true;  // every row starts at the same place in its block as the first one
  for (int d = 0; d < p.outer; ++d) {
    p.extents[d] = runs.extents[d];
    p.strides[d] = runs.strides[d];
    p.rows *= runs.extents[d];
    aligned = aligned && runs.strides[d] % 4 == 0;
  }
  p.count = p.rows * p.row_length;
  p.row_blocks = (p.row_length + (aligned ? p.base % 4 : 3) + 3) / 4;
  p.shift = static_cast<int64_t>(reinterpret_cast<uintptr_t>(draw.memory) /
                                 element_bytes(draw.dtype) % 4);
  p.scale = scale;
  return p;
}

std::string launch(const CudaDraw& draw, bool adds, float scale, const float* scales) {
  Plan plan = make_plan(draw, scale);
  if (plan.n == 0 || plan.copies == 0 || plan.count == 0) return {};
  const CurrentDevice current(draw.device);
  if (current.error() != cudaSuccess) return describe(current.error());
  int processors = 0;
  const cudaError_t asked =
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, draw.device);
  if (asked != cudaSuccess) return describe(asked);
  const bool whole = plan.rows == 1 && plan.base % 4 == 0 && plan.count % 4 == 0 && plan.shift == 0;
  const int64_t y = std::min(plan.n, kMaxGridY);
  const int64_t most = std::max<int64_t>(1, int64_t{processors} * kBlocksPerProcessor / y);
  const int64_t items = whole ? (plan.row_blocks + 1) / 2 : plan.rows * plan.row_blocks;
  const int64_t x = std::min(most, (items + kThreads - 1) / kThreads);
  void* memory = draw.memory;
  const uint64_t* keys = draw.keys;
  void* arguments[] = {&memory, &keys, &scales, &plan};
  return describe(cudaLaunchKernel(
      kernel(draw.dtype, adds, whole), dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
      dim3(kThreads), arguments, 0, reinterpret_cast<cudaStream_t>(draw.stream)));
}

}  // namespace

std::string load_cuda(int device) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return describe(current.error());
  // Loading may allocate, which a capture on this thread would refuse: it is no part of the graph.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return describe(error);
  for (int i = 0; i < 16 && error == cudaSuccess; ++i) {
    cudaFuncAttributes attributes;
    const bool adds = i & 1, whole = i & 2;
    error = cudaFuncGetAttributes(&attributes, kernel(static_cast<Dtype>(i / 4), adds, whole));
  }
  const std::string text = describe(error);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return text;
}

std::string normal_cuda(const CudaDraw& draw) { return launch(draw, false, 1.0f, nullptr); }

std::string add_normal_cuda(const CudaDraw& draw, float scale, const float* scales) {
  return launch(draw, true, scale, scales);
}

}  // namespace dg
