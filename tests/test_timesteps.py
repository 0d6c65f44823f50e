"""Trained steps and their weights: chosen as asked, weighted by the published formulas."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import CPU, tiny_config
from tree_stand_ins import KEY, SCHEDULE

from dancegrpo_fast.advantages import leaf_advantages
from dancegrpo_fast.ops.noise import permutation
from dancegrpo_fast.schedules import dance_schedule, from_scheduler
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trees.timesteps import edge_weights, timestep_subsets
from dancegrpo_fast.trees.tree import branch_points, shared_root, trunk_with_branches, window

EVERY = np.ones((3, 6), dtype=bool)
TEN = dance_schedule(16, 3.0)


def subsets(plan=None, **settings):
    return timestep_subsets(plan or shared_root(TEN, 6), EVERY, KEY, **settings)


def test_dancegrpo_takes_nine_of_fifteen_anew_for_each_sample() -> None:
    found = subsets(fraction=0.6)
    assert {len(steps) for steps in found.values()} == {9}
    assert set().union(*found.values()) == set(range(15))
    assert len(set(found.values())) > 15  # Two of 18 samples alike: 1 in 5005 each.
    order = permutation(15, KEY.fold_in(1).fold_in(2).fold_in(4).draw())
    assert found[2, 4] == frozenset(order[:9].tolist())


def test_a_group_shares_its_steps_and_other_groups_do_not() -> None:
    found = subsets(fraction=0.6, scope="group")
    of_prompts = [{found[p, g] for g in range(6)} for p in range(3)]
    assert all(len(steps) == 1 for steps in of_prompts)
    assert len(set().union(*of_prompts)) == 3
    assert {len(steps) for steps in found.values()} == {9}


def test_first_steps_and_listed_steps() -> None:
    assert set(subsets(fraction=0.3, timesteps="first").values()) == {frozenset(range(4))}
    assert set(subsets(timesteps=[2, 7]).values()) == {frozenset({2, 7})}
    assert set(subsets(fraction=0.01).values()) <= {frozenset({i}) for i in range(15)}


def test_samples_that_are_not_chosen_have_no_steps() -> None:
    chosen = EVERY.copy()
    chosen[1, 2:] = False
    found = timestep_subsets(shared_root(TEN, 6), chosen, KEY, fraction=0.6)
    assert set(found) == {(p, g) for p in range(3) for g in range(6) if p != 1 or g < 2}
    whole = subsets(fraction=0.6)
    assert all(found[place] == whole[place] for place in found)


def test_a_group_of_a_trunk_chooses_among_its_branch_steps() -> None:
    plan = trunk_with_branches(SCHEDULE, (0, 1, 3), 2)
    found = timestep_subsets(plan, EVERY, KEY, fraction=0.7, scope="group")
    for p in range(3):
        kept = set().union(*(found[p, g] for g in range(6)))
        assert len(kept) == 2 and kept < {0, 1, 3}


# ------------------------------------------------------------------ weights


def recipe(rule, *, dynamics="flow", level=0.7, train_last=False):
    rollout = SimpleNamespace(dynamics=dynamics, noise_level=level, train_last=train_last)
    return SimpleNamespace(rollout=rollout, loss=SimpleNamespace(timestep_weights=rule))


def by_step(plan, weights) -> dict[int, float]:
    return {plan.states[s.parent].step: weights[s.index] for s in plan.states if s.trained}


def flow_std(sigmas, i: int, level: float) -> float:
    """Flow-GRPO's sigma_t sqrt(dt), written out."""
    below = sigmas[1] if sigmas[i] == 1 else sigmas[i]
    return level * np.sqrt(sigmas[i] / (1 - below)) * np.sqrt(sigmas[i] - sigmas[i + 1])


def test_std_is_tempflows_weight() -> None:
    """The published constants make the mean 1: c = 2.25 (SD3, a .7) and 1.73 (FLUX, a .9).

    They have three digits and the second was rounded more freely: 0.2% and 1.5%.
    """
    diffusers = pytest.importorskip("diffusers")
    grid = from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    plan = shared_root(grid, 2)
    for level, constant, digits in ((0.7, 2.25, 2e-3), (0.9, 1.73, 1.5e-2)):
        found = by_step(plan, edge_weights(plan, grid, recipe("std", level=level)))
        assert set(found) == set(range(9))
        assert np.mean(list(found.values())) == pytest.approx(1, rel=1e-12)
        for step, weight in found.items():
            expected = constant * flow_std(grid.sigmas, step, level)
            assert weight == pytest.approx(expected, rel=digits)


