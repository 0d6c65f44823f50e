"""The updates of a tree as an explicit list of transitions.

`explicit_updates` writes the updates that `tree_case.package_updates` makes as one row for every
(sample, trained transition) - or every edge, where the credit rule says so - with the rules taken
from their definitions and nothing shared, summed or batched by state.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tree_case import (  # noqa: F401 -- EXPERTS and LOG_RATIOS for tests that take all from here
    CLIP,
    EXPERTS,
    LOG_RATIOS,
    Case,
    Result,
    clear,
    dyadic,
    explicit_transitions,
    gradient_of,
)
from tree_stand_ins import KEY

from dancegrpo_fast.ops.noise import permutation
from dancegrpo_fast.trees.tree import TreePlan


@dataclass(frozen=True)
class Term:
    """One separately clipped transition: its edge and its advantage per reward column."""

    prompt: int
    edge: int
    values: tuple[float, ...]


def walk(plan: TreePlan, leaf: int) -> list[int]:
    """Child states of the trained edges on the way to a leaf, root first."""
    found = []
    while leaf >= 0:
        found += [leaf] if plan.states[leaf].trained else []
        leaf = plan.states[leaf].parent
    return found[::-1]


def leaves_of(plan: TreePlan) -> list[int]:
    """States that are nobody's parent."""
    parents = {state.parent for state in plan.states}
    return [state.index for state in plan.states if state.index not in parents]


def normalised(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-8) with the unbiased std; 0 where nothing differs or one is left."""
    if len(rewards) < 2 or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (std + 1e-8) for reward in rewards]


def _columns(case: Case, p: int, g: int) -> list[float] | None:
    """What is normalised of one sample, signed so that more is better; None if it failed."""
    used = [(r, w) for r, w in zip(case.rewards[p, g].tolist(), case.weights, strict=True) if w]
    if any(r != r for r, _ in used):
        return None
    if case.combine == "reward":
        return [sum(w * r for r, w in used)]
    return [r if w > 0 else -r for r, w in used]


def _joined(case: Case, normal: Sequence[float], clip: float = 1.2) -> tuple[float, ...]:
    """One transition's advantages, combined and clamped."""
    if case.combine == "advantage":
        used = [abs(w) for w in case.weights if w]
        normal = [sum(w * a for w, a in zip(used, normal, strict=True))]
    return tuple(max(-clip, min(clip, a)) for a in normal)


def _normalise_columns(rows: Mapping[int, list[float]]) -> dict[int, list[float]]:
    """Each column of some members' rewards, normalised over the members."""
    columns = [normalised(column) for column in zip(*rows.values(), strict=True)]
    return {member: [column[i] for column in columns] for i, member in enumerate(rows)}


def leaf_values(case: Case, p: int, clip: float = 1.2) -> dict[int, tuple[float, ...]]:
    """Advantages of the valid samples of a prompt, by leaf position."""
    group = range(len(case.plan.leaves))
    rows = {g: row for g in group if (row := _columns(case, p, g)) is not None}
    return {g: _joined(case, normal, clip) for g, normal in _normalise_columns(rows).items()}


def edge_values(case: Case, p: int) -> dict[int, tuple[float, ...]]:
    """Advantages of the edges of a prompt under `depth` or `siblings`, by child state."""
    plan, below = case.plan, {}
    for g, leaf in enumerate(leaves_of(plan)):
        row = _columns(case, p, g)
        for edge in walk(plan, leaf) if row is not None else ():
            below.setdefault(edge, []).append(row)
    means = {e: [statistics.fmean(c) for c in zip(*rows, strict=True)] for e, rows in below.items()}
    children: dict[int, list[int]] = {}
    for state in plan.states:
        if state.trained:
            children.setdefault(state.parent, []).append(state.index)
    sets: dict[int, dict[int, list[float]]] = {}
    for edge in sorted(means):
        state = plan.states[edge]
        if case.credit == "depth":
            sets.setdefault(state.step, {})[edge] = means[edge]
        elif len(children[state.parent]) > 1:
            sets.setdefault(state.parent, {})[edge] = means[edge]
    normal = {e: row for members in sets.values() for e, row in _normalise_columns(members).items()}
    for edge in sorted(means):
        if edge not in normal:  # An only child: the edge into its parent speaks for it.
            normal[edge] = normal[plan.states[edge].parent]
    return {edge: _joined(case, row) for edge, row in normal.items()}


