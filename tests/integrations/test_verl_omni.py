"""verl-omni's step and clipped loss: values, gradients, conventions, and stand-ins of its calls."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import formulas
import pytest
import torch
from formulas import normal
from stand_ins import packages
from torch import Tensor

from dancegrpo_fast import dance_schedule
from dancegrpo_fast.integrations.verl_omni import PATCHES, compute_loss, sample_previous_step

SIGMAS = torch.tensor(dance_schedule(8, 3.0).sigmas, dtype=torch.float32)
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
LEVELS = {"sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
STEPS = torch.tensor([0, 6, 3])


def scheduler(step_index: int | None = None) -> Any:
    """What the step reads of a scheduler after `set_timesteps`."""
    return SimpleNamespace(sigmas=SIGMAS, timesteps=SIGMAS[:-1] * 1000, step_index=step_index)


def oracle(
    sde_type: str, v: Tensor, x: Tensor, index: Tensor, level: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(mean, std) in float64."""
    here, there = (formulas.column(SIGMAS[i], x) for i in (index, index + 1))
    if isinstance(level, Tensor):
        rows = [oracle(sde_type, *(t[i : i + 1] for t in (v, x, index)), float(level[i]))
                for i in range(len(x))]  # fmt: skip
        return torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    if sde_type == "cps":
        return formulas.cps_step(v, x, here, there, level)
    kind = {"sde": "flow", "dance_sde": "dance"}[sde_type]
    rate = formulas.rate(kind, here, level, float(SIGMAS[1]), 0.0)
    return formulas.flow_step(v, x, here, there, rate)


def density(sde_type: str, y: Tensor, mean: Tensor, std: Tensor, normaliser: bool) -> Tensor:
    if sde_type == "cps":
        return -((y - mean) ** 2).flatten(1).mean(1)
    if normaliser:
        return formulas.log_density(y, mean, std)
    return -(((y - mean) / std) ** 2 / 2).flatten(1).mean(1)


@pytest.mark.parametrize("sde_type", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact_order", [False, True])
@pytest.mark.parametrize("normaliser", [False, True])
def test_values_and_gradients(
    sde_type: str, shape: tuple[int, ...], exact_order: bool, normaliser: bool
) -> None:
    host, level = scheduler(), LEVELS[sde_type]
    v = normal(*shape, seed=1, dtype=torch.float32).requires_grad_()
    x, v64 = normal(*shape, seed=2, dtype=torch.float32), v.detach().double().requires_grad_()
    mean, std = oracle(sde_type, v64, x.double(), STEPS, level)
    y = (mean + std * normal(*shape, seed=3)).detach().float()
    true = density(sde_type, y.double(), mean, std, normaliser)
    out = sample_previous_step(
        host, x, v, host.timesteps[STEPS], noise_level=level, prev_sample=y, sde_type=sde_type,
        return_sqrt_dt=True, include_logprob_normalizer=normaliser, exact_order=exact_order,
    )  # fmt: skip
    assert type(out) is tuple and len(out) == 5
    prev, log_prob, found, std_dev_t, sqrt_dt = out
    assert prev is y and all(t.dtype == torch.float32 for t in out)
    lengths = (SIGMAS[STEPS] - SIGMAS[STEPS + 1]).double()
    torch.testing.assert_close(sqrt_dt.double(), lengths.sqrt(), rtol=1e-6, atol=0)
    wanted = std / formulas.column(lengths.sqrt(), x) if sde_type == "sde" else std
    # The original's order takes 1 - 0.9545 and such from rounded sigmas: 2^-24 / 0.045 = 1.3e-6.
    torch.testing.assert_close(std_dev_t.double(), wanted, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.double(), mean, rtol=0, atol=4e-6)
    # The rounding of the mean (2^-22) against s >= 0.08, times a residual of up to 4 s.
    torch.testing.assert_close(log_prob.double(), true, rtol=0, atol=2e-5)
    weight = normal(*shape, seed=5)
    pairs = [(log_prob.sum(), true.sum()), ((found * weight).sum(), (mean * weight).sum())]
    pairs.append((pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]))
    for got, exact in pairs:
        (gradient,) = torch.autograd.grad(got, v, retain_graph=True)
        (wanted,) = torch.autograd.grad(exact, v64, retain_graph=True)
        assert (gradient.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("sde_type", LEVELS)
@pytest.mark.parametrize("exact_order", [False, True])
def test_the_scheduler_s_own_index(sde_type: str, exact_order: bool) -> None:
    v, x, y = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2, 3))
    options: Any = {
        "noise_level": LEVELS[sde_type], "sde_type": sde_type, "prev_sample": y,
        "return_sqrt_dt": True, "exact_order": exact_order,
    }  # fmt: skip
    for i in (0, 3, 6):
        own = sample_previous_step(scheduler(i), x, v, **options)
        each = torch.full((3,), i)
        timesteps = scheduler().timesteps[each]
        given = sample_previous_step(scheduler(), x, v, timesteps, **options)
        assert own[3].shape == () and given[3].shape == (3, 1, 1, 1)
        assert own[4].shape == given[4].shape == (3,)
        assert torch.equal(own[3].expand(3, 1, 1, 1), given[3])
        for one, other in zip(own[:3] + own[4:], given[:3] + given[4:], strict=True):
            assert torch.equal(one, other)


