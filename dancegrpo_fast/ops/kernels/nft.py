"""DiffusionNFT's two-branch loss: five sums per state, then loss, metrics and gradient factors.

    E = x - sigma m - y            D = m - old
    e+ = E + sigma (1 - beta) D    e- = E + sigma (1 + beta) D
    w = max(mean|e|, minimum) of each branch, a constant;    L = mean(e^2) / w
    p = clip(A / (2 adv_max) + 1/2, 0, 1)
    loss_i = weight (adv_max (p L+ + (1 - p) L-) / beta + kl_weight mean((m - ref)^2))

m is the velocity, x the noised and y the clean latents; one child per state.
Source: DiffusionNFT, arXiv 2509.16117, and its published code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dancegrpo_fast.ops.kernels import finalise, tiles
from dancegrpo_fast.ops.kernels.configs import (
    FINALISE_TILE,
    FINALISE_WARPS,
    REDUCING_WARPS,
    finalise_width,
)
from dancegrpo_fast.ops.kernels.launch import OPTIONS, device_guard, optional, vector
from dancegrpo_fast.ops.kernels.layout import CHUNK, Box, layout

METRICS = 9


@triton.jit
def nft_sums_kernel(
    m, x, y, ref, old, sigmas, sums, n, states,
    minus: tl.float32, plus: tl.float32,
    extents, m_strides, x_strides, y_strides, ref_strides, old_strides,
    V: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """sums [5, states, chunks]: |e+|, e+^2, |e-|, e-^2, (m - ref)^2."""
    chunk = tl.program_id(0)
    state = tl.program_id(1).to(tl.int64)
    first = (chunk.to(tl.int64) if WIDE else chunk) * TILE
    full = tiles.ends_within(first, n, EVEN, TILE)
    sigma = tl.load(sigmas + state)
    mt = tiles.load(m, state, first, n, full, extents, m_strides, V, TILE)
    xt = tiles.load(x, state, first, n, full, extents, x_strides, V, TILE)
    yt = tiles.load(y, state, first, n, full, extents, y_strides, V, TILE)
    error = (xt - sigma * mt) - yt
    d = mt - tiles.load(old, state, first, n, full, extents, old_strides, V, TILE)
    chunks = tl.num_programs(0)
    step = states * chunks
    sums += state * chunks + chunk
    e = error + sigma * minus * d
    tl.store(sums, tiles.chunk_total(tl.abs(e)))
    tl.store(sums + step, tiles.total_of_squares(e))
    e = error + sigma * plus * d
    tl.store(sums + 2 * step, tiles.chunk_total(tl.abs(e)))
    tl.store(sums + 3 * step, tiles.total_of_squares(e))
    if ref is not None:
        d = mt - tiles.load(ref, state, first, n, full, extents, ref_strides, V, TILE)
        tl.store(sums + 4 * step, tiles.total_of_squares(d))


@triton.jit
def nft_kernel(
    sums, totals, sigmas, advantages, weights, loss, metrics, scales,
    states, rows, chunks, count: tl.float32, beta: tl.float32, minus: tl.float32, plus: tl.float32,
    adv_max: tl.float32, divisor: tl.float32, kl_weight: tl.float32, minimum: tl.float32,
    HAS_REF: tl.constexpr, DIVIDE: tl.constexpr, KL: tl.constexpr,
    SIZE: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    finalise.reduce_rows(sums, totals, rows, chunks, BLOCK, WIDTH)
    i = tl.arange(0, SIZE)
    inside = i < states
    sigma = tl.load(sigmas + i, mask=inside, other=0.0)
    advantage = tl.load(advantages + i, mask=inside, other=0.0)
    weight = inside.to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + i, mask=inside, other=0.0)
    if not DIVIDE:
        divisor = tiles.total(weight, LEVELS)
    positive_scale = scale(totals + i, inside, count, minimum)
    negative_scale = scale(totals + 2 * states + i, inside, count, minimum)
    positive = tl.div_rn(tl.load(totals + states + i, mask=inside, other=0.0), count)
    positive = tl.div_rn(positive, positive_scale)
    negative = tl.div_rn(tl.load(totals + 3 * states + i, mask=inside, other=0.0), count)
    negative = tl.div_rn(negative, negative_scale)
    p = tl.div_rn(advantage * 0.5, adv_max) + 0.5
    p = tl.where(p < 0, 0.0, tl.where(p > 1, 1.0, p))  # NaN stays
    policy = weight * tl.div_rn(adv_max * (p * positive + (1.0 - p) * negative), beta)
    kl = tl.zeros_like(policy)
    if HAS_REF:
        kl = weight * tl.div_rn(tl.load(totals + 4 * states + i, mask=inside, other=0.0), count)
    policy = tl.where(inside, policy, 0.0)
    numerator = tiles.total(policy, LEVELS)
    if KL:
        numerator += kl_weight * tiles.total(kl, LEVELS)
    tl.store(loss, tl.div_rn(numerator, divisor))

    active = weight > 0
    finalise.add(metrics + 0, active, tl.full((SIZE,), 1.0, tl.float32), LEVELS)
    finalise.add(metrics + 1, active, weight, LEVELS)
    finalise.add(metrics + 2, active, policy, LEVELS)
    finalise.add(metrics + 3, active, kl, LEVELS)
    finalise.add(metrics + 4, active, positive, LEVELS)
    finalise.add(metrics + 5, active, negative, LEVELS)
    finalise.add(metrics + 6, active, positive_scale, LEVELS)
    finalise.add(metrics + 7, active, negative_scale, LEVELS)
    finalise.add(metrics + 8, active, p, LEVELS)

    if scales is not None:
        # d loss / d e+ = h p e+ / w+, and e+ moves by -sigma beta per unit of m.
        h = tl.div_rn(tl.div_rn(2.0 * weight, divisor), count)
        up = tl.div_rn(-h * adv_max * p * sigma, positive_scale)
        down = tl.div_rn(h * adv_max * (1.0 - p) * sigma, negative_scale)
        g1 = tl.zeros_like(h)
        if KL:
            g1 = kl_weight * h
        tl.store(scales + i * 3, -(up + down), mask=inside)
        tl.store(scales + i * 3 + 1, g1, mask=inside)
        g2 = sigma * (up * minus + down * plus)
        tl.store(scales + i * 3 + 2, g2, mask=inside)


@triton.jit
def scale(totals, inside, count, minimum):
    """max(mean, minimum), NaN kept; 1 beyond the last state."""
    value = tl.div_rn(tl.load(totals, mask=inside, other=0.0), count)
    value = tl.where(value < minimum, minimum, value)
    return tl.where(inside, value, 1.0)


def nft_loss(
    m: Tensor,
    x: Tensor,
    y: Tensor,
    sigmas: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    ref: Tensor | None,
    old: Tensor,
    beta: float,
    adv_max: float,
    divisor: float | None,
    kl_weight: float,
    minimum: float,
    box: Box | None,
    with_scales: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two launches; arguments as in `ops.nft_loss`, checked there.

    Returns:
        (loss [], metrics [9], scales [states, 3] or None), float32. The scales are those of
        `transition_gradient` with table rows a = 1, b = -sigma.
    """
    device, states = m.device, m.shape[0]
    plan = layout(m, x, y, m if ref is None else ref, old, box=box)
    rows = 4 * states if ref is None else 5 * states
    width = finalise_width(plan.chunks)
    size = triton.next_power_of_2(max(states, 2))
    sums = torch.empty((rows, plan.chunks), dtype=torch.float32, device=device)
    totals = torch.empty(rows, dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    metrics = torch.empty(METRICS, dtype=torch.float32, device=device)
    scales = torch.empty((states, 3), dtype=torch.float32, device=device) if with_scales else None
    sigmas = vector(sigmas)
    with device_guard(m):
        nft_sums_kernel[(plan.chunks, states)](
            m, x, y, ref, old, sigmas, sums, plan.numel, states, 1.0 - beta, 1.0 + beta,
            plan.extents, *plan.strides,
            V=plan.vector, EVEN=plan.even, WIDE=plan.wide, TILE=CHUNK,
            num_warps=REDUCING_WARPS, **OPTIONS,
        )  # fmt: skip
        nft_kernel[(1,)](
            sums, totals, sigmas, vector(advantages),
            optional(weights), loss, metrics, scales,
            states, rows, plan.chunks, float(plan.numel), float(beta), 1.0 - beta, 1.0 + beta,
            float(adv_max), 1.0 if divisor is None else float(divisor), float(kl_weight),
            float(minimum),
            HAS_REF=ref is not None, DIVIDE=divisor is not None, KL=kl_weight != 0,
            SIZE=size, LEVELS=size.bit_length() - 1,
            BLOCK=FINALISE_TILE // width, WIDTH=width, num_warps=FINALISE_WARPS, **OPTIONS,
        )  # fmt: skip
    return loss, metrics, scales