def test_inverse_dt_is_guards_and_a_list_is_itself() -> None:
    plan = window(SCHEDULE, 3, 1, 2)
    found = by_step(plan, edge_weights(plan, SCHEDULE, recipe("inverse_dt")))
    sigmas = SCHEDULE.sigmas
    assert found == pytest.approx({i: 1 / (sigmas[i] - sigmas[i + 1]) for i in (1, 2)})
    listed = edge_weights(plan, SCHEDULE, recipe([3.0, 0.5, 7.0, 1.0]))
    assert by_step(plan, listed) == {1: 0.5, 2: 7.0}
    assert not listed[[s.index for s in plan.states if not s.trained]].any()
    assert set(by_step(plan, edge_weights(plan, SCHEDULE, recipe("uniform"))).values()) == {1.0}


def test_guards_weight_makes_the_normalised_gradient_flat() -> None:
    """s |dmu/dv| / std / dt = (1 + a^2 / 2) for Flow-SDE below sigma = 1: no step stands out."""
    plan, level = shared_root(TEN, 2), 0.7
    rows = plan.transitions(dynamics="flow", level=level)
    weights = edge_weights(plan, TEN, recipe("inverse_dt", level=level))
    scale = {
        plan.states[s.parent].step: abs(rows[s.index].b) * weights[s.index]
        for s in plan.states
        if s.trained and plan.states[s.parent].step > 0
    }
    assert list(scale.values()) == pytest.approx([1 + level**2 / 2] * len(scale))


def test_scaled_noise_counts_in_std_and_a_window_does_not_move_the_mean() -> None:
    plan = branch_points(SCHEDULE, (1,), 2, noise_scale=4.0)
    asked = recipe("std", dynamics="dance", level=0.3)
    chains, part = shared_root(SCHEDULE, 2), window(SCHEDULE, 3, 2, 1)
    whole = by_step(chains, edge_weights(chains, SCHEDULE, asked))
    found = by_step(plan, edge_weights(plan, SCHEDULE, asked))
    assert found == pytest.approx({**whole, 1: 4 * whole[1]})
    assert by_step(part, edge_weights(part, SCHEDULE, asked)) == pytest.approx({2: whole[2]})


def test_the_trainer_does_what_the_recipe_says(tmp_path, tiny_wan_folder) -> None:
    config = tiny_config(
        tmp_path,
        tiny_wan_folder,
        {
            "loss.timesteps": [0, 2], "loss.timestep_weights": [1, 2, 4],
            "advantage.best_of_n": 2, "advantage.keep": "best",
        },
    )  # fmt: skip
    trainer = Trainer(config, CPU)
    rewards = np.array([[0.1, 0.4, 0.2, 0.9], [0.8, 0.7, 0.1, 0.0]])[..., None]
    advantages = leaf_advantages(rewards, np.ones(1), config.advantage)
    plan = trainer.plan(0)
    (update,) = trainer.schedule_updates(plan, rewards, advantages)
    assert update.divisor == 2 * 2 * 2  # Two prompts, two samples, two steps; no weight enters.
    found = {}
    for call in update.calls:
        for item in call.items:
            for child, parts in zip(item.children, item.advantages, strict=True):
                (leaf,) = (g for g, way in enumerate(plan.leaf_edges) if child in way)
                found[item.prompt, leaf, plan.states[item.state].step] = parts.sum()
    expected = {
        (p, g, step): advantages.values[p, g, 0] * weight
        for p, g in ((0, 1), (0, 3), (1, 0), (1, 1))
        for step, weight in ((0, 1.0), (2, 4.0))
    }
    assert found == pytest.approx(expected)


def test_the_trainer_draws_steps_for_a_group(tmp_path, tiny_wan_folder) -> None:
    overrides = {"loss.timestep_fraction": 0.4, "loss.timestep_scope": "group"}
    config = tiny_config(tmp_path, tiny_wan_folder, overrides)
    trainer = Trainer(config, CPU)
    rewards = np.arange(8.0).reshape(2, 4, 1)
    advantages = leaf_advantages(rewards, np.ones(1), config.advantage)
    steps: set[tuple[int, int]] = set()
    for iteration in range(4):
        trainer.done = iteration
        plan = trainer.plan(iteration)
        (update,) = trainer.schedule_updates(plan, rewards, advantages)
        items = [item for call in update.calls for item in call.items]
        found = {(item.prompt, plan.states[item.state].step) for item in items}
        assert len(found) == 2  # One step a prompt, for all of its four samples.
        steps |= found
    assert len(steps) > 2  # And another in another iteration.