def test_results_and_refusals() -> None:
    v, x = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2))
    host = scheduler(2)
    out = sample_previous_step(host, x, v, return_logprobs=False)
    assert len(out) == 4 and out[1] is None
    with pytest.raises(ValueError, match="sde_type = 'ode'"):
        sample_previous_step(host, x, v, sde_type="ode")
    with pytest.raises(NotImplementedError, match="per_token_timesteps"):
        sample_previous_step(host, x, v, per_token_timesteps=x)
    with pytest.raises(ValueError, match="not among the scheduler's"):
        sample_previous_step(host, x, v, torch.full((3,), 3.5))
    with pytest.raises(ValueError, match="must be a number"):
        sample_previous_step(host, x, v, noise_level=torch.ones(3), exact_order=True)
    # Storage in bf16 is no error here; the result is float32 all the same.
    half = sample_previous_step(host, x.bfloat16(), v.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.float32


@pytest.mark.parametrize("sde_type", LEVELS)
def test_noise_and_levels_of_rows(sde_type: str) -> None:
    v, x = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2))
    host, level = scheduler(0), LEVELS[sde_type]
    levels = torch.tensor([level, 0.0, level / 2]).view(3, 1, 1, 1)
    seeded = torch.Generator().manual_seed(4)
    for index, timestep in ((torch.zeros(3).long(), None), (STEPS, host.timesteps[STEPS])):
        eps = torch.randn(SHAPES[1], generator=seeded.clone_state())
        found = sample_previous_step(
            host, x, v, timestep, generator=seeded, noise_level=levels, sde_type=sde_type,
            return_sqrt_dt=True,
        )  # fmt: skip
        mean, std = oracle(sde_type, v.double(), x.double(), index, levels)
        torch.testing.assert_close(found[2].double(), mean, rtol=0, atol=4e-6)
        torch.testing.assert_close(found[0].double(), mean + std * eps, rtol=0, atol=4e-6)
        sqrt_dt = (SIGMAS[index] - SIGMAS[index + 1]).double().sqrt()
        wanted = std / formulas.column(sqrt_dt, x) if sde_type == "sde" else std
        torch.testing.assert_close(found[3].double(), wanted, rtol=2e-6, atol=0)
        torch.testing.assert_close(found[4].double(), sqrt_dt, rtol=1e-6, atol=0)
        keep = [0, 2]  # Without noise the original's log-prob is 0 / 0.
        true = density(sde_type, found[0][keep].double(), mean[keep], std[keep], True)
        torch.testing.assert_close(found[1][keep].double(), true, rtol=0, atol=3e-5)
        assert found[1][1] == 0.0
        # A level for all rows is a number: the same, bit by bit.
        for number in (level, 0.0):
            options: Any = {"sde_type": sde_type, "prev_sample": found[0]}
            one = sample_previous_step(host, x, v, timestep, noise_level=number, **options)
            same = torch.full((3, 1, 1, 1), number, dtype=torch.float64)
            other = sample_previous_step(host, x, v, timestep, noise_level=same, **options)
            assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


@pytest.mark.parametrize("sde_type", LEVELS)
def test_no_worse_than_the_host(sde_type: str) -> None:
    shape, index, own, level = (64, 4, 6, 5), torch.arange(64) % 8, scheduler(), LEVELS[sde_type]
    v, x = (normal(*shape, seed=s, dtype=torch.float32) for s in (1, 2))
    index = index.clamp(max=6)  # CPS has no noise in the last step.
    mean, std = oracle(sde_type, v.double(), x.double(), index, level)
    y = (mean + std * normal(*shape, seed=3)).float()
    options: Any = {"noise_level": level, "sde_type": sde_type, "prev_sample": y}
    ours, theirs = (
        sample_previous_step(own, x, v, own.timesteps[index], exact_order=order, **options)
        for order in (False, True)
    )
    formulas.assert_no_worse(ours[2], theirs[2], mean)
    formulas.assert_no_worse(ours[1], theirs[1], density(sde_type, y.double(), mean, std, True))


