"""Miles' step backends and its loss formula: values, gradients, metrics, and stand-ins of calls."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import formulas
import pytest
import torch
from formulas import normal
from torch import Tensor

from dancegrpo_fast import dance_schedule
from dancegrpo_fast.integrations import exact, miles
from dancegrpo_fast.integrations.common import per_sample

SIGMAS = torch.tensor(dance_schedule(8, 3.0).sigmas, dtype=torch.float32)
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
STEPS = torch.tensor([0, 6, 3])
LEVELS = {"sde": 0.7, "cps": 0.8}
BACKENDS = {"sde": miles.FusedSdeStepBackend, "cps": miles.FusedCpsStepBackend}


def backend(sde_type: str) -> Any:
    """As the actor makes it."""
    scheduler = SimpleNamespace(sigmas=SIGMAS, timesteps=SIGMAS[:-1] * 1000)
    return BACKENDS[sde_type](scheduler, sde_timestep_divisor=1000.0)


def oracle(
    sde_type: str, v: Tensor, x: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, std_dev_t) in float64."""
    here, there = (formulas.column(SIGMAS[i], x) for i in (index, index + 1))
    if sde_type == "cps":
        mean, std = formulas.cps_step(v, x, here, there, LEVELS["cps"])
        return mean, std, std
    rate = formulas.rate("flow", here, LEVELS["sde"], float(SIGMAS[1]), 0.0)
    return *formulas.flow_step(v, x, here, there, rate), rate


