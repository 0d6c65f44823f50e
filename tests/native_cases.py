"""Batches for the tests of the native kernels, and the losses as formulas in float64."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from ops_cases import randn
from torch import Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, F16, F32, F64)
FLOAT32 = 3e-5
"""Relative error of a float32 mean: a lane adds 256 squares of a chunk and four halvings follow,
each addition off by at most 2^-24 of the sum, 260 * 2^-24 = 1.6e-5; the rest is for the three
roundings in each residual, which is not small against its terms here."""
# Half a unit in the last place, relative to the value.
HALF_STORE = {BF16: 2**-8, F16: 2**-11, F32: 2**-24, F64: 2**-53}


class Case(NamedTuple):
    m: Tensor
    x: Tensor
    y: Tensor
    table: Tensor
    offsets: Tensor
    ref: Tensor
    old: Tensor

    def double(self) -> Case:
        return Case(*(t.double() if t.is_floating_point() else t for t in self))


def make(counts=(1, 3, 0, 24), dims=(3, 5, 7), dtypes=(F32,) * 5, seed=0, shared=False) -> Case:
    """A batch whose dtypes are those of (m, x, y, ref, old); w e is about 1."""
    states, children = len(counts), sum(counts)
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    parent = torch.repeat_interleave(torch.arange(states), torch.tensor(counts))
    m = randn(states, *dims, seed=seed).to(dtypes[0])
    x = randn(states, *dims, seed=seed + 1).to(dtypes[1])
    ones = torch.ones(children, dtype=F64)
    # Of siblings a or b changes, not both: the kernels keep a x + b m while neither does.
    child = torch.arange(children) * (not shared)
    of_a, of_b = child // 2 * 0.004, (child + 1) // 2 * 0.004
    table = torch.stack(
        (1 - of_a, -0.2 - of_b, 0.5 * ones, 3 + of_b, 0.3 - of_b, 2 * ones, ones, ones), 1
    ).float()
    rows = table.double().reshape(children, 8, *[1] * len(dims))
    center = rows[:, 0] * x.double()[parent] + rows[:, 1] * m.double()[parent]
    y = (center + 0.5 * randn(children, *dims, seed=seed + 2)).to(dtypes[2])
    ref = (m.double() + 0.3 * randn(states, *dims, seed=seed + 3)).to(dtypes[3])
    old = (m.double() + 0.1 * randn(states, *dims, seed=seed + 4)).to(dtypes[4])
    return Case(m, x, y, table, offsets, ref, old)


def boxed(t: Tensor, box) -> Tensor:
    return t if box is None else t[(slice(None), *(slice(a, b) for a, b in box))]


def mean(t: Tensor) -> Tensor:
    return t.flatten(1).mean(1)


def link(e: Tensor, power: float) -> Tensor:
    return e if power == 1 else ((e + 1e-10) ** power - 1e-10**power) / power


def formula(
    c: Case, parts, old_lp=None, weights=None, u=None, ref=False, old=False, low=0.1, high=0.2,
    divisor=None, kl_weight=0.0, box=None, power=1.0, old_penalty=None,
):  # fmt: skip
    """(loss, log-probs, metrics) as the papers write them, in float64, differentiable in c.m."""
    parent = torch.repeat_interleave(torch.arange(len(c.m)), c.offsets.diff())
    a, b, s, w, const, k = (
        c.table[:, i].reshape(-1, *[1] * (c.m.dim() - 1)) for i in range(6)
    )  # fmt: skip
    residual = boxed(c.y - (a * c.x[parent] + b * c.m[parent]), box)
    b, s, w, const, k = (v.flatten() for v in (b, s, w, const, k))
    lp = const - w * link(mean(residual**2), power)
    d_ref = mean(boxed(c.m - c.ref, box) ** 2)[parent] if ref else torch.zeros_like(lp)
    d_old = mean(boxed(c.m - c.old, box) ** 2)[parent] if old else torch.zeros_like(lp)
    log_rho = lp - (lp.detach() if old_lp is None else old_lp)
    if old and old_penalty is None:
        log_rho = (log_rho + w * b**2 * d_old) * s
    rho = log_rho.exp()
    u = torch.ones(parts.shape[1], dtype=F64) if u is None else u
    weights = torch.ones_like(lp) if weights is None else weights
    free, bound = -parts * rho[:, None, None], -parts * rho.clamp(1 - low, 1 + high)[:, None, None]
    surrogate = (torch.maximum(free, bound).sum(-1) * u).sum(-1)
    kl = weights * k * d_ref
    penalty = weights * d_old
    total = surrogate.sum() + kl_weight * kl.sum() + (old_penalty or 0) * penalty.sum()
    deviation = rho - 1
    metrics = torch.stack([
        torch.ones_like(lp), weights, surrogate, kl, lp, rho, deviation.abs(), deviation**2,
        (rho < 1 - low).double(), (rho > 1 + high).double(), penalty,
    ])  # fmt: skip
    metrics = (metrics * (weights > 0)).sum(1)
    return total / (weights.sum() if divisor is None else divisor), lp, metrics


def parts_of(children: int, rewards: int) -> Tensor:
    values = randn(children, rewards, 3, seed=9)
    return torch.stack((values.clamp(min=0).sum(-1), values.clamp(max=0).sum(-1)), -1).float()


def close(ours: Tensor, exact: Tensor, bound: float, scale: float | Tensor | None = None) -> None:
    scale = exact.abs().max() if scale is None else scale
    error = ((ours.double() - exact).abs() / scale).max() if exact.numel() else torch.zeros(())
    assert error <= bound, (float(error), bound)


def native_policy(n, c: Case, parts, *, old_lp=None, weights=None, u=None, ref=False, old=False,
                  low=0.1, high=0.2, divisor=None, kl_weight=0.0, box=None, power=1.0,
                  old_penalty=None, scales=True, threads=1):  # fmt: skip
    return n.policy_loss(
        c.m, c.x, c.y, c.table, parts, old_lp, weights, c.offsets, u, c.ref if ref else None,
        c.old if old else None, low, high, divisor, kl_weight, box, power, old_penalty, scales,
        threads,
    )  # fmt: skip


def native_gradient(n, c: Case, scales, *, upstream=1.0, ref=False, old=False, box=None, threads=1):
    return n.transition_gradient(
        torch.as_tensor(upstream), scales, c.m, c.x, c.y, c.table, c.offsets,
        c.ref if ref else None, c.old if old else None, box, threads,
    )  # fmt: skip


def check_policy(n: ModuleType, c: Case, rewards: int = 1, box=None, **settings) -> None:
    """Loss, log-probs, metrics and gradient against the formula."""
    bound = 1e-10 if F64 in [t.dtype for t in (c.m, c.x, c.y)] else FLOAT32
    for name in ("ref", "old"):
        if settings.get(name) and getattr(c, name).dtype == F64:
            bound = 1e-10
    children = len(c.table)
    parts = parts_of(children, rewards)
    d = c.double()._replace(m=c.m.detach().double().clone().requires_grad_())
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in settings.items()}
    loss, lp, metrics = formula(d, parts.double(), box=box, **exact)
    loss.backward()
    ours = native_policy(n, c, parts, box=box, **settings)
    # Rounding 1e-10 + e to float32 matters to a small e only; w e is about 1.
    close(ours[1], lp.detach(), bound, 1 + lp.detach().abs())
    terms = parts.abs().sum().double() / (float(loss.detach().abs()) or 1)  # what cancels
    close(ours[0], loss.detach(), 4 * bound * (1 + float(terms)))
    close(ours[2], metrics.detach(), 4 * bound, 1 + metrics.detach().abs() + parts.abs().sum())
    dm = native_gradient(
        n, c, ours[3], ref=settings.get("ref", False), old=settings.get("old", False), box=box
    )
    assert dm.dtype == c.m.dtype
    exact_dm = d.m.grad
    # Every rho, and so every slope, is off by what its log-prob is off.
    slack = 8 * bound * exact_dm.abs().max()
    # float16: half the spacing of its subnormals.
    tiny = 2**-25 if c.m.dtype == F16 else 0.0
    error = (dm.double() - exact_dm).abs()
    limit = HALF_STORE[c.m.dtype] * exact_dm.abs() * 1.01 + slack + tiny
    assert bool((error <= limit).all()), float((error - limit).max())
    if box is not None:
        outside = torch.ones_like(dm, dtype=torch.bool)
        boxed(outside, box)[:] = False
        assert not dm[outside].any()
