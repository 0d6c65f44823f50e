"""The sums over a latent that the log-prob and the policy loss need, m and x read once per state.

    r_c  = y_c - (a_c x + b_c m)        sums[c, chunk]                      = tree(r_c^2)
    m - ref, m - old, per state         sums[C + state, ..], sums[.., ..]   = tree of its square
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dancegrpo_fast.ops.kernels import tiles
from dancegrpo_fast.ops.kernels.configs import REDUCING_WARPS, config
from dancegrpo_fast.ops.kernels.launch import OPTIONS, parts
from dancegrpo_fast.ops.kernels.layout import CHUNK, Box, layout


@triton.jit
def residual_kernel(
    m, x, y, ref, old, table, offsets, sums, parent, n, first_ref, first_old,
    extents, m_strides, x_strides, y_strides, ref_strides, old_strides,
    V: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    state = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    first = (chunk.to(tl.int64) if WIDE else chunk) * TILE
    full = tiles.ends_within(first, n, EVEN, TILE)
    start, stop = tiles.children(offsets, state)
    mt = tiles.load(m, state, first, n, full, extents, m_strides, V, TILE)
    xt = tiles.load(x, state, first, n, full, extents, x_strides, V, TILE)
    sums += chunk
    chunks = tl.num_programs(0)
    for c in range(start + part, stop, tl.num_programs(2)):
        yt = tiles.load(y, c, first, n, full, extents, y_strides, V, TILE)
        r = yt - (tl.load(table + c * 8) * xt + tl.load(table + c * 8 + 1) * mt)
        tl.store(sums + c * chunks, tiles.total_of_squares(r))
        if parent is not None:
            if chunk == 0:
                tl.store(parent + c, state)
    if part == 0:
        if ref is not None:
            d = mt - tiles.load(ref, state, first, n, full, extents, ref_strides, V, TILE)
            tl.store(sums + (first_ref + state) * chunks, tiles.total_of_squares(d))
        if old is not None:
            d = mt - tiles.load(old, state, first, n, full, extents, old_strides, V, TILE)
            tl.store(sums + (first_old + state) * chunks, tiles.total_of_squares(d))


def residual_sums(
    m: Tensor,
    x: Tensor,
    y: Tensor,
    table: Tensor,
    offsets: Tensor | None,
    ref: Tensor | None,
    old: Tensor | None,
    box: Box | None,
    parent: Tensor | None,
) -> tuple[Tensor, int]:
    """Launches the sums; `table` is contiguous float32.

    Args:
        parent: int32 [children] to be filled with each child's state, or None.

    Returns:
        (sums [children (+ states for ref) (+ states for old), chunks], elements of a row).
    """
    states, children = m.shape[0], table.shape[0]
    plan = layout(m, x, y, m if ref is None else ref, m if old is None else old, box=box)
    first_old = children + (0 if ref is None else states)
    rows = first_old + (0 if old is None else states)
    sums = torch.empty((rows, plan.chunks), dtype=torch.float32, device=m.device)
    split = parts(plan.chunks * states, states, children, config(m.device).programs)
    residual_kernel[(plan.chunks, states, split)](
        m, x, y, ref, old, table, offsets, sums, parent, plan.numel, children, first_old,
        plan.extents, *plan.strides,
        V=plan.vector, EVEN=plan.even, WIDE=plan.wide, TILE=CHUNK,
        num_warps=REDUCING_WARPS, **OPTIONS,
    )  # fmt: skip
    return sums, plan.numel
