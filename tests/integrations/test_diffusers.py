"""`step_with_log_prob` on real diffusers schedulers."""

from __future__ import annotations

from typing import Any

import formulas
import pytest
import torch
from formulas import column, normal

from dancegrpo_fast import NoiseKey, normal_batch
from dancegrpo_fast.integrations.diffusers import DDIMStep, FlowStep, add_step_with_log_prob

diffusers = pytest.importorskip("diffusers")
SHAPE = (2, 4, 8, 6)


def flow(**config: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **config)
    scheduler.set_timesteps(8)
    return add_step_with_log_prob(scheduler)


def ddim(prediction: str = "epsilon") -> Any:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    return add_step_with_log_prob(scheduler)


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_flow_step(dynamics: str) -> None:
    scheduler, steps = flow(), torch.tensor([0, 7])
    m = normal(*SHAPE, seed=1, dtype=torch.bfloat16).requires_grad_()
    x = normal(*SHAPE, seed=2, dtype=torch.float32)
    sigmas = scheduler.sigmas.double()
    here, there = column(sigmas[steps], x), column(sigmas[steps + 1], x)
    m64 = m.detach().double().requires_grad_()
    if dynamics == "cps":
        mean, std = formulas.cps_step(m64, x.double(), here, there, 0.6)
    else:
        g = formulas.rate(dynamics, here, 0.6, float(sigmas[1]), 0.0)
        mean, std = formulas.flow_step(m64, x.double(), here, there, g)
    y = (mean + std * normal(*SHAPE, seed=3)).detach().float()
    density = -(y.double() - mean).square().flatten(1).mean(1)
    if dynamics != "cps":
        density = formulas.log_density(y.double(), mean, std)
    out = scheduler.step_with_log_prob(
        m, scheduler.timesteps[steps], x, noise_level=0.6, dynamics=dynamics, prev_sample=y
    )
    # Roundings of float32 numbers up to 4 against s >= 0.1.
    torch.testing.assert_close(out.log_prob.double(), density, rtol=0, atol=4e-6)
    torch.testing.assert_close(out.mean.double(), mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(out.x0.double(), x.double() - here * m64, rtol=0, atol=2e-6)
    for ours, true in ((out.log_prob, density), (out.mean, mean)):
        got, exact = (
            torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]
            for value, leaf in ((ours, m), (true, m64))
        )
        assert (got.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_level_zero_is_the_schedulers_own_step() -> None:
    scheduler = flow()
    x, m = (normal(*SHAPE, seed=seed, dtype=torch.float32) for seed in (1, 2))
    for t in scheduler.timesteps:
        state = torch.get_rng_state()
        ours = scheduler.step_with_log_prob(m, t, x, noise_level=0.0)
        assert torch.equal(torch.get_rng_state(), state)
        theirs = scheduler.step(m, t, x).prev_sample
        torch.testing.assert_close(ours.prev_sample, theirs, rtol=0, atol=1e-6)
        x = theirs
    # Ours has no state: the counter is where the scheduler's own steps left it.
    assert scheduler.step_index == 8
    host = ddim()
    for t in host.timesteps:  # the last one too: Stable Diffusion's set_alpha_to_one=False
        state = torch.get_rng_state()
        ours = host.step_with_log_prob(m, t, x, eta=0.0)
        assert torch.equal(torch.get_rng_state(), state)
        theirs = host.step(m, t, x, eta=0.0).prev_sample
        # 1 / sqrt(A) is 13 at the first timestep and amplifies roundings of numbers up to 4.
        torch.testing.assert_close(ours.prev_sample, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_step_is_the_schedulers_with_noise(prediction: str) -> None:
    host = ddim(prediction)
    x, m, eps = (normal(*SHAPE, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    for t in host.timesteps[[0, 9, 18]]:
        theirs = host.step(m, t, x, eta=1.0, variance_noise=eps).prev_sample
        out = host.step_with_log_prob(m, t, x, prev_sample=theirs)
        index = int(t)
        alphas = host.alphas_cumprod.double()
        here, there = (column(alphas[i], x) for i in (index, max(index - 50, 0)))
        mean, std, x0 = formulas.ddim_step(m.double(), x.double(), here, there, 1.0, prediction)
        torch.testing.assert_close(out.mean.double(), mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.x0.double(), x0, rtol=0, atol=1e-5)
        density = formulas.log_density(theirs.double(), mean, std)
        torch.testing.assert_close(out.log_prob.double(), density, rtol=0, atol=1e-5)
        torch.testing.assert_close((out.prev_sample - out.mean).double() / std, eps.double(),
                                   rtol=0, atol=2e-4)  # fmt: skip


def test_rollout_then_training_at_mixed_steps() -> None:
    scheduler, x = flow(), normal(*SHAPE, seed=1, dtype=torch.float32)
    m = normal(*SHAPE, seed=2, dtype=torch.float32)
    keys = [NoiseKey.from_seed(3).fold_in(n).draw() for n in range(2)]
    by_timestep = []
    for t in scheduler.timesteps[[1, 6]]:
        drawn = scheduler.step_with_log_prob(m, t, x, noise_level=0.7, key=keys)
        std = (drawn.prev_sample - drawn.mean).std() / normal_batch(SHAPE[1:], keys).std()
        assert std > 0
        by_timestep.append(drawn)
    mixed = torch.stack([by_timestep[0].prev_sample[0], by_timestep[1].prev_sample[1]])
    out = scheduler.step_with_log_prob(
        m, scheduler.timesteps[[1, 6]], x, noise_level=0.7, prev_sample=mixed
    )
    assert torch.equal(out.log_prob[0], by_timestep[0].log_prob[0])
    assert torch.equal(out.log_prob[1], by_timestep[1].log_prob[1])
    number = float(scheduler.timesteps[1])
    again = scheduler.step_with_log_prob(m, number, x, noise_level=0.7, key=keys)
    assert torch.equal(again.prev_sample, by_timestep[0].prev_sample)


def test_classes_and_refusals() -> None:
    class Mixed(FlowStep, diffusers.FlowMatchEulerDiscreteScheduler):
        pass

    class Plain(diffusers.DDIMScheduler):
        pass

    scheduler = Mixed(shift=3.0)
    scheduler.set_timesteps(8)
    x = normal(*SHAPE, seed=1, dtype=torch.float32)
    state = torch.get_rng_state()
    one = scheduler.step_with_log_prob(x, scheduler.timesteps[2], x, noise_level=0.7)
    torch.set_rng_state(state)
    other = flow().step_with_log_prob(x, scheduler.timesteps[2], x, noise_level=0.7)
    assert torch.equal(one.prev_sample, other.prev_sample)
    assert add_step_with_log_prob(Plain) is Plain
    assert Plain.step_with_log_prob is DDIMStep.step_with_log_prob
    with pytest.raises(ValueError, match="set_timesteps"):
        Plain().step_with_log_prob(x, 1, x)
    clipping = Plain()  # diffusers' default clips
    clipping.set_timesteps(10)
    with pytest.raises(ValueError, match="clip_sample = True"):
        clipping.step_with_log_prob(x, 1, x)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler: must be a"):
        add_step_with_log_prob(diffusers.UniPCMultistepScheduler())
