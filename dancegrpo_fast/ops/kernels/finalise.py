"""From chunk sums to log-probs, the policy loss, its metrics and the factors of its gradient.

    e   = sum / n                      lp = c - w link(e)
    link(e) = e, or ((e + 1e-10)^power - 1e-10^power) / power
    log rho = lp - old_lp              or (lp - old_lp + w b^2 d_old) s with RatioNorm
    surrogate = sum_r u_r [max(-P rho, -P clip(rho)) + max(-N rho, -N clip(rho))]
    loss = (sum surrogate + kl_weight sum weight k d_ref [+ old_penalty sum weight d_old]) / divisor

The loss is one program, so the order of every sum is fixed without atomics or counters: it adds up
the rows, writes them down, and after a barrier reads them back as one vector over the children.
Source: PPO, arXiv 1707.06347, equation 7; GRPO-Guard, arXiv 2510.22319; AWM's link and EMA term.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dancegrpo_fast.ops.kernels import philox, tiles
from dancegrpo_fast.ops.kernels.configs import FINALISE_TILE, FINALISE_WARPS, finalise_width
from dancegrpo_fast.ops.kernels.launch import OPTIONS, device_guard, optional, vector
from dancegrpo_fast.ops.kernels.layout import Box
from dancegrpo_fast.ops.kernels.residual import residual_sums

METRICS = 11
_FLOOR = tl.constexpr(1e-10)


@triton.jit
def row_sums(sums, first, rows, chunks, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK]: the sums of rows first .. first + BLOCK of [rows, chunks], 0 beyond the last."""
    row = (first + tl.arange(0, BLOCK))[:, None]
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for k in range(0, chunks, WIDTH):
        column = (k + tl.arange(0, WIDTH))[None, :]
        inside = (row < rows) & (column < chunks)
        acc += tl.load(sums + row * chunks + column, mask=inside, other=0.0)
    LEVELS: tl.constexpr = 5 if WIDTH == 32 else (8 if WIDTH == 256 else 10)
    return tiles.pairwise(acc, LEVELS)


