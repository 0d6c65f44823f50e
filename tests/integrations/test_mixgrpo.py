"""MixGRPO: its two steps, its call sites and what they cost."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counting import Counts
from formulas import assert_no_worse, clipped, normal
from stand_ins import Truth, check, packages
from torch import Tensor

from dancegrpo_fast import dance_schedule
from dancegrpo_fast.integrations import mixgrpo
from dancegrpo_fast.integrations.mixgrpo import dance_grpo_step, flow_grpo_step

SIGMAS = torch.tensor(dance_schedule(8, 3.0).sigmas, dtype=torch.float32)
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
LEVELS = {"flow": 0.7, "dance": 0.3, "euler_noise": 0.3}
MIXED = torch.tensor([0, 7, 3])


def call(kind: str, m: Tensor, x: Tensor, index: Any, y: Tensor | None, **options: Any) -> tuple:
    if kind == "flow":
        return flow_grpo_step(m, x, LEVELS[kind], SIGMAS, index, y, **options)
    return dance_grpo_step(m, x, LEVELS[kind], SIGMAS, index, y, True, kind == "dance", **options)


def truth(kind: str, m: Tensor, x: Tensor, index: Any, dtype: torch.dtype = torch.float64) -> Truth:
    i = torch.as_tensor(index)
    maximum = float(SIGMAS[1])
    return Truth(
        kind, LEVELS[kind], m, x, SIGMAS[i], SIGMAS[i + 1], sigma_max=maximum, dtype=dtype
    )


def density(kind: str, true: Truth, y: Tensor) -> Tensor:
    return true.log_prob(y, normaliser=kind == "flow")


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Latents as the trainer has them: a step of stored trajectories, not contiguous.
    m = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    stored = normal(shape[0], 3, *shape[1:], seed=2, dtype=torch.float32)
    return m, stored[:, 1]


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", [0, 7, torch.tensor(3), MIXED], ids=["0", "7", "0-d", "[B]"])
def test_values_and_gradients(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, index: Any
) -> None:
    m, x = inputs(shape, dtype)
    true = truth(kind, m, x, index)
    y = (true.mean + true.std * normal(*shape, seed=3)).detach().float()
    out = call(kind, m, x, index, y)
    found = {"x0": out[1], "log_prob": out[2]}
    wanted = {"x0": true.x0, "log_prob": density(kind, true, y)}
    assert out[0] is y
    if kind == "flow":
        assert len(out) == 5
        found["mean"], wanted["mean"] = out[3], true.mean
        per_row = isinstance(index, Tensor) and index.dim() == 1
        assert out[4].shape == ((3, *(1 for _ in shape[1:])) if per_row else ())
        torch.testing.assert_close(
            out[4].double().reshape(-1), true.std.reshape(-1), rtol=3e-7, atol=0
        )
    else:
        assert len(out) == 3
    check(found, wanted, m, true.m)


@pytest.mark.parametrize("kind", LEVELS)
def test_error_is_at_most_twice_that_of_the_formula(kind: str) -> None:
    m, x = inputs((3, 4, 32, 32), torch.float32)
    true, plain = truth(kind, m, x, MIXED), truth(kind, m, x, MIXED, torch.float32)
    y = (true.mean + true.std * normal(3, 4, 32, 32, seed=3)).detach().float()
    out = call(kind, m, x, MIXED, y)
    assert_no_worse(out[1], plain.x0, true.x0, "x0")
    assert_no_worse(out[2], density(kind, plain, y), density(kind, true, y), "log_prob")


def test_what_the_results_are() -> None:
    m, x = inputs((3, 4, 6, 5), torch.float32)
    mean, x0 = dance_grpo_step(m, x, 0.3, SIGMAS, 2, None, False, True)
    true = truth("dance", m, x, 2)
    check({"mean": mean, "x0": x0}, {"mean": true.mean, "x0": true.x0}, m, true.m)
    # Without the SDE solver nothing is drawn: x' is Euler's step, and has its gradient.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    euler = truth("euler_noise", m, x, 2)
    still = dance_grpo_step(m, x, 0.3, SIGMAS, 2, None, True, False)
    check({"x'": still[0]}, {"x'": euler.mean}, m, euler.m)
    assert (still[2] == 0).all()
    # Flow-GRPO's deterministic step: Euler's x', even if one is given, in the density of the SDE.
    flow = truth("flow", m, x, 2)
    step = truth("euler_noise", flow.m, x, 2)
    for given in (None, x):
        out = flow_grpo_step(m, x, 0.7, SIGMAS, 2, given, determistic=True)
        check({"x'": out[0]}, {"x'": step.mean}, m, step.m)
        torch.testing.assert_close(
            out[2].double(), flow.log_prob(step.mean.detach()), rtol=0, atol=4e-6
        )
    assert torch.equal(before, torch.get_rng_state())
    # No noise, no density: the original divides by zero.
    assert (flow_grpo_step(m, x, 0.0, SIGMAS, 2, None)[2] == 0).all()
    with pytest.raises(ValueError, match="both given"):
        flow_grpo_step(m, x, 0.7, SIGMAS, 2, x, torch.Generator())


@pytest.mark.parametrize("kind", ["flow", "dance"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_draws_are_torch_randn_and_replay_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    m, x = inputs((3, 40, 8), dtype)
    true = truth(kind, m, x, 3)
    torch.manual_seed(5)
    drawn = call(kind, m, x, 3, None)
    torch.manual_seed(5)
    eps = torch.randn(3, 40, 8).double()
    expected = (true.mean + true.std * eps).detach()
    torch.testing.assert_close(drawn[0].detach().double(), expected, rtol=0, atol=4e-6)
    check({"x'": drawn[0]}, {"x'": true.mean + true.std * eps}, m, true.m)
    assert torch.equal(call(kind, m, x, 3, drawn[0])[2], drawn[2])
    with torch.no_grad():
        assert torch.equal(call(kind, m, x, torch.tensor(3), drawn[0])[2], drawn[2])


def test_generator() -> None:
    m, x = inputs((3, 40, 8), torch.float32)
    one, two = (torch.Generator().manual_seed(8) for _ in range(2))
    drawn = flow_grpo_step(m, x, 0.7, SIGMAS, 3, None, one)
    noise = (drawn[0] - drawn[3]) / drawn[4]
    # The division by s = 0.3 amplifies the rounding of x'.
    torch.testing.assert_close(noise, torch.randn(3, 40, 8, generator=two), rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", ["flow", "dance", "euler_noise"])
def test_exact_order(kind: str) -> None:
    m, x = inputs((3, 40, 8), torch.bfloat16)
    torch.manual_seed(5)
    drawn = call(kind, m, x, 3, None, exact_order=True)
    # A 0-d sigma times bf16 is bf16: the x0 estimate tells.
    assert torch.equal(drawn[1], x - (SIGMAS[3] * m))
    assert not torch.equal(drawn[1], call(kind, m, x, 3, None)[1])
    replay = call(kind, m, x, torch.tensor(3), drawn[0], exact_order=True)
    assert torch.equal(replay[2], drawn[2])
    # In float32 both orders are the same up to rounding.
    m, x = inputs((3, 40, 8), torch.float32)
    y = (x - 0.1 * m).detach()
    for a, b in zip(call(kind, m, x, 3, y, exact_order=True), call(kind, m, x, 3, y), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=4e-6)
    with pytest.raises(ValueError, match="exact_order"):
        call(kind, m, x, MIXED, y, exact_order=True)


def profiled(kind: str, train: bool) -> Callable[[bool], Callable[[], object]]:
    """exact -> one step as the host calls it, with the backward pass if it trains."""
    m, x = inputs((3, 40, 8), torch.bfloat16)
    y = x + 0.1 if train else None

    def run(exact: bool) -> object:
        with torch.set_grad_enabled(train):
            out = call(kind, m, x, torch.tensor(3), y, exact_order=exact)
        return torch.autograd.grad(out[2].sum(), m) if train else out

    return lambda exact: lambda: run(exact)


CALLS = {
    "MixGRPO flow_grpo_step, rollout": profiled("flow", False),
    "MixGRPO flow_grpo_step, training with backward": profiled("flow", True),
    "MixGRPO dance_grpo_step, rollout": profiled("dance", False),
    "MixGRPO dance_grpo_step, training with backward": profiled("dance", True),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_and_syncs(name: str, counts: Callable[[Callable[[], object]], Counts]) -> None:
    before, after = (counts(CALLS[name](exact)) for exact in (True, False))
    assert after.syncs == 0
    assert after.launches + 2 * after.fused < before.launches, (before, after)
    m, x = inputs((3, 40, 8), torch.float32)
    assert counts(lambda: flow_grpo_step(m, x, 0.7, SIGMAS, MIXED, None)).syncs == 0


# ------------------------------------------------------------------ the host's call sites

HOST = {
    "fastvideo/utils/sampling_utils.py": """
