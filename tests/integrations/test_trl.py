"""TRL's former DDPO step: values, gradients, dtypes, and a stand-in of its call sites."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import formulas
import pytest
import torch
from formulas import normal
from stand_ins import packages
from torch import Tensor

from dancegrpo_fast.integrations.trl import PATCHES, scheduler_step

SHAPE = (3, 4, 6, 5)


def scheduler(prediction: str = "epsilon", **config: object) -> Any:
    """What the step reads of a `DDIMScheduler` of Stable Diffusion after `set_timesteps(50)`."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    options = {"clip_sample": False, "thresholding": False, **config}
    return SimpleNamespace(
        alphas_cumprod=torch.cumprod(1 - betas, 0).float(),
        num_inference_steps=50,
        timesteps=torch.arange(981, 0, -20),
        config=SimpleNamespace(num_train_timesteps=1000, prediction_type=prediction, **options),
    )


def oracle(
    host: Any, m: Tensor, x: Tensor, t: Tensor, eta: float, prediction: str
) -> tuple[Tensor, Tensor]:
    """(mean, std) in float64: a step goes 20 timesteps down, the last one to timestep 0."""
    alphas = host.alphas_cumprod.double()
    pair = (formulas.column(alphas[i], x) for i in (t, (t - 20).clamp(min=0)))
    mean, std, _ = formulas.ddim_step(m, x, *pair, eta, prediction)
    return mean, std


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_and_gradients(prediction: str, dtype: torch.dtype) -> None:
    host, double = scheduler(prediction), dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    t = torch.tensor([981, 1, 501])  # the first and the last step in one batch
    m = normal(*SHAPE, seed=1, dtype=dtype).requires_grad_()
    x = normal(*SHAPE, seed=2, dtype=wide)
    m64 = m.detach().double().requires_grad_()
    mean, std = oracle(host, m64, x.double(), t, 1.0, prediction)
    y = (mean + std * normal(*SHAPE, seed=3)).detach().to(wide)
    true = formulas.log_density(y.double(), mean, std)
    out = scheduler_step(host, m, t, x, eta=1.0, prev_sample=y)
    assert out.latents is y and out.log_probs.dtype == wide and out.log_probs.shape == (3,)
    # float32: x' is up to 4 and one rounding of it is 2^-22; against s = 0.02 at the last step
    # that is 1e-5 of the residual, which is squared: relative 2e-5 of a log-prob of up to 4.
    atol = 1e-10 if double else 1e-4
    torch.testing.assert_close(out.log_probs.double(), true, rtol=0, atol=atol)
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=wide)
    (got,) = torch.autograd.grad((out.log_probs * weights).sum(), m)
    (exact,) = torch.autograd.grad((true * weights).sum(), m64)
    assert got.dtype == dtype
    bound = {torch.bfloat16: 2**-7, torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    assert (got.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("shape", [(2, 40, 8), (2, 4, 6, 5), (2, 2, 3, 4, 5)])
def test_timesteps_of_every_form(shape: tuple[int, ...]) -> None:
    host, m = scheduler(), normal(*shape, seed=1, dtype=torch.float32)
    x, y = (normal(2, 2, *shape[1:], seed=s, dtype=torch.float32)[:, 1] for s in (2, 3))
    forms = (501, torch.tensor(501), torch.tensor([501, 501], dtype=torch.int32))
    found = [scheduler_step(host, m, t, x, eta=0.5, prev_sample=y).log_probs for t in forms]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_half_precision_latents_have_the_log_prob_of_what_is_stored() -> None:
    host, t = scheduler(), torch.tensor([981, 1, 501])
    m, x = (normal(*SHAPE, seed=s, dtype=torch.float16) for s in (1, 2))
    drawn = scheduler_step(host, m, t, x, eta=1.0)
    assert drawn.latents.dtype == torch.float16 and drawn.log_probs.dtype == torch.float32
    again = scheduler_step(host, m.requires_grad_(), t, x, eta=1.0, prev_sample=drawn.latents)
    assert torch.equal(again.log_probs, drawn.log_probs)


def test_generators_and_refusals() -> None:
    host, t = scheduler(), torch.tensor([981, 1, 501])
    m, x = (normal(*SHAPE, seed=s, dtype=torch.float32) for s in (1, 2))
    mean, std = oracle(host, m.double(), x.double(), t, 1.0, "epsilon")
    seeded = torch.Generator().manual_seed(5)
    out = scheduler_step(host, m, t, x, eta=1.0, generator=seeded)
    eps = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(out.latents.double(), mean + std * eps, rtol=0, atol=4e-6)
    with pytest.raises(ValueError, match="both given"):
        scheduler_step(host, m, t, x, eta=1.0, generator=seeded, prev_sample=x)
    for name in ("clip_sample", "thresholding"):
        with pytest.raises(ValueError, match=f"{name} = True"):
            scheduler_step(scheduler(**{name: True}), m, t, x, eta=1.0)
    host.num_inference_steps = None
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler_step(host, m, t, x, eta=1.0)


def test_without_noise_the_log_prob_is_zero() -> None:
    host, t = scheduler(), torch.tensor([981, 1, 501])
    m, x = (normal(*SHAPE, seed=s, dtype=torch.float32) for s in (1, 2))
    out = scheduler_step(host, m, t, x)
    mean, _ = oracle(host, m.double(), x.double(), t, 0.0, "epsilon")
    torch.testing.assert_close(out.latents.double(), mean, rtol=0, atol=4e-6)
    assert torch.equal(out.log_probs, torch.zeros(3))


def test_gradients_through_the_chain() -> None:
    # AlignProp differentiates the drawn latents, and x' of one step is x of the next.
    host = scheduler()
    m = [normal(*SHAPE, seed=s).requires_grad_() for s in (1, 2)]
    x = normal(*SHAPE, seed=3)
    torch.manual_seed(9)
    first = scheduler_step(host, m[0], host.timesteps[0], x, 1.0)
    second = scheduler_step(host, m[1], host.timesteps[1], first.latents, 1.0)
    torch.manual_seed(9)
    noise = [torch.randn(SHAPE).double() for _ in range(2)]
    mean, std = oracle(host, m[0], x, host.timesteps[0], 1.0, "epsilon")
    middle = mean + std * noise[0]
    mean, std = oracle(host, m[1], middle, host.timesteps[1], 1.0, "epsilon")
    true = mean + std * noise[1]
    density = formulas.log_density(true.detach(), mean, std)
    torch.testing.assert_close(second.latents, true, rtol=0, atol=1e-11)
    torch.testing.assert_close(second.log_probs, density, rtol=0, atol=1e-10)
    weight = normal(*SHAPE, seed=5)
    for got, wanted in ((second.latents * weight, true * weight), (second.log_probs, density)):
        a = torch.autograd.grad(got.sum(), m, retain_graph=True)
        b = torch.autograd.grad(wanted.sum(), m, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------ the host's call sites

HOST = '''
"""A stand-in of trl.models.modeling_sd_base: only who calls the step, and how."""
def scheduler_step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False,
                   generator=None, prev_sample=None):
    raise AssertionError("the original was called")

def pipeline_step(scheduler, unet, latents, eta):
    all_latents, all_log_probs = [latents], []
    for t in scheduler.timesteps:
        output = scheduler_step(scheduler, unet(latents, t), t, latents, eta)
        latents = output.latents
        all_latents.append(latents)
        all_log_probs.append(output.log_probs)
    return all_latents, all_log_probs

class Pipeline:
    def __init__(self, scheduler):
        self.inner = scheduler
    def scheduler_step(self, *args, **kwargs):
        return scheduler_step(self.inner, *args, **kwargs)
'''


def unet(latents: Tensor, t: Tensor) -> Tensor:
    phase = formulas.column(t / 1000, latents).to(latents.dtype)
    return 0.5 * latents + phase


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_call_sites(tmp_path: Path, counts: Callable[..., Any], dtype: torch.dtype) -> None:
    host = scheduler()
    with packages(tmp_path, {"trl/models/modeling_sd_base.py": HOST}, PATCHES):
        module = importlib.import_module("trl.models.modeling_sd_base")
    assert module.scheduler_step is scheduler_step
    x = normal(*SHAPE, seed=2, dtype=dtype)
    with torch.no_grad():
        latents, log_probs = module.pipeline_step(host, unet, x, 1.0)
    assert len(latents) == 51 and torch.isfinite(torch.stack(log_probs)).all()

    def train(step: int) -> Tensor:  # as DDPOTrainer.calculate_loss: every row at its own step
        index = [step, (step + 7) % 50, (step + 31) % 50]
        pick = torch.arange(3), torch.tensor(index)
        now, after = torch.stack(latents[:-1], 1)[pick], torch.stack(latents[1:], 1)[pick]
        timesteps = host.timesteps[pick[1]]
        prediction = unet(now, timesteps).requires_grad_()
        pipeline = module.Pipeline(host)
        output = pipeline.scheduler_step(prediction, timesteps, now, eta=1.0, prev_sample=after)
        ratio = torch.exp(output.log_probs - torch.stack(log_probs, 1)[pick])
        (ratio * torch.tensor([1.0, -1.0, 0.5])).sum().backward()
        assert prediction.grad is not None and prediction.grad.abs().max() > 0
        return ratio

    for step in (0, 19, 49):
        assert torch.equal(train(step), torch.ones(3))

    t, y = torch.tensor([981, 1, 501]), normal(*SHAPE, seed=3, dtype=dtype)
    m = unet(x, t).requires_grad_()
    replay = counts(lambda: scheduler_step(host, m, t, x, eta=1.0, prev_sample=y).log_probs.sum())
    assert replay.syncs == 0
    assert counts(lambda: scheduler_step(host, m.detach(), host.timesteps[3], x, 1.0)).syncs == 0


# ------------------------------------------------------------------ counts


def test_no_worse_than_the_host() -> None:
    shape, t = (64, 4, 6, 5), torch.arange(981, 0, -20)[torch.arange(64) % 50]
    host = scheduler()
    m, x = (normal(*shape, seed=s, dtype=torch.float32) for s in (1, 2))
    mean, std = oracle(host, m.double(), x.double(), t, 1.0, "epsilon")
    y = (mean + std * normal(*shape, seed=3)).float()
    ours, theirs = (
        scheduler_step(host, m, t, x, eta=1.0, prev_sample=y, exact_order=exact).log_probs
        for exact in (False, True)
    )
    formulas.assert_no_worse(ours, theirs, formulas.log_density(y.double(), mean, std))


def _call(train: bool) -> Callable[[bool], Callable[[], None]]:
    def make(before: bool) -> Callable[[], None]:
        host, t = scheduler(), torch.tensor([981, 1, 501])
        m, x, y = (normal(*SHAPE, seed=s, dtype=torch.float32) for s in (1, 2, 3))
        m.requires_grad_(train)
        prev = y if train else None

        def run() -> None:  # That TRL copies timesteps to the CPU is not seen on a CPU.
            log_prob = scheduler_step(
                host, m, t, x, eta=1.0, prev_sample=prev, exact_order=before
            ).log_probs
            if train:
                log_prob.sum().backward()

        return run

    return make


CALLS = {"TRL step, rollout": _call(False), "TRL step, backward": _call(True)}


@pytest.mark.parametrize("name", CALLS)
def test_counts(name: str, counts: Callable[..., Any]) -> None:
    before, after = (counts(CALLS[name](host)) for host in (True, False))
    assert after.syncs == 0 and after.launches + 2 * after.fused < before.launches
