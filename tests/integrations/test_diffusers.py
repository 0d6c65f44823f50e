"""`step_with_log_prob` on real diffusers schedulers."""

from __future__ import annotations

from typing import Any

import formulas
import pytest
import torch
from formulas import column, normal

from dancegrpo_fast import NoiseKey, normal_batch
from dancegrpo_fast.integrations import exact
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_exact_order_without_noise_is_the_step_of_diffusers(
    dynamics: str, dtype: torch.dtype
) -> None:
    m, wide = normal(*SHAPE, seed=1, dtype=dtype), normal(*SHAPE, seed=2, dtype=torch.float32)
    for index in range(8):
        scheduler, x = flow(), wide if index % 2 else wide.to(dtype)
        t = scheduler.timesteps[index]
        out = scheduler.step_with_log_prob(
            m, t, x, noise_level=0.0, dynamics=dynamics, exact_order=True
        )
        stock = scheduler.step(m, t, x).prev_sample
        assert out.prev_sample.dtype == torch.float32
        assert torch.equal(out.prev_sample.to(dtype), stock)
        assert torch.equal(out.mean, x.float() + scheduler.sigmas.diff()[index] * m)
        assert torch.equal(out.mean, out.prev_sample) and not out.log_prob.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_exact_order_of_ddim_is_the_step_of_diffusers(
    prediction: str, dtype: torch.dtype, eta: float
) -> None:
    scheduler = ddim(prediction)
    m = normal(*SHAPE, seed=1, dtype=dtype)
    x = normal(*SHAPE, seed=2, dtype=torch.float32)
    for t in scheduler.timesteps[[0, 7, 19]]:
        stock, own = (torch.Generator().manual_seed(3) for _ in range(2))
        theirs = scheduler.step(m, t, x, eta=eta, generator=stock)
        out = scheduler.step_with_log_prob(
            m, t, x, eta=eta, generator=own if eta else None, exact_order=True
        )
        assert torch.equal(out.prev_sample, theirs.prev_sample)
        assert torch.equal(out.x0, theirs.pred_original_sample.float())
        again = scheduler.step_with_log_prob(
            m, t, x, eta=eta, prev_sample=theirs.prev_sample, exact_order=True
        )
        assert torch.equal(again.log_prob, out.log_prob)
        assert bool((out.log_prob == 0).all()) == (eta == 0)


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps", "ddim"])
def test_exact_order_with_noise(dynamics: str) -> None:
    """Euler's step, then the pull, or CPS'; the fused step up to rounding, with its gradient."""
    scheduler = ddim() if dynamics == "ddim" else flow()
    how: Any = {"eta": 0.7} if dynamics == "ddim" else {"noise_level": 0.7, "dynamics": dynamics}
    m = normal(*SHAPE, seed=1, dtype=torch.float32).requires_grad_()
    x = normal(*SHAPE, seed=2, dtype=torch.float32)
    keys = [NoiseKey.from_seed(3).fold_in(n).draw() for n in range(2)]
    for index in (0, 3):
        t = scheduler.timesteps[index]
        both = [
            scheduler.step_with_log_prob(m, t, x, key=keys, exact_order=bits, **how)
            for bits in (True, False)
        ]
        for a, b in zip(*both, strict=True):
            # Roundings of float32 numbers up to 16 (the x0 estimate of DDIM's first step).
            torch.testing.assert_close(a, b, rtol=2e-5, atol=8e-6)
        one, other = (torch.autograd.grad(s.log_prob.sum() + s.x0.sum(), m)[0] for s in both)
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()
        replay = scheduler.step_with_log_prob(
            m, t, x, prev_sample=both[0].prev_sample.detach(), exact_order=True, **how
        )
        assert torch.equal(replay.log_prob, both[0].log_prob)
        if dynamics in ("flow", "dance"):
            s, after = scheduler.sigmas[index], scheduler.sigmas[index + 1]
            g = exact.flow_rate(s, 0.7, scheduler.sigmas[1]) if dynamics == "flow" else 0.7
            score = -(x - (x - s * m) * (1 - s)) / s**2
            mean = (x + (after - s) * m) + -0.5 * g**2 * score * (after - s)
            assert torch.equal(replay.mean, mean)
    with pytest.raises(ValueError, match="generator and key are both given"):
        scheduler.step_with_log_prob(
            m, t, x, key=keys, generator=torch.Generator(), exact_order=True, **how
        )
    with pytest.raises(ValueError, match="exact_order = True: the host has one index"):
        scheduler.step_with_log_prob(m, scheduler.timesteps[[1, 6]], x, exact_order=True, **how)
    if dynamics == "cps":
        # Its last step has no noise, but a generator is welcome, as in the fused step.
        last = scheduler.timesteps[7], x
        two = [
            scheduler.step_with_log_prob(
                m, *last, generator=torch.Generator().manual_seed(1), exact_order=bits, **how
            )
            for bits in (True, False)
        ]
        torch.testing.assert_close(two[0].prev_sample, two[1].prev_sample, rtol=0, atol=8e-6)
        assert not two[0].log_prob.any() and not two[1].log_prob.any()
        with pytest.raises(ValueError, match="dynamics = 'ode': must be 'flow'"):
            scheduler.step_with_log_prob(
                m, scheduler.timesteps[1], x, noise_level=0.7, dynamics="ode", exact_order=True
            )


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
