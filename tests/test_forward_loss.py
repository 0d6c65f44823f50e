"""DiffusionNFT and AWM: the papers' formulas written out in float64, published numbers, edges."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import F64, each_implementation, randn  # noqa: F401
from torch import Tensor

from dancegrpo_fast.ops import (
    NFT_METRICS,
    POLICY_METRICS,
    awm_loss,
    awm_weighting,
    nft_loss,
)

SHAPE = (4, 3, 5, 7)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


class Noised:
    """Four samples at times 0, .3, .8 and 1, with a policy between v_old and v_ref."""

    def __init__(self, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = F64) -> None:
        self.t = f64(0.0, 0.3, 0.8, 1.0)
        x0, eps, old, ref, step = (randn(*shape, seed=s) for s in range(5))
        t = self.t.reshape(-1, *(1 for _ in shape[1:]))
        self.x0, self.eps = x0.to(dtype), eps.to(dtype)
        self.xt = ((1 - t) * x0 + t * eps).to(dtype)
        self.old, self.ref = old.to(dtype), ref.to(dtype)
        self.v = (old + 0.3 * step).to(dtype).requires_grad_()
        self.advantages = f64(1.5, -0.7, 9.0, -2.0)
        self.weights = f64(1.0, 2.0, 3.0, 0.5)

    def nft(self, **changes: object):
        args = {"old_output": self.old, **changes}
        return nft_loss(self.v, self.xt, self.x0, self.t, self.advantages, **args)

    def awm(self, **changes: object):
        args = {"weighting": awm_weighting(self.t + 0.1, "t"), **changes}
        return awm_loss(self.v, self.x0, self.eps, self.advantages, **args)


def paper_nft(
    batch: Noised, beta: float, kl_weight: float, cut: slice = slice(None)
) -> list[Tensor]:
    """Loss of every sample, arXiv 2509.16117 word for word; the weight is a constant."""
    losses = []
    for i in range(len(batch.t)):
        v, old, ref, xt, x0 = (
            tensor[i].double()[..., cut]
            for tensor in (batch.v, batch.old, batch.ref, batch.xt, batch.x0)
        )
        branches = []
        for guided in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
            x0_estimate = xt - batch.t[i] * guided
            scale = (x0_estimate - x0).detach().abs().mean().clamp(min=1e-5)
            branches.append(((x0_estimate - x0) ** 2 / scale).mean())
        r = (batch.advantages[i].clamp(-5, 5) / 5 / 2 + 0.5).clamp(0, 1)
        policy = 5 * (r * branches[0] + (1 - r) * branches[1]) / beta
        losses.append(policy + kl_weight * ((v - ref) ** 2).mean())
    return losses


# ------------------------------------------------------------------ DiffusionNFT


@pytest.mark.parametrize(("beta", "wanted"), [(1.0, 0.33126369), (0.1, 3.02540133)])
def test_nft_published_vector(beta: float, wanted: float) -> None:
    x0, noise, old = f64(0.2, -0.4, 0.6, 1.0), f64(0.1, 0.9, -1.0, 0.5), f64(0.0, 1.2, -1.5, -0.4)
    v, t = old + f64(0.05, -0.02, 0.03, 0.01), 0.6
    out = nft_loss(
        v[None], (0.4 * x0 + t * noise)[None], x0[None], f64(t), f64(1.5),
        old_output=old[None], beta=beta,
    )  # fmt: skip
    assert float(out.loss) == pytest.approx(wanted, abs=1e-8)
    metrics = dict(zip(NFT_METRICS, out.metrics.tolist(), strict=True))
    assert metrics["probability"] == pytest.approx(0.65, rel=1e-12)
    if beta == 1.0:
        assert metrics["positive"] == pytest.approx(0.07752941, abs=1e-8)
        assert metrics["negative"] == pytest.approx(0.04531034, abs=1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.0, 1.7])
@pytest.mark.parametrize("divisor", [None, 7.0])
def test_nft_equals_the_paper(beta: float, divisor: float | None) -> None:
    batch = Noised()
    ours = batch.nft(
        beta=beta, weights=batch.weights, divisor=divisor, kl_weight=0.2, reference_output=batch.ref
    )
    losses = paper_nft(batch, beta, 0.2)
    total = sum(w * loss for w, loss in zip(batch.weights, losses, strict=True))
    total = total / (batch.weights.sum() if divisor is None else divisor)
    assert float(ours.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(ours.loss, batch.v)
    (wanted,) = torch.autograd.grad(total, batch.v)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_nft_is_the_public_scripts_loss() -> None:
    """Mean over the batch of 5 (r L+ + (1 - r) L-) / beta, plus 1e-4 times the mean distance."""
    batch = Noised()
    ours = batch.nft(kl_weight=1e-4, reference_output=batch.ref)
    wanted = torch.stack(paper_nft(batch, 1.0, 1e-4)).mean()
    assert float(ours.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)


def test_nft_metrics_are_sums_over_weighted_samples() -> None:
    batch = Noised()
    weights = f64(1.0, 0.0, 3.0, 0.5)
    batch.ref[1] = float("nan")
    out = batch.nft(weights=weights, divisor=2.0, reference_output=batch.ref)
    on, t = [0, 2, 3], batch.t.reshape(-1, 1, 1, 1)
    v, old = batch.v.detach(), batch.old
    plus, minus = (batch.xt - t * u - batch.x0 for u in (v, 2 * old - v))
    scales = [e.abs().flatten(1).mean(1).clamp(min=1e-5) for e in (plus, minus)]
    losses = [(e**2).flatten(1).mean(1) / s for e, s in zip((plus, minus), scales, strict=True)]
    p = (batch.advantages / 10 + 0.5).clamp(0, 1)
    distance = ((v - batch.ref) ** 2).flatten(1).mean(1)
    per_sample = {
        "samples": torch.ones(4, dtype=F64),
        "weight": weights,
        "policy": weights * 5 * (p * losses[0] + (1 - p) * losses[1]),
        "kl": weights * distance,
        "positive": losses[0],
        "negative": losses[1],
        "positive_scale": scales[0],
        "negative_scale": scales[1],
        "probability": p,
    }
    assert tuple(per_sample) == NFT_METRICS
    wanted = [float(values[on].sum()) for values in per_sample.values()]
    assert out.metrics.tolist() == pytest.approx(wanted, rel=1e-11)
    # kl_weight = 0 only measures: the NaN of the reference reaches neither loss nor gradient.
    assert float(out.loss.detach()) == pytest.approx(wanted[2] / 2, rel=1e-11)
    assert torch.autograd.grad(out.loss, batch.v)[0].isfinite().all()


def test_nft_without_signal_at_the_old_policy_has_no_gradient() -> None:
    """Equal rewards: p = 1/2, and at v = v_old the two branches cancel.

    Each alone is about 1e-2; autograd adds them in another order, and may leave its last bit.
    """
    batch = Noised()
    batch.v = batch.old.clone().requires_grad_()
    batch.advantages = torch.zeros(4, dtype=F64)
    (gradient,) = torch.autograd.grad(batch.nft(beta=0.3).loss, batch.v)
    assert gradient.abs().max() < 1e-16


def test_nft_at_time_zero_nothing_depends_on_the_velocity() -> None:
    batch = Noised()
    (gradient,) = torch.autograd.grad(batch.nft().loss, batch.v)
    assert not gradient[0].any() and gradient[1:].flatten(1).any(1).all()


def test_nft_clips_the_advantage_itself() -> None:
    batch = Noised()
    batch.advantages = f64(5.0, 5.0, -5.0, -5.0)
    at = batch.nft().loss
    batch.advantages = f64(50.0, math.inf, -6.0, -math.inf)
    beyond = batch.nft().loss
    assert torch.equal(at, beyond)
    (gradient,) = torch.autograd.grad(beyond, batch.v)
    # p = 1: only the positive branch pulls, towards x0.
    error = (batch.xt - batch.t[1] * batch.v - batch.x0).detach()[1]
    pull = -5 * 2 * batch.t[1] * error / error.abs().mean() / error.numel() / 4
    assert torch.allclose(gradient[1], pull, rtol=1e-10, atol=1e-16)


def test_nft_minimum_bounds_the_scale_and_its_gradient_is_that_of_a_constant() -> None:
    """An almost exact prediction: mean|e| = 1e-7, so the scale is the minimum, and below it."""
    x0, t = randn(2, 50), f64(0.5, 0.5)
    sign = randn(2, 50, seed=1).sign()
    v = torch.zeros(2, 50, dtype=F64).requires_grad_()
    xt = x0 + torch.tensor([[1e-7], [1e-3]], dtype=F64) * sign
    out = nft_loss(v, xt, x0, t, f64(5.0, 5.0), old_output=torch.zeros(2, 50, dtype=F64))
    scales = dict(zip(NFT_METRICS, out.metrics.tolist(), strict=True))["positive_scale"]
    assert scales == pytest.approx(1e-5 + 1e-3, rel=1e-9)
    (gradient,) = torch.autograd.grad(out.loss, v)
    assert torch.allclose(gradient[0], -5 * 2 * 0.5 * 1e-7 * sign[0] / 50 / 1e-5 / 2, rtol=1e-8)
    # Above the minimum e^2 / mean|e| is linear in the size of e; a scale that was differentiated
    # would give half of this.
    assert torch.allclose(gradient[1], -5 * 2 * 0.5 * sign[1] / 50 / 2, rtol=1e-8)


def test_nft_exact_prediction_is_zero() -> None:
    x0, v = randn(1, 8), torch.zeros(1, 8, dtype=F64).requires_grad_()
    out = nft_loss(v, x0, x0, f64(0.4), f64(2.0), old_output=torch.zeros(1, 8, dtype=F64))
    (gradient,) = torch.autograd.grad(out.loss, v)
    assert float(out.loss.detach()) == 0.0 and not gradient.any()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_nft_nan_is_never_hidden(weight: float) -> None:
    batch = Noised()
    batch.xt[2, 0, 0, 0] = float("nan")
    out = batch.nft(weights=f64(1.0, 1.0, weight, 1.0))
    assert math.isnan(out.loss.detach())
    assert bool(out.metrics.isfinite().all()) == (weight == 0.0)


def test_nft_no_samples() -> None:
    v = torch.zeros(0, 6, dtype=F64).requires_grad_()
    empty = torch.zeros(0, dtype=F64)
    out = nft_loss(v, v.detach(), v.detach(), empty, empty, old_output=v.detach(), divisor=3.0)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0 and v.grad.shape == (0, 6)


def test_nft_box_and_strides() -> None:
    batch = Noised()
    box = ((0, 3), (0, 5), (2, 6))
    losses = paper_nft(batch, 0.5, 0.1, slice(2, 6))
    (wanted,) = torch.autograd.grad(torch.stack(losses).mean(), batch.v)
    leaf = batch.v.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    batch.v, batch.old = leaf, batch.old.repeat_interleave(2, 3)[..., ::2]
    for tensor in (batch.xt, batch.x0, batch.ref):
        tensor[..., 0] = float("nan")
    out = batch.nft(beta=0.5, kl_weight=0.1, reference_output=batch.ref, action_box=box)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nft_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    """105 terms of size 1 in float32: 1e-5 is 20 times their worst-case rounding, 105 eps / 2."""
    batch = Noised(dtype=dtype)
    batch.t = batch.t.float()
    out = batch.nft(beta=0.4)
    wanted = torch.stack(paper_nft(batch, 0.4, 0.0)).mean()
    assert out.loss.dtype == torch.float32
    assert float(out.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(out.loss, batch.v)
    (exact,) = torch.autograd.grad(wanted, batch.v)
    assert gradient.dtype == dtype
    # One rounding to the storage dtype (half an ulp), or its smallest number.
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4
    assert torch.allclose(gradient.double(), exact.double(), rtol=unit, atol=1e-6)


def test_nft_gradcheck() -> None:
    """Under a minimum above every scale the weights are constants for finite differences too."""
    batch = Noised((4, 2, 3))
    assert torch.autograd.gradcheck(
        lambda v: nft_loss(
            v, batch.xt, batch.x0, batch.t, batch.advantages, old_output=batch.old, beta=0.7,
            kl_weight=0.3, reference_output=batch.ref, minimum=50.0, action_box=((0, 2), (1, 3)),
        ).loss,
        batch.v,
    )  # fmt: skip


# ------------------------------------------------------------------ AWM


def paper_log_prob(batch: Noised, form: str, i: int) -> Tensor:
    """The public code's log-prob of one sample; there huber and ghuber always take t."""
    t = batch.t[i] + 0.1
    e = ((batch.v[i] - (batch.eps[i] - batch.x0[i])) ** 2).mean()
    if form == "linear":
        return -e * t
    if form == "huber":
        return -(torch.sqrt(e + 1e-10) - 1e-5) * t
    return -((e + 1e-10) ** 0.25 - (1e-10) ** 0.25) * t / 0.25


