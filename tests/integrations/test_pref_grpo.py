"""Pref-GRPO: its two steps, its KL, its call sites and what they cost."""

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
from dancegrpo_fast.integrations import pref_grpo, run
from dancegrpo_fast.integrations.pref_grpo import (
    compute_kl_loss,
    dance_grpo_step,
    flow_grpo_step,
)

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
    out = call(kind, m, x, index, y, return_stats=True)
    assert type(out) is tuple and len(out) == 6 and out[0] is y
    found = {"x0": out[1], "log_prob": out[2], "mean": out[3]}
    check(found, {"x0": true.x0, "log_prob": true.log_prob(y), "mean": true.mean}, m, true.m)
    # The std has sqrt(-dt); the sign of dt is the host's, which differs between the two.
    per_row = isinstance(index, Tensor) and index.dim() == 1
    sign = 1.0 if kind == "flow" else -1.0
    for value, wanted in ((out[4], true.std), (out[5], sign * true.dt)):
        assert value.shape == ((3, *(1 for _ in shape[1:])) if per_row else ())
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double().reshape(-1), wanted.reshape(-1), rtol=3e-7, atol=0
        )
    short = call(kind, m, x, index, y)
    assert len(short) == 3 and all(map(torch.equal, short, out))


@pytest.mark.parametrize("kind", LEVELS)
def test_error_is_at_most_twice_that_of_the_formula(kind: str) -> None:
    m, x = inputs((3, 4, 32, 32), torch.float32)
    true, plain = truth(kind, m, x, MIXED), truth(kind, m, x, MIXED, torch.float32)
    y = (true.mean + true.std * normal(3, 4, 32, 32, seed=3)).detach().float()
    out = call(kind, m, x, MIXED, y, return_stats=True)
    assert_no_worse(out[1], plain.x0, true.x0, "x0")
    assert_no_worse(out[2], plain.log_prob(y), true.log_prob(y), "log_prob")
    assert_no_worse(out[3], plain.mean, true.mean, "mean")


@pytest.mark.parametrize("sde_solver", [True, False])
def test_dance_without_grpo(sde_solver: bool) -> None:
    m, x = inputs((3, 4, 6, 5), torch.float32)
    true = truth("dance" if sde_solver else "euler_noise", m, x, 2)
    out = dance_grpo_step(m, x, 0.3, SIGMAS, 2, None, False, sde_solver)
    assert len(out) == 2
    check({"mean": out[0], "x0": out[1]}, {"mean": true.mean, "x0": true.x0}, m, true.m)


@pytest.mark.parametrize("kind", LEVELS)
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


def test_generator_and_no_noise() -> None:
    m, x = inputs((3, 40, 8), torch.float32)
    one, two = (torch.Generator().manual_seed(8) for _ in range(2))
    drawn = flow_grpo_step(m, x, 0.7, SIGMAS, 3, None, one, True)
    noise = (drawn[0] - drawn[3]) / drawn[4]
    # The division by s = 0.3 amplifies the rounding of x'.
    torch.testing.assert_close(noise, torch.randn(3, 40, 8, generator=two), rtol=0, atol=4e-6)
    assert (flow_grpo_step(m, x, 0.0, SIGMAS, 2, None)[2] == 0).all()


@pytest.mark.parametrize("kind", LEVELS)
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
    both = (call(kind, m, x, 3, y, return_stats=True, exact_order=exact) for exact in (True, False))
    for a, b in zip(*both, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-5, atol=4e-6)
    with pytest.raises(ValueError, match="exact_order"):
        call(kind, m, x, MIXED, y, exact_order=True)


