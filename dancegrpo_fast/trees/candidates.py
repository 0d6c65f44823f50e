"""The tree of a greedy search: trunks that go on from the best of their candidates.

A search has two trees. `visited` is what it evaluates, previews and finishes. `trained` is what
training reads of it: the candidates of each searched state are leaves, one sample each, whose
reward is the preview; a copy of the one that went on carries the trunk. A candidate is then worth
its own preview, and no group depends on the groups below it.

Which candidate goes on is known only when it is drawn: in a plan it is child 0, so all prompts of
an iteration share one plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dancegrpo_fast.config import RolloutConfig
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.trees.tree import ROOT_STEP, State, TreePlan


def visited(rollout: RolloutConfig, schedule: Schedule) -> TreePlan:
    """What the searches in one prompt visit: each state with a child is evaluated once."""
    return beside(_one(rollout, schedule), rollout.tree.trunks)


def trained(rollout: RolloutConfig, schedule: Schedule) -> TreePlan:
    """The plan of training; leaf (s K + k) T + j is candidate k at search step s of trunk j."""
    plan, _ = candidates_apart(_one(rollout, schedule))
    return beside(plan, rollout.tree.trunks)


def walk(rollout: RolloutConfig, plan: TreePlan, owner: np.ndarray) -> tuple[TreePlan, np.ndarray]:
    """What is evaluated for the samples of a plan, and the rank of each of its leaves.

    Args:
        rollout: The recipe's; without a search nothing changes.
        plan: Of the iteration.
        owner: [P, G] rank of each sample.

    Raises:
        ValueError: A search whose candidates would be spread over ranks.
    """
    if rollout.tree.kind != "search":
        return plan, owner
    if (owner != owner[:, :1]).any():
        raise ValueError(
            f"data.prompts_per_iteration = {len(owner)}: with rollout.tree.kind = search a process "
            "(with parallel.sp a group of them) searches all trees of a prompt: must be a multiple "
            f"of {owner.max() + 1}, how many there are; change it, or start another number"
        )
    whole = visited(rollout, plan.schedule)
    return whole, np.repeat(owner[:, :1], len(whole.leaves), axis=1)


def _one(rollout: RolloutConfig, schedule: Schedule) -> TreePlan:
    tree = rollout.tree
    assert tree.branches is not None
    return search_tree(schedule, tree.branch_steps, tree.branches, final=rollout.final)


def search_tree(
    schedule: Schedule, steps: Sequence[int], width: int, *, final: str = "x0"
) -> TreePlan:
    """What one greedy search visits: N + S (K - 1) states with a child, S K previews, one sample.

    Args:
        schedule: N steps.
        steps: The S search steps, at which the trunk has candidates.
        width: Candidates (K), trained. The x0 edge out of each leads to its preview.
        final: The last step of the trunk: "x0" or "ode".

    Raises:
        ValueError: Steps without noise or outside the schedule.
    """
    last = schedule.steps - 1
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= last:
        raise ValueError(
            f"branch_steps = {list(steps)}: give ascending steps from 0 to {last - 1}, the last "
            f"stochastic one of a schedule of {schedule.steps}"
        )
    states = [State(0, -1, 0, (), "root")]

    def add(parent: State, step: int, child: int, kind: str, trained: bool = False) -> State:
        path = parent.path + (((parent.step, child),) if child else ())
        states.append(State(len(states), parent.index, step, path, kind, trained))
        return states[-1]

    trunk, candidates = states[0], list[State]()
    for step in range(schedule.steps):
        parent = trunk
        if step in steps:
            following = [add(parent, step + 1, child, "sde", True) for child in range(width)]
        else:
            kind = "x0" if final == "x0" and step == last else "ode"
            following = [add(parent, step + 1, 0, kind)]
        trunk = following[0]
        for candidate in candidates:
            add(candidate, schedule.steps, 0, "x0")
        candidates = following if step in steps else []
    return TreePlan(schedule, tuple(states))


def candidates_apart(plan: TreePlan) -> tuple[TreePlan, list[int]]:
    """A searched tree as it is trained: each trained edge leads to a leaf.

    A candidate that went on to others has a copy behind an untrained edge, which carries these.
    What leads to no trained edge is left out. Level by level, leaves come first: greedy trees of
    one setting are then equal but for their paths, whatever was chosen.

    Returns:
        The plan, and for each of its states the index of the given plan's state.
    """
    leads = [False] * len(plan.states)
    for state in reversed(plan.states):  # Children first.
        if state.parent >= 0 and (state.trained or leads[state.index]):
            leads[state.parent] = True
    states, sources, carrying = list[State](), list[int](), {-1: -1}
    for step in range(plan.schedule.steps + 1):
        level = [s for s in plan.states if s.step == step and s.parent in carrying]
        leaves = [(s, True) for s in level if s.trained]
        going = [(s, False) for s in level if leads[s.index]]
        for s, is_trained in leaves + going:
            if not is_trained:
                carrying[s.index] = len(states)
            parent = carrying[s.parent]
            states.append(replace(s, index=len(states), parent=parent, trained=is_trained))
            sources.append(s.index)
    return replace(plan, states=tuple(states)), sources


def beside(plan: TreePlan, count: int) -> TreePlan:
    """`count` such trees, each from its own initial noise: state i of tree j is i count + j."""

    def moved(state: State, j: int) -> State:
        parent = state.parent * count + j if state.parent >= 0 else -1
        path = ((ROOT_STEP, j), *state.path) if j else state.path
        return replace(state, index=state.index * count + j, parent=parent, path=path)

    states = (moved(state, j) for state in plan.states for j in range(count))
    return replace(plan, states=tuple(states))
