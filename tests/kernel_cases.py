"""Oracles and inputs for tests of the Triton kernels: float64 closed forms, the order of the sum.

Nothing here imports Triton or the ops: the formulas are written out, autograd differentiates them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64
Box = Any


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def coefficients(children: int, seed: int = 0) -> Tensor:
    """[children, 8] of plausible size: s from .1 to .7, w = 1 / (2 s^2)."""
    random = torch.rand(children, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)
    s = 0.1 + 0.6 * random[:, 0]
    rows = torch.zeros(children, 8, dtype=F64)
    rows[:, 0] = 0.9 + 0.2 * random[:, 1]
    rows[:, 1] = -0.2 * random[:, 2] - 0.05
    rows[:, 2] = s
    rows[:, 3] = 1 / (2 * s * s)
    rows[:, 4] = -s.log() - 0.5 * math.log(2 * math.pi)
    rows[:, 5] = rows[:, 1] ** 2 * rows[:, 3]
    return rows.float()


def offsets_of(*counts: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int64)


def parents(states: int, offsets: Tensor | None) -> Tensor:
    index = torch.arange(states)
    return index if offsets is None else torch.repeat_interleave(index, offsets.cpu().diff())


def boxed(tensor: Tensor, box: Box | None) -> Tensor:
    """[n, *dims] -> [n, numel] of the box."""
    if box is not None:
        tensor = tensor[(slice(None), *(slice(a, b) for a, b in box))]
    return tensor.reshape(len(tensor), -1)


class Case(NamedTuple):
    """Inputs of one call; the log-probs of the old policy are around those of m."""

    m: Tensor
    x: Tensor
    y: Tensor
    ref: Tensor
    old: Tensor
    table: Tensor
    offsets: Tensor | None
    old_log_prob: Tensor


def case(
    states: int = 2, counts: tuple[int, ...] | None = None, dims: tuple[int, ...] = (3, 5, 7),
    model: torch.dtype = torch.bfloat16, latent: torch.dtype = F32, seed: int = 0,
    box: Box | None = None,
) -> Case:  # fmt: skip
    """Transitions that could have been drawn, with ratios around the clip range 1e-2."""
    children = states if counts is None else sum(counts)
    offsets = None if counts is None else offsets_of(*counts)
    m = randn(states, *dims, seed=seed, dtype=model)
    x = randn(states, *dims, seed=seed + 1, dtype=latent)
    table = coefficients(children, seed)
    parent = parents(states, offsets)
    shape = (children, *(1,) * len(dims))
    a, b, s = (table[:, k].double().reshape(shape) for k in range(3))
    eps = randn(children, *dims, seed=seed + 2, dtype=F64)
    y = (a * x[parent].double() + b * m[parent].double() + s * eps).to(latent)
    ref = (m.double() + 0.1 * randn(states, *dims, seed=seed + 3, dtype=F64)).to(model)
    old = (m.double() + 0.1 * randn(states, *dims, seed=seed + 4, dtype=F64)).to(model)
    lp = log_prob(m.double(), x, y, table, offsets, box)
    spread = torch.linspace(-3e-2, 3e-2, children, dtype=F64) if children else lp
    return Case(m, x, y, ref, old, table, offsets, (lp - spread).float())


# ------------------------------------------------------------------ closed forms, float64


def log_prob(
    m: Tensor, x: Tensor, y: Tensor, table: Tensor, offsets: Tensor | None, box: Box | None,
    power: float = 1.0,
) -> Tensor:  # fmt: skip
    """m is float64; [children] float64."""
    rows = table.double()
    parent = parents(len(m), offsets)
    mean = rows[:, :1] * boxed(x, box)[parent].double() + rows[:, 1:2] * boxed(m, box)[parent]
    e = ((boxed(y, box).double() - mean) ** 2).mean(1)
    if power != 1:
        e = ((e + 1e-10) ** power - 1e-10**power) / power
    return rows[:, 4] - rows[:, 3] * e


def policy(
    m: Tensor, c: Case, advantages: Tensor, *, weights: Tensor | None = None,
    u: Tensor | None = None, ref: Tensor | None = None, old: Tensor | None = None,
    low: float = 1e-2, high: float = 2e-2, divisor: float | None = None, kl_weight: float = 0.0,
    box: Box | None = None, power: float = 1.0, old_penalty: float | None = None,
    on_policy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, log-probs, metrics) in float64, differentiable in m (float64)."""
    lp = log_prob(m, c.x, c.y, c.table, c.offsets, box, power)
    children = len(lp)
    parent, rows = parents(len(m), c.offsets), c.table.double()
    weight = torch.ones(children, dtype=F64) if weights is None else weights.double()
    log_rho = lp - (lp.detach() if on_policy else c.old_log_prob.double())

    def distance(other: Tensor) -> Tensor:
        return ((boxed(m, box) - boxed(other, box).double()) ** 2).mean(1)[parent]

    d_old = torch.zeros_like(lp) if old is None else distance(old)
    if old is not None and old_penalty is None:
        log_rho = (log_rho + rows[:, 3] * rows[:, 1] ** 2 * d_old) * rows[:, 2]
    rho = log_rho.exp()
    parts = advantages.double().reshape(children, -1) if advantages.dim() < 3 else advantages
    if advantages.dim() < 3:
        parts = torch.stack((parts.clamp(min=0), parts.clamp(max=0)), -1)
    parts = parts.double()
    held = rho.clamp(1 - low, 1 + high)
    surrogate = torch.maximum(-parts * rho[:, None, None], -parts * held[:, None, None]).sum(-1)
    factor = torch.ones(parts.shape[1], dtype=F64) if u is None else u.double()
    objective = (surrogate * factor).sum(1)
    kl = torch.zeros_like(lp) if ref is None else weight * rows[:, 5] * distance(ref)
    numerator = objective.sum()
    if kl_weight:
        numerator = numerator + kl_weight * kl.sum()
    if old is not None and old_penalty is not None:
        numerator = numerator + old_penalty * (weight * d_old).sum()
    values = torch.stack((
        torch.ones_like(lp), weight, objective, kl, lp, rho, (rho - 1).abs(), (rho - 1) ** 2,
        (rho < 1 - low).double(), (rho > 1 + high).double(), weight * d_old,
    ))  # fmt: skip
    metrics = torch.where(weight > 0, values, 0.0).sum(1)
    return numerator / (weight.sum() if divisor is None else divisor), lp, metrics