import torch

def flow_grpo_step(*args, **kwargs):
    raise AssertionError("the host's own step ran")

def dance_grpo_step(*args, **kwargs):
    raise AssertionError("the host's own step ran")

def run_sample_step(args, z, sigma_schedule, transformer, grpo_sample, determistic):
    all_latents, all_log_probs = [z], []
    for i in range(len(sigma_schedule) - 1):
        pred = transformer(z, int(sigma_schedule[i] * 1000))
        if args.flow_grpo_sampling:
            z, pred_original, log_prob, prev_latents_mean, std_dev_t = flow_grpo_step(
                model_output=pred, latents=z.to(torch.float32), eta=args.eta,
                sigmas=sigma_schedule, index=i, prev_sample=None, determistic=determistic[i],
            )
        else:
            z, pred_original, log_prob = dance_grpo_step(
                pred, z.to(torch.float32), args.eta, sigmas=sigma_schedule, index=i,
                prev_sample=None, grpo=True, sde_solver=not determistic[i],
            )
        all_latents.append(z)
        all_log_probs.append(log_prob)
    all_latents = torch.stack(all_latents, dim=1)
    return z, pred_original, all_latents, torch.stack(all_log_probs, dim=1)
""",
    "train_mix_stand_in.py": """
import torch
from fastvideo.utils.sampling_utils import flow_grpo_step, dance_grpo_step, run_sample_step

