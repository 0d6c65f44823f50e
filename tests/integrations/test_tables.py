"""Coefficient tables of host schedules, and gathering their rows."""

from __future__ import annotations

import functools
import gc

import formulas
import pytest
import torch
from formulas import normal
from torch import Tensor

from dancegrpo_fast import (
    dance_schedule,
    from_sigmas,
    transition,
)
from dancegrpo_fast.integrations import common, tables

GRID = dance_schedule(8, 3.0)
SIGMAS = torch.tensor(GRID.sigmas, dtype=torch.float64)
FLOW = {"dance": 0.3, "flow": 0.7, "flow_wan": 1.0, "cps": 0.8, "ode": 0.0}


def expected_rows(dynamics: str, level: float, **options: bool) -> Tensor:
    kind = "ode" if dynamics == "ode" else "sde"
    name = "dance" if dynamics == "ode" else dynamics
    steps = range(GRID.steps)
    moves = [
        transition(GRID, i, i + 1, dynamics=name, kind=kind, level=level, **options) for i in steps
    ]
    rows = torch.tensor([tuple(move) for move in moves], dtype=torch.float64)
    if dynamics == "cps" and not options:
        rows[:, 3] = 1.0  # as published: also in the last step, which has no noise
    return rows


# ------------------------------------------------------------------ tables


def test_a_schedule_of_another_length_is_another_table() -> None:
    short = torch.tensor(from_sigmas([1.0, 0.5, 0.0]).sigmas)
    assert common.flow_table(short, dynamics="dance", level=0.3).shape == (2, 8)


@pytest.mark.parametrize(("dynamics", "level"), FLOW.items())
def test_tables_are_the_transitions(dynamics: str, level: float) -> None:
    # Both in float64, a few operations each: their difference is rounding, below 1e-12.
    table = common.flow_table(SIGMAS, dynamics=dynamics, level=level, dtype=torch.float64)
    torch.testing.assert_close(table, expected_rows(dynamics, level), rtol=1e-12, atol=1e-12)
    single = common.flow_table(SIGMAS, dynamics=dynamics, level=level)
    assert single.dtype == torch.float32
    assert torch.equal(single, table.float())


def test_table_options() -> None:
    exact = common.flow_table(
        SIGMAS, dynamics="cps", level=0.8, exact_density=True, dtype=torch.float64
    )
    wanted = expected_rows("cps", 0.8, exact_density=True)
    torch.testing.assert_close(exact, wanted, rtol=1e-12, atol=1e-12)
    # The normaliser is c and nothing else.
    with_c = common.flow_table(SIGMAS, dynamics="dance", level=0.3)
    without = common.flow_table(SIGMAS, dynamics="dance", level=0.3, normaliser=False)
    assert (without[:, 4] == 0).all() and (with_c[:, 4] != 0).all()
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(with_c[:, others], without[:, others])
    # sigma_max replaces sigma = 1 in the denominator, and only there.
    other = common.flow_table(SIGMAS, dynamics="flow", level=0.7, sigma_max=0.99)
    assert other[0, 2] != common.flow_table(SIGMAS, dynamics="flow", level=0.7)[0, 2]
    assert other[0, 2] == pytest.approx(0.7 * 10 * (1 - GRID.sigmas[1]) ** 0.5, rel=1e-6)
    # Level 0 is the ODE, without a density, whatever the dynamics.
    for dynamics in ("dance", "flow", "flow_wan", "cps"):
        still = common.flow_table(SIGMAS, dynamics=dynamics, level=0.0, dtype=torch.float64)
        ode = expected_rows("ode", 0.0)
        if dynamics == "cps":
            ode[:, 3] = 1.0
        torch.testing.assert_close(still, ode, rtol=1e-12, atol=1e-12)


