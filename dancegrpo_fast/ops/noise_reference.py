"""The definition of our random numbers in NumPy: Philox-4x32-10 and the exact Box-Muller normal.

Every float32 operation is rounded by itself: no fused multiply-add, no library logarithm, sine or
cosine. So the bits are the same on every instruction set, and `csrc/normal.h` must agree with
this file bit for bit. Coefficients are minimax fits, written in hexadecimal because their exact
bits matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _coefficients(*hexadecimal: str) -> list[np.float32]:
    return [np.float32(float.fromhex(h)) for h in hexadecimal]


_LOG = _coefficients(
    "0x1.65c398p-4", "-0x1.2503cep-3", "0x1.318576p-3", "-0x1.535d5p-3",
    "0x1.98d2bcp-3", "-0x1.00049ap-2", "0x1.5556f4p-2", "-0x1.fffffap-2",
)  # fmt: skip
_SIN = _coefficients("-0x1.2d9bb8p+6", "0x1.465ec6p+6", "-0x1.4abbbap+5", "0x1.921fb6p+2")
_COS = _coefficients("0x1.d9c364p+5", "-0x1.55c57cp+6", "0x1.03c1dcp+6", "-0x1.3bd3ccp+4", "0x1p+0")
_LN2 = np.float32(float.fromhex("0x1.62e43p-1"))
_ULP32 = np.float32(2.0**-32)
_HALF_ULP32 = np.float32(2.0**-33)
# Enough to amortise NumPy's call overhead, small enough that temporaries stay in cache.
_CHUNK = 1 << 16


def philox_scalar(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """One block in Python integers: for deriving keys, where NumPy's overhead would dominate.

    Args:
        counter: Four 32-bit words.
        seed: 64-bit key, low word first.

    Returns:
        Four 32-bit words (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + _W0) & MASK32, (k1 + _W1) & MASK32
    return c0, c1, c2, c3


def philox(blocks: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """The blocks with 64-bit counters in words 0 and 1 and zero in words 2 and 3.

    Args:
        blocks: uint64, any shape.
        seed: 64-bit key.

    Returns:
        Four uint32 arrays of the same shape.
    """
    # 64-bit words throughout: a product of two 32-bit words needs them, and conversions cost more.
    low, shift = np.uint64(MASK32), np.uint64(32)
    c0, c1 = blocks & low, blocks >> shift
    c2, c3 = np.zeros_like(blocks), np.zeros_like(blocks)
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(_M0), c2 * np.uint64(_M1)
        c0, c1 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low
        c2, c3 = (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + _W0) & MASK32, (k1 + _W1) & MASK32
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def _horner(x: np.ndarray, coefficients: list[np.float32]) -> np.ndarray:
    q = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        q = q * x + c
    return q


def _log(u: np.ndarray) -> np.ndarray:
    """log(u) of float32 in [2**-33, 1]: exponent times ln 2 plus a polynomial."""
    bits = u.view(np.uint32)
    exponent = (bits - np.uint32(0x3F3504F3)).view(np.int32) >> 23
    f = (bits - (exponent.view(np.uint32) << np.uint32(23))).view(np.float32) - np.float32(1)
    return exponent.astype(np.float32) * _LN2 + ((f * f) * _horner(f, _LOG) + f)


def box_muller(x0: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 standard normals from two uint32 arrays (Box and Muller 1958).

    Relative error of the radius <= 1.14e-7; error of an element <= 1.44e-7 of the radius; largest
    possible magnitude 6.7637.

    Args:
        x0: uint32: the radius, sqrt(-2 log u) with u = (x0 + 1/2) / 2**32.
        x1: uint32: the angle, x1 / 2**32 turns, reduced exactly to an octant around k / 4 turns.

    Returns:
        (radius * cos, radius * sin), float32, same shape.
    """
    u = x0.astype(np.float32) * _ULP32 + _HALF_ULP32
    radius = np.sqrt(np.float32(-2) * _log(u))
    k = (x1 + np.uint32(0x20000000)) >> np.uint32(30)
    y = (x1 - (k << np.uint32(30))).view(np.int32).astype(np.float32) * _ULP32
    t = y * y
    sin, cos = _horner(t, _SIN) * y, _horner(t, _COS)
    odd = (k & np.uint32(1)) != 0
    two, thirty = np.uint32(2), np.uint32(30)
    sign_a, sign_b = ((k + np.uint32(1)) & two) << thirty, (k & two) << thirty
    a = (np.where(odd, sin, cos).view(np.uint32) ^ sign_a).view(np.float32)
    b = (np.where(odd, cos, sin).view(np.uint32) ^ sign_b).view(np.float32)
    return radius * a, radius * b


def normal_blocks(blocks: np.ndarray, seed: int) -> np.ndarray:
    """float32 `[n, 4]`: the normals of n blocks (uint64 `[n]`)."""
    x0, x1, x2, x3 = philox(blocks, seed)
    return np.stack([*box_muller(x0, x1), *box_muller(x2, x3)], axis=-1)


@dataclass(frozen=True)
class Runs:
    """A box of a tensor as nested runs of linear indices, outermost first.

    The last stride is 1: its extent is the length of a contiguous row.
    """

    base: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.extents)

    def elements(self, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (position of the first, ascending uint64 linear indices)."""
        for first in range(0, self.count, chunk):
            position = np.arange(first, min(first + chunk, self.count))
            index = np.unravel_index(position, self.extents)
            linear = sum(i * s for i, s in zip(index, self.strides, strict=True)) + self.base
            yield first, np.asarray(linear).astype(np.uint64)


def collapse(shape: Sequence[int], box: Sequence[tuple[int, int]]) -> Runs:
    """Merges the dimensions of a box that are adjacent in memory."""
    base, stride = 0, 1
    extents: list[int] = [1]
    strides: list[int] = [1]
    for size, (start, stop) in zip(reversed(shape), reversed(box), strict=True):
        base += start * stride
        if extents[-1] * strides[-1] == stride:
            extents[-1] *= stop - start
        else:
            extents.append(stop - start)
            strides.append(stride)
        stride *= size
    return Runs(base, tuple(reversed(extents)), tuple(reversed(strides)))


def fill(out: np.ndarray, key: np.ndarray, runs: Runs) -> None:
    """Fills float32 `out` `[runs.count]` with the elements that `runs` names."""
    seed, offset = int(key[0]), key[1]
    for first, element in runs.elements(_CHUNK):
        block, lane = element >> np.uint64(2), element & np.uint64(3)
        # Elements ascend, so a block's first element is where the block number changes.
        new = np.empty(block.shape, bool)
        new[0], new[1:] = True, block[1:] != block[:-1]
        values = normal_blocks(block[new] + offset, seed)
        out[first : first + len(element)] = values[np.cumsum(new) - 1, lane.astype(np.intp)]
