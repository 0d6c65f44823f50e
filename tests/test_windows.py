"""Windows: where they stand, by hand; and the DPM-Solver++ 2M steps behind one."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from tree_stand_ins import BOX, KEY, draw

from dancegrpo_fast.config import RolloutConfig
from dancegrpo_fast.ops.noise import randint
from dancegrpo_fast.rollout import plan_trees
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.trees.tree import Cost, branch_points, window
from dancegrpo_fast.trees.windows import thinned, window_start, without_history_across

TWELVE = dance_schedule(12, 3.0)


def rollout(steps: int = 12, **tree) -> RolloutConfig:
    return RolloutConfig(
        group_size=3, steps=steps, noise_level=0.3, batch_size=4,
        tree={"kind": "window", "window_size": 4, **tree},
    )  # fmt: skip


def places(count: int, config: RolloutConfig) -> list[int]:
    return [window_start(config, iteration, KEY) for iteration in range(count)]


def test_progressive_walks_from_the_first_place_to_the_last_and_again() -> None:
    config = rollout(window_order="progressive", window_iterations=2, window_stride=3)
    # 11 trainable steps, a window of 4: it starts at 0 to 7, every third.
    assert places(14, config) == [0, 0, 3, 3, 6, 6] * 2 + [0, 0]
    inside = rollout(window_order="progressive", window_range=(2, 8))
    assert places(4, inside) == [2, 3, 4, 2]


def test_decaying_stays_from_tau_down_to_one() -> None:
    config = rollout(window_order="decaying", window_iterations=8)
    stays = Counter(places(sum(range(1, 9)), config))
    assert [stays[place] for place in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]
    # Between whole numbers it rounds up: 10, 10 - 9/7, ...
    config = rollout(window_order="decaying", window_iterations=10)
    expected = [math.ceil(10 - 9 * j / 7) for j in range(8)]
    stays = Counter(places(sum(expected), config))
    assert [stays[place] for place in range(8)] == expected
    assert set(places(9, rollout(window_order="decaying"))) == set(range(8))
    only = rollout(window_order="decaying", window_iterations=3, window_range=(1, 5))
    assert places(4, only) == [1] * 4


def test_exponential_is_the_published_formula() -> None:
    config = rollout(25, window_order="exponential", window_iterations=25)
    expected = [math.ceil(25 * math.exp(-0.1 * max(0, place - 13))) for place in range(21)]
    assert expected[:14] == [25] * 14 and expected[20] == 13
    stays = Counter(places(sum(expected), config))
    assert [stays[place] for place in range(21)] == expected


def test_random_places_are_drawn_from_the_iteration_and_may_stay() -> None:
    found = places(200, rollout())
    assert set(found) == set(range(8))
    assert found == [randint(0, 8, KEY.fold_in(iteration).draw()) for iteration in range(200)]
    slow = places(200, rollout(window_iterations=5))
    assert slow == [found[iteration // 5] for iteration in range(200)]
    assert places(3, rollout(window_start=5)) == [5] * 3


def test_a_window_of_all_steps_is_the_shared_root() -> None:
    config = rollout(window_size=11, window_start=0)
    whole = RolloutConfig(group_size=3, steps=12, noise_level=0.3, batch_size=4)
    assert plan_trees(config, TWELVE, 0, KEY) == plan_trees(whole, TWELVE, 0, KEY)


def test_one_branch_point_at_the_root_is_the_shared_root() -> None:
    tree = {"kind": "branch_points", "branch_steps": [0], "branches": 3}
    config = RolloutConfig(group_size=3, steps=12, noise_level=0.3, batch_size=4, tree=tree)
    whole = RolloutConfig(group_size=3, steps=12, noise_level=0.3, batch_size=4)
    assert plan_trees(config, TWELVE, 0, KEY) == plan_trees(whole, TWELVE, 0, KEY)


def test_depth_pruning_trains_the_window_and_changes_no_state() -> None:
    tree = {"kind": "branch_points", "branch_steps": [0, 3], "branches": 2, "noise_scale": 4.0}
    settings = {"group_size": 4, "steps": 12, "noise_level": 0.3, "batch_size": 4}
    whole = plan_trees(RolloutConfig(**settings, tree=tree), TWELVE, 0, KEY)
    assert whole == branch_points(TWELVE, (0, 3), 2, noise_scale=4.0)
    moving = {"window_size": 4, "window_order": "progressive"}
    for iteration in range(9):
        pruned = plan_trees(RolloutConfig(**settings, tree=tree | moving), TWELVE, iteration, KEY)
        inside = range(iteration % 8, iteration % 8 + 4)
        for one, other in zip(whole.states, pruned.states, strict=True):
            assert (one.kind, one.path, one.noise_scale) == (
                other.kind, other.path, other.noise_scale
            )  # fmt: skip
            assert other.trained == (one.trained and one.step - 1 in inside)
    assert whole.cost().training == 1 + 2 * 3 + 4 * 7
    assert pruned.cost().training == 1 + 2 * 3  # Iteration 8: steps 0 to 3 again.


# ------------------------------------------------------------------ Flash


def test_thinned_schedules_by_hand() -> None:
    flash = thinned(TWELVE, 6, 0.5)
    assert flash.sigmas == tuple(TWELVE.sigmas[i] for i in (0, 1, 2, 3, 4, 5, 6, 8, 10, 12))
    assert flash.timesteps == tuple(TWELVE.timesteps[i] for i in (0, 1, 2, 3, 4, 5, 6, 8, 10))
    assert thinned(TWELVE, 4, 1.0) == TWELVE
    assert thinned(TWELVE, 12, 0.2) == TWELVE  # Nothing is left to thin.
    assert thinned(TWELVE, 11, 0.2).sigmas == TWELVE.sigmas
    assert thinned(TWELVE, 2, 0.01).sigmas == (*TWELVE.sigmas[:3], 0.0)
    assert thinned(TWELVE, 5, 0.55).steps == 5 + 3  # 3.85 is rounded down.
    # MixGRPO-Flash: T 25, window 4, ratio .4: int(21 x .4) = 8 steps after the first window.
    assert thinned(dance_schedule(25, 3.0), 4, 0.4).steps == 4 + 8


def test_flash_plan_by_hand() -> None:
    plan = plan_trees(rollout(window_start=2, window_size=2, flash=0.5), TWELVE, 0, KEY)
    way = [plan.states[i] for i in plan.ancestry(plan.leaves[1])]
    assert [s.kind for s in way] == ["root", "ode", "ode", "sde", "sde"] + ["multistep"] * 4
    assert [s.history for s in way] == [False] * 6 + [True] * 3
    # Two trunk steps and the splitting state, then one stochastic and four deterministic steps.
    assert plan.cost() == Cost(3 + 3 * 5, 1 + 3, 3 * 8, 3 * 2)
    names = ["high"] * 6 + ["low"] * 2  # The step out of point 6 begins a new expert.
    across = without_history_across(plan, names)
    way = [across.states[i] for i in across.ancestry(across.leaves[1])]
    assert [s.history for s in way] == [False] * 6 + [True, False, True]
    assert without_history_across(plan, ["net"] * 8) == plan


def paper_walk(x: np.ndarray, x0_of, sigmas: tuple[float, ...]) -> np.ndarray:
    """DPM-Solver++ 2M as MixGRPO-Flash prints it, from the end of the window to sigma = 0."""
    snr = [math.log((1 - s) / s) if 0 < s < 1 else math.nan for s in sigmas]
    before = None
    for i in range(len(sigmas) - 1):
        x0 = x0_of(x, i)
        if sigmas[i + 1] == 0:
            return x0
        h = snr[i + 1] - snr[i]
        blend = x0
        if before is not None:
            ratio = h / (2 * (snr[i] - snr[i - 1]))
            blend = (1 + ratio) * x0 - ratio * before
        x = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * (math.exp(-h) - 1) * blend
        before = x0
    raise AssertionError("the walk ends at 0")


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_draws_the_papers_steps(box, dtype) -> None:
    plan = window(thinned(TWELVE, 4, 0.6), 3, 2, 2, solver="multistep")
    one = draw(plan, box=box, latent_dtype=dtype)
    inside = tuple(slice(*side) for side in box) if box else ...
    # float32 steps against float64 ones; bfloat16 rounds each of the four states to 8 bits.
    tolerance = 2e-5 if dtype == "float32" else 0.1
    for p in range(2):
        for leaf in plan.leaves:
            end = [i for i in plan.ancestry(leaf) if plan.states[i].kind == "sde"][-1]
            first = plan.states[end].step
            start = one.drawn.latents[p, end]

            def x0_of(x, i, p=p, first=first, start=start):
                latents = start.clone()
                latents[inside] = torch.from_numpy(x).to(start.dtype)[inside]
                time = torch.tensor([plan.schedule.timesteps[first + i]])
                asked = one.conditions.select([p])
                m = one.family.model_output(one.network, latents[None], time, asked, "net")[0]
                return x - plan.schedule.sigmas[first + i] * m.detach().double().numpy()

            expected = paper_walk(start.double().numpy(), x0_of, plan.schedule.sigmas[first:])
            stored = one.drawn.latents[p, leaf]
            assert stored.dtype == start.dtype
            gap = np.abs(stored.double().numpy() - expected)[inside].max()
            assert gap < tolerance
            if box:
                outside = torch.ones(stored.shape, dtype=torch.bool)
                outside[inside] = False
                assert torch.equal(stored[outside], start[outside])


def test_flash_history_changes_the_sample() -> None:
    """Without a second order the comparison above would have no power."""
    plan = window(thinned(TWELVE, 4, 0.6), 3, 2, 2, solver="multistep")
    names = [str(step) for step in range(plan.schedule.steps)]
    first_order = without_history_across(plan, names)
    assert not any(s.history for s in first_order.states)
    one, other = draw(plan), draw(first_order)
    for leaf in plan.leaves:
        gap = one.drawn.latents[0, leaf] - other.drawn.latents[0, leaf]
        assert float(gap.abs().max()) > 1e-3
