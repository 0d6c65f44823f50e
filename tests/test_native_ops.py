"""The native kernels (csrc/) against float64 formulas.

Every input's value is exact in float64, so the only difference is the kernels' own rounding.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from native_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    FLOAT32,
    HALF_STORE,
    Case,
    boxed,
    check_policy,
    close,
    formula,
    make,
    mean,
    native_gradient,
    native_policy,
    parts_of,
)  # fmt: skip
from ops_cases import randn

# ------------------------------------------------------------------ values


@pytest.mark.parametrize("dtypes", [
    (BF16, F32, F32, BF16, F16), (F32, BF16, F16, F32, F32), (F16, F16, BF16, F16, BF16),
    (F32,) * 5, (F64,) * 5, (F32, F32, F64, F32, F32), (BF16, F64, BF16, F16, F32),
    (F32, F32, F32, F64, BF16),
])  # fmt: skip
@pytest.mark.parametrize("dims", [(7,), (3, 17), (3, 5, 7), (2, 3, 5, 7), (2, 2, 3, 3, 5)])
def test_policy_loss_over_dtypes_and_ranks(native_module, dtypes, dims) -> None:
    c = make(dims=dims, dtypes=dtypes)
    weights = torch.arange(28).float()
    check_policy(
        native_module, c, rewards=2, ref=True, kl_weight=0.04, weights=weights,
        u=torch.tensor([0.5, 1.5]),
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1025, 4095, 4096, 4097, 9001])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_policy_loss_over_sizes(native_module, n, dtype) -> None:
    check_policy(native_module, make((2, 0, 1), (n,), (dtype,) * 5), rewards=3)


@pytest.mark.parametrize("counts", [(1,), (40,), (0, 0, 33), (1, 1, 1, 1), (24, 0, 3, 1, 0)])
def test_policy_loss_over_families(native_module, counts) -> None:
    """Also more children than share one load, and siblings with equal and with other a, b."""
    for shared in (False, True):
        c = make(counts, (5, 823), shared=shared)
        check_policy(native_module, c, ref=True, kl_weight=0.1, divisor=7.0)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("box", [None, ((1, 3), (0, 5), (2, 6)), ((0, 3), (4, 5), (0, 7))])
def test_ratio_norm_penalty_and_power(native_module, dtype, box) -> None:
    c = make(dtypes=(dtype,) * 5)
    old_lp = formula(c.double(), parts_of(28, 1).double(), box=box)[1]
    old_lp = (old_lp + 0.3 * randn(28, seed=5)).to(dtype)
    check_policy(native_module, c, old_lp=old_lp, box=box)
    check_policy(native_module, c, old_lp=old_lp, old=True, ref=True, kl_weight=0.2, box=box)
    for power in (0.5, 1.0, 2.0):
        check_policy(
            native_module, c, old=True, old_penalty=0.7, power=power, ref=True, kl_weight=0.3,
            box=box,
        )  # fmt: skip


def test_advantages_are_split_by_sign(native_module) -> None:
    c = make()
    flat = randn(28, 2, dtype=F32)
    both = torch.stack((flat.clamp(min=0), flat.clamp(max=0)), -1)
    for given, same in ((flat, both), (flat[:, 0], both[:, :1])):
        results = [native_policy(native_module, c, advantages) for advantages in (given, same)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_upstream_per_child(native_module) -> None:
    """The backward of transition_log_prob: scales (2 w b / n, 0, 0)."""
    c = make(dtypes=(F64,) * 5)
    d = c._replace(m=c.m.clone().requires_grad_(), table=c.table.double())
    upstream = randn(28, seed=3)
    lp = formula(d, parts_of(28, 1).double())[1]
    lp.backward(upstream)
    n = c.m[0].numel()
    scales = torch.zeros(28, 3, dtype=F64)
    scales[:, 0] = 2 * d.table[:, 3] * d.table[:, 1] / n
    close(native_gradient(native_module, c, scales, upstream=upstream), d.m.grad, 1e-12)
    ours = native_module.transition_log_prob(c.m, c.x, c.y, c.table, c.offsets, None, 1)
    close(ours, lp.detach(), 1e-12)


@pytest.mark.parametrize("dtypes", list(itertools.product((BF16, F32, F64), (F16, F32, F64))))
@pytest.mark.parametrize("out", DTYPES)
def test_sample_against_formula(native_module, dtypes, out) -> None:
    c = make(dtypes=(*dtypes, F32, F32, F32)).double()
    m, x = c.m.to(dtypes[0]), c.x.to(dtypes[1])
    noise = randn(28, 3, 5, 7, seed=8, dtype=F32)
    box = ((1, 3), (0, 4), (2, 7))
    parent = torch.repeat_interleave(torch.arange(4), c.offsets.diff())
    a, b, s = (c.table[:, i].reshape(-1, 1, 1, 1) for i in range(3))
    exact = x.double()[parent].clone()
    boxed(exact, box)[:] = boxed(a * exact + b * m.double()[parent] + s * noise.double(), box)
    y, lp = native_module.sample_transition(
        m, x, c.table.float(), None, noise, c.offsets, box, out, 1
    )
    # Three roundings of terms below 8, then the store; float16: half the spacing of subnormals.
    bound = 3 * 8 * (2**-53 if F64 in dtypes else 2**-24) + 2**-25 * (out == F16)
    bound = bound + HALF_STORE[out] * exact.abs() * 1.01
    assert y.dtype == out and bool(((y.double() - exact).abs() <= bound).all())
    again = Case(m, x, y, c.table.float(), c.offsets, m, m).double()
    expected = formula(again, parts_of(28, 1).double(), box=box)[1]
    close(lp, expected, FLOAT32, 1 + expected.abs())
    if out != F64 or F64 in dtypes:  # a float64 y makes the log-prob compute in float64
        assert torch.equal(
            lp, native_module.transition_log_prob(m, x, y, c.table.float(), c.offsets, box, 2)
        )


# ------------------------------------------------------------------ forward process


def nft(c: Case, sigmas, advantages, weights, beta, adv_max, kl_weight, minimum, box):
    sigma = sigmas.reshape(-1, *[1] * (c.m.dim() - 1))
    branches = []
    for v in ((1 - beta) * c.old + beta * c.m, (1 + beta) * c.old - beta * c.m):
        e = boxed(c.x - sigma * v - c.y, box)
        scale = mean(e.detach().abs()).clamp(min=minimum)
        branches.append((mean(e**2) / scale, scale))
    (plus, w_plus), (minus, w_minus) = branches
    p = (advantages / (2 * adv_max) + 0.5).clamp(0, 1)
    policy = weights * adv_max * (p * plus + (1 - p) * minus) / beta
    kl = weights * mean(boxed(c.m - c.ref, box) ** 2)
    metrics = torch.stack(
        (torch.ones_like(p), weights, policy, kl, plus, minus, w_plus, w_minus, p)
    )  # fmt: skip
    loss = (policy + kl_weight * kl).sum() / weights.sum()
    return loss, (metrics * (weights > 0)).sum(1)


@pytest.mark.parametrize("dtypes", [(F64,) * 5, (F32,) * 5, (BF16, F32, F16, F32, BF16)])
@pytest.mark.parametrize("box", [None, ((1, 3), (0, 5), (2, 6))])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_against_formula(native_module, dtypes, box, beta) -> None:
    """In the usual form v+- = (1 -+ beta) v_old +- beta v; the kernel expands about v."""
    c = make((1,) * 5, dtypes=dtypes)
    sigmas = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])
    advantages, weights = torch.tensor([1.5, -7.0, 9.0, 0.0, -2.0]), torch.tensor([1.0, 2, 0, 1, 3])
    n, bound = native_module, 1e-10 if F64 in dtypes else FLOAT32
    d = c.double()._replace(m=c.m.detach().double().clone().requires_grad_())
    loss, metrics = nft(
        d, sigmas.double(), advantages.double(), weights.double(), beta, 5.0, 0.1, 1e-5, box
    )
    loss.backward()
    ours = n.nft_loss(
        c.m, c.x, c.y, sigmas, advantages, weights, c.ref, c.old, beta, 5.0, None, 0.1, 1e-5, box,
        True, 2,
    )  # fmt: skip
    close(ours[0], loss.detach(), 4 * bound)
    close(ours[1], metrics.detach(), 4 * bound, 1 + metrics.detach().abs())
    table = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).repeat(5, 1)
    table[:, 1] = -sigmas
    case = c._replace(table=table, offsets=torch.arange(6))
    dm = native_gradient(n, case, ours[2], ref=True, old=True, box=box)
    limit = HALF_STORE[c.m.dtype] * d.m.grad.abs() * 1.01 + 32 * bound * d.m.grad.abs().max()
    assert bool(((dm.double() - d.m.grad).abs() <= limit).all())


@pytest.mark.parametrize("beta, expected", [(1.0, 0.33126369), (0.1, 3.02540133)])
def test_nft_published_vector(native_module, beta, expected) -> None:
    """DiffusionNFT's own code on four numbers."""
    x0, noise, old, step = (
        torch.tensor([row], dtype=F64)
        for row in (
            [0.2, -0.4, 0.6, 1], [0.1, 0.9, -1, 0.5], [0, 1.2, -1.5, -0.4],
            [0.05, -0.02, 0.03, 0.01],
        )
    )  # fmt: skip
    t = torch.tensor([0.6], dtype=F64)
    loss, metrics, scales = native_module.nft_loss(
        old + step, (1 - t) * x0 + t * noise, x0, t, torch.tensor([1.5]), None, None, old, beta,
        5.0, None, 0.0, 1e-5, None, False, 1,
    )  # fmt: skip
    assert scales is None
    assert abs(float(loss) - expected) < 1e-8 and float(metrics[8]) == pytest.approx(0.65)
    if beta == 1:
        assert metrics[4:6].tolist() == pytest.approx([0.07752941, 0.04531034], abs=1e-8)
