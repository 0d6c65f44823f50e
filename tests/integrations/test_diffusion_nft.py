"""DiffusionNFT: its solver's steps, its loss, its call sites and what they cost."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from counting import Counts
from formulas import assert_no_worse, normal
from stand_ins import Truth, check, packages
from torch import Tensor

from dancegrpo_fast import dance_schedule
from dancegrpo_fast.integrations import diffusion_nft as nft

SIGMAS = torch.tensor(dance_schedule(8, 3.0).sigmas, dtype=torch.float32)
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
LEVELS = {"flow": 0.7, "dance": 0.3, "ddim": 0.6}
STEPS = {"flow": nft.flow_grpo_step, "dance": nft.dance_grpo_step, "ddim": nft.ddim_step}
MIXED = torch.tensor([0, 6, 3])


def call(kind: str, m: Tensor, x: Tensor, index: Any, y: Tensor | None, **options: Any) -> tuple:
    return STEPS[kind](m, x, LEVELS[kind], SIGMAS, index, y, **options)


class FlowDDIM(Truth):
    """DDIM's own equations, in its own variables: latents and noise levels of unit norm."""

    def __init__(
        self, m: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__("ode", 0.0, m, x, sigma, sigma_next, dtype=dtype)
        here, there = (formulas.column(s.double(), x).to(dtype) for s in (sigma, sigma_next))
        norm, norm_next = ((s.square() + (1 - s).square()).sqrt() for s in (here, there))
        mean, std, _ = formulas.ddim_step(
            self.x0, x.to(dtype) / norm, ((1 - here) / norm).square(),
            ((1 - there) / norm_next).square(), LEVELS["ddim"], "sample",
        )  # fmt: skip
        self.mean, self.std = mean * norm_next, std * norm_next


def truth(kind: str, m: Tensor, x: Tensor, index: Any, dtype: torch.dtype = torch.float64) -> Truth:
    i = torch.as_tensor(index)
    if kind == "ddim":
        return FlowDDIM(m, x.detach(), SIGMAS[i], SIGMAS[i + 1], dtype)
    maximum = float(SIGMAS[1])
    return Truth(
        kind, LEVELS[kind], m, x, SIGMAS[i], SIGMAS[i + 1], sigma_max=maximum, dtype=dtype
    )


def density(kind: str, true: Truth, y: Tensor) -> Tensor:
    return true.log_prob(y, normaliser=kind != "dance")


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    stored = normal(shape[0], 3, *shape[1:], seed=2, dtype=torch.float32)
    return m, stored[:, 1]


# The last step of DDIM goes to sigma' = 0, without noise: a test of its own.
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", [0, 7, torch.tensor(3), MIXED], ids=["0", "7", "0-d", "[B]"])
def test_values_and_gradients(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, index: Any
) -> None:
    if kind == "ddim" and isinstance(index, int):
        index = min(index, 6)
    m, x = inputs(shape, dtype)
    true = truth(kind, m, x, index)
    y = (true.mean + true.std * normal(*shape, seed=3)).detach().float()
    out = call(kind, m, x, index, y)
    assert type(out) is tuple and len(out) == 3 and out[0] is y
    wanted = {"x0": true.x0, "log_prob": density(kind, true, y)}
    check({"x0": out[1], "log_prob": out[2]}, wanted, m, true.m)


@pytest.mark.parametrize("kind", STEPS)
def test_error_is_at_most_twice_that_of_the_formula(kind: str) -> None:
    m, x = inputs((3, 4, 32, 32), torch.float32)
    true, plain = truth(kind, m, x, MIXED), truth(kind, m, x, MIXED, torch.float32)
    y = (true.mean + true.std * normal(3, 4, 32, 32, seed=3)).detach().float()
    out = call(kind, m, x, MIXED, y)
    assert_no_worse(out[1], plain.x0, true.x0, "x0")
    assert_no_worse(out[2], density(kind, plain, y), density(kind, true, y), "log_prob")


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_draws_are_torch_randn_and_replay_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    m, x = inputs((3, 40, 8), dtype)
    true = truth(kind, m, x, 3)
    torch.manual_seed(5)
    drawn = call(kind, m, x, 3, None)
    torch.manual_seed(5)
    eps = torch.randn(3, 40, 8).double()
    check({"x'": drawn[0]}, {"x'": true.mean + true.std * eps}, m, true.m)
    assert torch.equal(call(kind, m, x, 3, drawn[0])[2], drawn[2])
    with torch.no_grad():
        assert torch.equal(call(kind, m, x, torch.tensor(3), drawn[0])[2], drawn[2])


@pytest.mark.parametrize("kind", STEPS)
def test_without_noise_it_is_the_ode(kind: str) -> None:
    m, x = inputs((3, 40, 8), torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for index in (0, 3, 7):
        out = STEPS[kind](m, x, 0, SIGMAS, index, None)
        ode = Truth("ode", 0.0, m, x, SIGMAS[index], SIGMAS[index + 1])
        check({"x'": out[0]}, {"x'": ode.mean}, m, ode.m)
        assert (out[2] == 0).all()
    assert torch.equal(before, torch.get_rng_state())


def test_the_ends() -> None:
    m, x = inputs((3, 40, 8), torch.float32)
    last = nft.ddim_step(m, x, 0.6, SIGMAS, 7, None)
    # sigma' = 0: x' is the x0 estimate, and there is no density.
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=4e-6)
    assert (last[2] == 0).all()
    one, two = (torch.Generator().manual_seed(8) for _ in range(2))
    drawn = nft.flow_grpo_step(m, x, 0.7, SIGMAS, 3, None, one)[0]
    true = truth("flow", m, x, 3)
    noise = (drawn - true.mean) / true.std
    eps = torch.randn(3, 40, 8, generator=two).double()
    torch.testing.assert_close(noise, eps, rtol=0, atol=4e-6)
    with pytest.raises(ValueError, match="both given"):
        nft.flow_grpo_step(m, x, 0.7, SIGMAS, 3, x, one)
    with pytest.raises(ValueError, match=r"eta = 1.5: must be from 0 to 1"):
        nft.ddim_step(m, x, 1.5, SIGMAS, 3, None)


# ------------------------------------------------------------------ the loss

MODES = {
    "all": lambda a: a,
    "positive_only": lambda a: max(a, 0.0),
    "negative_only": lambda a: min(a, 0.0),
    "one_only": lambda a: 1.0 if a > 0 else 0.0,
    "binary": lambda a: float((a > 0) - (a < 0)),
}


def loss_terms(
    v: Tensor, old: Tensor, ref: Tensor, xt: Tensor, x0: Tensor, t: Tensor, goodness: Tensor,
    beta: float, adv_clip_max: float, train_beta: float,
) -> dict[str, Tensor]:  # fmt: skip
    """The published objective, any dtype: the probability of each branch times its distance."""
    t = t.reshape(-1, *(1 for _ in x0.shape[1:]))

    def branch(prediction: Tensor) -> Tensor:
        error = (xt - t * prediction - x0).flatten(1)
        return error.square().mean(1) / error.abs().mean(1).detach().clamp(min=1e-5)

    positive = branch(old + beta * (v - old))
    negative = branch(old - beta * (v - old))
    p = (0.5 + goodness / (2 * adv_clip_max)).clamp(0, 1)
    each = (p * positive + (1 - p) * negative) / beta
    kl = (v - ref).square().flatten(1).mean(1).mean()
    policy = adv_clip_max * each.mean()
    return {
        "policy_loss": policy,
        "unweighted_policy_loss": each.mean(),
        "kl_div_loss": kl,
        "kl_div": kl,
        "total_loss": policy + train_beta * kl,
    }


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    x0 = normal(*shape, seed=21, dtype=torch.float32)
    t = torch.tensor([1.0, 0.4, 0.02])
    noise = normal(*shape, seed=22, dtype=torch.float32)
    column = t.reshape(-1, *(1 for _ in shape[1:]))
    v = noise - x0 + 0.1 * normal(*shape, seed=23).float()
    old, ref = (v + 0.05 * normal(*shape, seed=seed).float() for seed in (24, 25))
    return {
        "forward_prediction": v.to(dtype).requires_grad_(),
        "old_prediction": old.to(dtype),
        "ref_forward_prediction": ref.to(dtype),
        "xt": (1 - column) * x0 + column * noise,
        "x0": x0,
        "t": t,
        "advantages": torch.tensor([7.0, -0.8, 1.7]),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loss(mode: str, beta: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    items = batch(shape, dtype)
    options = {"beta": beta, "adv_clip_max": 5.0, "train_beta": 0.01}
    loss, terms = nft.two_branch_loss(**items, **options, adv_mode=mode, loss_scale=64.0)
    goodness = torch.tensor([MODES[mode](min(max(a, -5.0), 5.0)) for a in [7.0, -0.8, 1.7]])
    v, old, ref, xt, x0, t, _ = (value.detach().double() for value in items.values())
    v.requires_grad_()
    true = loss_terms(v, old, ref, xt, x0, t, goodness.double(), beta, 5.0, 0.01)
    assert list(terms) == list(true)
    # Sums of squares of float32 numbers, where xt - t v - x0 cancels to a tenth of its terms.
    for name, value in terms.items():
        assert not value.requires_grad and value.shape == ()
        torch.testing.assert_close(value.double(), true[name].detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), 64.0 * true["total_loss"], rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(loss, items["forward_prediction"])
    (wanted,) = torch.autograd.grad(64.0 * true["total_loss"], v)
    assert got.dtype == dtype
    # Rounded once to the dtype, in fp16 scaled or the smallest are lost; in float32 the terms of
    # both branches cancel to a tenth at beta = 0.1.
    bound = {torch.float16: 2**-10, torch.bfloat16: 2**-8, torch.float32: 2e-5}[dtype]
    # The largest of each sample: their gradients differ by the square of t.
    error = ((got.double() - wanted).flatten(1).abs().amax(1) / wanted.flatten(1).abs().amax(1))
    assert float(error.max()) <= bound


def test_loss_is_as_exact_as_the_formula() -> None:
    items = batch((3, 4, 32, 32), torch.float32)
    _, terms = nft.two_branch_loss(**items, beta=0.1, adv_clip_max=5.0, train_beta=0.01)
    goodness = items["advantages"].clamp(-5, 5)
    narrow, wide = (
        loss_terms(*(value.detach().to(dtype) for value in list(items.values())[:-1]),
                   goodness.to(dtype), 0.1, 5.0, 0.01)
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    for name, value in terms.items():
        assert_no_worse(value, narrow[name], wide[name], name)


def test_loss_refuses() -> None:
    items = batch((3, 40, 8), torch.float32)
    options: dict[str, Any] = {"beta": 1.0, "adv_clip_max": 5.0}
    for wrong, match in (
        ({"adv_mode": "both"}, "adv_mode = 'both': must be one of all"),
        ({"loss_scale": 0.0}, "loss_scale = 0.0"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"train_beta": 0.1, "ref_forward_prediction": None}, "reference_output"),
    ):
        with pytest.raises(ValueError, match=match):
            nft.two_branch_loss(**{**items, **options, **wrong})


# ------------------------------------------------------------------ what it costs


def profiled(kind: str, train: bool) -> Callable[[bool], Callable[[], object]]:
    m, x = inputs((3, 40, 8), torch.float32)
    y = x + 0.1 if train else None

    def run(exact: bool) -> object:
        with torch.set_grad_enabled(train):
            log_prob = call(kind, m, x, 3, y, exact_order=exact)[2]
        return torch.autograd.grad(log_prob.sum(), m) if train else log_prob

    return lambda exact: lambda: run(exact)


def loss_call(exact: bool) -> Callable[[], object]:
    items = batch((3, 40, 8), torch.bfloat16)
    v = items["forward_prediction"]

    def run() -> object:
        if not exact:
            loss, _ = nft.two_branch_loss(**items, beta=1.0, adv_clip_max=5.0, train_beta=0.01)
            return torch.autograd.grad(loss, v)
        *tensors, advantages = items.values()
        terms = loss_terms(*tensors, advantages.clamp(-5, 5), 1.0, 5.0, 0.01)
        return torch.autograd.grad(terms["total_loss"], v)

    return run


CALLS = {
    "DiffusionNFT flow_grpo_step, rollout": profiled("flow", False),
    "DiffusionNFT dance_grpo_step, rollout": profiled("dance", False),
    "DiffusionNFT flow_grpo_step, with backward": profiled("flow", True),
    "DiffusionNFT loss with backward": loss_call,
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_and_syncs(name: str, counts: Callable[[Callable[[], object]], Counts]) -> None:
    before, after = (counts(CALLS[name](exact)) for exact in (True, False))
    assert after.syncs == 0
    assert after.launches + 2 * after.fused < before.launches, (before, after)


def test_ddim_reads_nothing_back(counts: Callable[[Callable[[], object]], Counts]) -> None:
    m, x = inputs((3, 40, 8), torch.float32)
    for index in (3, torch.tensor(3), MIXED):
        assert counts(lambda index=index: call("ddim", m, x, index, None)).syncs == 0


# ------------------------------------------------------------------ the host's call sites

HOST = {
    "flow_grpo/diffusers_patch/solver.py": """
def flow_grpo_step(*args, **kwargs):
    raise AssertionError("the host's own step ran")

def dance_grpo_step(*args, **kwargs):
    raise AssertionError("the host's own step ran")

def ddim_step(*args, **kwargs):
    raise AssertionError("the host's own step ran")

def run_sampling(v_pred_fn, z, sigma_schedule, solver="flow", determistic=False, eta=0.7):
    dtype = z.dtype
    all_latents, all_log_probs = [z], []
    level = eta if not determistic else 0
    for i in range(len(sigma_schedule) - 1):
        pred = v_pred_fn(z.to(dtype), sigma_schedule[i])
        if solver == "flow":
            z, pred_original, log_prob = flow_grpo_step(
                model_output=pred.float(), latents=z.float(), eta=level, sigmas=sigma_schedule,
                index=i, prev_sample=None,
            )
        else:
            step = dance_grpo_step if solver == "dance" else ddim_step
            z, pred_original, log_prob = step(
                pred.float(), z.float(), level, sigmas=sigma_schedule, index=i, prev_sample=None
            )
        z = z.to(dtype)
        all_latents.append(z)
        all_log_probs.append(log_prob)
    return z.to(dtype), all_latents, all_log_probs
""",
    "flow_grpo/diffusers_patch/pipeline_with_logprob.py": """
from .solver import run_sampling
""",
}


@pytest.mark.parametrize("solver", STEPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_host_runs_unchanged(tmp_path: Path, solver: str, dtype: torch.dtype) -> None:
    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        return (0.3 * z.float() + sigma / 4).to(dtype)

    z = normal(2, 4, 6, 5, seed=4, dtype=dtype)
    with packages(tmp_path, HOST, nft.PATCHES):
        host = importlib.import_module("flow_grpo.diffusers_patch.pipeline_with_logprob")
        with torch.no_grad():
            clean, latents, log_probs = host.run_sampling(
                velocity, z, SIGMAS, solver, False, LEVELS[solver]
            )
            still, path, _ = host.run_sampling(velocity, z, SIGMAS, solver, True)
    assert len(latents) == 9 and len(log_probs) == 8
    assert all(x.dtype == dtype and x.isfinite().all() for x in (*latents, *path, clean, still))
    assert all(lp.dtype == torch.float32 and lp.shape == (2,) for lp in log_probs)
    # The first update: the same step of the stored trajectory, replayed before any rounding.
    if dtype == torch.float32:
        step = STEPS[solver]
        pred = velocity(latents[3], SIGMAS[3]).requires_grad_()
        new = step(pred, latents[3], LEVELS[solver], SIGMAS, 3, latents[4])[2]
        assert torch.equal(torch.exp(new - log_probs[3]), torch.ones(2))