# ------------------------------------------------------------------ the loss


def config(clip_ratio: float = 1e-2, adv_clip_max: float = 2.0) -> Any:
    loss = SimpleNamespace(clip_ratio=clip_ratio, adv_clip_max=adv_clip_max)
    return SimpleNamespace(diffusion_loss=loss)


@pytest.mark.parametrize("weighted", [False, True])
def test_clipped_objective(weighted: bool) -> None:
    new = (normal(64, seed=1) * 2e-2).requires_grad_()
    old, advantages = normal(64, seed=2) * 1e-3, 3 * normal(64, seed=3)
    weights = normal(64, seed=4).relu() if weighted else None
    loss, metrics = compute_loss(
        None, old_log_prob=old, log_prob=new, advantages=advantages, config=config(),
        rollout_is_weights=weights,
    )  # fmt: skip
    ratio = (new - old).exp()
    each = formulas.clipped(ratio, advantages.clamp(-2, 2), 1e-2, 1e-2)
    true = (each if weights is None else each * weights).mean()
    torch.testing.assert_close(loss, true, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(f, new)[0] for f in (loss, true)))
    wanted = {
        "ppo_kl": (old - new).mean(), "ratio_mean": ratio.mean(), "ratio_std": ratio.std(),
        "pg_clipfrac": ((ratio - 1).abs() > 1e-2).double().mean(),
        "pg_clipfrac_higher": (ratio > 1.01).double().mean(),
        "pg_clipfrac_lower": (ratio < 0.99).double().mean(),
    }  # fmt: skip
    assert {name.removeprefix("actor/") for name in metrics} == set(wanted)
    for name, value in wanted.items():
        found = metrics[f"actor/{name}"]
        assert found.shape == () and not found.requires_grad
        torch.testing.assert_close(found.double(), value.detach(), rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------ the host's call sites

SCHEDULER = '''
"""A stand-in of verl-omni's scheduler: only how its step calls the other method."""
from diffusers import FlowMatchEulerDiscreteScheduler

class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, generator=None, return_dict=True,
             noise_level=0.7, prev_sample=None, sde_type="sde", return_logprobs=True):
        if self.step_index is None:
            self._init_step_index(timestep)
        out = self.sample_previous_step(
            sample=sample.float(), model_output=model_output, generator=generator,
            per_token_timesteps=None, noise_level=noise_level, prev_sample=prev_sample,
            sde_type=sde_type, return_logprobs=return_logprobs, include_logprob_normalizer=True)
        self._step_index += 1
        return out

    def sample_previous_step(self, sample, model_output, **options):
        raise AssertionError("the original was called")
'''
ALGORITHMS = '''
"""A stand-in of verl-omni's losses: the class, its registry and the worker's call."""
REGISTRY = {}

class FlowGRPOLoss:
    required_model_output_keys = ("log_probs",)
    required_data_keys = ("old_log_probs", "advantages")

    @classmethod
    def compute_loss(cls, **options):
        raise AssertionError("the original was called")

    def __call__(self, *, config, model_output, data):
        return self.compute_loss(
            old_log_prob=data["old_log_probs"], log_prob=model_output["log_probs"],
            advantages=data["advantages"], config=config,
            rollout_is_weights=data.get("rollout_is_weights", None))

REGISTRY["flow_grpo"] = REGISTRY["dance_grpo"] = FlowGRPOLoss()
'''


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """(scheduler module, loss module), imported after ours: patched as soon as they have run."""
    pytest.importorskip("diffusers")  # the core's tests also run without it
    modules = [patch.module or "" for patch in PATCHES]
    paths = [name.replace(".", "/") + ".py" for name in modules]
    with packages(tmp_path, dict(zip(paths, (SCHEDULER, ALGORITHMS), strict=True)), PATCHES):
        schedulers, algorithms = (importlib.import_module(name) for name in modules)
        yield schedulers, algorithms


def transformer(x: Tensor) -> Tensor:
    return (0.3 * x - 0.2).to(torch.bfloat16)


@pytest.mark.parametrize("sde_type", LEVELS)
def test_call_sites(host: tuple[Any, Any], counts: Callable[..., Any], sde_type: str) -> None:
    schedulers, algorithms = host
    level = LEVELS[sde_type]
    rollout = schedulers.FlowMatchSDEDiscreteScheduler(shift=3.0)
    rollout.set_timesteps(8)
    rollout.set_begin_index(0)
    latents, log_probs = [normal(*SHAPES[0], seed=1, dtype=torch.float32)], []
    window = range(1, 5)
    for i, timestep in enumerate(rollout.timesteps):
        with torch.no_grad():
            after, log_prob, _, _ = rollout.step(
                transformer(latents[-1]).to(torch.float32), timestep, latents[-1],
                noise_level=level if i in window else 0.0, sde_type=sde_type, return_dict=False,
            )  # fmt: skip
        latents.append(after)
        log_probs.append(log_prob)
    all_latents, all_timesteps = torch.stack(latents, 1), rollout.timesteps.expand(3, 8)

    trainer = schedulers.FlowMatchSDEDiscreteScheduler(shift=3.0)
    trainer.set_timesteps(8)
    loss_fn = algorithms.REGISTRY["dance_grpo"]

    def train(step: int) -> tuple[dict[str, Tensor], Tensor]:
        prediction = transformer(all_latents[:, step]).requires_grad_()
        _, log_prob, _, _, _ = trainer.sample_previous_step(
            sample=all_latents[:, step].float(), model_output=prediction.float(),
            timestep=all_timesteps[:, step], noise_level=level,
            prev_sample=all_latents[:, step + 1].float(), sde_type=sde_type, return_logprobs=True,
            return_sqrt_dt=True,
        )  # fmt: skip
        data = {"old_log_probs": log_probs[step], "advantages": torch.tensor([1.0, -1.0, 0.5])}
        output = {"log_probs": log_prob}
        loss, metrics = loss_fn(config=config(1e-4), model_output=output, data=data)
        loss.backward()
        return metrics, prediction.grad

    for step in window:
        metrics, gradient = train(step)
        # Every ratio is exactly 1.
        assert metrics["actor/ratio_mean"] == 1.0 and metrics["actor/ratio_std"] == 0.0
        assert gradient.abs().max() > 0
    assert counts(lambda: train(2)).syncs == 0


# ------------------------------------------------------------------ counts


def _call(train: bool) -> Callable[[bool], Callable[[], None]]:
    def make(before: bool) -> Callable[[], None]:
        v, x, y = (normal(*SHAPES[0], seed=s, dtype=torch.float32) for s in (1, 2, 3))
        v.requires_grad_(train)
        own = scheduler(None if train else 3)
        timestep = own.timesteps[STEPS] if train else None

        def run() -> None:
            if before and timestep is not None:  # the original's lookup, row by row
                [(own.timesteps == t).nonzero()[0].item() for t in timestep]
            with torch.set_grad_enabled(train):
                out = sample_previous_step(
                    own, x, v, timestep, noise_level=0.3, sde_type="dance_sde",
                    prev_sample=y if train else None, return_sqrt_dt=train, exact_order=before,
                )  # fmt: skip
                if train:
                    out[1].sum().backward()

        return run

    return make


def _loss_call(before: bool) -> Callable[[], None]:
    new, old, advantages = (normal(3, seed=s, dtype=torch.float32) for s in (1, 2, 3))
    new.requires_grad_()

    def theirs() -> None:  # verl-omni's order
        limited, difference = advantages.clamp(-2, 2), new - old
        ratio = torch.exp(difference)
        each = torch.maximum(-limited * ratio, -limited * ratio.clamp(0.99, 1.01))
        each.mean().backward()
        with torch.no_grad():
            shares = (ratio - 1).abs() > 1e-2, ratio - 1 > 1e-2, 1 - ratio > 1e-2
            values = [-difference.mean(), *(s.float().mean() for s in shares), ratio.mean()]
            # torch.std, in a form that reads nothing back on the CPU.
            values.append(torch.linalg.vector_norm(ratio - values[-1]) / 2**0.5)
            [value.item() for value in values]

    def ours() -> None:
        loss, _ = compute_loss(
            None, old_log_prob=old, log_prob=new, advantages=advantages, config=config()
        )
        loss.backward()

    return theirs if before else ours


CALLS = {
    "verl-omni step, rollout": _call(False),
    "verl-omni step, backward": _call(True),
    "verl-omni loss, backward": _loss_call,
}


@pytest.mark.parametrize("name", CALLS)
def test_counts(name: str, counts: Callable[..., Any]) -> None:
    before, after = (counts(CALLS[name](host)) for host in (True, False))
    assert after.syncs == 0 and after.launches + 2 * after.fused < before.launches
