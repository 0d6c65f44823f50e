"""Flow-Factory: the step of its scheduler, its call sites and what they cost."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import Counts
from formulas import assert_no_worse, clipped, column, normal
from stand_ins import Truth, check, packages
from torch import Tensor

from dancegrpo_fast import dance_schedule
from dancegrpo_fast.integrations import exact, flow_factory, pairs

SIGMAS = torch.tensor(dance_schedule(8, 3.0).sigmas, dtype=torch.float32)
TIMES = SIGMAS * 1000
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
LEVELS = {"Flow-SDE": 0.7, "Dance-SDE": 0.3, "CPS": 0.8}
NAMES = {"Flow-SDE": "flow", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}
MIXED = torch.tensor([0, 6, 3])

HOST = {
    "flow_factory/scheduler/abc.py": """
from dataclasses import dataclass
from typing import Any

@dataclass
class SDESchedulerOutput:
    next_latents: Any = None
    next_latents_mean: Any = None
    std_dev_t: Any = None
    dt: Any = None
    log_prob: Any = None
    noise_pred: Any = None
""",
    "flow_factory/scheduler/flow_match_euler_discrete.py": """
import torch

class FlowMatchEulerDiscreteSDEScheduler:
    def __init__(self, sigmas, noise_level=0.7, dynamics_type="Flow-SDE"):
        self.sigmas, self.timesteps = sigmas, sigmas[:-1] * 1000
        self.noise_level, self.dynamics_type, self.is_eval = noise_level, dynamics_type, False
        self._sde_steps, self._num_sde_steps, self.seed = torch.tensor([1, 3, 4]), None, 42

    def get_noise_levels(self):
        levels = torch.zeros_like(self.timesteps)
        levels[self._sde_steps] = self.noise_level
        return levels

    def get_noise_level_for_sigma(self, sigma):
        index = (sigma.reshape(-1, 1) == self.sigmas).int().argmax(dim=-1)
        return self.get_noise_levels()[index]

    def step(self, *args, **kwargs):
        raise AssertionError("the host's own step ran")
""",
    "flow_factory/models/adapter.py": """
import torch
from flow_factory.scheduler.flow_match_euler_discrete import FlowMatchEulerDiscreteSDEScheduler

class Adapter:
    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler

    def forward(self, t, latents, t_next=None, next_latents=None, noise_level=None,
                compute_log_prob=True, return_kwargs=("next_latents", "log_prob", "noise_pred")):
        noise_pred = self.transformer(latents, t.expand(latents.shape[0]) / 1000)
        return self.scheduler.step(
            noise_pred=noise_pred, timestep=t, latents=latents, timestep_next=t_next,
            next_latents=next_latents, compute_log_prob=compute_log_prob, return_dict=True,
            return_kwargs=return_kwargs, noise_level=noise_level,
        )

    def inference(self, latents, levels, dtype):
        timesteps, all_latents, all_log_probs = self.scheduler.timesteps, [latents], []
        for i, t in enumerate(timesteps):
            t_next = timesteps[i + 1] if i + 1 < len(timesteps) else torch.tensor(0)
            output = self.forward(
                t=t, t_next=t_next, latents=latents, noise_level=levels[i],
                compute_log_prob=levels[i] > 0,
                return_kwargs=["next_latents", "log_prob", "noise_pred", "noise_level"],
            )
            latents = output.next_latents.to(dtype)
            all_latents.append(latents)
            all_log_probs.append(output.log_prob)
        return torch.stack(all_latents, dim=1), all_log_probs