@triton.jit
def reduce_rows(sums, totals, rows, chunks, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Writes the sum of every row to totals [rows] and makes it visible to this program."""
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        value = row_sums(sums, first, rows, chunks, BLOCK, WIDTH)
        tl.store(totals + row, value, mask=row < rows)
    tl.debug_barrier()


@triton.jit
def linked(e, power, shift, LINK: tl.constexpr):
    """link(e); `shift` is 1e-10^power. inf and NaN stay."""
    if LINK:
        z = e + _FLOOR
        value = philox.exp(power * philox.log(z))
        e = tl.div_rn(tl.where(z < float("inf"), value, z) - shift, power)
    return e


@triton.jit
def clipped(advantage, rho, low, high):
    """(max(-A rho, -A clip(rho)), its derivative with respect to log rho); NaN goes through."""
    bounded = tl.where(rho < low, low, tl.where(rho > high, high, rho))
    free = -advantage * rho
    held = -advantage * bounded
    value = tl.maximum(free, held, propagate_nan=tl.PropagateNan.ALL)
    return value, tl.where(free < held, 0.0, free)


@triton.jit
def log_prob_kernel(
    sums, table, log_prob, rows, chunks, count: tl.float32,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    row = first + tl.arange(0, BLOCK)
    inside = row < rows
    e = tl.div_rn(row_sums(sums, first, rows, chunks, BLOCK, WIDTH), count)
    w = tl.load(table + row * 8 + 3, mask=inside, other=0.0)
    c = tl.load(table + row * 8 + 4, mask=inside, other=0.0)
    tl.store(log_prob + row, c - w * e, mask=inside)


@triton.jit
def policy_kernel(
    sums, totals, table, parent, advantages, old_log_prob, weights, reward_weights,
    loss, log_prob, metrics, scales, children, rows, first_ref, first_old, chunks, rewards,
    count: tl.float32, low: tl.float32, high: tl.float32, divisor: tl.float32,
    kl_weight: tl.float32, power: tl.float32, power_less: tl.float32, shift: tl.float32,
    old_penalty: tl.float32,
    SPLIT: tl.constexpr, HAS_REF: tl.constexpr, HAS_OLD: tl.constexpr, DIVIDE: tl.constexpr,
    KL: tl.constexpr, NORM: tl.constexpr, PENALTY: tl.constexpr, LINK: tl.constexpr,
    SIZE: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    reduce_rows(sums, totals, rows, chunks, BLOCK, WIDTH)
    c = tl.arange(0, SIZE)
    inside = c < children
    state = tl.load(parent + c, mask=inside, other=0)
    b = tl.load(table + c * 8 + 1, mask=inside, other=0.0)
    s = tl.load(table + c * 8 + 2, mask=inside, other=0.0)
    w = tl.load(table + c * 8 + 3, mask=inside, other=0.0)
    constant = tl.load(table + c * 8 + 4, mask=inside, other=0.0)
    k = tl.load(table + c * 8 + 5, mask=inside, other=0.0)
    weight = inside.to(tl.float32)
    if weights is not None:
        weight = tl.load(weights + c, mask=inside, other=0.0)
    e = tl.div_rn(tl.load(totals + c, mask=inside, other=0.0), count)
    d_ref = tl.zeros_like(e)
    d_old = tl.zeros_like(e)
    if HAS_REF:
        d_ref = tl.div_rn(tl.load(totals + first_ref + state, mask=inside, other=0.0), count)
    if HAS_OLD:
        d_old = tl.div_rn(tl.load(totals + first_old + state, mask=inside, other=0.0), count)
    if not DIVIDE:
        divisor = tiles.total(weight, LEVELS)

    lp = constant - w * linked(e, power, shift, LINK)
    previous = lp
    if old_log_prob is not None:
        previous = tl.load(old_log_prob + c, mask=inside, other=0.0)
    log_rho = lp - previous
    if NORM:
        log_rho = (log_rho + w * b * b * d_old) * s
    rho = philox.exp(log_rho)
    policy = tl.zeros_like(e)
    slope = tl.zeros_like(e)  # d surrogate / d log rho
    for r in range(rewards):
        if SPLIT:
            both = tl.load(advantages + c * rewards + r, mask=inside, other=0.0)
            positive = tl.where(both < 0, 0.0, both)
            negative = tl.where(both > 0, 0.0, both)
        else:
            positive = tl.load(advantages + (c * rewards + r) * 2, mask=inside, other=0.0)
            negative = tl.load(advantages + (c * rewards + r) * 2 + 1, mask=inside, other=0.0)
        gain, gain_slope = clipped(positive, rho, low, high)
        cost, cost_slope = clipped(negative, rho, low, high)
        if reward_weights is None:
            policy += gain + cost
            slope += gain_slope + cost_slope
        else:
            u = tl.load(reward_weights + r)
            policy += (gain + cost) * u
            slope += (gain_slope + cost_slope) * u
    kl = weight * k * d_ref
    distance = weight * d_old
    numerator = tiles.total(policy, LEVELS)
    if KL:
        numerator += kl_weight * tiles.total(kl, LEVELS)
    if PENALTY:
        numerator += old_penalty * tiles.total(distance, LEVELS)
    tl.store(loss, tl.div_rn(numerator, divisor))
    tl.store(log_prob + c, lp, mask=inside)

    active = weight > 0
    deviation = rho - 1.0
    add(metrics + 0, active, tl.full((SIZE,), 1.0, tl.float32), LEVELS)
    add(metrics + 1, active, weight, LEVELS)
    add(metrics + 2, active, policy, LEVELS)
    add(metrics + 3, active, kl, LEVELS)
    add(metrics + 4, active, lp, LEVELS)
    add(metrics + 5, active, rho, LEVELS)
    add(metrics + 6, active, tl.abs(deviation), LEVELS)
    add(metrics + 7, active, deviation * deviation, LEVELS)
    add(metrics + 8, active, (rho < low).to(tl.float32), LEVELS)
    add(metrics + 9, active, (rho > high).to(tl.float32), LEVELS)
    add(metrics + 10, active, distance, LEVELS)

    if scales is not None:
        g = tl.div_rn(slope, divisor)
        if NORM:
            g = g * s
        g0 = tl.div_rn(g * w * (2.0 * b), count)
        if LINK:
            g0 = g0 * philox.exp(power_less * philox.log(e + _FLOOR))
        per_weight = tl.div_rn(tl.div_rn(2.0 * weight, divisor), count)
        g1 = tl.zeros_like(e)
        g2 = tl.zeros_like(e)
        if KL:
            g1 = kl_weight * k * per_weight
        if NORM:
            g2 = tl.div_rn(g * (w * b * b) * 2.0, count)
        if PENALTY:
            g2 = old_penalty * per_weight
        tl.store(scales + c * 3, g0, mask=inside)
        tl.store(scales + c * 3 + 1, g1, mask=inside)
        tl.store(scales + c * 3 + 2, g2, mask=inside)


@triton.jit
def add(pointer, active, values, LEVELS: tl.constexpr):
    """Stores the sum of the active values."""
    tl.store(pointer, tiles.total(tl.where(active, values, 0.0), LEVELS))


# ------------------------------------------------------------------ launchers


def log_prob(sums: Tensor, table: Tensor, numel: int) -> Tensor:
    """[children] float32 from chunk sums [children, chunks]; on the current device."""
    rows, chunks = sums.shape
    out = torch.empty(rows, dtype=torch.float32, device=sums.device)
    width = finalise_width(chunks)
    block = FINALISE_TILE // width
    log_prob_kernel[(-(-rows // block),)](
        sums, table, out, rows, chunks, float(numel),
        BLOCK=block, WIDTH=width, num_warps=FINALISE_WARPS, **OPTIONS,
    )  # fmt: skip
    return out


def transition_log_prob(
    m: Tensor, x: Tensor, y: Tensor, table: Tensor, offsets: Tensor | None, box: Box | None
) -> Tensor:
    """[children] float32; arguments as in `ops.transition_log_prob`, checked there."""
    if table.shape[0] == 0:
        return torch.empty(0, dtype=torch.float32, device=m.device)
    table = vector(table)
    with device_guard(m):
        sums, numel = residual_sums(m, x, y, table, offsets, None, None, box, None)
        return log_prob(sums, table, numel)


def policy_loss(
    m: Tensor,
    x: Tensor,
    y: Tensor,
    table: Tensor,
    advantages: Tensor,
    old_log_prob: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor | None,
    reward_weights: Tensor | None,
    ref: Tensor | None,
    old: Tensor | None,
    low: float,
    high: float,
    divisor: float | None,
    kl_weight: float,
    box: Box | None,
    power: float,
    old_penalty: float | None,
    with_scales: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Two launches; arguments as in `ops.policy_loss`, checked there.

    Args:
        power: Of link(e); 1 is the policy gradient.
        old_penalty: Given with `old`: AWM's term weight d_old instead of RatioNorm.
        with_scales: Whether to write the factors that `transition_gradient` takes.

    Returns:
        (loss [], log_prob [children], metrics [11], scales [children, 3] or None), float32.
    """
    device, children = m.device, table.shape[0]
    table = vector(table)
    parent = torch.empty(children, dtype=torch.int32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    lp = torch.empty(children, dtype=torch.float32, device=device)
    metrics = torch.empty(METRICS, dtype=torch.float32, device=device)
    scales = torch.empty((children, 3), dtype=torch.float32, device=device) if with_scales else None
    rewards = 1 if advantages.dim() == 1 else advantages.shape[1]
    with device_guard(m):
        sums, numel = residual_sums(m, x, y, table, offsets, ref, old, box, parent)
        rows, chunks = sums.shape
        width = finalise_width(chunks)
        size = triton.next_power_of_2(max(children, 2))
        policy_kernel[(1,)](
            sums, torch.empty(rows, dtype=torch.float32, device=device), table, parent,
            vector(advantages), optional(old_log_prob), optional(weights), optional(reward_weights),
            loss, lp, metrics, scales,
            children, rows, children, rows - m.shape[0], chunks, rewards,
            float(numel), 1.0 - low, 1.0 + high, 1.0 if divisor is None else float(divisor),
            float(kl_weight), float(power), power - 1.0, 1e-10**power, float(old_penalty or 0.0),
            SPLIT=advantages.dim() < 3, HAS_REF=ref is not None, HAS_OLD=old is not None,
            DIVIDE=divisor is not None, KL=kl_weight != 0,
            NORM=old is not None and old_penalty is None,
            PENALTY=old is not None and old_penalty is not None, LINK=power != 1,
            SIZE=size, LEVELS=size.bit_length() - 1,
            BLOCK=FINALISE_TILE // width, WIDTH=width, num_warps=FINALISE_WARPS, **OPTIONS,
        )  # fmt: skip
    return loss, lp, metrics, scales
