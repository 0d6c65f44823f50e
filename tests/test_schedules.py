"""Sigma grids against diffusers' schedulers and DanceGRPO's published arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dancegrpo_fast.schedules import Schedule, dance_schedule, from_scheduler, from_sigmas

diffusers = pytest.importorskip("diffusers")


def flux_mu(tokens: int) -> float:
    """The FLUX pipeline's shift: linear from 0.5 at 256 tokens to 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


FLOW_CASES = {
    "sd3": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 10, None, None),
    "hunyuan": (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        16,
        None,
        np.linspace(1.0, 0.0, 17)[:-1],
    ),
    "flux": (
        diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        16,
        flux_mu(2025),
        np.linspace(1.0, 1 / 16, 16),
    ),
    "qwen-image": (
        diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential"
        ),
        10,
        0.9,
        np.linspace(1.0, 1 / 10, 10),
    ),
    "linear-shift": (
        diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear"
        ),
        7,
        1.7,
        None,
    ),
    "wan-unipc": (
        diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        20,
        None,
        None,
    ),
}


@pytest.mark.parametrize("case", FLOW_CASES)
def test_flow_grids_are_those_the_scheduler_then_walks(case: str) -> None:
    scheduler, steps, mu, sigmas = FLOW_CASES[case]
    before = scheduler.timesteps.clone()
    schedule = from_scheduler(scheduler, steps, mu, sigmas=sigmas)
    assert torch.equal(scheduler.timesteps, before), "the caller's scheduler was changed"

    # What a pipeline does.
    if sigmas is not None:
        scheduler.set_timesteps(sigmas=list(sigmas), mu=mu)
    elif mu is not None:
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(steps)
    assert schedule.steps == steps
    assert schedule.sigmas == tuple(map(float, scheduler.sigmas))
    assert schedule.timesteps == tuple(map(float, scheduler.timesteps))
    assert schedule.prediction == "flow_prediction"
    assert schedule.sigmas[0] == pytest.approx(1.0, abs=1.1e-6)


def test_euler_walk_equals_the_scheduler_step() -> None:
    scheduler, steps, mu, sigmas = FLOW_CASES["flux"]
    schedule = from_scheduler(scheduler, steps, mu, sigmas=sigmas)
    scheduler.set_timesteps(sigmas=list(sigmas), mu=mu)
    generator = torch.Generator().manual_seed(0)
    x = theirs = torch.randn(1, 64, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        m = torch.tanh(theirs) + 0.1 * i
        theirs = scheduler.step(m, t, theirs).prev_sample
        x = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * (torch.tanh(x) + 0.1 * i)
    assert torch.allclose(x, theirs, atol=2e-6)


def test_wan_timesteps_are_integers_and_start_is_below_one() -> None:
    scheduler, steps, _, _ = FLOW_CASES["wan-unipc"]
    schedule = from_scheduler(scheduler, steps)
    assert all(t.is_integer() for t in schedule.timesteps)
    assert 0 < 1 - schedule.sigmas[0] < 2e-6


def sd_betas() -> torch.Tensor:
    return torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def sd_scheduler(**changes: object) -> object:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }
    return diffusers.DDIMScheduler(**{**config, **changes})


def test_ddim_alphas_of_stable_diffusion() -> None:
    schedule = from_scheduler(sd_scheduler(), 50)
    assert schedule.timesteps == tuple(float(t) for t in range(981, 0, -20))
    table = torch.cumprod(1 - sd_betas(), 0)
    wanted = [float(table[max(t, 0)]) for t in range(981, -20, -20)]
    assert schedule.alphas_cumprod == tuple(wanted)
    # The clamp: the last step goes from timestep 1 to 0, not to alphas_cumprod = 1.
    assert schedule.alphas_cumprod[-1] == float(table[0]) < 1
    assert schedule.alphas_cumprod[0] == pytest.approx(0.00577550, abs=2e-8)  # float32 cumprod
    assert schedule.alphas_cumprod[1] == pytest.approx(0.00728173, abs=2e-8)  # float32 cumprod
    assert schedule.sigmas[3] == math.sqrt(1 - schedule.alphas_cumprod[3])
    assert schedule.prediction == "epsilon"


def test_ddim_reads_the_prediction_and_trailing_spacing() -> None:
    scheduler = sd_scheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0
    )
    schedule = from_scheduler(scheduler, 10)
    assert schedule.prediction == "v_prediction"
    assert schedule.timesteps == tuple(float(t) for t in range(999, 0, -100))
    table = torch.cumprod(1 - sd_betas(), 0)
    assert schedule.alphas_cumprod == tuple(float(table[max(t, 0)]) for t in range(999, -2, -100))


