"""Philox-4x32-10, the exact Box-Muller normal, and exp and log, as Triton device functions.

Definition: `ops/noise_reference.py`. Every float32 operation is rounded by itself: the kernels are
compiled with `enable_fp_fusion=False`, the only square root is `sqrt_rn`, and there is no division
here. So the bits are those of NumPy, of the native module and of Triton's interpreter; the tests of
`tests/compile_only` read the PTX for it. Coefficients are the decimal forms of the hexadecimal ones
there (Triton has no hexadecimal floats in its subset of Python); each rounds to the same float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_ULP32 = tl.constexpr(2.3283064365386963e-10)  # 2^-32
_HALF_ULP32 = tl.constexpr(1.1641532182693481e-10)  # 2^-33
_LN2 = tl.constexpr(0.6931471824645996)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits: its product with an exponent is exact
_LN2_LOW = tl.constexpr(1.428606765330187e-06)


@triton.jit
def wide_product(word, factor: tl.constexpr):
    """(high, low) 32 bits of word * factor; one wide multiplication on the device."""
    product = word.to(tl.uint64) * tl.full((), factor, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(block, seed):
    """The four words of 64-bit counters `block` (uint64 [n]) under a scalar 64-bit key (uint64).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = wide_product(c0, _M0)
        high1, low1 = wide_product(c2, _M1)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + tl.full((), _W0, tl.uint32)
        k1 = k1 + tl.full((), _W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def log(u):
    """log of positive normal float32: exponent times ln 2 plus a polynomial."""
    bits = u.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    mantissa = bits - (exponent.to(tl.uint32, bitcast=True) << 23)
    f = mantissa.to(tl.float32, bitcast=True) - 1.0
    q = f * 0.08734473586082458 + -0.1430736631155014
    q = q * f + 0.1491803377866745
    q = q * f + -0.16570532321929932
    q = q * f + 0.19962069392204285
    q = q * f + -0.25001755356788635
    q = q * f + 0.33333951234817505
    q = q * f + -0.49999991059303284
    return exponent.to(tl.float32) * _LN2 + ((f * f) * q + f)


@triton.jit
def exp(x):
    """exp(x), within 1.5 ulp; exp(0) = 1; subnormal results count as 0; NaN stays NaN.

    The library's exp is `ex2.approx`: off by 2 ulp on a GPU and other bits than the interpreter's.
    """
    bounded = tl.minimum(tl.maximum(x, -88.0), 89.0)
    # Adding 1.5 * 2^23 leaves no bit below 1: to the nearest integer and back.
    k = (bounded * 1.4426950216293335 + 12582912.0) - 12582912.0
    f = (bounded - k * _LN2_HIGH) - k * _LN2_LOW
    q = f * 0.001393388374708593 + 0.008363335393369198
    q = q * f + 0.041666463017463684
    q = q * f + 0.16666576266288757
    q = q * f + 0.5
    q = (f * f) * q + f
    # 2^k in two factors: k = 128 has no float32 of its own.
    half = k.to(tl.int32) >> 1
    rest = k.to(tl.int32) - half
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((rest + 127) << 23).to(tl.float32, bitcast=True)
    value = (q + 1.0) * first * second
    value = tl.where(x < -87.0, 0.0, value)
    return tl.where(x == x, value, x)


@triton.jit
def box_muller(x0, x1):
    """Two float32 standard normals from two uint32: radius from x0, angle from x1."""
    u = x0.to(tl.float32) * _ULP32 + _HALF_ULP32
    radius = tl.sqrt_rn(log(u) * -2.0)
    k = (x1 + 0x20000000) >> 30  # nearest quarter turn
    y = (x1 - (k << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _ULP32
    t = y * y
    s = t * -75.40206909179688 + 81.5925521850586
    s = s * t + -41.3416633605957
    s = s * t + 6.2831854820251465
    s = s * y
    c = t * 59.22040557861328 + -85.44285583496094
    c = c * t + 64.93931579589844
    c = c * t + -19.739208221435547
    c = c * t + 1.0
    odd = (k & 1) != 0
    a = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((k + 1) & 2) << 30)
    b = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((k & 2) << 30)
    return radius * a.to(tl.float32, bitcast=True), radius * b.to(tl.float32, bitcast=True)


@triton.jit
def normal_blocks(block, key):
    """The four normals of each block: block uint64 [n] from 0, key a pointer to (seed, offset)."""
    seed = tl.load(key).to(tl.uint64, bitcast=True)
    offset = tl.load(key + 1).to(tl.uint64, bitcast=True)
    x0, x1, x2, x3 = philox(block + offset, seed)
    z0, z1 = box_muller(x0, x1)
    z2, z3 = box_muller(x2, x3)
    return z0, z1, z2, z3


@triton.jit
def normal_elements(element, key):
    """The normal of each element: element uint64 [n]. Four times the integer work of a block."""
    seed = tl.load(key).to(tl.uint64, bitcast=True)
    offset = tl.load(key + 1).to(tl.uint64, bitcast=True)
    x0, x1, x2, x3 = philox((element >> 2) + offset, seed)
    second = (element & 2) != 0
    even, odd = box_muller(tl.where(second, x2, x0), tl.where(second, x3, x1))
    return tl.where((element & 1) != 0, odd, even)
