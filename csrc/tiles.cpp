// Compile with -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math.
#include "tiles.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cmath>
#include <cstring>

#include "clones.h"
#include "normal.h"

namespace dg {
namespace {

// 32 bytes: what the compiler prefers on every x86-64 with AVX, and can hold in a register there.
template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(32)));
  static constexpr int width = 32 / sizeof(T);
  static constexpr int parts = kLanes / width;
};
template <class T>
using V = typename Vector<T>::type;

template <class T>
DG_INLINE void load(V<T>& to, const T* from) {
  std::memcpy(&to, from, sizeof to);
}

template <class T>
DG_INLINE void save(T* to, const V<T>& from) {
  std::memcpy(to, &from, sizeof from);
}

// Asks for what the next tile will read at this place: the processor foresees a stream only while
// it runs, and the tiles of one operand are far apart in time when a state has many children.
// (Measured on Zen 5 with 8 children: 25 GB/s instead of 15.)
template <class U>
DG_INLINE void fetch_next(const U* at) {
  __builtin_prefetch(at + kTile, 0, 3);
}

// The same for what it will write.
DG_INLINE void fetch_next_store(uint16_t* at) { __builtin_prefetch(at + kTile, 1, 3); }

template <class T>
DG_INLINE T magnitude(T value) {
  return std::fabs(value);
}
template <class T>
DG_INLINE void magnitude(V<T>& out, const V<T>& value) {
  out = value < 0 ? -value : value;
}

template <class T>
DG_INLINE void distance_body(T* lanes, const T* p, const T* q, int64_t n) {
  constexpr int parts = Vector<T>::parts, width = Vector<T>::width;
  V<T> sum[parts], pv, qv;
  std::memcpy(sum, lanes, sizeof sum);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_next(p + i);
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      load(pv, p + i + part * width);
      load(qv, q + i + part * width);
      const V<T> d = pv - qv;
      sum[part] += d * d;
    }
  }
  std::memcpy(lanes, sum, sizeof sum);
  for (; i < n; ++i) {
    const T d = p[i] - q[i];
    lanes[i % kLanes] += d * d;
  }
}

template <class T>
DG_INLINE void branches_body(T* lanes, const T* center, const T* y, const T* m, const T* old,
                             T plus, T minus, int64_t n) {
  constexpr int parts = Vector<T>::parts, width = Vector<T>::width;
  V<T> sum[4][parts], cv, yv, mv, ov, size;
  std::memcpy(sum, lanes, sizeof sum);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_next(y + i);
    fetch_next(old + i);
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      load(cv, center + i + p * width);
      load(yv, y + i + p * width);
      load(mv, m + i + p * width);
      load(ov, old + i + p * width);
      const V<T> e = cv - yv, d = mv - ov;
      const V<T> first = e + d * plus, second = e + d * minus;
      magnitude<T>(size, first);
      sum[0][p] += size;
      sum[1][p] += first * first;
      magnitude<T>(size, second);
      sum[2][p] += size;
      sum[3][p] += second * second;
    }
  }
  std::memcpy(lanes, sum, sizeof sum);
  for (; i < n; ++i) {
    const T e = center[i] - y[i], d = m[i] - old[i];
    const T first = e + d * plus, second = e + d * minus;
    const int lane = static_cast<int>(i % kLanes);
    lanes[lane] += magnitude(first);
    lanes[kLanes + lane] += first * first;
    lanes[2 * kLanes + lane] += magnitude(second);
    lanes[3 * kLanes + lane] += second * second;
  }
}

template <class T>
DG_INLINE void affine_body(T* out, const T* x, const T* m, T a, T b, int64_t n) {
  constexpr int parts = Vector<T>::parts, width = Vector<T>::width;
  V<T> xv, mv;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_next(x + i);
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      load(xv, x + i + p * width);
      load(mv, m + i + p * width);
      save<T>(out + i + p * width, xv * a + mv * b);
    }
  }
  for (; i < n; ++i) out[i] = a * x[i] + b * m[i];
}

template <class T>
DG_INLINE void add_scaled_body(T* __restrict out, const T* __restrict center,
                               const T* __restrict eps, T s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = center[i] + s * eps[i];
}

template <class T>
DG_INLINE void difference_body(T* out, const T* p, const T* q, T g, bool first, int64_t n) {
  constexpr int parts = Vector<T>::parts, width = Vector<T>::width;
  V<T> pv, qv, sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    fetch_next(p + i);
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      load(pv, p + i + part * width);
      load(qv, q + i + part * width);
      const V<T> term = (pv - qv) * g;
      load(sum, out + i + part * width);
      save<T>(out + i + part * width, first ? term : sum + term);
    }
  }
  for (; i < n; ++i) {
    const T term = g * (p[i] - q[i]);
    out[i] = first ? term : out[i] + term;
  }
}

