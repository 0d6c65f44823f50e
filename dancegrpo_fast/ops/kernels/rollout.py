"""One denoising step in one launch: x' = round((a x + b m) + s eps) and the sums of its log-prob.

    eps_i = normal(key, i)          drawn in registers, i the index in the full latent
    y     = round((a x + b m) + s eps)
    r     = y - (a x + b m)         of the rounded y, as the training kernels compute it
    sums[child, chunk] = tree(r^2)

A program takes one chunk of one state and loops over its children: m and x are read once.
`finalise` turns the sums into log-probs. With an action box a second launch copies x around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dancegrpo_fast.ops.kernels import finalise, tiles
from dancegrpo_fast.ops.kernels.configs import REDUCING_WARPS, ROLLOUT_REGISTERS, config
from dancegrpo_fast.ops.kernels.launch import OPTIONS, device_guard, parts, vector
from dancegrpo_fast.ops.kernels.layout import CHUNK, Box, layout
from dancegrpo_fast.ops.kernels.philox import normal_blocks, normal_elements

# Where eps comes from (DRAW). BLOCKS: keys, four neighbours at a time; ELEMENTS: keys, where a box
# cuts through blocks.
NONE, GIVEN, BLOCKS, ELEMENTS = 0, 1, 2, 3


@triton.jit
def rollout_kernel(
    m, x, noise, y, table, keys, offsets, sums, n,
    extents, m_strides, x_strides, noise_strides, y_strides, index_extents, index,
    DRAW: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    state = tl.program_id(1).to(tl.int64)
    first = (chunk.to(tl.int64) if WIDE else chunk) * TILE
    full = tiles.ends_within(first, n, EVEN, TILE)
    start, stop = tiles.children(offsets, state)
    mt = tiles.load(m, state, first, n, full, extents, m_strides, V, TILE)
    xt = tiles.load(x, state, first, n, full, extents, x_strides, V, TILE)
    for c in range(start + tl.program_id(2), stop, tl.num_programs(2)):
        a = tl.load(table + c * 8)
        b = tl.load(table + c * 8 + 1)
        s = tl.load(table + c * 8 + 2)
        center = a * xt + b * mt
        # Two whole branches: only scalars leave them, so each keeps its own layout in registers.
        if s > 0:
            squares = transition(
                center, s, noise, y, keys, c, first, n, full, extents, noise_strides, y_strides,
                index_extents, index, DRAW, V, TILE,
            )  # fmt: skip
        else:
            squares = still(center, y, c, first, n, full, extents, y_strides, V, TILE)
        tl.store(sums + c * tl.num_programs(0) + chunk, squares)


@triton.jit
def transition(
    center, s, noise, y, keys, c, first, n, full, extents, noise_strides, y_strides,
    index_extents, index, DRAW: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores child c of a center [TILE] with s > 0; returns the sum of its squares."""
    dtype: tl.constexpr = y.dtype.element_ty
    if DRAW == 2:
        block = index[0] + tiles.place(first // 4, index_extents, index, V // 4, TILE // 4)
        block = tl.reshape(block, (TILE // 4,)).to(tl.uint64)
        position = first + tl.arange(0, TILE // 4) * 4
        c0, c1, c2, c3 = tiles.split4(center)
        z0, z1, z2, z3 = normal_blocks(block, keys + 2 * c)
        y0 = tiles.rounded(c0 + s * z0, dtype)
        y1 = tiles.rounded(c1 + s * z1, dtype)
        y2 = tiles.rounded(c2 + s * z2, dtype)
        y3 = tiles.rounded(c3 + s * z3, dtype)
        stored = tiles.join4(y0, y1, y2, y3)
        r0 = y0.to(tl.float32) - c0
        r1 = y1.to(tl.float32) - c1
        r2 = y2.to(tl.float32) - c2
        r3 = y3.to(tl.float32) - c3
        # Beyond n center is 0 and y is not: it must not count. Fours end with an even row.
        if full is not None:
            r1 = tl.where(position + 1 < n, r1, 0.0)
            r2 = tl.where(position + 2 < n, r2, 0.0)
            r3 = tl.where(position + 3 < n, r3, 0.0)
        fours = (r0 * r0 + r1 * r1) + (r2 * r2 + r3 * r3)
        squares = tiles.total_of_fours(tl.where(position < n, fours, 0.0))
    else:
        if DRAW == 0:
            eps = tl.full((TILE,), float("nan"), tl.float32)
        elif DRAW == 1:
            eps = tiles.load(noise, c, first, n, full, extents, noise_strides, V, TILE)
        else:
            item = index[0] + tiles.place(first, index_extents, index, V, TILE)
            eps = normal_elements(tl.reshape(item, (TILE,)).to(tl.uint64), keys + 2 * c)
        stored = tiles.rounded(center + s * eps, dtype)
        r = tl.where(first + tl.arange(0, TILE) < n, stored.to(tl.float32) - center, 0.0)
        squares = tiles.total_of_squares(r)
    tiles.store(y, c, stored, first, n, full, extents, y_strides, V, TILE)
    return squares


@triton.jit
def still(center, y, c, first, n, full, extents, y_strides, V: tl.constexpr, TILE: tl.constexpr):
    """The same without noise: y is the rounded center."""
    stored = tiles.rounded(center, y.dtype.element_ty)
    tiles.store(y, c, stored, first, n, full, extents, y_strides, V, TILE)
    return tiles.total_of_squares(stored.to(tl.float32) - center)


@triton.jit
def copy_outside_kernel(
    x, y, offsets, n, extents, x_strides, y_strides, bounds,
    CUT: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    state = tl.program_id(1).to(tl.int64)
    first = (chunk.to(tl.int64) if WIDE else chunk) * TILE
    start, stop = tiles.children(offsets, state)
    outside = tiles.element(first, extents, V, TILE) < n
    outside = outside & (tiles.inside(first, extents, bounds, CUT, V, TILE) == 0)
    source = tiles.row_pointer(x, state, x_strides)
    values = tl.load(
        source + tiles.place(first, extents, x_strides, V, TILE), mask=outside, other=0.0
    )
    values = tiles.rounded(values.to(tl.float32), y.dtype.element_ty)
    where = tiles.place(first, extents, y_strides, V, TILE)
    for c in range(start, stop):
        tl.store(tiles.row_pointer(y, c, y_strides) + where, values, mask=outside)


def sample_transition(
    m: Tensor,
    x: Tensor,
    table: Tensor,
    keys: Tensor | None,
    noise: Tensor | None,
    offsets: Tensor | None,
    box: Box | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Draws every child and its log-prob; arguments as in `ops.sample_transition`, checked there.

    Returns:
        (y [children, *dims] in `out_dtype`, contiguous; log-prob [children] float32).
    """
    states, children = m.shape[0], table.shape[0]
    y = torch.empty((children, *m.shape[1:]), dtype=out_dtype, device=m.device)
    table = vector(table)
    plan = layout(m, x, y, y if noise is None else noise, box=box)
    sums = torch.empty((children, plan.chunks), dtype=torch.float32, device=m.device)
    if children == 0:
        return y, sums.new_empty(0)
    draw = NONE if keys is None and noise is None else GIVEN
    index_extents, index = plan.extents, plan.index
    if keys is not None:
        keys = keys.contiguous()
        draw = BLOCKS if plan.aligned else ELEMENTS
        if plan.aligned:
            index_extents, index = plan.in_blocks()
    chosen = config(m.device)
    grid = (plan.chunks, states, parts(plan.chunks * states, states, children, chosen.programs))
    with device_guard(m):
        rollout_kernel[grid](
            m, x, noise, y, table, keys, offsets, sums, plan.numel,
            plan.extents, *plan.strides[:2], plan.strides[3], plan.strides[2], index_extents, index,
            DRAW=draw, V=plan.fours, EVEN=plan.even, WIDE=plan.wide, TILE=CHUNK,
            num_warps=REDUCING_WARPS, maxnreg=ROLLOUT_REGISTERS, **OPTIONS,
        )  # fmt: skip
        if box is not None:
            _copy_outside(x, y, offsets, box)
        log_prob = finalise.log_prob(sums, table, plan.numel)
    return y, log_prob


def _copy_outside(x: Tensor, y: Tensor, offsets: Tensor | None, box: Box) -> None:
    plan = layout(x, y, box=box, whole=True)
    if plan.cut == 0:
        return
    chosen = config(x.device)
    copy_outside_kernel[(-(-plan.numel // chosen.gradient_tile), x.shape[0])](
        x, y, offsets, plan.numel, plan.extents, *plan.strides, plan.bounds,
        CUT=plan.cut, V=plan.vector, WIDE=plan.wide, TILE=chosen.gradient_tile,
        num_warps=chosen.gradient_warps, **OPTIONS,
    )  # fmt: skip