def density(sde_type: str, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if sde_type == "cps":
        return -((y - mean) ** 2).flatten(1).mean(1)
    return formulas.log_density(y, mean, std)


@pytest.mark.parametrize("sde_type", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backends(sde_type: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    timesteps = SIGMAS * 1000
    v = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    x, v64 = normal(*shape, seed=2, dtype=torch.float32), v.detach().double().requires_grad_()
    mean, std, std_dev_t = oracle(sde_type, v64, x.double(), STEPS)
    y = (mean + std * normal(*shape, seed=3)).detach().float()
    true = density(sde_type, y.double(), mean, std)
    out = backend(sde_type).sde_step_logprob(
        v, timesteps[STEPS], timesteps[STEPS + 1], x, prev_sample=y, noise_level=LEVELS[sde_type]
    )
    assert type(out) is tuple and len(out) == 4 and all(t.dtype == torch.float32 for t in out)
    stored, log_prob, found, factor = out
    assert stored is y and log_prob.shape == (3,)
    assert factor.shape == (3, *(1 for _ in shape[1:]))
    torch.testing.assert_close(factor.double(), std_dev_t, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.double(), mean, rtol=0, atol=4e-6)
    # The rounding of the mean (2^-22) against s >= 0.08, times a residual of up to 4 s.
    torch.testing.assert_close(log_prob.double(), true, rtol=0, atol=2e-5)
    weight = normal(*shape, seed=5)
    for got, wanted in (
        (log_prob.sum(), true.sum()),
        ((found * weight).sum(), (mean * weight).sum()),
        (log_prob.sum() + (found * weight).sum(), true.sum() + (mean * weight).sum()),
    ):
        (gradient,) = torch.autograd.grad(got, v, retain_graph=True)
        (exact64,) = torch.autograd.grad(wanted, v64, retain_graph=True)
        bound = 2**-7 if dtype == torch.bfloat16 else 2e-5  # bf16: a rounding for each output
        assert (gradient.double() - exact64).abs().max() <= bound * exact64.abs().max()


def test_the_last_step_and_refusals() -> None:
    v, x, y = (normal(*SHAPES[1], seed=s, dtype=torch.float32) for s in (1, 2, 3))
    last, zero = torch.full((3,), float(SIGMAS[7] * 1000)), torch.zeros(3)
    out = backend("sde").sde_step_logprob(v, last, zero, x, prev_sample=y, noise_level=0.7)
    mean, std, _ = oracle("sde", v.double(), x.double(), torch.full((3,), 7))
    true = formulas.log_density(y.double(), mean, std)
    torch.testing.assert_close(out[1].double(), true, rtol=2e-6, atol=2e-5)
    out = backend("cps").sde_step_logprob(v, last, zero, x, prev_sample=y, noise_level=0.8)
    mean = x.double() - SIGMAS[7].double() * v.double()
    torch.testing.assert_close(out[2].double(), mean, rtol=0, atol=4e-6)
    true = -((y.double() - mean) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(out[1].double(), true, rtol=2e-6, atol=0)
    with pytest.raises(ValueError, match="not among the scheduler's"):
        backend("sde").sde_step_logprob(v, last + 1, zero, x, prev_sample=y, noise_level=0.7)
    old = miles.sde_step_with_logprob(backend("sde").scheduler, v, last, x, y, noise_level=0.7)
    new = backend("sde").sde_step_logprob(v, last, zero, x, prev_sample=y, noise_level=0.7)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


# ------------------------------------------------------------------ the loss


class Metrics:
    """Miles' buffer: sums and counts of each name, read when a step is logged."""

    def __init__(self) -> None:
        self.means: dict[str, tuple[Tensor, int]] = {}
        self.others: dict[str, Any] = {}

    def emit_mean(self, key: str, total: Tensor, count: int) -> None:
        assert isinstance(total, Tensor) and total.shape == () and not total.requires_grad
        self.means[key] = (total, count)


def context(sde_type: str, own: Any = None, **changes: Any) -> Any:
    args = {
        "diffusion_clip_range": 1e-2, "diffusion_noise_level": LEVELS[sde_type],
        "diffusion_kl_beta": 0.0, "diffusion_sde_type": sde_type, "diffusion_debug_mode": False,
    }  # fmt: skip
    return SimpleNamespace(
        args=SimpleNamespace(**{**args, **changes}), sde_backend=own or backend(sde_type),
        models={"transformer": None}, device=torch.device("cpu"),
    )  # fmt: skip


def prepare(sde_type: str, shape: tuple[int, ...]) -> tuple[Any, Tensor, Tensor]:
    """(prepared batch, v, v_ref); the ratios lie below, inside and above the clip range."""
    v, x, ref = (normal(*shape, seed=s, dtype=torch.float32) for s in (1, 2, 3))
    mean, std, _ = oracle(sde_type, v.double(), x.double(), STEPS)
    y = (mean + std * normal(*shape, seed=4)).float()
    shift = torch.tensor([3e-2, -4e-3, -2e-2], dtype=torch.float64)
    old = density(sde_type, y.double(), mean, std) - shift
    extras = {
        "next_latents": y, "next_timesteps": SIGMAS[STEPS + 1] * 1000, "log_prob_old": old.float()
    }  # fmt: skip
    prepared = SimpleNamespace(
        latents=x, timesteps=SIGMAS[STEPS] * 1000, component_name="transformer", extras=extras,
        advantage=torch.tensor([-1.0, 0.5, 2.0]),
    )  # fmt: skip
    return prepared, v.requires_grad_(), ref


@pytest.mark.parametrize("sde_type", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kl_beta", [0.0, 0.04])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_loss(sde_type: str, shape: tuple[int, ...], kl_beta: float, fresh: bool) -> None:
    prepared, v, ref = prepare(sde_type, shape)
    advantage, y = prepared.advantage.double(), prepared.extras["next_latents"].double()
    v64, x = v.detach().double().requires_grad_(), prepared.latents.double()
    mean, std, factor = oracle(sde_type, v64, x, STEPS)
    new = density(sde_type, y, mean, std)
    old = new.detach() if fresh else prepared.extras["log_prob_old"].double()
    ratio = (new - old).exp()
    each = formulas.clipped(ratio, advantage, 1e-2, 1e-2)
    other = oracle(sde_type, ref.double(), x, STEPS)[0]
    kl = ((mean - other) ** 2 / (2 * factor**2)).flatten(1).mean(1)
    true = each.sum() + kl_beta * kl.sum()

    metrics = Metrics()
    loss = miles.flow_grpo_loss_formula(
        context(sde_type, diffusion_kl_beta=kl_beta), [{}] * 3, prepared, new_pred=v,
        ref_pred=ref if kl_beta else None, metrics=metrics, old_log_prob_from_new=fresh,
    )  # fmt: skip
    assert loss is not None and loss.dtype == torch.float32
    # log_prob_old was rounded (2^-24 of 4), and a float32 log-prob is off by up to 2e-5.
    torch.testing.assert_close(loss.double(), true, rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, v)
    (wanted,) = torch.autograd.grad(true, v64)
    assert (gradient.double() - wanted).abs().max() <= 5e-5 * wanted.abs().max()
    sums = {
        "loss": true, "policy_loss": each.sum(), "kl_loss": kl.sum() if kl_beta else 0 * true,
        "loss_abs_mean": each.abs().sum(), "adv_abs_mean": advantage.abs().sum(),
        "ratio_abs_minus_1": (ratio - 1).abs().sum(), "approx_kl": ((new - old) ** 2).sum() / 2,
        "clipfrac": ((ratio - 1).abs() > 1e-2).double().sum(), "log_prob_new_idx_0": new[0],
        "log_prob_old_idx_0": old[0], "log_prob_mean_abs_diff": (new - old).abs().sum(),
    }  # fmt: skip
    assert set(sums) == set(metrics.means)
    for name, value in sums.items():
        total, number = metrics.means[name]
        assert number == (1 if name.endswith("idx_0") else 3)
        torch.testing.assert_close(total.double(), value.detach(), rtol=2e-6, atol=1e-4, msg=name)


def test_recomputed_log_probs_and_refusals() -> None:
    prepared, v, _ = prepare("sde", SHAPES[1])
    batch: list[dict[str, Any]] = [{}, {}, {}]
    options: Any = {"new_pred": v, "ref_pred": None, "metrics": None, "old_pred": None}
    found = miles.flow_grpo_loss_formula(
        context("sde"), batch, prepared, write_old_log_prob=True, **options
    )
    assert found is None
    stored = torch.stack([pair["log_prob_old"] for pair in batch])
    prepared.extras["log_prob_old"] = stored
    options["metrics"] = metrics = Metrics()
    miles.flow_grpo_loss_formula(context("sde"), batch, prepared, **options)
    assert metrics.means["ratio_abs_minus_1"][0] == 0.0  # the ratio is exactly 1
    for flag, value, match in (
        ("diffusion_kl_beta", 0.1, "needs a reference"),
        ("diffusion_score_centering", True, "diffusion_score_centering = True"),
        ("diffusion_sde_type", "ode", "sde_type = 'ode'"),
    ):
        with pytest.raises(ValueError, match=match):
            miles.flow_grpo_loss_formula(
                context("sde", **{flag: value}), batch, prepared, **options
            )


def test_debug_mode_uses_the_host_s_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, v, _ = prepare("sde", SHAPES[1])
    pairs, record = ModuleType("pairs"), ModuleType("record")

    def stack(batch: list[dict[str, Any]], key: str) -> Tensor:
        return torch.stack([pair["rollout_debug_tensors"][key] for pair in batch])

    def difference(metrics: Metrics, prefix: str, train: Tensor, rollout: Tensor, **_: Any) -> None:
        metrics.others[prefix] = (train - rollout).abs().max()

    pairs.stack_train_pair_rollout_debug = stack  # type: ignore[attr-defined]
    record.record_rollout_train_abs_diff = difference  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "miles", ModuleType("miles"))
    monkeypatch.setitem(sys.modules, "miles.utils.train_data_utils", pairs)
    monkeypatch.setitem(sys.modules, "miles.backends.fsdp_utils.metrics", record)
    batch = [{"rollout_debug_tensors": {"rollout_step_model_output": row}} for row in v.detach()]
    metrics, ctx = Metrics(), context("sde", diffusion_debug_mode=True)
    ctx.models["second"] = None
    miles.flow_grpo_loss_formula(
        ctx, batch, prepared, new_pred=v, ref_pred=None, metrics=metrics
    )
    assert metrics.others["model_output"] == 0.0
    assert "log_prob_mean_abs_diff_transformer" in metrics.means


# ------------------------------------------------------------------ the host's call sites

HOST = '''
"""A stand-in of Miles' actor: what the flags name is imported and called as the actor does."""
import importlib
import torch

def load_function(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)

class Actor:
    def __init__(self, args, scheduler, model):
        self.args, self.model = args, model
        self.sde_backend = load_function(args.sde_step_backend_path)(
            scheduler, sde_timestep_divisor=1000.0)
        path = args.custom_loss_function_path
        self.loss_formula_fn = load_function(path) if path else self.host_formula
        self.device, self.models = torch.device("cpu"), {"transformer": model}

    def host_formula(self, ctx, batch, prepared, *, new_pred, ref_pred, metrics,
                     write_old_log_prob=False, old_log_prob_from_new=False):
        _, log_prob, mean, std_dev_t = ctx.sde_backend.sde_step_logprob(
            new_pred.float(), prepared.timesteps, prepared.extras["next_timesteps"],
            prepared.latents.float(), prev_sample=prepared.extras["next_latents"].float(),
            noise_level=ctx.args.diffusion_noise_level)
        if write_old_log_prob:
            for pair, value in zip(batch, log_prob, strict=True):
                pair["log_prob_old"] = value.cpu()
            return None
        ratio = torch.exp(log_prob - prepared.extras["log_prob_old"])
        metrics.emit_mean("ratio_abs_minus_1", total=(ratio - 1).abs().sum().detach(), count=3)
        return torch.maximum(-prepared.advantage * ratio, -prepared.advantage * ratio).sum()

    def forward(self, batch, prepared, metrics, **options):
        prediction = self.model(prepared.latents)
        return self.loss_formula_fn(
            self, batch, prepared, new_pred=prediction, ref_pred=None, metrics=metrics, **options)
'''


@pytest.mark.parametrize("sde_type", LEVELS)
@pytest.mark.parametrize("formula", ["flow_grpo_loss_formula", ""])
def test_call_sites(
    sde_type: str, formula: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    counts: Callable[..., Any],
) -> None:  # fmt: skip
    (tmp_path / "miles_actor_stand_in.py").write_text(HOST)
    monkeypatch.syspath_prepend(str(tmp_path))
    host = importlib.import_module("miles_actor_stand_in")
    ours, name = "dancegrpo_fast.integrations.miles", BACKENDS[sde_type].__name__
    args = context(
        sde_type, sde_step_backend_path=f"{ours}.{name}",
        custom_loss_function_path=f"{ours}.{formula}" if formula else None,
    ).args  # fmt: skip
    layer = torch.nn.Linear(8, 8).to(torch.bfloat16)
    actor = host.Actor(args, backend("sde").scheduler, lambda x: layer(x.to(torch.bfloat16)))
    prepared, _, _ = prepare(sde_type, SHAPES[0])
    batch: list[dict[str, Any]] = [{}, {}, {}]
    with torch.no_grad():
        assert actor.forward(batch, prepared, None, write_old_log_prob=True) is None
    prepared.extras["log_prob_old"] = torch.stack([pair["log_prob_old"] for pair in batch])
    metrics = Metrics()
    actor.forward(batch, prepared, metrics).backward()
    assert metrics.means["ratio_abs_minus_1"][0] == 0.0
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0
    if sde_type == "sde":  # The check of sigmas given as values reads them, on the CPU only.
        assert counts(lambda: actor.forward(batch, prepared, metrics).backward()).syncs == 0


# ------------------------------------------------------------------ counts


def miles_order(v: Tensor, x: Tensor, index: Any) -> tuple[exact.Moments, Tensor]:
    """The original's order, and std_dev_t."""
    here, there = (per_sample(SIGMAS[[int(i) + n for i in index]], v) for n in (0, 1))
    rate = exact.flow_rate(here, 0.7, SIGMAS[1].item())
    return exact.reverse_sde(v, x, here, there, rate), rate


def test_no_worse_than_the_host() -> None:
    shape, index = (64, 4, 6, 5), torch.arange(64) % 8
    v, x = (normal(*shape, seed=s, dtype=torch.float32) for s in (1, 2))
    mean, std, _ = oracle("sde", v.double(), x.double(), index)
    y = (mean + std * normal(*shape, seed=3)).float()
    t, after = SIGMAS[index] * 1000, SIGMAS[index + 1] * 1000
    _, log_prob, found, _ = backend("sde").sde_step_logprob(
        v, t, after, x, prev_sample=y, noise_level=0.7
    )
    theirs, _ = miles_order(v, x, index)
    formulas.assert_no_worse(found, theirs.mean, mean)
    true = formulas.log_density(y.double(), mean, std)
    formulas.assert_no_worse(log_prob, exact.log_prob(y, theirs), true)


def _loss_call(sde_type: str, kl_beta: float) -> Callable[[bool], Callable[[], None]]:
    def make(before: bool) -> Callable[[], None]:
        prepared, v, ref = prepare(sde_type, SHAPES[1])
        ctx = context(sde_type, diffusion_kl_beta=kl_beta)
        extras = prepared.extras

        def ours() -> None:
            loss = miles.flow_grpo_loss_formula(
                ctx, [{}] * 3, prepared, new_pred=v, ref_pred=ref, metrics=Metrics()
            )
            assert loss is not None
            loss.backward()

        def theirs() -> None:  # Miles' order, without its metrics.
            scheduler = ctx.sde_backend.scheduler
            index = [(scheduler.timesteps == t).nonzero()[0].item() for t in prepared.timesteps]
            mine, rate = miles_order(v, prepared.latents, index)
            ratio = torch.exp(
                exact.log_prob(extras["next_latents"], mine) - extras["log_prob_old"]
            )
            a = -prepared.advantage
            loss = torch.maximum(a * ratio, a * ratio.clamp(0.99, 1.01)).sum()
            if kl_beta:
                other, _ = miles_order(ref, prepared.latents, index)
                square = (mine.mean - other.mean) ** 2
                loss = loss + kl_beta * (square.mean((1, 2, 3), keepdim=True) / (2 * rate**2)).sum()
            loss.backward()

        return theirs if before else ours

    return make


CALLS = {
    "Miles loss, backward": _loss_call("sde", 0.0),
    "Miles loss with KL, backward": _loss_call("sde", 0.04),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts(name: str, counts: Callable[..., Any]) -> None:
    before, after = (counts(CALLS[name](host)) for host in (True, False))
    assert after.syncs == 0 < before.syncs
    assert after.launches + 2 * after.fused < before.launches  # our metrics counted, theirs not