@pytest.mark.parametrize("form", ["linear", "huber", "ghuber"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_awm_equals_the_paper(form: str, on_policy: bool) -> None:
    batch = Noised()
    log_prob = torch.stack([paper_log_prob(batch, form, i) for i in range(4)])
    old = log_prob.detach()
    if not on_policy:
        old = old - f64(0.3, -0.3, 0.3, -0.02)  # Rows 0 and 2 above, row 1 below the range.
    rho, a = torch.exp(log_prob - old), batch.advantages
    policy = torch.maximum(-a * rho, -a * rho.clamp(0.8, 1.1))
    distances = [((batch.v - other) ** 2).flatten(1).mean(1) for other in (batch.ref, batch.old)]
    w = batch.weights
    total = (policy + w * (0.2 * distances[0] + 0.7 * distances[1])).sum() / w.sum()
    ours = batch.awm(
        form=form, old_log_prob=None if on_policy else old, clip_range=(0.2, 0.1), weights=w,
        kl_weight=0.2, reference_output=batch.ref, ema_weight=0.7, ema_output=batch.old,
    )  # fmt: skip
    assert torch.allclose(ours.log_prob, log_prob.detach(), rtol=1e-12)
    assert float(ours.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(ours.loss, batch.v)
    (wanted,) = torch.autograd.grad(total, batch.v)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-14)
    metrics = dict(zip(POLICY_METRICS, ours.metrics.tolist(), strict=True))
    assert metrics["old_distance"] == pytest.approx(float((w * distances[1]).sum().detach()))
    assert (metrics["clipped_low"], metrics["clipped_high"]) == ((0, 0) if on_policy else (1, 2))


def test_awm_is_the_public_scripts_loss() -> None:
    """All times of a batch as rows: plain means of objective and of both distances."""
    batch = Noised()
    scaled = batch.advantages.clamp(-5, 5) / 5
    e = ((batch.v - (batch.eps - batch.x0)) ** 2).flatten(1).mean(1)
    wanted = (
        torch.maximum(-scaled, -scaled)
        + 3e-3 * ((batch.v - batch.ref) ** 2).flatten(1).mean(1)
        + 1.0 * ((batch.v - batch.old) ** 2).flatten(1).mean(1)
    ).mean()
    batch.advantages = scaled
    ours = batch.awm(
        weighting=awm_weighting(batch.t, "uniform"), kl_weight=3e-3, reference_output=batch.ref,
        ema_weight=1.0, ema_output=batch.old,
    )  # fmt: skip
    assert float(ours.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert torch.allclose(ours.log_prob, -e.detach(), rtol=1e-12)


def test_awm_ema_weight_of_zero_only_measures() -> None:
    batch = Noised()
    plain = batch.awm()
    batch.old[0] = float("nan")
    measured = batch.awm(ema_output=batch.old)
    assert torch.equal(plain.loss, measured.loss) and math.isnan(measured.metrics[-1])
    assert torch.equal(
        torch.autograd.grad(plain.loss, batch.v)[0], torch.autograd.grad(measured.loss, batch.v)[0]
    )


@pytest.mark.parametrize("form", ["linear", "huber", "ghuber"])
def test_awm_exact_prediction_has_a_finite_gradient(form: str) -> None:
    x0, eps = randn(1, 20), randn(1, 20, seed=1)
    v = (eps - x0).requires_grad_()
    out = awm_loss(v, x0, eps, f64(1.0), weighting=f64(0.5), form=form)
    assert abs(float(out.log_prob)) < 1e-12
    (gradient,) = torch.autograd.grad(out.loss, v)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("form", ["linear", "huber", "ghuber"])
def test_awm_gradcheck(form: str) -> None:
    batch = Noised((4, 2, 3))
    assert torch.autograd.gradcheck(
        lambda v: awm_loss(
            v, batch.x0, batch.eps, batch.advantages, weighting=batch.t + 0.1, form=form,
            old_log_prob=f64(-0.4, -0.5, -1.0, -1.5), clip_range=0.9, kl_weight=0.2,
            reference_output=batch.ref, ema_weight=0.5, ema_output=batch.old,
        ).loss,
        batch.v,
    )  # fmt: skip


def test_awm_weighting() -> None:
    t = f64(0.0, 0.5, 1.0)
    assert awm_weighting(t, "uniform").tolist() == [1, 1, 1]
    assert awm_weighting(t, "t").tolist() == [0, 0.5, 1]
    assert awm_weighting(t, "t^2").tolist() == [0, 0.25, 1]
