// Philox-4x32-10 (Salmon et al. 2011), for host and device. No torch, no CUDA header.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define DG_INLINE __host__ __device__ __forceinline__
#else
// always_inline: each target_clones copy of a caller must contain this code, compiled for its ISA.
#define DG_INLINE static inline __attribute__((always_inline))
#endif

namespace dg {

struct Words {
  uint32_t x0, x1, x2, x3;
};

DG_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // one instruction; from the plain product nvcc makes three
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

DG_INLINE Words philox(Words c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = wide_product(0xD2511F53u, c.x0), p1 = wide_product(0xCD9E8D57u, c.x2);
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.x1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.x3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The layout of our keys: a 64-bit counter in words 0 and 1, zero in words 2 and 3.
DG_INLINE Words philox_block(uint64_t counter, uint64_t seed) {
  return philox({static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace dg
