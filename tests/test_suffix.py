"""`rollout.suffix_every`: outputs that are held where no trained edge follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CPU, tiny_config, tiny_wan
from tree_stand_ins import BOX, KEY, LEVEL, SCHEDULE, Family, Net, embeddings
from tree_stand_ins import features as network_input

from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.models import open_family
from dancegrpo_fast.planner import Hardware, Planner
from dancegrpo_fast.rollout import (
    carried_in_suffixes,
    draw_trees,
    forwards_per_step,
    held_states,
    plan_iteration,
)
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.trees.tree import (
    TreePlan,
    branch_points,
    shared_root,
    trunk_with_branches,
    window,
)

TREE = "rollout.tree"
ONE_NETWORK = ("net",) * SCHEDULE.steps
PLANS = {
    "window": window(SCHEDULE, 3, 0, 1),
    "later window": window(SCHEDULE, 3, 1, 1, final="ode"),
    "flash": window(SCHEDULE, 3, 0, 2, solver="multistep"),
    "trunk": trunk_with_branches(SCHEDULE, (0, 2), 2, trunks=2),
}


def steps_evaluated(plan: TreePlan, leaf: int) -> list[int]:
    """Steps of a sample's way at which the model is evaluated."""
    way = [plan.states[s] for s in plan.ancestry(plan.leaves[leaf])[:-1]]
    return [state.step for state in way if not state.carried]


def test_which_states_are_evaluated():
    """Five steps. The first state of a suffix is, and each n-th after it."""
    plan = PLANS["window"]  # Trained: step 0; suffix: 1 2 3 4.
    found = {n: carried_in_suffixes(plan, n, ONE_NETWORK) for n in (1, 2, 3, 9)}
    assert found[1] is plan
    assert steps_evaluated(found[2], 0) == [0, 1, 3]
    assert steps_evaluated(found[3], 1) == [0, 1, 4]
    assert steps_evaluated(found[9], 2) == [0, 1]
    # The trunk before the window leads to trained edges: it is evaluated.
    assert steps_evaluated(carried_in_suffixes(PLANS["later window"], 9, ONE_NETWORK), 0) == [
        0, 1, 2,
    ]  # fmt: skip
    # Another network begins anew.
    experts = ("high", "high", "high", "low", "low")
    assert steps_evaluated(carried_in_suffixes(plan, 3, experts), 0) == [0, 1, 3]
    trunk = carried_in_suffixes(PLANS["trunk"], 2, ONE_NETWORK)
    ways = {tuple(steps_evaluated(trunk, leaf)) for leaf in range(len(trunk.leaves))}
    assert ways == {(0, 1, 3), (0, 1, 2, 3)}  # Branches of step 0 and of step 2, each by itself.


@pytest.mark.parametrize("plan", [shared_root(SCHEDULE, 3), branch_points(SCHEDULE, (0,), 3)])
def test_without_two_deterministic_steps_nothing_is_held(plan):
    assert carried_in_suffixes(plan, 9, ONE_NETWORK) == plan


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("tree", PLANS)
def test_the_plan_counts_what_is_evaluated(tree, n):
    plan = carried_in_suffixes(PLANS[tree], n, ONE_NETWORK)
    inner = [s for s in plan.states if plan.children[s.index]]
    cost, whole = plan.cost(), PLANS[tree].cost()
    assert cost.rollout == whole.rollout - sum(s.carried for s in inner) < whole.rollout
    assert (cost.training, cost.rollout_unshared) == (whole.training, whole.rollout_unshared)
    family = Family(ONE_NETWORK, None)
    made: list[int] = []
    drawn = draw(plan, 3, family, progress=made.append)
    assert family.evaluations == 2 * cost.rollout
    assert sum(made) == 2 * len(inner), "the progress bar counts states"
    needed = forwards_per_step(plan, leaf_owners(2, len(plan.leaves), 1), [0, 0], 3)
    assert len(drawn.batches) == sum(needed)


