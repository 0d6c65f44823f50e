"""What the kernels share: one fixed sum, tiles of any layout, rounding, a state's children.

**The sum.** A chunk of 4096 values is added by one binary tree: q_i = (v_4i + v_4i+1) + (v_4i+2 +
v_4i+3), then q_i + q_i+512, then those 256 apart, then neighbours, neighbours of those, and so on:
what a thread holds is added first. `finalise.py` adds the chunk sums by a tree of neighbours.
Triton's `tl.sum` adds in an order that depends on the layout of its operand in registers, which
depends on dtypes, strides and alignment. Along an axis of two elements there is one order only, as
addition commutes. So the bits of a log-prob do not depend on the kernel, on dtypes, on the layout
or on the GPU, and they are those of the interpreter.

**Tiles.** A row (the action box of one state or child) is indexed by dimensions that the host has
merged as far as all tensors allow (`layout.py`): extents (e0, .., eN-1), and for each tensor
(start, row, s0, .., sN-1): the offset of the box, the stride from row to row, the strides inside.
With one dimension a tile is a vector of offsets; V = 4 then asks for four elements a thread. With
more it is [TILE // V, V] where V divides the last extent: only every V-th index is divided, and V
neighbours stay one vector load.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairwise(values, LEVELS: tl.constexpr):
    """[n] (or any shape of n elements) -> [n >> LEVELS]: the tree of neighbours."""
    for _ in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, (values.numel // 2, 2)), 1)
    return values


@triton.jit
def total(values, LEVELS: tl.constexpr):
    """[2^LEVELS] -> scalar, the same tree."""
    return tl.sum(pairwise(values, LEVELS - 1), 0)


@triton.jit
def total_of_fours(values):
    """Sum of a chunk from its sums of four neighbours, [1024]."""
    values = tl.sum(tl.reshape(values, (2, 512)), 0)
    values = tl.sum(tl.reshape(values, (2, 256)), 0)
    return total(values, 8)


@triton.jit
def total_of_squares(values):
    """Sum of squares of a chunk [4096]."""
    return chunk_total(values * values)


@triton.jit
def chunk_total(values):
    """Sum of a chunk [4096]."""
    return total_of_fours(pairwise(values, 2))


@triton.jit
def split4(values):
    """[4 n] -> elements 0, 4, ..; 1, 5, ..; 2, 6, ..; 3, 7, ..: four times [n]."""
    even, odd = tl.split(tl.reshape(values, (values.numel // 4, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def join4(v0, v1, v2, v3):
    """The inverse of `split4`."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (v0.numel * 4,))


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even.

    bfloat16 by integer operations, because the interpreter's cast truncates: the same bits
    everywhere. A NaN keeps its sign and upper payload and becomes quiet.
    """
    if dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        word = tl.where(values == values, even, bits | 0x400000) >> 16
        out = word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = values.to(dtype)
    return out


@triton.jit
def children(offsets, state):
    """First and last + 1 child of a state (int64), int64."""
    if offsets is None:
        start = state
        stop = state + 1
    else:
        start = tl.load(offsets + state)
        stop = tl.load(offsets + state + 1)
    return start, stop


@triton.jit
def ends_within(first, n, EVEN: tl.constexpr, TILE: tl.constexpr):
    """The `full` of `load` and `store`."""
    full = None
    if not EVEN:
        full = first + TILE <= n
    return full


@triton.jit
def place(first, extents, strides, V: tl.constexpr, TILE: tl.constexpr):
    """Offsets of elements first .. first + TILE within a row: [TILE], or [TILE // V, V]."""
    NDIM: tl.constexpr = len(extents)
    if NDIM == 1:
        offsets = (first + tl.arange(0, TILE)) * strides[2]
    else:
        rest = first + tl.arange(0, TILE // V) * V
        begin = tl.zeros_like(rest)
        for d in tl.static_range(NDIM - 1, 0, -1):
            begin += rest % extents[d] * strides[d + 2]
            rest = rest // extents[d]
        begin += rest * strides[2]
        offsets = begin[:, None] + (tl.arange(0, V) * strides[NDIM + 1])[None, :]
    return offsets


@triton.jit
def element(first, extents, V: tl.constexpr, TILE: tl.constexpr):
    """Indices first .. first + TILE within a row, shaped as `place` shapes them."""
    if len(extents) == 1:
        index = first + tl.arange(0, TILE)
    else:
        begin = first + tl.arange(0, TILE // V) * V
        index = begin[:, None] + tl.arange(0, V)[None, :]
    return index


@triton.jit
def pointers(pointer, row, first, extents, strides, V: tl.constexpr, TILE: tl.constexpr):
    """Pointers to elements first .. first + TILE of a row, shaped as `place` shapes them."""
    where = row_pointer(pointer, row, strides) + place(first, extents, strides, V, TILE)
    # A promise to the compiler, true for unit strides only: `Layout.fours` sees to that.
    if len(extents) == 1 and V == 4:
        where = tl.max_contiguous(where, 4)
    return where


@triton.jit
def row_pointer(pointer, row, strides):
    """Where the box begins of a row (int64: rows may lie more than 2^31 elements apart)."""
    return pointer + (row * strides[1] + strides[0])


@triton.jit
def load(pointer, row, first, n, full, extents, strides, V: tl.constexpr, TILE: tl.constexpr):
    """float32 [TILE]: elements first .. first + TILE of a row; 0 beyond n.

    A mask keeps vector loads where n is a multiple of 16, which Triton is told. Where it is not,
    `full` says whether the tile ends within the row, and only the last one pays for a mask; None
    where it is. (Always branching would make the compiler choose registers for each branch alone
    and move values between them through shared memory.)
    """
    where = pointers(pointer, row, first, extents, strides, V, TILE)
    if full is None:
        values = tl.load(where, mask=element(first, extents, V, TILE) < n, other=0.0)
    elif full:
        values = tl.load(where)
    else:
        values = tl.load(where, mask=element(first, extents, V, TILE) < n, other=0.0)
    return tl.reshape(values, (TILE,)).to(tl.float32)


@triton.jit
def store(
    pointer, row, values, first, n, full, extents, strides, V: tl.constexpr, TILE: tl.constexpr
):
    """Stores [TILE] (already of the pointer's dtype) to elements first .. of a row, up to n."""
    where = pointers(pointer, row, first, extents, strides, V, TILE)
    values = tl.reshape(values, where.shape)
    if full is None:
        tl.store(where, values, mask=element(first, extents, V, TILE) < n)
    elif full:
        tl.store(where, values)
    else:
        tl.store(where, values, mask=element(first, extents, V, TILE) < n)


@triton.jit
def inside(first, extents, bounds, CUT: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr):
    """Whether elements lie in the box, shaped as `place` shapes them.

    bounds: (start, stop) of each dimension, flat. CUT: bit d is set where dimension d is cut; a
    dimension that is not cut keeps its mask uniform, and so its vector loads.
    """
    NDIM: tl.constexpr = len(extents)
    index = element(first, extents, V, TILE)
    within = index >= 0
    if NDIM > 1:
        rest = first + tl.arange(0, TILE // V) * V
        for d in tl.static_range(NDIM - 1, -1, -1):
            coordinate = rest % extents[d] if d > 0 else rest
            rest = rest // extents[d]
            if (CUT >> d) & 1:
                if d == NDIM - 1:
                    position = coordinate[:, None] + tl.arange(0, V)[None, :]
                else:
                    position = tl.broadcast_to(coordinate[:, None], (TILE // V, V))
                within = within & (position >= bounds[2 * d]) & (position < bounds[2 * d + 1])
    elif CUT:
        within = (index >= bounds[0]) & (index < bounds[1])
    return within