def test_euler_noise_is_the_ode_with_dance_noise() -> None:
    # DanceGRPO without its SDE solver: the mean of the ODE, the noise and density of the SDE.
    table = common.flow_table(SIGMAS, dynamics="euler_noise", level=0.3, dtype=torch.float64)
    ode, sde = expected_rows("ode", 0.0), expected_rows("dance", 0.3)
    torch.testing.assert_close(table[:, :2], ode[:, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table[:, 2:5], sde[:, 2:5], rtol=1e-12, atol=1e-12)


def test_undefined_steps_are_nan_and_bad_arguments_are_refused() -> None:
    sigmas = torch.tensor([0.5, 0.2, 0.0, 0.0])
    table = common.flow_table(sigmas, dynamics="dance", level=0.3)
    assert table[:2].isfinite().all() and table[2].isnan().all()
    at_one = common.flow_table(torch.tensor([1.0, 1.0, 0.5]), dynamics="flow", level=0.7)
    assert at_one[0].isnan().all() and at_one[1].isnan().all()
    assert common.flow_table(sigmas, dynamics="ode").isfinite().all()
    with pytest.raises(ValueError, match="must fall within"):
        common.flow_table(torch.tensor([0.2, 0.5]), dynamics="dance", level=0.3)
    with pytest.raises(ValueError, match="must fall within"):
        common.flow_table(torch.tensor([1.0, float("nan")]), dynamics="ode")
    with pytest.raises(ValueError, match="level = -1"):
        common.flow_table(SIGMAS, dynamics="dance", level=-1)
    with pytest.raises(ValueError, match="level = 1.5: must be from 0 to 1"):
        common.flow_table(SIGMAS, dynamics="cps", level=1.5)
    with pytest.raises(ValueError, match="dynamics = 'sde'"):
        common.flow_table(SIGMAS, dynamics="sde", level=0.7)
    with pytest.raises(ValueError, match=r"sigmas has shape \[\]"):
        common.flow_table(torch.tensor(1.0), dynamics="ode")


def test_tables_are_kept_until_the_sigmas_change_or_die() -> None:
    build = functools.partial(common.flow_table, dynamics="dance")
    sigmas = torch.linspace(1, 0, 5)
    gc.collect()  # what other tests left
    before = len(tables.TABLES._kept)
    first = build(sigmas, level=0.3)
    assert build(sigmas, level=0.3) is first
    assert build(sigmas, level=0.4) is not first
    assert build(sigmas, level=0.3, normaliser=False) is not first
    sigmas[1] = 0.8  # in place: the host's schedule object reused
    changed = build(sigmas, level=0.3)
    assert not torch.equal(changed, first) and changed[0, 1] == pytest.approx(-0.2)
    for _ in range(50):  # a host that makes sigmas anew in each rollout must not leak
        build(torch.linspace(1, 0, 5), level=0.3)
    del sigmas
    gc.collect()
    assert len(tables.TABLES._kept) == before
    with torch.inference_mode():  # writes to these are not counted: never kept
        sigmas = torch.linspace(1, 0, 5)
        first = build(sigmas, level=0.3)
        sigmas[1] = 0.8
        assert not torch.equal(build(sigmas, level=0.3), first)
    assert len(tables.TABLES._kept) == before


def test_a_level_in_a_tensor_is_read_not_remembered() -> None:
    level = torch.tensor(0.25)  # a host that anneals it in place
    alphas = torch.linspace(0.999, 0.01, 20)
    calls = (
        lambda level: common.flow_table(SIGMAS, dynamics="dance", level=level),
        lambda level: common.noise_table(SIGMAS, dynamics="dance", level=level),
        lambda level: common.ddim_table(alphas, stride=5, eta=level),
    )
    for call in calls:
        level.fill_(0.25)
        assert call(level) is call(0.25)
        level.fill_(0.5)
        assert call(level) is call(0.5)


def test_noise_table() -> None:
    table = common.noise_table(SIGMAS, dynamics="flow", level=0.7)
    rows = expected_rows("flow", 0.7)
    torch.testing.assert_close(table[:, 0] * table[:, 1], rows[:, 2].float())
    torch.testing.assert_close(table[:, 2], SIGMAS.diff().float())
    sigma = SIGMAS[:-1]
    rate = formulas.rate("flow", sigma, 0.7, float(SIGMAS[1]), 0.0)
    torch.testing.assert_close(table[:, 0], rate.float())


@pytest.mark.parametrize(("dynamics", "level"), FLOW.items())
def test_pairs_are_the_table(dynamics: str, level: float) -> None:
    table = common.flow_table(SIGMAS, dynamics=dynamics, level=level)
    pairs = functools.partial(
        common.pair_rows, dynamics=dynamics, level=level, sigma_min=0.0, sigma_max=GRID.sigmas[1]
    )
    for i in (0, 3, 7):
        here, there = SIGMAS[i], SIGMAS[i + 1]
        numbers = pairs(float(here), float(there), batch=2)
        assert torch.equal(numbers, table[i].expand(2, 8))
        assert torch.equal(pairs(here, there, batch=2), numbers)
        assert torch.equal(pairs(here.reshape(1, 1, 1), float(there), batch=2), numbers)
    index = torch.tensor([4, 0, 7])
    mixed = pairs(SIGMAS[index], SIGMAS[index + 1].reshape(3, 1, 1), batch=3)
    assert torch.equal(mixed, table[index])
    with pytest.raises(ValueError, match="must be 1 or 2"):
        pairs(SIGMAS[index], SIGMAS[index + 1], batch=2)


def test_pairs_need_the_limits_of_wan() -> None:
    with pytest.raises(ValueError, match="needs sigma_min and sigma_max"):
        common.pair_rows(0.5, 0.4, dynamics="flow_wan", level=1.0, batch=1)
    # Without sigma_max the first step of Flow-GRPO's SDE is undefined; all others need none.
    rows = common.pair_rows(torch.tensor([1.0, 0.5]), 0.4, dynamics="flow", level=0.7, batch=2)
    assert rows[0].isnan().all() and rows[1].isfinite().all()


ALPHAS = torch.cumprod(
    1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_table(prediction: str) -> None:
    x, m = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
    table = common.ddim_table(
        ALPHAS, stride=20, eta=1.0, prediction=prediction, dtype=torch.float64
    )
    assert table.shape == (1000, 8)
    t = torch.tensor([981, 501, 1])
    a, a_next = ALPHAS[t].reshape(3, 1, 1), ALPHAS[(t - 20).clamp(min=0)].reshape(3, 1, 1)
    mean, std, x0 = formulas.ddim_step(m, x, a, a_next, 1.0, prediction)
    row = common.rows(table, t, 3)
    torch.testing.assert_close(common.per_sample(row[:, 2], x), std, rtol=1e-12, atol=0)
    out = common.step(m, x, row, prev_sample=x)
    # Both in float64; 1 / sqrt(A) is 13 at the first timestep, which amplifies the rounding.
    torch.testing.assert_close(out.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.x0, x0, rtol=1e-12, atol=1e-12)


def test_ddim_vectors_and_the_rule_below_zero() -> None:
    # algorithms.md 1.6: the last step keeps its noise because it goes to timestep 0.
    table = common.ddim_table(ALPHAS, stride=20, eta=1.0)
    found = table[[981, 501, 1], 2]
    torch.testing.assert_close(found, torch.tensor([0.45446327, 0.29478454, 0.02064832]))


# ------------------------------------------------------------------ gathering


def test_rows_take_every_kind_of_index() -> None:
    table = common.flow_table(SIGMAS, dynamics="dance", level=0.3)
    same = torch.tensor([2, 2, 2], dtype=torch.int32)
    for index in (2, torch.tensor(2), torch.tensor([2]), same):
        assert torch.equal(common.rows(table, index, 3), table[2].expand(3, 8))
    mixed = torch.tensor([7, 0, 3])
    assert torch.equal(common.rows(table, mixed, 3), table[mixed])
    for index in (-1, 8):
        with pytest.raises(ValueError, match=f"index = {index}: must be a step from 0 to 7"):
            common.rows(table, index, 3)
    with pytest.raises(ValueError, match="must be 0-d or"):
        common.rows(table, torch.tensor([0, 1]), 3)
    with pytest.raises(IndexError):
        common.rows(table, torch.tensor([0, 1, 8]), 3)


def test_timesteps_are_found_by_equality() -> None:
    timesteps = torch.tensor([1000.0, 933.3, 750.0, 750.0, 500.0])
    wanted = timesteps[[4, 1]]
    assert common.timestep_index(timesteps, wanted).tolist() == [4, 1]
    assert common.timestep_index(timesteps, timesteps[1]).shape == ()
    assert common.timestep_index(timesteps, 500.0).item() == 4
    assert common.timestep_index(timesteps, torch.tensor([750.0, 1000.0])).tolist() == [2, 0]
    second = common.timestep_index(timesteps, torch.tensor([750.0, 1000.0]), second=True)
    assert second.tolist() == [3, 0]
    # Whatever else it is asked: of three the second, and the list may change in place.
    timesteps[4] = 750.0
    assert common.timestep_index(timesteps, 750.0, second=True).tolist() == 3
    timesteps[3:] = torch.tensor([500.0, 400.0])
    assert common.timestep_index(timesteps, 750.0, second=True).tolist() == 2
    with pytest.raises(ValueError, match="not among the scheduler's"):
        common.timestep_index(timesteps, torch.tensor([933.0]))
    whole = torch.tensor([999, 500])
    assert common.timestep_index(whole, 500).item() == 1
    with pytest.raises(ValueError, match="not among"):  # not truncated to 500
        common.timestep_index(whole, 500.5)