def draw(plan: TreePlan, batch_size: int, family: Any = None, **options: Any) -> Trajectories:
    """The trees of two prompts, network and coefficients in float64."""
    rows = plan.transitions(dynamics="dance", level=LEVEL)
    return draw_trees(
        family or Family(ONE_NETWORK, BOX), {"net": Net(0)}, plan,
        coefficient_table(rows, dtype=torch.float64), embeddings(2), key=KEY,
        owner=leaf_owners(2, len(plan.leaves), 1), rank=0, batch_size=batch_size, **options,
    )  # fmt: skip


@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("tree", PLANS)
def test_samples_change_and_what_is_trained_does_not(tree, n):
    plain = draw(PLANS[tree], 4)
    held = draw(carried_in_suffixes(PLANS[tree], n, ONE_NETWORK), 4)
    assert plain.log_prob.keys() == held.log_prob.keys() and plain.log_prob
    for edge, value in plain.log_prob.items():
        assert torch.equal(value, held.log_prob[edge])
    leaves = {(p, leaf) for p in range(2) for leaf in PLANS[tree].leaves}
    moved = 0
    for place, latents in plain.latents.items():
        if place in leaves:
            moved += int(not torch.equal(latents, held.latents[place]))
        else:
            assert torch.equal(latents, held.latents[place])
    assert moved == len(leaves) if tree != "trunk" else moved > 0
    # Whose output is held is a matter of the path: the batch decides nothing.
    again = draw(carried_in_suffixes(PLANS[tree], n, ONE_NETWORK), 3)
    assert all(torch.equal(held.latents[place], again.latents[place]) for place in leaves)


def test_held_samples_are_those_of_the_formula():
    """x <- a x + b m with m of the last evaluated state, by hand in float64.

    Latents are stored in float32: each of four steps rounds by 1e-7 of numbers of size 1.
    """
    plan = carried_in_suffixes(PLANS["window"], 3, ONE_NETWORK)
    drawn = draw(plan, 4, Family(ONE_NETWORK, None))
    rows = plan.transitions(dynamics="dance", level=LEVEL)
    network = Net(0)
    for p in range(2):
        embeds = embeddings(2).select([p]).positive()["text"]
        for leaf in plan.leaves:
            way = plan.ancestry(leaf)
            x = drawn.latents[p, way[1]].double()  # Behind the trained edge.
            for parent, child in zip(way[1:-1], way[2:], strict=True):
                step = plan.states[parent].step
                if not plan.states[parent].carried:
                    time = torch.tensor([plan.schedule.timesteps[step]])
                    with torch.no_grad():
                        row = network_input(x[None].float(), time, embeds)
                        m = network(row).reshape(x.shape)
                x = rows[child].a * x + rows[child].b * m
            assert (x - drawn.latents[p, leaf]).abs().max() < 2e-6


def test_a_rank_that_holds_only_owes_the_others_calls():
    """Where every rank makes the same number of forwards, one with none repeats a level's batch."""
    plan = carried_in_suffixes(PLANS["trunk"], 2, ONE_NETWORK)
    owner = leaf_owners(1, len(plan.leaves), 4)
    most = forwards_per_step(plan, owner, [0], 2)
    for rank in range(4):
        held = held_states(plan, [(int(p), int(g)) for p, g in np.argwhere(owner == rank)])
        family = Family(ONE_NETWORK, None)
        drawn = draw_trees(
            family, {"net": Net(0)}, plan,
            coefficient_table(plan.transitions(dynamics="dance", level=LEVEL)), embeddings(1),
            key=KEY, owner=owner, rank=rank, batch_size=2, forwards=most,
        )  # fmt: skip
        own = sum(not plan.states[s].carried and bool(plan.children[s]) for s in held[0])
        assert sum(len(batch) for batch in drawn.batches) == own
        assert family.evaluations >= own and len(drawn.batches) <= sum(most)


