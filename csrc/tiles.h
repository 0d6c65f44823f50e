// The loops over one tile of contiguous elements, T = float or double. All that is vectorised is
// here, and nothing here knows of tensors.
//
// A sum runs in 16 lanes: element i of a tile is added to lane i mod 16, in order. So its bits do
// not depend on the width of the machine's vectors. Every operation is rounded by itself.
#pragma once
#include <cstdint>

#include "noise_cpu.h"

namespace dg {

constexpr int kLanes = 16;
constexpr int64_t kTile = 1024;   // elements: each operand's tile stays in the first cache
constexpr int64_t kChunk = 4096;  // elements of one partial sum; a multiple of kTile

// lanes += (p - q)^2
template <class T>
void distance(T* lanes, const T* p, const T* q, int64_t n);

// DiffusionNFT's branches e = (center - y) + c (m - old) for two c; lanes [4][16] collect |e|, e^2
// of the first and of the second.
template <class T>
void branches(T* lanes, const T* center, const T* y, const T* m, const T* old, T plus, T minus,
              int64_t n);

// out = a x + b m
template <class T>
void affine(T* out, const T* x, const T* m, T a, T b, int64_t n);

// out = center + s eps
template <class T>
void add_scaled(T* out, const T* center, const T* eps, T s, int64_t n);

// out = g (p - q), added to what is there unless `first`
template <class T>
void difference(T* out, const T* p, const T* q, T g, bool first, int64_t n);

// Between memory of any dtype and T: exact on the way in, rounded once to nearest even out. n <=
// kTile. past_cache: halves go to memory directly, where the processor can, without being read into
// the cache first; finish_past_cache() comes before another thread is told of them.
template <class T>
void widen(T* out, const void* in, Dtype dtype, int64_t n);
template <class T>
void narrow(void* out, Dtype dtype, const T* in, int64_t n, bool past_cache = false);

void finish_past_cache();

// 16 lanes -> one number: the upper half is added to the lower, four times.
template <class T>
T halve(const T* lanes) {
  T sum[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) sum[i] = lanes[i] + lanes[i + kLanes / 2];
  for (int half = kLanes / 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

}  // namespace dg