def kept_edges(case: Case, p: int, g: int) -> list[int]:
    """The trained edges of a sample that its subset of steps holds."""
    plan, key = case.plan, KEY.fold_in(2)
    way = walk(plan, leaves_of(plan)[g])
    if isinstance(case.timesteps, tuple):
        return [edge for edge in way if plan.states[edge].step - 1 in case.timesteps]
    if case.fraction == 1:
        return way
    if case.timesteps == "first":
        return way[: max(1, int(case.fraction * len(way)))]
    if case.scope == "group":
        steps = sorted({s.step for s in plan.states if s.trained})
        order = permutation(len(steps), key.fold_in(2).fold_in(p).draw())
        chosen = {steps[i] for i in order[: max(1, int(case.fraction * len(steps)))]}
        return [edge for edge in way if plan.states[edge].step in chosen]
    order = permutation(len(way), key.fold_in(1).fold_in(p).fold_in(g).draw())
    return [way[i] for i in order[: max(1, int(case.fraction * len(way)))]]


def explicit_terms(case: Case) -> list[list[Term]]:
    """The transitions of every update."""
    plan, key = case.plan, KEY.fold_in(2)
    updates: list[list[Term]] = [[] for _ in range(case.updates)]
    for p in range(case.prompts):
        leaves = leaf_values(case, p)
        weights = [abs(w) for w in case.weights if w] if case.combine == "loss" else [1.0]
        apart = leaf_values(case, p, math.inf)  # Clamped, the best of many would be equal.
        ranked = sorted(
            apart, key=lambda g: sum(w * a for w, a in zip(weights, apart[g], strict=True))
        )
        if case.best_of_n is not None and case.best_of_n < len(ranked):
            half = case.best_of_n // 2
            ranked = ranked[:half] + ranked[-half:]
        chosen = sorted(ranked)
        shuffled = permutation(len(chosen), key.fold_in(0).fold_in(p).draw()).tolist()
        edges = edge_values(case, p) if case.credit != "leaf" else {}
        met: set[int] = set()
        for rank, g in enumerate(chosen):
            way = walk(plan, leaves_of(plan)[g])
            kept = kept_edges(case, p, g)
            for edge in way:
                first = edge not in met
                met.add(edge)
                if edge in kept and (first or case.credit == "leaf"):
                    values = leaves[g] if case.credit == "leaf" else edges[edge]
                    term = Term(p, edge, tuple(dyadic(np.array(values)).tolist()))
                    updates[shuffled.index(rank) % case.updates].append(term)
    return updates


def explicit_losses(case: Case, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Loss [n] of each term before the divisor, and its ratio [n]."""
    edges = [(term.prompt, term.edge) for term in terms]
    log_prob, kl = explicit_transitions(case, edges)
    ratio = torch.exp(log_prob - torch.stack([case.planted[edge] for edge in edges]))
    values = torch.tensor([term.values for term in terms], dtype=torch.float64)
    weights = [abs(w) for w in case.weights if w] if case.combine == "loss" else [1.0]
    total = case.kl_weight * kl
    factor = torch.ones(len(terms), dtype=torch.float64)
    if case.step_weights is not None:
        steps = [case.plan.states[term.edge].step - 1 for term in terms]
        factor = torch.tensor([case.step_weights[step] for step in steps], dtype=torch.float64)
    for column, weight in enumerate(weights):
        gain = values[:, column] * ratio
        clipped = values[:, column] * ratio.clamp(1 - CLIP, 1 + CLIP)
        total = total - factor * weight * torch.minimum(gain, clipped)
    return total, ratio


def explicit_updates(case: Case) -> list[Result]:
    """Every update: the mean of its terms' losses, and its gradient."""
    results = []
    for terms in explicit_terms(case):
        clear(case)
        loss = 0.0
        if terms:
            mean = explicit_losses(case, terms)[0].sum() / len(terms)
            mean.backward()
            loss = float(mean.detach())
        results.append(Result(loss, gradient_of(case), float(len(terms))))
    return results