""",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with packages(tmp_path_factory.mktemp("host"), HOST, flow_factory.PATCHES):
        yield importlib.import_module("flow_factory.models.adapter")


@pytest.fixture
def scheduler(host: Any) -> Any:
    return host.FlowMatchEulerDiscreteSDEScheduler(SIGMAS)


def truth(
    kind: str, m: Tensor, x: Tensor, index: Any, dtype: torch.dtype = torch.float64,
    level: float | None = None,
) -> Truth:  # fmt: skip
    i = torch.as_tensor(index)
    level = LEVELS.get(kind, 0.0) if level is None else level
    # The host's sigmas are float32 quotients of its timesteps.
    sigmas = TIMES / 1000
    maximum = float(SIGMAS[1])
    return Truth(NAMES[kind], level, m, x, sigmas[i], sigmas[i + 1], sigma_max=maximum, dtype=dtype)


def density(kind: str, true: Truth, y: Tensor) -> Tensor:
    return true.square_log_prob(y) if kind == "CPS" else true.log_prob(y)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Latents as the trainer has them: a step of stored trajectories, not contiguous.
    m = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    stored = normal(shape[0], 3, *shape[1:], seed=2, dtype=dtype)
    return m, stored[:, 1]


def pair(index: Any) -> tuple[Any, Any]:
    return TIMES[index], TIMES[index + 1]


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", [0, 7, MIXED], ids=["0", "7", "[B]"])
@pytest.mark.parametrize("paired", [True, False])
def test_values_and_gradients(
    scheduler: Any, kind: str, shape: tuple[int, ...], dtype: torch.dtype, index: Any, paired: bool
) -> None:
    if kind == "CPS" and index is not MIXED:
        index = min(index, 6)  # Its last step has no noise: another test.
    m, x = inputs(shape, dtype)
    true = truth(kind, m, x, index)
    y = (true.mean + true.std * normal(*shape, seed=3)).detach().to(dtype)
    t, t_next = pair(index)
    out = scheduler.step(
        m, t, x, y, t_next if paired else None, noise_level=LEVELS[kind], dynamics_type=kind
    )
    assert torch.equal(out.next_latents, y.float())
    found = {
        "log_prob": out.log_prob, "mean": out.next_latents_mean, "noise_pred": out.noise_pred,
    }  # fmt: skip
    wanted = {"log_prob": density(kind, true, y), "mean": true.mean, "noise_pred": true.m * 1}
    check(found, wanted, m, true.m)
    # Without sqrt(-dt), but for CPS, which has none.
    std = true.std if kind == "CPS" else true.std / (-true.dt).sqrt()
    for value, expected in ((out.std_dev_t, std), (out.dt, true.dt)):
        assert value.shape == (3, *(1 for _ in shape[1:])) and value.dtype == torch.float32
        # dt is a difference of float32 sigmas, which 1000 sigma rounds; std its root.
        expected = expected.detach().float().expand_as(value)
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", LEVELS)
def test_error_is_at_most_twice_that_of_the_formula(scheduler: Any, kind: str) -> None:
    m, x = inputs((3, 4, 32, 32), torch.float32)
    true, plain = truth(kind, m, x, MIXED), truth(kind, m, x, MIXED, torch.float32)
    y = (true.mean + true.std * normal(3, 4, 32, 32, seed=3)).detach().float()
    t, t_next = pair(MIXED)
    out = scheduler.step(m, t, x, y, t_next, noise_level=LEVELS[kind], dynamics_type=kind)
    assert_no_worse(out.next_latents_mean, plain.mean, true.mean, "mean")
    assert_no_worse(out.log_prob, density(kind, plain, y), density(kind, true, y), "log_prob")


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_drawn_sample_is_rounded_before_its_log_prob(
    scheduler: Any, kind: str, dtype: torch.dtype
) -> None:
    m, x = inputs((3, 40, 8), dtype)
    true = truth(kind, m, x, 3)
    t, t_next = pair(3)
    options = {"timestep_next": t_next, "noise_level": LEVELS[kind], "dynamics_type": kind}
    torch.manual_seed(5)
    drawn = scheduler.step(m, t, x, **options)
    torch.manual_seed(5)
    expected = true.mean + true.std * torch.randn(3, 40, 8).double()
    assert drawn.next_latents.dtype == torch.float32
    assert torch.equal(drawn.next_latents.to(dtype).float(), drawn.next_latents)
    # One rounding to bf16 of values up to 8; float32 as everywhere.
    atol = 2**-6 if dtype == torch.bfloat16 else 4e-6
    torch.testing.assert_close(drawn.next_latents.double(), expected, rtol=0, atol=atol)
    (got,), (wanted,) = (
        torch.autograd.grad(y.sum(), at) for y, at in ((drawn.next_latents, m), (expected, true.m))
    )
    torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=0)
    stored = drawn.next_latents.to(dtype)
    replay = scheduler.step(m, t.expand(3), x, stored, **options)
    assert torch.equal(replay.log_prob, drawn.log_prob)
    one, two = (torch.Generator().manual_seed(8) for _ in range(2))
    again, same = (scheduler.step(m, t, x, generator=g, **options) for g in (one, two))
    assert torch.equal(again.next_latents, same.next_latents)
    assert not torch.equal(again.next_latents, drawn.next_latents)


def test_ode_and_evaluation(scheduler: Any) -> None:
    m, x = inputs((3, 40, 8), torch.bfloat16)
    true = truth("ODE", m, x, 7)
    t, t_next = pair(7)
    before = torch.get_rng_state()
    out = scheduler.step(m, t, x, timestep_next=t_next, dynamics_type="ODE")
    # The ODE's x' is not rounded: it is the mean.
    check({"x'": out.next_latents, "mean": out.next_latents_mean},
          {"x'": true.mean, "mean": true.mean}, m, true.m)  # fmt: skip
    assert (out.log_prob == 0).all() and (out.std_dev_t == 0).all()
    assert torch.equal(before, torch.get_rng_state())
    # The last step of CPS has no noise either.
    last = scheduler.step(m, t, x, timestep_next=t_next, dynamics_type="CPS", noise_level=0.8)
    torch.testing.assert_close(last.next_latents.double(), true.x0, rtol=0, atol=2**-6)
    before = torch.get_rng_state()
    scheduler.is_eval = True
    for kind in NAMES:
        out = scheduler.step(m, t, x, timestep_next=t_next, dynamics_type=kind, noise_level=0.7)
        torch.testing.assert_close(out.next_latents.double(), true.mean, rtol=0, atol=2**-6)
        assert out.log_prob.isfinite().all()
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="dynamics_type = 'SDE': must be one of Flow-SDE"):
        scheduler.step(m, t, x, dynamics_type="SDE")


def test_timesteps_and_levels_of_the_schedule(scheduler: Any) -> None:
    m, x = inputs((3, 40, 8), torch.float32)
    noisy = truth("Flow-SDE", m, x, 3)
    y = (noisy.mean + noisy.std).detach().float()
    whole = torch.tensor(3)
    for timestep in (float(TIMES[3]), TIMES[3], TIMES[3].expand(3), 3, whole, whole.expand(3)):
        # Step 3 is one of the scheduler's noisy steps, 2 is not.
        out = scheduler.step(m, timestep, x, y)
        torch.testing.assert_close(out.log_prob.double(), noisy.log_prob(y), rtol=0, atol=4e-6)
    # As pairs: with the scheduler's level, and off the schedule by numbers.
    paired = scheduler.step(m, TIMES[3].expand(3), x, y, TIMES[4].expand(3))
    torch.testing.assert_close(paired.log_prob, out.log_prob, rtol=0, atol=4e-6)
    free = scheduler.step(m, 900.0, x, y, 700, noise_level=0.7)
    sigma, sigma_next = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.7).double()
    true = Truth("flow", 0.7, m, x, sigma, sigma_next)
    torch.testing.assert_close(free.log_prob.double(), true.log_prob(y), rtol=0, atol=4e-6)
    torch.testing.assert_close(free.dt, column([-0.2] * 3, x).float())
    assert (scheduler.step(m, 2, x).log_prob == 0).all()
    # Other levels, or other noisy steps, are another table.
    scheduler.noise_level = 0.5
    other = truth("Flow-SDE", m, x, 3, level=0.5)
    out = scheduler.step(m, 3, x, y)
    torch.testing.assert_close(out.log_prob.double(), other.log_prob(y), rtol=0, atol=4e-6)
    scheduler._sde_steps = torch.tensor([2])
    assert (scheduler.step(m, 3, x).log_prob == 0).all()
    # A level per row, by index and by pair.
    levels = torch.tensor([0.7, 0.0, 0.3])
    for args in ((3, x, y, None), (*pair(3)[:1], x, y, pair(3)[1])):
        out = scheduler.step(m, *args, noise_level=levels)
        for row, level in ((0, 0.7), (2, 0.3)):
            wanted = truth("Flow-SDE", m, x, 3, level=level).log_prob(y)[row]
            torch.testing.assert_close(out.log_prob[row].double(), wanted, rtol=0, atol=4e-6)
        assert out.log_prob[1] == 0
    # sigma_max counts where sigma is 1 only.
    first = scheduler.step(m, 0, x, sigma_max=0.9, noise_level=1.0).std_dev_t
    torch.testing.assert_close(first, column([10.0**0.5] * 3, x).float())
    with pytest.raises(ValueError, match="not among the scheduler's"):
        scheduler.step(m, 933.5, x)


def test_only_what_is_asked_for(scheduler: Any, counts: Callable) -> None:
    m, x = inputs((3, 40, 8), torch.float32)
    t, t_next = pair(3)
    before = torch.get_rng_state()
    out = scheduler.step(m, t, x, compute_log_prob=False, return_kwargs=["noise_pred"])
    assert torch.equal(out.noise_pred, m) and out.next_latents is None and out.log_prob is None
    out = scheduler.step(
        m, t, x, timestep_next=t_next, noise_level=0.7, compute_log_prob=False,
        return_kwargs=["next_latents_mean", "dt", "noise_level"],
    )  # fmt: skip
    assert out.next_latents is None and out.std_dev_t is None
    assert out.next_latents_mean.requires_grad
    assert torch.equal(before, torch.get_rng_state())
    found = scheduler.step(m, t, x, x, t_next, noise_level=0.7, return_dict=False)
    assert type(found) is tuple and len(found) == 6
    named = scheduler.step(m, t, x, x, t_next, noise_level=0.7)
    order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    assert all(torch.equal(a, getattr(named, b)) for a, b in zip(found, order, strict=True))
    found = scheduler.step(m, t, x, x, t_next, compute_log_prob=False, noise_level=0.7,
                           return_dict=False)  # fmt: skip
    assert len(found) == 6 and found[3] is None


# ------------------------------------------------------------------ what it costs


class Scheduler:
    """What the step reads of the host's scheduler, for counting without its package."""

    sigmas, timesteps = SIGMAS, TIMES[:-1]
    noise_level, dynamics_type, is_eval = 0.7, "Flow-SDE", False
    _sde_steps, _num_sde_steps, seed = None, None, 42

    def get_noise_levels(self) -> Tensor:
        return torch.full((8,), 0.7)


