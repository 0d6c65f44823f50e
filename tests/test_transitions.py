"""Transitions of a schedule: identities, kinds, KL forms, edge cases and errors, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transition_cases import (
    GRID,
    NOISE,
    M,
    X,
    gaussian_log_prob,
    log_prob_of,
    mean_of,
    predictions,
    stable_diffusion,
)

from dancegrpo_fast.schedules import Schedule, from_sigmas
from dancegrpo_fast.transitions import (
    Transition,
    coefficient_table,
    dance_sde,
    ddim,
    dpmpp_2m,
    flow_sde,
    flow_sde_wan,
    ode,
    transition,
    vp_sde,
    x0_step,
)

# ------------------------------------------------------------------ identities and edge cases


@pytest.mark.parametrize("i", range(16))
def test_dance_and_flow_are_one_sde(i: int) -> None:
    sigma, sigma_next = GRID.sigmas[i], GRID.sigmas[i + 1]
    rate = 0.7 * math.sqrt(sigma / (1 - (GRID.sigmas[1] if sigma == 1 else sigma)))
    ours, theirs = (
        flow_sde(sigma, sigma_next, 0.7, GRID.sigmas[1]),
        dance_sde(sigma, sigma_next, rate),
    )
    assert tuple(ours) == pytest.approx(tuple(theirs), rel=1e-13)


def test_flow_drift_closed_form() -> None:
    sigma, sigma_next, a = 0.6, 0.55, 0.7
    t = flow_sde(sigma, sigma_next, a, 0.9)
    assert t.a == pytest.approx(1 - a * a * 0.05 / (2 * 0.4), rel=1e-13)
    assert t.b == pytest.approx(-(1 + a * a / 2) * 0.05, rel=1e-13)


def test_flow_at_one_uses_the_second_sigma_also_on_unipc_grids() -> None:
    at_one = flow_sde(1.0, 0.95, 0.7, 0.95)
    assert at_one.s == pytest.approx(0.7 * math.sqrt(1 / 0.05) * math.sqrt(0.05))
    nearly = flow_sde(1 - 1e-6, 0.95, 0.7, 0.95)
    assert tuple(nearly) == pytest.approx(tuple(at_one), rel=1e-4)


@pytest.mark.parametrize("dynamics", ["dance", "flow", "flow_wan", "cps"])
def test_level_zero_and_ode_are_the_euler_step(dynamics: str) -> None:
    for i in range(16):
        euler = X + (GRID.sigmas[i + 1] - GRID.sigmas[i]) * M
        flat = transition(GRID, i, i + 1, dynamics=dynamics, kind="sde", level=0.0)
        straight = transition(GRID, i, i + 1, dynamics=dynamics, kind="ode", level=0.7)
        assert mean_of(flat) == pytest.approx(euler, rel=1e-12)
        assert mean_of(straight) == pytest.approx(euler, rel=1e-14)
        for t in (flat, straight):
            assert (t.s, t.w, t.c, t.k) == (0.0, 0.0, 0.0, 0.0)
    assert straight == ode(GRID.sigmas[15], 0.0)


@pytest.mark.parametrize("dynamics", ["ddim", "vp"])
def test_ode_of_ddim_models(dynamics: str) -> None:
    schedule = stable_diffusion()
    straight = transition(schedule, 3, 4, dynamics=dynamics, kind="ode", level=1.0)
    assert straight == transition(schedule, 3, 4, dynamics=dynamics, kind="sde", level=0.0)
    assert (straight.s, straight.w, straight.c, straight.k) == (0.0, 0.0, 0.0, 0.0)


def test_cps_into_zero_returns_x0_without_density() -> None:
    t = transition(GRID, 15, 16, dynamics="cps", kind="sde", level=0.8)
    assert (t.s, t.w, t.c, t.k) == (0.0, 0.0, 0.0, 0.0)
    assert mean_of(t) == pytest.approx(X - GRID.sigmas[15] * M, rel=1e-14)


@pytest.mark.parametrize("schedule", [GRID, stable_diffusion()])
def test_x0_step(schedule: Schedule) -> None:
    t = x0_step(schedule, 5)
    if schedule is GRID:
        x0 = X - GRID.sigmas[5] * M
    else:
        x0 = predictions(schedule.alphas_cumprod[5])["sample"]
    assert mean_of(t) == pytest.approx(x0, rel=1e-12)
    assert (t.a, t.b, t.s, t.w, t.c, t.k) == (t.p, t.q, 0.0, 0.0, 0.0, 0.0)
    dynamics = "cps" if schedule is GRID else "ddim"
    assert t == transition(schedule, 5, 6, dynamics=dynamics, kind="x0", level=0.8)


CASES = [
    ("dance", 0.3, GRID),
    ("flow", 0.7, GRID),
    ("flow_wan", 1.0, GRID),
    ("cps", 0.8, GRID),
    ("ddim", 1.0, stable_diffusion()),
    ("vp", 0.5, stable_diffusion()),
]


@pytest.mark.parametrize(("dynamics", "level", "schedule"), CASES)
def test_kl_is_that_between_the_two_gaussians(dynamics, level, schedule) -> None:
    t = transition(schedule, 5, 6, dynamics=dynamics, kind="sde", level=level)
    reference = M + np.array([0.02, -0.01, 0.03, 0.0])
    # KL(N(mu, s^2) || N(mu_ref, s^2)) per element, averaged.
    exact = np.mean((mean_of(t) - mean_of(t, m=reference)) ** 2) / (2 * t.s**2)
    assert t.k * np.mean((M - reference) ** 2) == pytest.approx(exact, rel=1e-9)
    x = transition(schedule, 5, 6, dynamics=dynamics, kind="sde", level=level, kl="x")
    v = transition(schedule, 5, 6, dynamics=dynamics, kind="sde", level=level, kl="v")
    assert x == t._replace(k=t.b**2) and v == t._replace(k=1.0)


def test_kl_published_values() -> None:
    exact = transition(GRID, 5, 6, dynamics="flow", kind="sde", level=0.7)
    image = transition(GRID, 5, 6, dynamics="flow", kind="sde", level=0.7, kl="flow_image")
    distance = np.mean(np.array([0.02, -0.01, 0.03, 0.0]) ** 2)
    assert exact.k * distance == pytest.approx(2.943011e-6, abs=5e-13)
    assert image.k * distance == pytest.approx(1.032635e-7, abs=5e-14)


@pytest.mark.parametrize(("dynamics", "level", "schedule"), CASES)
def test_noise_scale_changes_the_noise_and_its_density_only(dynamics, level, schedule) -> None:
    args = {"dynamics": dynamics, "kind": "sde", "level": level}
    plain = transition(schedule, 4, 5, **args)
    wide = transition(schedule, 4, 5, **args, noise_scale=4.0)
    assert (wide.a, wide.b, wide.p, wide.q) == (plain.a, plain.b, plain.p, plain.q)
    assert wide.s == pytest.approx(4 * plain.s, rel=1e-15)
    y = mean_of(wide) + wide.s * NOISE
    density = gaussian_log_prob(y, mean_of(wide), 4 * plain.s)
    if dynamics == "cps":
        assert (wide.w, wide.c) == (1.0, 0.0)
        wide = transition(schedule, 4, 5, **args, noise_scale=4.0, exact_density=True)
    assert log_prob_of(wide, y) == pytest.approx(density, rel=1e-9)


@pytest.mark.parametrize(("dynamics", "level", "schedule"), CASES)
def test_sum_is_numel_times_the_mean(dynamics, level, schedule) -> None:
    args = {"dynamics": dynamics, "kind": "sde", "level": level}
    mean = transition(schedule, 4, 5, **args)
    total = transition(schedule, 4, 5, **args, log_prob="sum", numel=4)
    assert total == mean._replace(w=4 * mean.w, c=4 * mean.c)
    y = mean_of(mean) + mean.s * NOISE
    assert log_prob_of(total, y) == pytest.approx(4 * log_prob_of(mean, y), rel=1e-12)


def test_steps_may_span_several_points() -> None:
    t = transition(GRID, 2, 5, dynamics="dance", kind="sde", level=0.3)
    assert t == dance_sde(GRID.sigmas[2], GRID.sigmas[5], 0.3)


def test_wan_takes_its_bounds_from_the_schedule() -> None:
    schedule = from_sigmas([0.999, 0.95, 0.6, 0.02])
    t = transition(schedule, 1, 2, dynamics="flow_wan", kind="sde", level=1.0)
    assert t == flow_sde_wan(0.95, 0.6, 1.0, 0.02, 0.95)
    assert t.s == pytest.approx((0.02 + 0.93 * 0.95) * math.sqrt(0.35))


def test_coefficient_table_order_and_rounding() -> None:
    rows = [transition(GRID, i, i + 1, dynamics="dance", kind="sde", level=0.3) for i in (0, 7)]
    table = coefficient_table(rows)
    assert table.dtype == torch.float32
    assert torch.equal(table, torch.tensor(np.array(rows), dtype=torch.float32))
    assert coefficient_table([], dtype=torch.float64).shape == (0, 8)
    assert Transition._fields == ("a", "b", "s", "w", "c", "k", "p", "q")


# ------------------------------------------------------------------ errors


def flow_call(**changes: object):
    args = {"dynamics": "dance", "kind": "sde", "level": 0.3, **changes}
    return lambda: transition(GRID, 3, 4, **args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (flow_call(dynamics="euler"), "dynamics = 'euler': must be one of dance"),
        (flow_call(kind="multistep"), "kind = 'multistep'"),
        (flow_call(kl="reverse"), "kl = 'reverse'"),
        (flow_call(log_prob="max"), "log_prob = 'max'"),
        (flow_call(log_prob="sum"), "numel = None"),
        (flow_call(level=-0.1), "eta = -0.1"),
        (flow_call(level=float("nan")), "eta = nan"),
        (flow_call(noise_scale=float("inf")), "noise_scale = inf"),
        (flow_call(dynamics="cps", level=1.1), "level = 1.1: .* at most 1"),
        (flow_call(dynamics="cps", level=0.7, kl="flow_image"), "flow_image"),
        (flow_call(dynamics="ddim"), "alphas_cumprod = None"),
        (lambda: transition(GRID, 4, 4, dynamics="flow", kind="ode", level=0.7), "j = 4"),
        (lambda: transition(GRID, 3, 17, dynamics="flow", kind="ode", level=0.7), "j = 17"),
        (lambda: transition(GRID, -1, 3, dynamics="flow", kind="ode", level=0.7), "i = -1"),
        (
            lambda: transition(stable_diffusion(), 0, 1, dynamics="cps", kind="sde", level=0.5),
            "prediction = 'epsilon'",
        ),
        (lambda: dance_sde(0.0, 0.0, 0.3), "sigma = 0.0"),
        (lambda: ode(0.4, 0.5), "sigma = 0.4, sigma_next = 0.5"),
        (lambda: flow_sde(1.0, 0.9, 0.7, 1.0), "sigma = 1.0 with sigma_max = 1.0"),
        (lambda: dpmpp_2m(0.5, 0.5), "strictly falling"),
        (lambda: dpmpp_2m(0.5, 0.4, 0.3), "sigma_parent = 0.3"),
        (lambda: ddim(0.5, 0.4, 1.0), "alpha = 0.5, alpha_next = 0.4"),
        (lambda: ddim(1.0, 1.0, 0.0), "alpha = 1.0"),
        (lambda: ddim(0.1, 0.5, 1.3), "eta = 1.3"),
        (lambda: ddim(0.0, 0.5, 1.0), "alpha = 0.0: an epsilon"),
        (lambda: ddim(0.3, 0.5, 1.0, "flow_prediction"), "prediction = 'flow_prediction'"),
        (lambda: vp_sde(0.0, 0.5, 1.0, "v_prediction"), "alpha = 0.0"),
        (lambda: x0_step(GRID, 17), "i = 17"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
