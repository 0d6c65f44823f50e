"""Formulas of the steps: published vectors, score and estimate forms, marginals, other samplers.

The formulas here are written with x0, noise and score estimates, not with a and b.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transition_cases import (
    GRID,
    NOISE,
    PRINTED,
    M,
    X,
    gaussian_log_prob,
    log_prob_of,
    mean_of,
    predictions,
    stable_diffusion,
)

from dancegrpo_fast.schedules import from_scheduler, from_sigmas
from dancegrpo_fast.transitions import (
    cps,
    ddim,
    dpmpp_2m,
    transition,
    vp_sde,
)

# fmt: off
VECTORS = [  # dynamics, level, step, mean, std, log-prob
    ("dance", .3, 0, [.47777174, -1.0098913, .26605978, 1.99369565], .04423259, 1.92685497),
    ("flow", .7, 0, [.35576087, -.76586957, .20505435, 1.50565217], .70000000, -.83476359),
    ("cps", .8, 0, [.14028005, -.33490793, .09731394, .6437289], .93038137, -.47175718),
    ("dance", .3, 5, [.46376396, -1.0158453, .27604067, 1.98929825], .05619515, 1.68748631),
    ("flow", .7, 5, [.42364912, -.95650877, .26642982, 1.86059649], .33685855, -.10334637),
    ("cps", .8, 5, [.10123701, -.47960753, .18918526, .82619098], .79254710, -.34233134),
    ("dance", .3, 14, [.34266667, -1.05366667, .3555, 1.93053333], .10954451, 1.01998578),
    ("flow", .7, 14, [.31066667, -1.03633333, .36283333, 1.87346667], .16733201, .59633685),
    ("cps", .8, 14, [.22847007, -.99181017, .38167005, 1.72688273], .15850942, None),
    ("dance", .3, 15, [.27333333, -1.05708333, .391875, 1.86916667], .12247449, None),
    ("flow", .7, 15, [.268, -1.05475, .393375, 1.8605], .12780193, None),
    ("cps", .8, 15, [.33333333, -1.08333333, .375, 1.96666667], 0., None),
]
# fmt: on


@pytest.mark.parametrize(("dynamics", "level", "i", "mean", "std", "log_prob"), VECTORS)
def test_flow_vectors(dynamics, level, i, mean, std, log_prob) -> None:
    t = transition(GRID, i, i + 1, dynamics=dynamics, kind="sde", level=level)
    assert mean_of(t) == pytest.approx(mean, abs=PRINTED)
    assert t.s == pytest.approx(std, abs=PRINTED)
    if log_prob is not None:
        assert log_prob_of(t, mean_of(t) + t.s * NOISE) == pytest.approx(log_prob, abs=PRINTED)


# fmt: off
DDIM_VECTORS = [
    (0, .45446327, [.3284901, -1.2393196, .4554148, 2.1991162], -.4028004),
    (24, .29478454, [.4130402, -1.1040503, .345505, 2.0746751], .0300720),
    (49, .02064832, [.4794996, -1.0107847, .2656425, 1.9967124], 2.6886828),
]
# fmt: on


@pytest.mark.parametrize(("i", "std", "mean", "log_prob"), DDIM_VECTORS)
def test_ddim_vectors(i, std, mean, log_prob) -> None:
    schedule = stable_diffusion()
    t = transition(schedule, i, i + 1, dynamics="ddim", kind="sde", level=1.0)
    assert t.s == pytest.approx(std, abs=PRINTED)
    assert mean_of(t) == pytest.approx(mean, abs=1e-7)
    assert log_prob_of(t, mean_of(t) + t.s * NOISE) == pytest.approx(log_prob, abs=1e-7)


# ------------------------------------------------------------------ independent formulas, all steps


def flow_score(sigma: float) -> np.ndarray:
    noise = X + (1 - sigma) * M
    return -noise / sigma


def reverse_sde_mean(sigma: float, sigma_next: float, rate: float) -> np.ndarray:
    dt = sigma_next - sigma
    return X + M * dt - 0.5 * rate**2 * flow_score(sigma) * dt


@pytest.mark.parametrize("i", range(16))
def test_flow_dynamics_in_score_form(i: int) -> None:
    sigma, sigma_next = GRID.sigmas[i], GRID.sigmas[i + 1]
    root = math.sqrt(sigma - sigma_next)
    top = GRID.sigmas[1] if i == 0 else sigma
    rates = {
        "dance": 0.3,
        "flow": 0.7 * math.sqrt(sigma / (1 - top)),
        "flow_wan": GRID.sigmas[-1] + (GRID.sigmas[1] - GRID.sigmas[-1]) * sigma,
    }
    levels = {"dance": 0.3, "flow": 0.7, "flow_wan": 1.0}
    for dynamics, rate in rates.items():
        t = transition(GRID, i, i + 1, dynamics=dynamics, kind="sde", level=levels[dynamics])
        assert mean_of(t) == pytest.approx(reverse_sde_mean(sigma, sigma_next, rate), rel=1e-12)
        assert t.s == pytest.approx(rate * root, rel=1e-14)
        y = mean_of(t) + t.s * NOISE
        assert log_prob_of(t, y) == pytest.approx(gaussian_log_prob(y, mean_of(t), t.s), rel=1e-12)
        assert t.p * X + t.q * M == pytest.approx(X - sigma * M, rel=1e-15)


@pytest.mark.parametrize("i", range(15))
def test_cps_in_estimate_form(i: int) -> None:
    sigma, sigma_next = GRID.sigmas[i], GRID.sigmas[i + 1]
    std = sigma_next * math.sin(0.8 * math.pi / 2)
    x0, x1 = X - sigma * M, X + (1 - sigma) * M
    mean = (1 - sigma_next) * x0 + math.sqrt(sigma_next**2 - std**2) * x1
    own = transition(GRID, i, i + 1, dynamics="cps", kind="sde", level=0.8)
    true = transition(GRID, i, i + 1, dynamics="cps", kind="sde", level=0.8, exact_density=True)
    assert mean_of(own) == pytest.approx(mean, rel=1e-12)
    assert own.s == pytest.approx(std, rel=1e-14)
    assert (own.w, own.c) == (1.0, 0.0)
    y = mean + std * NOISE
    assert log_prob_of(own, y) == pytest.approx(-np.mean((y - mean) ** 2), rel=1e-12)
    assert log_prob_of(true, y) == pytest.approx(gaussian_log_prob(y, mean, std), rel=1e-11)
    assert own.k == true.k == pytest.approx(own.b**2 / (2 * std**2))
    assert true == cps(sigma, sigma_next, 0.8, exact_density=True)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("points", [(0.0058, 0.0073), (0.3, 0.5), (0.99, 0.9992), (0.5, 1.0)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_in_estimate_form(points, eta, prediction) -> None:
    alpha, alpha_next = points
    std = eta * math.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
    x0 = predictions(alpha)["sample"]
    mean = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next - std**2) * M
    t = ddim(alpha, alpha_next, eta, prediction)
    m = predictions(alpha)[prediction]
    assert mean_of(t, m=m) == pytest.approx(mean, rel=1e-10)
    assert t.s == pytest.approx(std, rel=1e-12)
    assert t.p * X + t.q * m == pytest.approx(x0, rel=1e-10)


def test_ddim_equals_the_diffusers_scheduler_step() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    schedule = from_scheduler(scheduler, 20)
    scheduler.set_timesteps(20)
    x, m, eps = (torch.from_numpy(v)[None] for v in (X, M, NOISE))
    for i in (0, 7, 18):
        theirs = scheduler.step(m, int(schedule.timesteps[i]), x, eta=0.6, variance_noise=eps)
        t = transition(schedule, i, i + 1, dynamics="ddim", kind="sde", level=0.6)
        ours = mean_of(t) + t.s * NOISE
        assert ours == pytest.approx(theirs.prev_sample.numpy()[0], rel=3e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_vp_sde_in_score_form(prediction: str) -> None:
    alpha, alpha_next, eps_t = 0.3, 0.34, 0.7
    beta = math.log(alpha_next / alpha)  # integral of beta over the step; time runs backwards
    f, g_squared = -0.5 * beta, beta
    score = -M / math.sqrt(1 - alpha)
    mean = X - (f * X - 0.5 * (1 + eps_t**2) * g_squared * score)
    t = vp_sde(alpha, alpha_next, eps_t, prediction)
    assert mean_of(t, m=predictions(alpha)[prediction]) == pytest.approx(mean, rel=1e-12)
    assert t.s == pytest.approx(eps_t * math.sqrt(beta), rel=1e-14)


def test_vp_sde_without_noise_is_the_probability_flow_ode() -> None:
    """Its error against DDIM (the ODE solved exactly for constant eps) is second order."""
    alpha = 0.3
    errors = []
    for step in (1e-2, 5e-3, 2.5e-3):
        t = vp_sde(alpha, alpha + step, 0.0)
        assert (t.s, t.w, t.c, t.k) == (0.0, 0.0, 0.0, 0.0)
        errors.append(np.abs(mean_of(t) - mean_of(ddim(alpha, alpha + step, 0.0))).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("eps_t", [0.0, 0.5, 1.0])
def test_vp_sde_keeps_the_marginals_at_every_noise_level(eps_t: float) -> None:
    """Data N(0, v): eps(x) is linear and the variance A v + 1 - A is known at every time."""
    v, first, last = 4.0, 0.2, 0.9
    points = np.exp(np.linspace(math.log(first), math.log(last), 20001))
    variance = first * v + 1 - first
    for alpha, alpha_next in zip(points[:-1], points[1:], strict=True):
        total = alpha * v + 1 - alpha
        t = vp_sde(float(alpha), float(alpha_next), eps_t)
        factor = t.a + t.b * math.sqrt(1 - alpha) / total
        variance = factor**2 * variance + t.s**2
    assert variance == pytest.approx(last * v + 1 - last, rel=2e-4)


@pytest.mark.parametrize(("dynamics", "level"), [("dance", 0.3), ("flow", 0.7), ("flow_wan", 1.0)])
def test_flow_sdes_keep_the_marginals_on_a_fine_grid(dynamics: str, level: float) -> None:
    """Data N(0, v): v(x) = E[eps - x0 | x] is linear; the variance follows (1-s)^2 v + s^2."""
    v = 4.0
    schedule = from_sigmas(np.linspace(0.95, 0.05, 20001))
    variance = 0.05**2 * v + 0.95**2
    for i in range(schedule.steps):
        sigma = schedule.sigmas[i]
        velocity = (sigma - (1 - sigma) * v) / ((1 - sigma) ** 2 * v + sigma**2)
        t = transition(schedule, i, i + 1, dynamics=dynamics, kind="sde", level=level)
        variance = (t.a + t.b * velocity) ** 2 * variance + t.s**2
    assert variance == pytest.approx(0.95**2 * v + 0.05**2, rel=5e-4)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("points", [(1.0, 0.978), (0.6, 0.4), (0.3, 0.01), (0.2, 0.0)])
def test_cps_preserves_the_coefficients(points, level) -> None:
    """x = (1-s) x0 + s eps with the true velocity: signal 1 - s', total noise exactly s'."""
    sigma, sigma_next = points
    t = cps(sigma, sigma_next, level)
    signal = t.a * (1 - sigma) + t.b * -1
    noise = t.a * sigma + t.b * 1
    assert signal == pytest.approx(1 - sigma_next, abs=1e-14)
    assert math.hypot(noise, t.s) == pytest.approx(sigma_next, abs=1e-14)


# ------------------------------------------------------------------ multistep


def multistep_walk(sigmas: tuple[float, ...], network, x: np.ndarray) -> np.ndarray:
    parent = None
    for i in range(len(sigmas) - 1):
        m = network(x, sigmas[i])
        first = i == 0
        t, history = dpmpp_2m(sigmas[i], sigmas[i + 1], None if first else sigmas[i - 1])
        x0 = t.p * x + t.q * m
        x = t.a * x + t.b * m + (0.0 if first else history * parent)
        parent = x0
    return x


def test_dpmpp_2m_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2,
        algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=False,
        final_sigmas_type="zero",
    )  # fmt: skip

    def network(x, sigma):
        return np.tanh(1.5 * x) * (0.3 + sigma) - 0.2

    for steps in (4, 20):
        schedule = from_scheduler(scheduler, steps)
        scheduler.set_timesteps(steps)
        theirs = torch.from_numpy(X)[None]
        for i, t in enumerate(scheduler.timesteps):
            m = torch.from_numpy(network(theirs.numpy(), schedule.sigmas[i]))
            theirs = scheduler.step(m, t, theirs, return_dict=False)[0]
        ours = multistep_walk(schedule.sigmas, network, X)
        assert ours == pytest.approx(theirs.numpy()[0], abs=2e-5)
        euler = X.copy()
        for a, b in zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True):
            euler = euler + (b - a) * network(euler, a)
        assert np.abs(euler - ours).max() > 1e-3, "the comparison has no power"


def test_dpmpp_2m_is_second_order() -> None:
    """Data N(0, v): the ODE has the closed form x(s) ~ sqrt((1-s)^2 v + s^2)."""
    v = 4.0

    def spread(sigma):
        return math.sqrt((1 - sigma) ** 2 * v + sigma**2)

    def network(x, sigma):
        return x * (sigma - (1 - sigma) * v) / spread(sigma) ** 2

    errors = []
    for steps in (20, 40, 80):
        sigmas = tuple(np.linspace(0.9, 0.1, steps + 1))
        end = multistep_walk(sigmas, network, X)
        errors.append(np.abs(end - X * spread(0.1) / spread(0.9)).max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


def test_dpmpp_2m_paper_form_and_ends() -> None:
    before, sigma, after = 0.7, 0.5, 0.35

    def snr(s):
        return math.log((1 - s) / s)

    h, h_before = snr(after) - snr(sigma), snr(sigma) - snr(before)
    x0, parent = X - sigma * M, NOISE
    blend = (1 + h / (2 * h_before)) * x0 - h / (2 * h_before) * parent
    expected = after / sigma * X - (1 - after) * (math.exp(-h) - 1) * blend
    t, history = dpmpp_2m(sigma, after, before)
    assert mean_of(t) + history * parent == pytest.approx(expected, rel=1e-12)
    assert (t.s, t.w, t.c, t.k) == (0.0, 0.0, 0.0, 0.0)
    # First order, at sigma = 1 and after it, is the Euler step of the same ODE; into 0 it is x0.
    for first, h0 in (dpmpp_2m(1.0, 0.9), dpmpp_2m(0.5, 0.35)):
        assert h0 == 0.0 and first.a == pytest.approx(1.0, abs=1e-15)
    assert dpmpp_2m(0.9, 0.8, 1.0) == dpmpp_2m(0.9, 0.8)
    last, h_last = dpmpp_2m(0.1, 0.0, 0.2)
    assert h_last == 0.0 and mean_of(last) == pytest.approx(X - 0.1 * M, rel=1e-15)