def profiled(train: bool, paired: bool) -> Callable[[bool], Callable[[], object]]:
    m, x = inputs((3, 40, 8), torch.bfloat16)
    y = x + 0.1 if train else None
    at = torch.tensor([3, 3, 3]) if train else torch.tensor(3)
    t, t_next = pair(at)
    names = ("next_latents", "log_prob", "dt")

    def ours() -> Tensor:
        found = flow_factory.step(
            Scheduler(), m, t, x, y, t_next if paired else None, noise_level=0.7,
            return_dict=False, return_kwargs=names,
        )  # fmt: skip
        return found[3]

    def plain() -> Tensor:
        sigma, sigma_next = ((v / 1000).reshape(-1, 1, 1) for v in (t, t_next))
        rate = exact.flow_rate(sigma, 0.7, SIGMAS[1].item())
        moments = exact.reverse_sde(m.float(), x.float(), sigma, sigma_next, rate)
        drawn = exact.draw(moments, torch.randn(x.shape)).to(x.dtype) if y is None else y
        return exact.log_prob(drawn.float(), moments)

    def run(exact: bool) -> object:
        with torch.set_grad_enabled(train):
            log_prob = plain() if exact else ours()
        return torch.autograd.grad(log_prob.sum(), m) if train else log_prob

    return lambda exact: lambda: run(exact)