@pytest.mark.parametrize("rows", ["0-d", "[B]"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kl(shape: tuple[int, ...], rows: str) -> None:
    m, ref = (normal(*shape, seed=seed, dtype=torch.float32) for seed in (1, 2))
    m.requires_grad_()
    m64 = m.detach().double().requires_grad_()
    scale = torch.tensor([0.3, 0.1, 1e-12])
    scale = scale[1] if rows == "0-d" else scale.reshape(3, *(1 for _ in shape[1:]))
    loss = compute_kl_loss(m, ref, scale)
    distance = (m64 - ref.double()).square().flatten(1).mean(1)
    true = (distance / (2 * scale.double().reshape(-1).square()).clamp(min=1e-20)).mean()
    # Relative: a sum of squares rounds like its terms, and the bound of the scale is 1e-20.
    torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=0)
    (got,), (exact,) = (torch.autograd.grad(a, b) for a, b in ((loss, m), (true, m64)))
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    assert compute_kl_loss(m, m.detach(), scale) == 0
    with pytest.raises(ValueError, match="gradient"):
        compute_kl_loss(m, m, scale)


def profiled(kind: str, train: bool) -> Callable[[bool], Callable[[], object]]:
    """exact -> one step as the host calls it, with the backward pass if it trains."""
    m, x = inputs((3, 40, 8), torch.bfloat16)
    y = x + 0.1 if train else None

    def run(exact: bool) -> object:
        with torch.set_grad_enabled(train):
            out = call(kind, m, x, torch.tensor(3), y, return_stats=train, exact_order=exact)
        return torch.autograd.grad(out[2].sum(), m) if train else out

    return lambda exact: lambda: run(exact)


def plain_kl(mean: Tensor, ref: Tensor, scale: Tensor) -> Tensor:
    distance = (mean - ref).square().mean(dim=(1, 2))
    return (distance / (2 * scale**2).clamp(min=1e-20)).mean()


def kl_call(exact: bool) -> Callable[[], object]:
    x, ref = normal(3, 40, 8, seed=1).float().requires_grad_(), normal(3, 40, 8, seed=2).float()
    kl = plain_kl if exact else compute_kl_loss
    return lambda: torch.autograd.grad(kl(x, ref, SIGMAS[3]), x)


CALLS = {
    "Pref-GRPO flow_grpo_step, rollout": profiled("flow", False),
    "Pref-GRPO flow_grpo_step, training with backward": profiled("flow", True),
    "Pref-GRPO dance_grpo_step, rollout": profiled("dance", False),
    "Pref-GRPO dance_grpo_step, training with backward": profiled("dance", True),
    "Pref-GRPO compute_kl_loss with backward": kl_call,
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_and_syncs(name: str, counts: Callable[[Callable[[], object]], Counts]) -> None:
    before, after = (counts(CALLS[name](exact)) for exact in (True, False))
    assert after.syncs == 0
    if "kl" not in name:  # There the plain formula is short: passes over the latents are saved.
        assert after.launches + 2 * after.fused < before.launches, (before, after)


# ------------------------------------------------------------------ the host's call sites

HOST = {
    "fastvideo/grpo/__init__.py": """
from .kl import compute_kl_loss
from .steps import dance_grpo_step, flow_grpo_step
""",
    "fastvideo/grpo/steps.py": """
def flow_grpo_step(*args, **kwargs):
    raise AssertionError("the host's own step ran")

def dance_grpo_step(*args, **kwargs):
    raise AssertionError("the host's own step ran")
""",
    "fastvideo/grpo/kl.py": """
def compute_kl_loss(*args, **kwargs):
    raise AssertionError("the host's own KL ran")
""",
    "train_pref_stand_in.py": """
import torch
from fastvideo.grpo.kl import compute_kl_loss
from fastvideo.grpo.steps import dance_grpo_step, flow_grpo_step

def run_sample_step(args, z, sigma_schedule, transformer):
    all_latents, all_log_probs = [z], []
    for i in range(len(sigma_schedule) - 1):
        pred = transformer(z, int(sigma_schedule[i] * 1000))
        if args.grpo_step_mode == "dance":
            z, pred_original, log_prob, prev_sample_mean, _, _ = dance_grpo_step(
                pred, z.to(torch.float32), args.eta, sigmas=sigma_schedule, index=i,
                prev_sample=None, grpo=True, sde_solver=True, return_stats=True,
            )
        else:
            z, pred_original, log_prob = flow_grpo_step(
                model_output=pred, latents=z.to(torch.float32), eta=args.eta,
                sigmas=sigma_schedule, index=i, prev_sample=None,
            )
        all_latents.append(z)
        all_log_probs.append(log_prob)
    return torch.stack(all_latents, dim=1), torch.stack(all_log_probs, dim=1)

def grpo_one_step(args, latents, pre_latents, transformer, timesteps, i, sigma_schedule):
    pred = transformer(latents, timesteps)
    if args.grpo_step_mode == "dance":
        z, pred_original, log_prob, prev_sample_mean, noise_scale, dt = dance_grpo_step(
            model_output=pred, latents=latents.to(torch.float32), eta=args.eta,
            sigmas=sigma_schedule, index=i, prev_sample=pre_latents.to(torch.float32),
            grpo=True, sde_solver=True, return_stats=True,
        )
    else:
        z, pred_original, log_prob, prev_sample_mean, noise_scale, dt = flow_grpo_step(
            model_output=pred, latents=latents.to(torch.float32), eta=args.eta,
            sigmas=sigma_schedule, index=i, prev_sample=pre_latents.to(torch.float32),
            return_stats=True,
        )
    return log_prob, prev_sample_mean, noise_scale, dt
""",
}


def test_the_kl_that_a_script_defines_itself_is_rebound() -> None:
    names = "prev_sample_mean, prev_sample_mean_ref, noise_scale_ref"
    script = f"def compute_kl_loss({names}):\n    return 'its own'\n"
    tree, found = run.rebound(script, "train_wan_stand_in.py", pref_grpo.PATCHES)
    module: dict[str, Any] = {}
    exec(compile(tree, "train_wan_stand_in.py", "exec"), module)
    assert [patch.name for patch in found] == ["compute_kl_loss"]
    assert module["compute_kl_loss"] is compute_kl_loss


@pytest.mark.parametrize("mode", ["flow", "dance"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_host_runs_unchanged(tmp_path: Path, mode: str, dtype: torch.dtype) -> None:
    args = SimpleNamespace(eta=LEVELS[mode], grpo_step_mode=mode)
    factor = torch.tensor(0.3, requires_grad=True)

    def transformer(hidden_states: Tensor, timestep: int) -> Tensor:
        return (factor * hidden_states.float() + timestep / 4000).to(dtype)

    with packages(tmp_path, HOST, pref_grpo.PATCHES):
        script = importlib.import_module("train_pref_stand_in")
        assert script.compute_kl_loss is compute_kl_loss
        z = normal(2, 40, 8, seed=4, dtype=torch.float32)
        with torch.no_grad():
            latents, log_probs = script.run_sample_step(args, z, SIGMAS, transformer)
        assert latents.dtype == torch.float32 and latents.isfinite().all()
        for step in (0, 7):
            now = int(SIGMAS[step] * 1000)
            item = latents[:, step], latents[:, step + 1], transformer, now
            found = script.grpo_one_step(args, *item, torch.tensor(step), SIGMAS)
            new, mean, _, _ = found
            ratio = torch.exp(new - log_probs[:, step])
            assert torch.equal(ratio, torch.ones(2))
            with torch.no_grad():
                other = script.grpo_one_step(
                    args, *item[:2], lambda x, t: transformer(x, t) * 0.5, now, step, SIGMAS
                )
            kl = script.compute_kl_loss(mean, other[1], other[2])
            loss = clipped(ratio, torch.tensor([1.0, -0.5]), 1e-4, 1e-4).mean() + 0.01 * kl
            (gradient,) = torch.autograd.grad(loss, factor)
            assert kl > 0 and gradient.isfinite() and gradient != 0
