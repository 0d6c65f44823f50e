// The exact Box-Muller normal, for host and device. Definition: ops/noise_reference.py.
//
// Every operation is rounded by itself. On the device the _rn intrinsics say so; on the host the
// file must be compiled with -ffp-contract=off, which CMakeLists.txt does and
// tests/test_native_build.py checks with a build that does not.
#pragma once
#include <cstring>

#include "philox.h"

namespace dg {

#ifdef __CUDA_ARCH__
DG_INLINE uint32_t bits_of(float f) { return __float_as_uint(f); }
DG_INLINE float float_of(uint32_t u) { return __uint_as_float(u); }
DG_INLINE float mul(float a, float b) { return __fmul_rn(a, b); }
DG_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
DG_INLINE float sqrt_exact(float a) { return __fsqrt_rn(a); }
#else
DG_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
DG_INLINE float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
DG_INLINE float mul(float a, float b) { return a * b; }
DG_INLINE float add(float a, float b) { return a + b; }
DG_INLINE float sqrt_exact(float a) { return __builtin_sqrtf(a); }
#endif
DG_INLINE float mul_add(float a, float b, float c) { return add(mul(a, b), c); }

// log(u) for u in [2^-33, 1]: exponent times ln 2 plus a polynomial in the mantissa minus 1.
DG_INLINE float log_unit(float u) {
  const uint32_t bits = bits_of(u);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float f = add(float_of(bits - (static_cast<uint32_t>(exponent) << 23)), -1.0f);
  float q = 0x1.65c398p-4f;
  q = mul_add(q, f, -0x1.2503cep-3f);
  q = mul_add(q, f, 0x1.318576p-3f);
  q = mul_add(q, f, -0x1.535d5p-3f);
  q = mul_add(q, f, 0x1.98d2bcp-3f);
  q = mul_add(q, f, -0x1.00049ap-2f);
  q = mul_add(q, f, 0x1.5556f4p-2f);
  q = mul_add(q, f, -0x1.fffffap-2f);
  return mul_add(static_cast<float>(exponent), 0x1.62e43p-1f, mul_add(mul(f, f), q, f));
}

struct Pair {
  float z0, z1;
};

DG_INLINE Pair box_muller(uint32_t x0, uint32_t x1) {
  const float u = mul_add(static_cast<float>(x0), 0x1p-32f, 0x1p-33f);
  const float radius = sqrt_exact(mul(-2.0f, log_unit(u)));
  const uint32_t k = (x1 + 0x20000000u) >> 30;  // nearest quarter turn
  const float y = mul(static_cast<float>(static_cast<int32_t>(x1 - (k << 30))), 0x1p-32f);
  const float t = mul(y, y);
  float s = -0x1.2d9bb8p+6f;
  s = mul_add(s, t, 0x1.465ec6p+6f);
  s = mul_add(s, t, -0x1.4abbbap+5f);
  s = mul_add(s, t, 0x1.921fb6p+2f);
  s = mul(s, y);
  float c = 0x1.d9c364p+5f;
  c = mul_add(c, t, -0x1.55c57cp+6f);
  c = mul_add(c, t, 0x1.03c1dcp+6f);
  c = mul_add(c, t, -0x1.3bd3ccp+4f);
  c = mul_add(c, t, 1.0f);
  const bool odd = (k & 1) != 0;
  const float a = float_of(bits_of(odd ? s : c) ^ (((k + 1) & 2) << 30));
  const float b = float_of(bits_of(odd ? c : s) ^ ((k & 2) << 30));
  return {mul(radius, a), mul(radius, b)};
}

// Round to nearest even with integer operations: the same on every backend. NaN stays NaN.
DG_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t u = bits_of(value);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : rounded);
}

// Round to nearest even; from 65520 on to infinity, NaN to NaN.
DG_INLINE uint16_t to_float16(float value) {
  const uint32_t u = bits_of(value);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // One ulp of 0.5f is 2^-24, the spacing of half-precision subnormals: the addition rounds.
  const uint32_t subnormal = bits_of(add(float_of(magnitude), 0.5f)) - 0x3F000000u;
  // One select after the other: gcc 12 vectorises a loop over this, not over nested ones.
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<uint16_t>(sign | half);
}

DG_INLINE float from_bfloat16(uint16_t value) { return float_of(uint32_t{value} << 16); }

// Exact, also for subnormals, whatever the processor's flush mode.
DG_INLINE float from_float16(uint16_t value) {
  const uint32_t sign = (uint32_t{value} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{value} & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + (magnitude >= 0x0F800000u ? 0x70000000u : 0x38000000u);
  // 2^-14 (1 + fraction) - 2^-14 = fraction 2^-14.
  const uint32_t subnormal = bits_of(add(float_of(magnitude + 0x38800000u), -0x1p-14f));
  return float_of(sign | (magnitude < 0x00800000u ? subnormal : normal));
}

// A double as a float rounded to odd: rounding that again to 13 or more bits fewer is the same as
// rounding the double once (Boldo and Melquiond 2008).
DG_INLINE float to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  const bool beyond = value < 0 ? back < value : back > value;
  const uint32_t truncated = bits_of(nearest) - (beyond ? 1u : 0u);
  return float_of(truncated | (back < value || back > value ? 1u : 0u));
}

}  // namespace dg