CALLS = {
    "Flow-Factory step by timestep, rollout": profiled(False, False),
    "Flow-Factory step by timestep, training with backward": profiled(True, False),
    "Flow-Factory step by pair, training with backward": profiled(True, True),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_and_syncs(
    name: str, counts: Callable[[Callable[[], object]], Counts], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sigmas and timesteps that lie on the CPU are checked there; on a device nothing is read.
    monkeypatch.setattr(pairs, "check_sigmas", lambda *sigmas: None)
    before, after = (counts(CALLS[name](exact)) for exact in (True, False))
    assert after.syncs == 0
    if "pair" not in name:
        assert after.launches + 2 * after.fused < before.launches, (before, after)


# ------------------------------------------------------------------ the host's call sites


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_host_runs_unchanged(host: Any, kind: str, dtype: torch.dtype) -> None:
    factor = torch.tensor(0.3, requires_grad=True)

    def transformer(hidden_states: Tensor, sigma: Tensor) -> Tensor:
        return (factor * hidden_states.float() + sigma.reshape(-1, 1, 1) / 4).to(dtype)

    scheduler = host.FlowMatchEulerDiscreteSDEScheduler(SIGMAS, LEVELS[kind], kind)
    adapter = host.Adapter(transformer, scheduler)
    z = normal(2, 40, 8, seed=4, dtype=dtype)
    levels = [LEVELS[kind] if i in (0, 3) else 0.0 for i in range(8)]
    with torch.no_grad():
        latents, log_probs = adapter.inference(z, levels, dtype)
    assert latents.isfinite().all()
    assert [lp is not None for lp in log_probs] == [level > 0 for level in levels]
    for step in (0, 3):
        times = scheduler.timesteps.expand(2, 8)
        output = adapter.forward(
            t=times[:, step], t_next=times[:, step + 1], latents=latents[:, step],
            next_latents=latents[:, step + 1], noise_level=scheduler.noise_level,
            return_kwargs=["log_prob", "dt", "next_latents_mean", "std_dev_t"],
        )  # fmt: skip
        ratio = torch.exp(output.log_prob - log_probs[step])
        assert torch.equal(ratio, torch.ones(2))
        loss = clipped(ratio, torch.tensor([1.0, -0.5]), 1e-4, 1e-4).mean()
        (gradient,) = torch.autograd.grad(loss, factor)
        assert gradient.isfinite() and gradient != 0
