"""The loss, gradient and forward-process kernels in the interpreter, against float64 and autograd.

Bounds. A residual of size s >= .1 carries the rounding of latents of size 1 to 4: 2^-23 / .1, about
1e-6 of itself; over a mean the errors average out. A log-prob is w e of order 1: 1e-6 absolute,
with a margin 5e-6; rho and what is linear in it the same. A gradient is relative to its largest
element: 1e-6 from r, the same from the factor: 5e-6; half an ulp of the model's dtype on top.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    F64,
    Case,
    add_chunks,
    assert_close,
    assert_gradient,
    case,
    coefficients,
    log_prob,
    log_prob_bits,
    nft,
    parents,
    policy,
    randn,
)

from dancegrpo_fast.ops import kernels
from dancegrpo_fast.ops.kernels import finalise

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOUND = 5e-6
HALF_ULP = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 0.0}
CLIP = (1e-2, 2e-2)


def fused(c: Case, advantages: torch.Tensor, *, weights=None, u=None, ref=None, old=None,
          divisor=None, kl_weight=0.0, box=None, power=1.0, old_penalty=None, on_policy=False,
          scales=True):  # fmt: skip
    return kernels.policy_loss(
        c.m, c.x, c.y, c.table, advantages, None if on_policy else c.old_log_prob, weights,
        c.offsets, u, ref, old, *CLIP, divisor, kl_weight, box, power, old_penalty, scales,
    )  # fmt: skip


def compare(c: Case, advantages: torch.Tensor, upstream: float = 1.0, **options) -> None:
    """Loss, log-probs, metrics and gradient against the closed form."""
    loss, lp, metrics, scales = fused(c, advantages, **options)
    m = c.m.double().requires_grad_()
    expected = policy(m, c, advantages, low=CLIP[0], high=CLIP[1], **options)
    size = float(expected[2].detach()[:3].abs().max())  # sums over children grow with them
    assert_close(lp, expected[1], BOUND, "log-prob")
    assert_close(loss, expected[0], BOUND * max(1.0, size), "loss")
    assert_close(metrics, expected[2], BOUND * max(1.0, size), "metrics")
    box = options.get("box")
    if options.get("power", 1.0) == 1:
        assert torch.equal(lp, log_prob_bits(c.m, c.x, c.y, c.table, c.offsets, box))
    (expected[0] * upstream).backward()
    dm = kernels.transition_gradient(
        torch.tensor(upstream), scales, c.m, c.x, c.y, c.table, c.offsets,
        options.get("ref"), options.get("old"), box,
    )  # fmt: skip
    assert dm.dtype == c.m.dtype and dm.stride() == torch.empty_like(c.m).stride()
    assert_gradient(dm, m.grad, BOUND + HALF_ULP[c.m.dtype])


@pytest.mark.parametrize(
    ("model", "latent"), [(BF16, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16)]
)
@pytest.mark.parametrize("dims", [(5, 16), (3, 5, 7), (2, 3, 5, 8)])
def test_dtypes_and_ranks(dims: tuple[int, ...], model: torch.dtype, latent: torch.dtype) -> None:
    c = case(3, (0, 1, 3), dims, model, latent)
    compare(c, randn(4, seed=9), weights=torch.tensor([1.0, 2, 0, 3]))


@pytest.mark.parametrize("rewards", [1, 2, 3])
@pytest.mark.parametrize("parts", [False, True])
def test_rewards_and_parts(rewards: int, parts: bool) -> None:
    c = case(3, (2, 5, 1))
    advantages = randn(8, rewards, seed=5)
    if parts:
        advantages = torch.stack((advantages.clamp(min=0) + 0.3, advantages.clamp(max=0)), -1)
    compare(
        c, advantages, u=torch.linspace(0.5, 1.5, rewards), divisor=7.0, ref=c.ref, kl_weight=0.3,
        weights=torch.arange(1.0, 9.0), upstream=2.5,
    )  # fmt: skip


BOX = ((0, 3), (1, 4), (2, 7))
TERMS = {
    "plain": {},
    "on policy": {"on_policy": True},
    "reference measured": {"ref": True},
    "reference": {"ref": True, "kl_weight": 0.5},
    "ratio norm": {"old": True},
    "ratio norm and reference": {"old": True, "ref": True, "kl_weight": 0.5},
    "old penalty": {"old": True, "old_penalty": 0.7, "ref": True, "kl_weight": 0.5},
    "power": {"power": 0.5},
    "power above 1, old penalty": {"power": 1.7, "old": True, "old_penalty": 0.7},
}


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str, box: object) -> None:
    c = case(2, (3, 2), (3, 5, 7), FP32, box=box)
    options = {**TERMS[name], "box": box}
    for key, value in (("ref", c.ref), ("old", c.old)):
        if options.pop(key, False):
            options[key] = value
    if "power" in options:  # the ratios of this link, not of the other
        lp = log_prob(c.m.double(), c.x, c.y, c.table, c.offsets, box, options["power"])
        c = c._replace(old_log_prob=(lp - torch.linspace(-3e-2, 3e-2, 5, dtype=F64)).float())
    compare(c, randn(5, 2, seed=3), weights=torch.tensor([1.0, 2, 1, 0.5, 3]), **options)


def test_advantage_weighted_matching_as_it_calls() -> None:
    # m = v, x = x0, y = noise: table rows a = 1, b = 1, w = weight(t), c = 0, k = 1, s = 0.
    c = case(3, None, (4, 6, 5), BF16)
    table = torch.zeros(3, 8)
    table[:, :2], table[:, 3], table[:, 5] = 1, torch.tensor([0.5, 1, 2]), 1
    compare(
        c._replace(table=table), randn(3, seed=3), power=0.5, old=c.old, old_penalty=0.2, ref=c.ref,
        kl_weight=0.1, on_policy=True,
    )  # fmt: skip


def test_clip_boundaries_and_nan() -> None:
    c = case(1, (4,), (3, 5, 7), FP32)
    lp = kernels.transition_log_prob(c.m, c.x, c.y, c.table, c.offsets, None)
    same = c._replace(old_log_prob=lp)  # rho = 1 exactly
    _, _, metrics, scales = fused(same, torch.ones(4))
    assert metrics[5] == 4 and metrics[6] == 0 and metrics[8] == metrics[9] == 0
    assert (scales[:, 0] != 0).all()
    far = c._replace(old_log_prob=lp - torch.tensor([1.0, 1, -1, -1]))
    _, _, metrics, scales = fused(far, torch.tensor([1.0, -1, 1, -1]))
    assert metrics[8] == 2 and metrics[9] == 2
    # Held: a positive advantage above the range, a negative one below it.
    assert (scales[:, 0] == 0).tolist() == [True, False, False, True]
    y = c.y.clone()
    y[3, 0, 0, 0] = float("nan")
    used = torch.tensor([1.0, 1, 1, 0])
    loss, lp, metrics, _ = fused(c._replace(y=y), used, weights=used)
    assert loss.isnan() and lp[3].isnan() and metrics.isfinite().all()


def test_ratio_is_accurate_where_it_overflows_and_where_it_vanishes() -> None:
    steps = torch.tensor([0.0, 1e-7, -1e-6, 1e-3, -0.5, 5, 80, 88.5, 89.5, -80, -85, -200, 300])
    c = case(1, (len(steps),), (2, 3), FP32)
    lp = kernels.transition_log_prob(c.m, c.x, c.y, c.table, c.offsets, None)
    one = torch.zeros(len(steps))
    for i, step in enumerate(steps):
        one.zero_()[i] = 1
        c = c._replace(old_log_prob=lp - step)
        rho = fused(c, one, weights=one)[2][5].double()
        exact = (lp - (lp - step))[i].double().exp()
        if exact > 3.5e38:
            assert rho == math.inf
        elif exact < 1e-37:
            assert rho < 1e-37
        else:
            # exp to 1.5 ulp and the reduction's product to another.
            assert abs(rho / exact - 1) < 2.0**-22, (step, rho, exact)


def test_gradient_edges() -> None:
    c = case(3, (2, 0, 1), (3, 5, 7), FP32)
    nan = c.m.clone()
    nan[1] = float("nan")
    ref = torch.full_like(c.ref, float("nan"))
    scales = torch.zeros(3, 3)
    scales[:, 0] = torch.tensor([1.0, 2, 3])
    upstream = torch.tensor(2.0).expand(3)
    args = (c.x, c.y, c.table, c.offsets)
    dm = kernels.transition_gradient(upstream, scales, nan, *args, ref, None, None)
    assert not dm[1].any()  # no children: 0, whatever the model said
    a, b = c.table[:, 0, None, None, None], c.table[:, 1, None, None, None]
    r = c.y - (a * c.x[parents(3, c.offsets)] + b * c.m[parents(3, c.offsets)])
    torch.testing.assert_close(dm[0], 2 * r[0] + 4 * r[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(dm[2], 6 * r[2], atol=1e-5, rtol=0)
    boxed = kernels.transition_gradient(upstream, scales, nan, *args, ref, None, BOX)
    inside = torch.zeros(3, 5, 7, dtype=torch.bool)
    inside[tuple(slice(*pair) for pair in BOX)] = True
    assert torch.equal(boxed[:, inside], dm[:, inside]) and not boxed[:, ~inside].any()
    lost = torch.full_like(scales, float("nan"))  # of a NaN loss: the fixed part stays 0
    boxed = kernels.transition_gradient(upstream, lost, c.m, *args, ref, None, BOX)
    assert boxed[::2, inside].isnan().all() and not boxed[:, ~inside].any()


def test_fp16_gradient_is_scaled_before_it_is_rounded() -> None:
    c = case(1, None, (4, 8), FP16)
    scales = torch.tensor([[1e-9, 0, 0]])
    args = (scales, c.m, c.x, c.y, c.table, None, None, None, None)
    scaled = kernels.transition_gradient(torch.tensor(65536.0), *args)
    assert scaled.count_nonzero() == scaled.numel()
    assert not kernels.transition_gradient(torch.tensor(1.0), *args).any()
    assert kernels.transition_gradient(torch.tensor(1e20), *args).isinf().all()


def test_upstream_per_child_is_the_gradient_of_the_log_prob() -> None:
    c = case(2, (3, 1), (3, 5, 7), BF16)
    upstream = randn(4, 3, seed=8)[:, 1]
    n = 105
    scales = torch.zeros(4, 3)
    scales[:, 0] = 2 * c.table[:, 3] * c.table[:, 1] / n
    dm = kernels.transition_gradient(
        upstream, scales, c.m, c.x, c.y, c.table, c.offsets, None, None, None
    )
    m = c.m.double().requires_grad_()
    (log_prob(m, c.x, c.y, c.table, c.offsets, None) * upstream.double()).sum().backward()
    assert_gradient(dm, m.grad, BOUND + HALF_ULP[BF16])


def test_strides_change_no_bit() -> None:
    c = case(2, (3, 2), (4, 6, 16), BF16)
    advantages = randn(5, seed=1)
    loss, lp, metrics, scales = fused(c, advantages, ref=c.ref, kl_weight=0.1)
    strided = c._replace(
        m=c.m.transpose(1, 3).contiguous().transpose(1, 3),
        x=torch.stack((c.x, c.x * 0), 1)[:, 0],
        y=c.y.transpose(1, 2).contiguous().transpose(1, 2),
    )
    again = fused(strided, advantages, ref=c.ref, kl_weight=0.1)
    assert all(torch.equal(p, q) for p, q in zip((loss, lp, metrics, scales), again, strict=True))
    gradients = [
        kernels.transition_gradient(
            torch.tensor(1.0), scales, each.m, each.x, each.y, c.table, c.offsets, c.ref, None, None
        )
        for each in (c, strided)
    ]
    assert torch.equal(*gradients) and gradients[1].stride() == strided.m.stride()


def test_several_chunks_and_many_children() -> None:
    c = case(2, (70, 3), (3, 1367), BF16)
    compare(c, randn(73, seed=1), ref=c.ref, kl_weight=0.1)


@pytest.mark.parametrize("chunks", [1, 33, 300, 2500])
def test_chunk_sums_are_added_in_the_stated_order(chunks: int) -> None:
    sums, table = randn(300 if chunks == 33 else 5, chunks).abs(), coefficients(300)
    table = table[: len(sums)]
    e = torch.from_numpy(add_chunks(sums.numpy())) / torch.tensor(1000.0)
    expected = table[:, 4] - table[:, 3] * e
    assert torch.equal(finalise.log_prob(sums, table, 1000), expected)


# ------------------------------------------------------------------ DiffusionNFT


def compare_nft(m, x, y, sigmas, advantages, weights, ref, old, beta, kl_weight, box) -> None:
    adv_max, divisor, minimum = 5.0, None, 1e-5
    rest = (beta, adv_max, divisor, kl_weight, minimum, box)
    loss, metrics, scales = kernels.nft_loss(
        m, x, y, sigmas, advantages, weights, ref, old, *rest, True
    )
    m64 = m.double().requires_grad_()
    expected, expected_metrics = nft(m64, x, y, sigmas, advantages, weights, ref, old, *rest)
    # adv_max / beta multiplies errors of a few 2^-24 in L, which is of order 1.
    bound = 1e-6 * max(1.0, adv_max / beta)
    assert_close(loss, expected, bound, "loss")
    assert_close(metrics, expected_metrics, bound, "metrics")
    expected.backward()
    table = torch.zeros(len(m), 8)
    table[:, 0], table[:, 1] = 1, -sigmas
    dm = kernels.transition_gradient(
        torch.tensor(1.0), scales, m, x, y, table, None, ref, old, box
    )
    assert_gradient(dm, m64.grad, BOUND + HALF_ULP[m.dtype])


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("model", [BF16, FP32])
@pytest.mark.parametrize(("beta", "kl_weight"), [(1.0, 0.0), (0.1, 0.3)])
def test_nft(box: object, model: torch.dtype, beta: float, kl_weight: float) -> None:
    c = case(4, None, (3, 5, 7), model)
    compare_nft(
        c.m, c.x, c.y, torch.tensor([0.0, 0.3, 0.7, 1.0]), torch.tensor([-9.0, 0.5, 3, 9]),
        torch.tensor([1.0, 2, 0, 1]), c.ref, c.old, beta, kl_weight, box,
    )  # fmt: skip


def test_nft_published_values() -> None:
    x0 = torch.tensor([[0.2, -0.4, 0.6, 1]])
    noise = torch.tensor([[0.1, 0.9, -1, 0.5]])
    old = torch.tensor([[0, 1.2, -1.5, -0.4]])
    v = old + torch.tensor([[0.05, -0.02, 0.03, 0.01]])
    sigma = torch.tensor([0.6])
    x = 0.4 * x0 + 0.6 * noise
    for beta, value in ((1.0, 0.33126369), (0.1, 3.02540133)):
        loss, metrics, _ = kernels.nft_loss(
            v, x, x0, sigma, torch.tensor([1.5]), None, None, old, beta, 5.0, None, 0.0, 1e-5, None,
            False,
        )  # fmt: skip
        assert abs(float(loss) - value) < 2e-6 * max(1, value)
        if beta == 1:
            assert_close(metrics[4:6], torch.tensor([0.07752941, 0.04531034], dtype=F64), 1e-7)
            assert float(metrics[8]) == pytest.approx(0.65)


def test_nft_exact_prediction_takes_the_minimum() -> None:
    x, y, sigma = randn(1, 4, 4), randn(1, 4, 4, seed=1), torch.tensor([0.5])
    v = (x - y) / 0.5
    loss, metrics, scales = kernels.nft_loss(
        v, x, y, sigma, torch.ones(1), None, None, v, 1.0, 5.0, 1.0, 0.0, 1e-3, None, True
    )
    assert metrics[6] == metrics[7] == pytest.approx(1e-3) and float(loss) < 1e-6
    assert scales.isfinite().all()


def test_coefficients_are_what_the_bounds_assume() -> None:
    assert float(coefficients(100)[:, 2].min()) >= 0.1
