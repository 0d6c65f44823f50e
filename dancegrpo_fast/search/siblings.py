"""Training on what a search visited: the candidates of each searched state as sibling groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dancegrpo_fast.advantages import LeafAdvantages, leaf_advantages
from dancegrpo_fast.config import AdvantageConfig
from dancegrpo_fast.search.sampler import Sampler
from dancegrpo_fast.search.settings import Found
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.tree import TreePlan


def training_trees(
    found: Sequence[Found], sampler: Sampler, *, kl: str = "exact"
) -> tuple[Trajectories, np.ndarray]:
    """The trees of T searches under one plan, as losses read them, and their previews.

    States are renumbered so that those that go on come before their siblings: greedy trees of one
    setting are then equal but for their paths. The plan's paths are the first tree's; the noise is
    drawn, and nothing asks for them again.

    Returns:
        The trajectories, and previews [T, states, R] (NaN where there is none).

    Raises:
        ValueError: Trees of different shapes, or a candidate without a preview.
    """
    orders = [_going_on_first(one.plan) for one in found]
    plans = [_renumbered(one.plan, order) for one, order in zip(found, orders, strict=True)]
    shapes = [[replace(state, path=()) for state in plan.states] for plan in plans]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "found: trees of different shapes (a beam keeps where it likes); hand over one tree at "
            "a time"
        )
    drawn = Trajectories(plans[0], sampler.table(plans[0], kl), [])
    columns = len(next(iter(found[0].scores.values())))
    previews = np.full((len(found), len(plans[0].states), columns), np.nan)
    for t, (one, order) in enumerate(zip(found, orders, strict=True)):
        if any(candidate not in one.previews for group in one.siblings for candidate in group):
            raise ValueError("found: candidates without a preview; search with preview_all = True")
        for new, old in enumerate(order):
            if old in one.latents:
                drawn.latents[t, new] = one.latents[old]
            if old in one.log_prob:
                drawn.log_prob[t, new] = one.log_prob[old]
            if old in one.previews:
                previews[t, new] = one.previews[old]
    drawn.leaves = [(t, g) for t in range(len(found)) for g in range(len(plans[0].leaves))]
    return drawn, previews


def sibling_credit(
    plan: TreePlan, previews: np.ndarray, weights: np.ndarray, config: AdvantageConfig
) -> tuple[LeafAdvantages, np.ndarray]:
    """Advantages among the candidates of each searched state, for `build_updates`.

    A group's rewards are its K previews: one kind of value for all of them, those that went on
    included. A candidate without a score enters no statistic and is not trained, nor is what lies
    below it where it went on all the same; nor is one all of whose own candidates failed.

    Args:
        plan: Of `training_trees`.
        previews: [T, states, R].
        weights: [R].
        config: std, eps, combine, clip and zero_variance.

    Returns:
        What says which leaves are valid, and `edge_values` [T, states, C].

    Raises:
        ValueError: Fewer than 3 candidates, or a scope beyond the group.
    """
    groups = np.array([kids for kids in plan.children if kids and plan.states[kids[0]].trained])
    if groups.size == 0 or groups.shape[1] < 3:
        raise ValueError(
            "width: training needs 3 or more candidates of a searched state; the normalised "
            "advantages of 2 would be +-1 whatever the rewards"
        )
    if config.scope != "group":
        raise ValueError(
            f"advantage.scope = {config.scope!r}: candidates are compared with their siblings; use "
            "'group'"
        )
    trees, count = len(previews), len(plan.states)
    rewards = previews[:, groups]  # [T, groups, K, R]
    found = leaf_advantages(rewards.reshape(-1, *rewards.shape[2:]), weights, config)
    values = np.zeros((trees, count, len(found.weights)))
    values[:, groups] = found.values.reshape(*rewards.shape[:3], -1)
    scored = np.ones((trees, count), dtype=bool)
    scored[:, groups] = found.valid.reshape(rewards.shape[:3])
    valid = np.stack([scored[:, edges].all(axis=1) for edges in plan.leaf_edges], axis=1)
    leaves = np.zeros((*valid.shape, len(found.weights)))
    return LeafAdvantages(leaves, found.weights, valid, found.zero_variance), values


def _going_on_first(plan: TreePlan) -> list[int]:
    """States level by level, parent by parent, those with children before their siblings."""
    order: list[int] = []
    # Initial noise that was given up leads to no transition.
    families = [[s.index for s in plan.states if s.parent < 0 and plan.children[s.index]]]
    while families:
        # Sorting is stable: within each half the order of the paths stays.
        level = [s for kids in families for s in sorted(kids, key=lambda s: not plan.children[s])]
        order += level
        families = [list(plan.children[s]) for s in level if plan.children[s]]
    return order


def _renumbered(plan: TreePlan, order: Sequence[int]) -> TreePlan:
    new = {old: position for position, old in enumerate(order)} | {-1: -1}
    states = (plan.states[old] for old in order)
    return replace(
        plan,
        states=tuple(replace(s, index=new[s.index], parent=new[s.parent]) for s in states),
    )
