"""UniRL's step strategies: values, gradients, storage dtypes, and a stand-in of its two loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import formulas
import pytest
import torch
from formulas import normal
from torch import Tensor

from dancegrpo_fast import dance_schedule
from dancegrpo_fast.integrations import unirl

SCHEDULE = torch.tensor(dance_schedule(8, 3.0).sigmas, dtype=torch.float32)
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
STRATEGIES = {
    "flow": (unirl.FlowSDEStrategy, 0.7),
    "dance": (unirl.DanceSDEStrategy, 0.3),
    "cps": (unirl.CPSSDEStrategy, 0.8),
}


def oracle(
    name: str, v: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, level: float, high: float
) -> tuple[Tensor, Tensor]:
    """(mean, std) in float64."""
    here, there = formulas.column(sigma, x), formulas.column(sigma_next, x)
    if name == "cps":
        return formulas.cps_step(v, x, here, there, level)
    return formulas.flow_step(v, x, here, there, formulas.rate(name, here, level, high, 0.0))


def density(name: str, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if name == "cps":
        return -((y - mean) ** 2).flatten(1).mean(1)
    return formulas.log_density(y, mean, std)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cls, level = STRATEGIES[name]
    strategy = cls(config=None)
    assert strategy.canonical_name == name
    index = torch.tensor([0, 6, 3])  # sigma = 1 among them
    sigma, sigma_next, high = SCHEDULE[index], SCHEDULE[index + 1], SCHEDULE[1]
    v = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    x, v64 = normal(*shape, seed=2, dtype=dtype), v.detach().double().requires_grad_()
    mean, std = oracle(name, v64, x.double(), sigma, sigma_next, level, float(high))
    y = (mean + std * normal(*shape, seed=3)).detach().to(dtype)
    true = density(name, y.double(), mean, std)
    prev, log_prob, found = strategy.denoise(
        v, x, sigma, sigma_next, eta=level, prev_sample=y, sigma_max=high, step_index=0
    )
    assert torch.equal(prev, y.float()) and prev.dtype == torch.float32
    assert log_prob is not None and log_prob.dtype == torch.float32 and log_prob.shape == (3,)
    # float32: a few roundings (2^-24 each) of numbers up to 5; the log-prob divides one such
    # rounding by s >= 0.08 and squares.
    torch.testing.assert_close(found.double(), mean, rtol=0, atol=4e-6)
    torch.testing.assert_close(log_prob.double(), true, rtol=0, atol=2e-5)
    weight = normal(*shape, seed=5)
    pairs = [(log_prob.sum(), true.sum()), ((found * weight).sum(), (mean * weight).sum())]
    pairs.append((pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]))
    for got, true in pairs:
        (gradient,) = torch.autograd.grad(got, v, retain_graph=True)
        (wanted,) = torch.autograd.grad(true, v64, retain_graph=True)
        # bf16: one rounding (2^-9) for each of the two outputs.
        bound = 2**-7 if dtype == torch.bfloat16 else 2e-5
        assert (gradient.double() - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_form_of_sigma_is_the_same_step(name: str) -> None:
    cls, level = STRATEGIES[name]
    v, x, y = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2, 3))

    def of(i: int, sigma: Tensor, after: Tensor, high: Any) -> Tensor:
        out = cls().denoise(v, x, sigma, after, eta=level, prev_sample=y, sigma_max=high)
        assert out[1] is not None
        return out[1]

    for i in (0, 3, 6):
        pair = SCHEDULE[i], SCHEDULE[i + 1]
        wanted = of(i, *pair, SCHEDULE[1])
        assert torch.equal(of(i, *pair, float(SCHEDULE[1])), wanted)
        assert torch.equal(of(i, *pair, SCHEDULE[1].clone()), wanted)
        apart = pair[0].clone(), pair[1].clone()
        assert torch.equal(of(i, *apart, SCHEDULE[1]), wanted)
        assert torch.equal(of(i, *(s.expand(3) for s in apart), float(SCHEDULE[1])), wanted)
        assert torch.equal(of(i, *(s.double() for s in pair), SCHEDULE[1]), wanted)
    # Sigmas that are not neighbours in one schedule are not looked up.
    here, there = SCHEDULE[2], SCHEDULE[4]
    assert torch.equal(of(2, here, there, 0.9), of(2, here.clone(), there.clone(), 0.9))
    # Strided and offset schedules.
    wide = torch.stack((SCHEDULE, 1 - SCHEDULE), 1)[1:, 0]
    assert torch.equal(of(2, wide[2], wide[3], 0.9), of(2, SCHEDULE[3], SCHEDULE[4], 0.9))


def test_the_schedule_may_be_rewritten() -> None:
    v, x, y = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2, 3))
    schedule, strategy = SCHEDULE.clone(), unirl.DanceSDEStrategy()

    def mean() -> Tensor:
        return strategy.denoise(v, x, schedule[2], schedule[3], eta=0.3, prev_sample=y)[2]

    before = mean()
    schedule[3] = 0.8
    wanted, _ = oracle("dance", v.double(), x.double(), schedule[2], schedule[3], 0.3, 0.99)
    assert not torch.equal(mean(), before)
    torch.testing.assert_close(mean().double(), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_noise(name: str) -> None:
    v = normal(*SHAPES[1], seed=1, dtype=torch.float32)
    x = normal(*SHAPES[1], seed=2, dtype=torch.bfloat16)
    strategy = STRATEGIES[name][0]()
    state = torch.get_rng_state()
    prev, log_prob, mean = strategy.denoise(v, x, SCHEDULE[2], SCHEDULE[3], eta=0.0)
    assert log_prob is None and torch.equal(prev, mean)
    ode = x.double() + (SCHEDULE[3] - SCHEDULE[2]).double() * v.double()
    torch.testing.assert_close(mean.double(), ode, rtol=0, atol=4e-6)
    # Numbers are drawn all the same: a seed's later steps get what UniRL gives them.
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randn(SHAPES[1])
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_last_step_to_zero() -> None:
    v, x = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2))
    for name in ("flow", "dance"):
        cls, level = STRATEGIES[name]
        prev, log_prob, mean = cls().denoise(v, x, SCHEDULE[7], SCHEDULE[8], eta=level)
        wanted = oracle(name, v.double(), x.double(), SCHEDULE[7], SCHEDULE[8], level, 0.9)
        torch.testing.assert_close(mean.double(), wanted[0], rtol=0, atol=4e-6)
        true = formulas.log_density(prev.double(), *wanted)
        assert log_prob is not None
        torch.testing.assert_close(log_prob.double(), true, rtol=0, atol=2e-5)
    prev, log_prob, mean = unirl.CPSSDEStrategy().denoise(v, x, SCHEDULE[7], SCHEDULE[8], eta=0.8)
    assert log_prob is not None and torch.equal(log_prob, torch.zeros(3))
    torch.testing.assert_close(prev, x - SCHEDULE[7] * v, rtol=0, atol=4e-6)


# ------------------------------------------------------------------ the host's call sites


class Stage:
    """A stand-in of a diffusion stage: its rollout and replay loops around the strategy."""

    def __init__(self, strategy: Any, trajectory_dtype: torch.dtype) -> None:
        self.strategy, self.trajectory_dtype = strategy, trajectory_dtype

    def predict_noise(self, sample: Tensor, sigma: Tensor) -> Tensor:
        return (0.5 * sample + sigma).to(torch.bfloat16)

    def diffuse(
        self, x: Tensor, schedule: Tensor, sde: list[int], eta: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        self.strategy.reset()
        self.strategy.init_schedule(schedule)
        latents, stored, log_probs = x.to(self.trajectory_dtype), [], []
        stored.append(latents)
        for i in range(len(schedule) - 1):
            sigma, sigma_next = schedule[i].to(x.device), schedule[i + 1].to(x.device)
            with torch.no_grad():
                prev, log_prob, _ = self.strategy.denoise(
                    noise_pred=self.predict_noise(latents, sigma), sample=latents, sigma=sigma,
                    sigma_next=sigma_next, eta=eta if i in sde else 0.0, prev_sample=None,
                    sigma_max=schedule[1].float(), step_index=i,
                )  # fmt: skip
            latents = prev.to(dtype=self.trajectory_dtype)
            stored.append(latents)
            if log_prob is not None:
                log_probs.append(log_prob)
        return stored, log_probs

    def replay(
        self, stored: list[Tensor], sigmas: Tensor, i: int, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        sigma = sigmas[i].to(dtype=torch.float32)
        prediction = self.predict_noise(stored[i], sigma).requires_grad_()
        _, log_prob, mean = self.strategy.denoise(
            noise_pred=prediction, sample=stored[i], sigma=sigma,
            sigma_next=sigmas[i + 1].to(dtype=torch.float32), eta=eta, prev_sample=stored[i + 1],
            sigma_max=sigmas[1].float(), step_index=i,
        )  # fmt: skip
        return log_prob, mean, prediction


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rollout_and_replay(
    name: str, dtype: torch.dtype, counts: Callable[..., Any]
) -> None:
    cls, level = STRATEGIES[name]
    stage, x = Stage(cls(), dtype), normal(*SHAPES[1], seed=1, dtype=torch.float32)
    sde = [0, 2, 6]
    stored, log_probs = stage.diffuse(x, SCHEDULE, sde, level)
    assert len(log_probs) == 3
    for i, old in zip(sde, log_probs, strict=True):
        log_prob, _, prediction = stage.replay(stored, SCHEDULE, i, level)
        ratio = torch.exp(log_prob - old)
        assert torch.equal(ratio, torch.ones(3))
        ratio.sum().backward()
        assert prediction.grad is not None and prediction.grad.abs().max() > 0
    assert counts(lambda: stage.replay(stored, SCHEDULE, 2, level)[0].sum()).syncs == 0
    assert counts(lambda: stage.diffuse(x, SCHEDULE, sde, level)).syncs == 0


# ------------------------------------------------------------------ counts


def test_no_worse_than_the_host() -> None:
    shape, index = (64, 4, 6, 5), torch.arange(64) % 8
    sigma, after, high = SCHEDULE[index], SCHEDULE[index + 1], float(SCHEDULE[1])
    v, x = (normal(*shape, seed=s, dtype=torch.float32) for s in (1, 2))
    mean, std = oracle("flow", v.double(), x.double(), sigma, after, 0.7, high)
    y = (mean + std * normal(*shape, seed=3)).float()
    ours, theirs = (
        unirl.FlowSDEStrategy().denoise(
            v, x, sigma, after, eta=0.7, prev_sample=y, sigma_max=high, exact_order=exact
        )
        for exact in (False, True)
    )
    formulas.assert_no_worse(ours[2], theirs[2], mean)
    true = formulas.log_density(y.double(), mean, std)
    assert ours[1] is not None and theirs[1] is not None
    formulas.assert_no_worse(ours[1], theirs[1], true)


def _call(train: bool) -> Callable[[bool], Callable[[], None]]:
    def make(before: bool) -> Callable[[], None]:
        v, x, y = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2, 3))
        v.requires_grad_(train)
        prev, strategy = (y if train else None), unirl.FlowSDEStrategy()
        sigma, after, high = SCHEDULE[2], SCHEDULE[3], SCHEDULE[1]

        def run() -> None:
            with torch.set_grad_enabled(train):
                _, log_prob, _ = strategy.denoise(
                    v, x, sigma, after, eta=0.7, prev_sample=prev, sigma_max=high,
                    exact_order=before,
                )  # fmt: skip
                assert log_prob is not None
                if train:
                    log_prob.sum().backward()

        return run

    return make


CALLS = {"UniRL denoise, rollout": _call(False), "UniRL denoise, replay": _call(True)}


@pytest.mark.parametrize("name", CALLS)
def test_counts(name: str, counts: Callable[..., Any]) -> None:
    before, after = (counts(CALLS[name](host)) for host in (True, False))
    assert after.syncs == 0 and after.launches + 2 * after.fused < before.launches
