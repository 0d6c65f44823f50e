"""The gradient with respect to the model output, written once in its dtype.

    dm = sum_c u_c g0_c (y_c - (a_c x + b_c m))
         + (sum_c u_c g1_c)(m - ref) + (sum_c u_c g2_c)(m - old)

u is read from device memory, multiplied in float32 before the one rounding. 0 outside the action
box and for states without children.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dancegrpo_fast.ops.kernels import tiles
from dancegrpo_fast.ops.kernels.configs import config
from dancegrpo_fast.ops.kernels.launch import OPTIONS, device_guard, vector
from dancegrpo_fast.ops.kernels.layout import Box, layout


@triton.jit
def load_within(
    pointer, row, within, first, n, full, extents, strides,
    CUT: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`tiles.load`, or where a box cuts the row: only what `within` says."""
    if CUT == 0:
        values = tiles.load(pointer, row, first, n, full, extents, strides, V, TILE)
    else:
        where = tiles.row_pointer(pointer, row, strides)
        where += tiles.place(first, extents, strides, V, TILE)
        values = tl.reshape(tl.load(where, mask=within, other=0.0), (TILE,)).to(tl.float32)
    return values


@triton.jit
def gradient_kernel(
    upstream, scales, m, x, y, ref, old, table, offsets, out, n, upstream_stride,
    extents, m_strides, x_strides, y_strides, ref_strides, old_strides, out_strides, bounds,
    CUT: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    state = tl.program_id(1).to(tl.int64)
    first = (tile.to(tl.int64) if WIDE else tile) * TILE
    full = tiles.ends_within(first, n, EVEN, TILE)
    within = 0
    if CUT != 0:
        within = tiles.inside(first, extents, bounds, CUT, V, TILE)
        within = within & (tiles.element(first, extents, V, TILE) < n)
    start, stop = tiles.children(offsets, state)
    acc = tl.zeros((TILE,), tl.float32)
    mt = load_within(m, state, within, first, n, full, extents, m_strides, CUT, V, TILE)
    xt = load_within(x, state, within, first, n, full, extents, x_strides, CUT, V, TILE)
    to_ref = 0.0
    to_old = 0.0
    for c in range(start, stop):
        u = tl.load(upstream + c * upstream_stride)
        yt = load_within(y, c, within, first, n, full, extents, y_strides, CUT, V, TILE)
        r = yt - (tl.load(table + c * 8) * xt + tl.load(table + c * 8 + 1) * mt)
        acc += u * tl.load(scales + c * 3) * r
        if ref is not None:
            to_ref += u * tl.load(scales + c * 3 + 1)
        if old is not None:
            to_old += u * tl.load(scales + c * 3 + 2)
    # A factor of 0 takes nothing, not even a NaN: a reference that is only measured.
    if ref is not None:
        if to_ref != 0:
            rt = load_within(
                ref, state, within, first, n, full, extents, ref_strides, CUT, V, TILE
            )
            acc += to_ref * (mt - rt)
    if old is not None:
        if to_old != 0:
            ot = load_within(
                old, state, within, first, n, full, extents, old_strides, CUT, V, TILE
            )
            acc += to_old * (mt - ot)
    if CUT != 0:
        acc = tl.where(tl.reshape(within, (TILE,)), acc, 0.0)
    values = tiles.rounded(acc, out.dtype.element_ty)
    tiles.store(out, state, values, first, n, full, extents, out_strides, V, TILE)


def transition_gradient(
    upstream: Tensor,
    scales: Tensor,
    m: Tensor,
    x: Tensor,
    y: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    ref: Tensor | None,
    old: Tensor | None,
    box: Box | None,
) -> Tensor:
    """One launch: dm, like m.

    Args:
        upstream: [] or [children]; gradients of the loss or of the log-probs, any strides.
        scales: [children, 3] float32: (g0, g1, g2) for an upstream of 1.
    """
    out = torch.empty_like(m)
    given = (m if ref is None else ref, m if old is None else old)
    plan = layout(m, x, y, *given, out, box=box, whole=True)
    upstream = upstream.to(torch.float32)
    chosen = config(m.device)
    with device_guard(m):
        gradient_kernel[(-(-plan.numel // chosen.gradient_tile), m.shape[0])](
            upstream, scales, m, x, y, ref, old, vector(table), offsets, out, plan.numel,
            upstream.stride(0) if upstream.dim() else 0,
            plan.extents, *plan.strides, plan.bounds,
            CUT=plan.cut, V=plan.vector, EVEN=plan.even, WIDE=plan.wide, TILE=chosen.gradient_tile,
            num_warps=chosen.gradient_warps, **OPTIONS,
        )  # fmt: skip
    return out