def nft(
    m: Tensor, x: Tensor, y: Tensor, sigmas: Tensor, advantages: Tensor, weights: Tensor | None,
    ref: Tensor | None, old: Tensor, beta: float, adv_max: float, divisor: float | None,
    kl_weight: float, minimum: float, box: Box | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, metrics) in float64; the published form: x0 predictions of v mixed with old."""
    m, x, y, old = (boxed(t, box).double() for t in (m, x, y, old))
    sigma = sigmas.double()[:, None]
    weight = torch.ones(len(m), dtype=F64) if weights is None else weights.double()

    def branch(velocity: Tensor) -> tuple[Tensor, Tensor]:
        error = (x - sigma * velocity) - y
        scale = error.detach().abs().mean(1).clamp(min=minimum)
        return (error**2).mean(1) / scale, scale

    positive, positive_scale = branch(beta * m + (1 - beta) * old)
    negative, negative_scale = branch((1 + beta) * old - beta * m)
    p = (advantages.double().clamp(-adv_max, adv_max) / adv_max / 2 + 0.5).clamp(0, 1)
    objective = weight * adv_max * (p * positive + (1 - p) * negative) / beta
    kl = torch.zeros_like(weight)
    if ref is not None:
        kl = weight * ((m - boxed(ref, box).double()) ** 2).mean(1)
    values = torch.stack((
        torch.ones_like(weight), weight, objective, kl, positive, negative, positive_scale,
        negative_scale, p,
    ))  # fmt: skip
    metrics = torch.where(weight > 0, values, 0.0).sum(1)
    total = (objective + kl_weight * kl).sum()
    return total / (weight.sum() if divisor is None else divisor), metrics


# ------------------------------------------------------------------ the order of the sum, float32


def _neighbours(values: np.ndarray) -> np.ndarray:
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


def tree_sum(values: np.ndarray) -> np.ndarray:
    """float32 [rows, n] -> [rows]: the order that `kernels/tiles.py` and `finalise.py` state."""
    rows, n = values.shape
    chunks = -(-n // 4096)
    padded = np.zeros((rows, chunks * 4096), np.float32)
    padded[:, :n] = values
    fours = padded.reshape(rows, chunks, 1024, 4)
    quads = (fours[..., 0] + fours[..., 1]) + (fours[..., 2] + fours[..., 3])
    quads = quads[..., :512] + quads[..., 512:]
    return add_chunks(_neighbours(quads[..., :256] + quads[..., 256:]))


def add_chunks(sums: np.ndarray) -> np.ndarray:
    """Chunk sums float32 [rows, chunks] -> [rows]."""
    rows, chunks = sums.shape
    width = 32 if chunks <= 32 else 256 if chunks <= 256 else 1024
    acc = np.zeros((rows, width), np.float32)
    for first in range(0, chunks, width):
        part = sums[:, first : first + width]
        acc[:, : part.shape[1]] += part
    return _neighbours(acc)


def log_prob_bits(
    m: Tensor, x: Tensor, y: Tensor, table: Tensor, offsets: Tensor | None, box: Box | None = None
) -> Tensor:
    """[children] float32: what every kernel must give, bit for bit."""
    parent = parents(len(m), offsets)
    a, b, _, w, c, *_ = (column[:, None].numpy() for column in table.float().unbind(1))
    xs, ms, ys = (boxed(t, box).float() for t in (x, m, y))
    r = ys.numpy() - (a * xs[parent].numpy() + b * ms[parent].numpy())
    e = tree_sum(r * r) / np.float32(r.shape[1])
    return torch.from_numpy(c[:, 0] - w[:, 0] * e)


def assert_close(actual: Tensor, expected: Tensor, bound: float, what: str = "") -> None:
    """|actual - expected| <= bound max(1, |expected|) elementwise, NaN where NaN."""
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    assert torch.equal(actual.isnan(), expected.isnan()), what
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    worst = float(error.nan_to_num(0).max()) if error.numel() else 0.0
    assert worst <= bound, f"{what}: {worst:.3g} > {bound:.3g}"


def assert_gradient(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Largest error as part of the largest gradient."""
    worst = (actual.cpu().double() - expected).abs().max() / expected.abs().max()
    assert float(worst) <= bound, f"{float(worst):.3g} > {bound:.3g}"