template <class T, class U, class Convert>
DG_INLINE void widen_body(T* __restrict out, const U* __restrict in, int64_t n, Convert convert) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(U)) fetch_next(in + i);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(convert(in[i]));
}

template <class T>
DG_INLINE void widen_body(T* out, const void* in, Dtype dtype, int64_t n) {
  const auto same = [](auto value) { return value; };
  switch (dtype) {
    case Dtype::float32:
      return widen_body(out, static_cast<const float*>(in), n, same);
    case Dtype::bfloat16:
      return widen_body(out, static_cast<const uint16_t*>(in), n, from_bfloat16);
    case Dtype::float16:
      return widen_body(out, static_cast<const uint16_t*>(in), n, from_float16);
    case Dtype::float64:
      return widen_body(out, static_cast<const double*>(in), n, same);
  }
}

DG_INLINE float before_half(float value) { return value; }
DG_INLINE float before_half(double value) { return to_odd(value); }

template <class T>
DG_INLINE void narrow_to_half(uint16_t* __restrict out, Dtype dtype, const T* __restrict in,
                              int64_t n) {
  if (dtype == Dtype::bfloat16)
    for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(before_half(in[i]));
  else
    for (int64_t i = 0; i < n; ++i) out[i] = to_float16(before_half(in[i]));
}

template <class T>
DG_INLINE void narrow_body(void* out, Dtype dtype, const T* __restrict in, int64_t n,
                           bool past_cache) {
  if (dtype == Dtype::float32) {
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = static_cast<float>(in[i]);
    return;
  }
  if (dtype == Dtype::float64) {
    for (int64_t i = 0; i < n; ++i) static_cast<double*>(out)[i] = in[i];
    return;
  }
  uint16_t* const half = static_cast<uint16_t*>(out);
#ifdef __SSE2__
  if (past_cache && n % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    alignas(64) uint16_t rounded[kTile];
    narrow_to_half(rounded, dtype, in, n);
    for (int64_t i = 0; i < n; i += 8)
      _mm_stream_si128(reinterpret_cast<__m128i*>(half + i),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(rounded + i)));
    return;
  }
#else
  (void)past_cache;
#endif
  for (int64_t i = 0; i < n; i += 32) fetch_next_store(half + i);
  narrow_to_half(half, dtype, in, n);
}

}  // namespace

// target_clones does not go with templates: each instance is written out.
#define DG_INSTANCE(T)                                                                            \
  template <>                                                                                     \
  DG_CLONES void distance(T* lanes, const T* p, const T* q, int64_t n) {                          \
    distance_body(lanes, p, q, n);                                                                \
  }                                                                                               \
  template <>                                                                                     \
  DG_CLONES void branches(T* lanes, const T* center, const T* y, const T* m, const T* old,        \
                          T plus, T minus, int64_t n) {                                           \
    branches_body(lanes, center, y, m, old, plus, minus, n);                                      \
  }                                                                                               \
  template <>                                                                                     \
  DG_CLONES void affine(T* out, const T* x, const T* m, T a, T b, int64_t n) {                    \
    affine_body(out, x, m, a, b, n);                                                              \
  }                                                                                               \
  template <>                                                                                     \
  DG_CLONES void add_scaled(T* out, const T* center, const T* eps, T s, int64_t n) {              \
    add_scaled_body(out, center, eps, s, n);                                                      \
  }                                                                                               \
  template <>                                                                                     \
  DG_CLONES void difference(T* out, const T* p, const T* q, T g, bool first, int64_t n) {         \
    if (first) return difference_body(out, p, q, g, true, n);                                     \
    difference_body(out, p, q, g, false, n);                                                      \
  }                                                                                               \
  template <>                                                                                     \
  DG_CLONES void widen(T* out, const void* in, Dtype dtype, int64_t n) {                          \
    widen_body(out, in, dtype, n);                                                                \
  }                                                                                               \
  template <>                                                                                     \
  DG_CLONES void narrow(void* out, Dtype dtype, const T* in, int64_t n, bool past_cache) {        \
    narrow_body(out, dtype, in, n, past_cache);                                                   \
  }

DG_INSTANCE(float)
DG_INSTANCE(double)
#undef DG_INSTANCE

void finish_past_cache() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace dg