def grpo_one_step(args, latents, pre_latents, transformer, timesteps, i, sigma_schedule):
    pred = transformer(latents, timesteps)
    if args.flow_grpo_sampling:
        z, pred_original, log_prob, prev_latents_mean, std_dev_t = flow_grpo_step(
            model_output=pred, latents=latents.to(torch.float32), eta=args.eta,
            sigmas=sigma_schedule, index=i, prev_sample=pre_latents.to(torch.float32),
            determistic=False,
        )
    else:
        z, pred_original, log_prob = dance_grpo_step(
            pred, latents.to(torch.float32), args.eta, sigma_schedule, i,
            prev_sample=pre_latents.to(torch.float32), grpo=True, sde_solver=True,
        )
    return log_prob
""",
}


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_host_runs_unchanged(tmp_path: Path, flow: bool, dtype: torch.dtype) -> None:
    args = SimpleNamespace(eta=0.7 if flow else 0.3, flow_grpo_sampling=flow)
    factor = torch.tensor(0.3, requires_grad=True)

    def transformer(hidden_states: Tensor, timestep: int) -> Tensor:
        return (factor * hidden_states.float() + timestep / 4000).to(dtype)

    determistic = [i not in (2, 3) for i in range(8)]
    with packages(tmp_path, HOST, mixgrpo.PATCHES):
        script = importlib.import_module("train_mix_stand_in")
        assert script.flow_grpo_step is flow_grpo_step
        z = normal(2, 40, 8, seed=4, dtype=torch.float32)
        with torch.no_grad():
            _, _, latents, log_probs = script.run_sample_step(
                args, z, SIGMAS, transformer, True, determistic
            )
        assert latents.dtype == torch.float32 and latents.isfinite().all()
        for step in (2, 3):
            index = torch.tensor(step)
            new = script.grpo_one_step(
                args, latents[:, step], latents[:, step + 1], transformer,
                int(SIGMAS[step] * 1000), index, SIGMAS,
            )  # fmt: skip
            ratio = torch.exp(new - log_probs[:, step])
            assert torch.equal(ratio, torch.ones(2))
            advantage = torch.tensor([1.0, -0.5])
            loss = clipped(ratio, advantage, 1e-4, 1e-4).mean()
            (gradient,) = torch.autograd.grad(loss, factor)
            assert gradient.isfinite() and gradient != 0