def test_dance_grid_closed_form() -> None:
    schedule = dance_schedule(16, 3.0)
    for i, sigma in enumerate(schedule.sigmas):
        u = 1 - i / 16
        assert sigma == pytest.approx(3 * u / (1 + 2 * u), rel=1e-15)
    assert schedule.sigmas[0] == 1.0 and schedule.sigmas[-1] == 0.0
    assert schedule.sigmas[1] == pytest.approx(0.97826087, abs=5e-9)
    assert schedule.timesteps[:3] == (1000.0, 978.0, 954.0)
    assert dance_schedule(4, 1.0).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_dance_timesteps_where_the_fused_multiply_add_of_linspace_decides() -> None:
    assert {875, 874} & set(dance_schedule(50, 3.0).timesteps) == {874}
    assert {549, 550} & set(dance_schedule(20, 1.0).timesteps) == {550}


# 15, 35, 38, 50 and 59 differ at one of these shifts where products are rounded before the sum.
@pytest.mark.parametrize("steps", [12, 15, 16, 20, 25, 35, 38, 50, 59])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0])
def test_dance_timesteps_equal_the_published_float32_arithmetic(steps: int, shift: float) -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch's linspace for processors without fused multiply-add")
    t = torch.linspace(1, 0, steps + 1)
    t = (shift * t) / (1 + (shift - 1) * t)
    schedule = dance_schedule(steps, shift)
    assert schedule.timesteps == tuple(float(int(s * 1000)) for s in t[:-1])
    assert np.allclose(schedule.sigmas, t.numpy(), atol=2e-7, rtol=0)


def test_dance_truncation_follows_float32_not_float64() -> None:
    schedule = dance_schedule(12, 3.0)
    i = schedule.timesteps.index(599.0)
    assert int(schedule.sigmas[i] * 1000) == 600


def test_from_sigmas() -> None:
    schedule = from_sigmas([0.9, 0.5, 0.1])
    assert schedule.sigmas == (0.9, 0.5, 0.1)
    assert schedule.timesteps == (900.0, 500.0)
    assert from_sigmas([1.0, 0.0], num_train_timesteps=1).timesteps == (1.0,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: from_sigmas([1.0]), "timesteps = ()"),
        (lambda: from_sigmas([0.5, 0.7, 0.0]), r"sigmas\[1\] = 0.7 after 0.5"),
        (lambda: from_sigmas([1.2, 0.0]), r"sigmas\[0\] = 1.2"),
        (lambda: from_sigmas([1.0, float("nan")]), r"sigmas\[1\] = nan"),
        (lambda: Schedule((1.0, 0.0), (1.0, 2.0)), "sigmas has 2 values for 2 timesteps"),
        (lambda: Schedule((1.0, 0.0), (1.0,), prediction="noise"), "prediction = 'noise'"),
        (lambda: Schedule((1.0, 0.0), (1.0,), prediction="epsilon"), "alphas_cumprod absent"),
        (lambda: Schedule((1.0, 0.0), (1.0,), (0.5, 0.9)), "alphas_cumprod given"),
        (lambda: Schedule((1.0, 0.0), (1.0,), (0.5,), "epsilon"), "alphas_cumprod has 1 values"),
        (lambda: Schedule((1.0, 0.0), (1.0,), (0.9, 0.5), "epsilon"), r"alphas_cumprod\[1\] = 0.5"),
        (lambda: dance_schedule(0, 3.0), "steps = 0"),
        (lambda: dance_schedule(4, 0.0), "shift = 0.0"),
        (lambda: from_scheduler(sd_scheduler(), 0), "steps = 0"),
        (lambda: from_scheduler(sd_scheduler(), 5, 0.5), "takes no mu"),
        (lambda: from_scheduler(sd_scheduler(), 2, sigmas=[1.0]), "sigmas has 1 values"),
        (
            lambda: from_scheduler(diffusers.PNDMScheduler(skip_prk_steps=True), 10),
            "PNDMScheduler makes 11 timesteps .* example DDIMScheduler",
        ),
        (
            lambda: from_scheduler(diffusers.FlowMatchHeunDiscreteScheduler(), 10),
            "makes 19 timesteps .* example FlowMatchEulerDiscreteScheduler",
        ),
        (
            lambda: from_scheduler(diffusers.EulerDiscreteScheduler(), 7),
            "fractional timesteps",
        ),
        (
            lambda: from_scheduler(
                diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 7
            ),
            "mu",
        ),
        (
            lambda: from_scheduler(
                diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4
            ),
            "must not rise",
        ),
    ],
)
def test_errors_name_the_value(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