# ---- whole iterations of the real classes --------------------------------------------------------

RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "window": ({f"{TREE}.kind": "window", f"{TREE}.window_size": 1, f"{TREE}.window_start": 0}, 1),
    "experts": (
        {f"{TREE}.kind": "window", f"{TREE}.window_size": 1, f"{TREE}.window_start": 0}, 2,
    ),
    "trunk": ({f"{TREE}.kind": "trunk_with_branches", f"{TREE}.branches": 2,
               f"{TREE}.branch_steps": [0, 1]}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_an_iteration_with_the_same_rewards_makes_the_same_update(tmp_path, name):
    """Bit for bit: with the samples only the rewards may change."""
    changes, experts = RUNS[name]
    model = tiny_wan(tmp_path / "wan", experts=experts)
    torch.set_num_threads(1)
    weights, samples = [], []
    for n in (1, 2):
        config = tiny_config(
            tmp_path / str(n), model, {"rollout.steps": 6, "rollout.suffix_every": n, **changes}
        )
        trainer = Trainer(config, CPU)
        score = trainer.score

        def scored(drawn: Trajectories, *rest: Any, score: Any = score) -> np.ndarray:
            samples.append(drawn.samples().clone())
            rewards = score(drawn, *rest)
            return np.sin(7 * np.arange(rewards.size, dtype=np.float32)).reshape(rewards.shape)

        trainer.score = scored  # type: ignore[method-assign]
        metrics = trainer.iteration()
        assert metrics["gate/max_gap"] < 1e-5 and metrics["update/grad_norm"] > 0
        weights.append({k: p.detach().clone() for k, p in trainer.policy.trainable().items()})
    assert not torch.equal(*samples)
    for key, weight in weights[0].items():
        assert torch.equal(weight, weights[1][key]), key


def test_every_step_is_the_default(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, RUNS["window"][0])
    plan = plan_iteration(config, Trainer(config, CPU).family.grid, 0)
    assert config.rollout.suffix_every == 1 and not any(s.carried for s in plan.states)


def test_the_planner_projects_what_is_evaluated(tmp_path, tiny_wan_folder):
    """Products of a rollout are proportional to the states that are evaluated."""
    flops, counts = [], []
    for n in (1, 3):
        changes = {"rollout.steps": 6, "rollout.suffix_every": n, **RUNS["window"][0]}
        config = tiny_config(tmp_path / str(n), tiny_wan_folder, changes)
        family = open_family(config.model)
        flops.append(Planner(config, family).estimate(Hardware(1), cuda=False).flops["rollout"])
        counts.append(plan_iteration(config, family.grid, 0).cost().rollout)
    assert counts == [1 + 4 * 5, 1 + 4 * 2]  # Of the suffix' five states the first and the fourth.
    assert flops[1] / flops[0] == pytest.approx(counts[1] / counts[0], rel=1e-6)


WINDOW = {f"{TREE}.kind": "window", f"{TREE}.window_size": 1}
REFUSED = {
    "a stochastic tree": ({}, "rollout.tree.kind"),
    "a window at the end": (
        WINDOW | {f"{TREE}.window_size": 2, f"{TREE}.window_start": 1}, "1 of 4 are left"
    ),
    "a moving one": (WINDOW | {f"{TREE}.window_range": [2, 3]}, "1 of 4 are left"),
    "flash": (WINDOW | {f"{TREE}.window_start": 0, f"{TREE}.flash": 0.5}, "1 of 4 are left"),
    "late branches": (
        {f"{TREE}.kind": "trunk_with_branches", f"{TREE}.branches": 4,
         f"{TREE}.branch_steps": [2]}, "1 of 4 are left",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_hold_nothing_is_refused(tmp_path, name):
    changes, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"rollout.suffix_every = 2: has no effect.*{reason}"):
        tiny_config(tmp_path, tmp_path, {"rollout.suffix_every": 2} | changes)
