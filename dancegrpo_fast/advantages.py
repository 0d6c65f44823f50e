"""From rewards to advantages: of leaves (samples), and of edges where a rule credits edges.

Every rank holds the same gathered reward array and runs this same host code in float64, so
nothing here communicates. A failed reward is NaN, never a number: the sample is dropped from every
statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dancegrpo_fast.config import AdvantageConfig
from dancegrpo_fast.trees.tree import TreePlan

Array = np.ndarray


@dataclass(frozen=True)
class LeafAdvantages:
    """Advantages of the samples of one iteration.

    Attributes:
        values: [P, G, C] float64, clamped; 0 for invalid samples. C is the number of rewards for
            `combine = loss`, else 1.
        weights: [C] weight of each separately clipped objective, positive.
        valid: [P, G] bool; False where a reward of non-zero weight failed.
        zero_variance: share of groups whose rewards do not differ (they carry no signal).
        ranking: [P, G] what best-of-n ranks by, the weighted sum before the clamp, which would make
            the best of a large group equal; None: the sum of `values`.
    """

    values: Array
    weights: Array
    valid: Array
    zero_variance: float
    ranking: Array | None = None


@dataclass
class RunningRewards:
    """The last rewards of each prompt, for `scope = running` (DDPO's per-prompt statistics).

    `history[prompt]` is [n, R]; statistics come from it once it holds `min_count` samples, or a
    whole smaller window.
    """

    window: int
    min_count: int = 16
    history: dict[int, Array] = field(default_factory=dict)

    def update(self, prompt: int, rewards: Array) -> Array:
        """Append the valid rewards [n, R] of a prompt; returns its history."""
        seen = self.history.get(prompt, rewards[:0])
        self.history[prompt] = np.concatenate([seen, rewards])[-self.window :]
        return self.history[prompt]


def valid_samples(rewards: Array, weights: Array) -> Array:
    """[P, G] bool: every reward of non-zero weight is a finite number."""
    return np.isfinite(rewards[..., weights != 0]).all(axis=-1)


def leaf_advantages(
    rewards: Array,
    weights: Array,
    config: AdvantageConfig,
    *,
    prompts: Sequence[int] = (),
    running: RunningRewards | None = None,
) -> LeafAdvantages:
    """Advantages of P x G samples (DeepSeekMath eq. 3's normalisation, per reward, then combined).

    Args:
        rewards: [P, G, R] with NaN where a reward failed.
        weights: [R]; rewards of weight 0 are only logged.
        config: std, eps, scope, combine, batch_normalise (GDPO, after the sum), clip and
            zero_variance.
        prompts: [P] index of each prompt in the data set, for `scope = running`.
        running: The history, updated in place, for `scope = running`.
    """
    valid = valid_samples(rewards, weights)
    columns, column_weights = _columns(rewards, weights, config.combine)
    columns = np.where(valid[..., None], columns, np.nan)
    values = np.zeros(columns.shape)
    flat = np.zeros(columns.shape[::2], dtype=bool)
    for p in range(columns.shape[0]):
        history = None
        if config.scope == "running":
            assert running is not None
            history = running.update(prompts[p], columns[p][valid[p]])
            if len(history) < min(running.min_count, running.window):
                history = None
        for r in range(columns.shape[2]):
            group, batch = columns[p, :, r], columns[:, :, r]
            mean_of = std_of = group
            if config.scope == "running":
                mean_of = std_of = batch if history is None else history[:, r]
            elif config.scope == "batch":
                mean_of = std_of = batch
            elif config.scope == "batch_std":
                std_of = batch
            values[p, :, r], flat[p, r] = _normalise(group, mean_of, std_of, config)
    values, column_weights = _sum(values, column_weights, config)
    if config.batch_normalise:
        silent = np.asarray(flat.all(axis=1))  # Groups without a spread say nothing.
        used = valid & ~silent[:, None]
        for r in range(len(column_weights)):
            whole = values[used, r]
            values[used, r], _ = _normalise(whole, whole, whole, config)
    ranking, values = values @ column_weights, np.clip(values, -config.clip, config.clip)
    return LeafAdvantages(
        values, column_weights, valid, float(flat.all(axis=1).mean()), ranking
    )


def edge_advantages(
    plan: TreePlan, rewards: Array, weights: Array, config: AdvantageConfig
) -> tuple[Array, Array]:
    """Advantages of the trained edges under `credit = depth` or `siblings`.

    An edge's reward is the mean over the valid leaves below it. `depth` (BranchGRPO) normalises
    over the prompt's trained edges into one step; `siblings` (TempFlow-GRPO) over the trained
    children of one state, and an only child takes the advantage of the edge into its parent.

    Returns:
        values [P, states, C] (0 on untrained edges and edges with no valid leaf) and weights [C].
    """
    valid = valid_samples(rewards, weights)
    columns, column_weights = _columns(rewards, weights, config.combine)
    below = _leaves_below(plan)
    values = np.zeros((columns.shape[0], len(plan.states), columns.shape[2]))
    for p in range(columns.shape[0]):
        edge_rewards = np.full((len(plan.states), columns.shape[2]), np.nan)
        for index, leaves in enumerate(below):
            scored = [leaf for leaf in leaves if valid[p, leaf]]
            if plan.states[index].trained and scored:
                edge_rewards[index] = columns[p, scored].mean(axis=0)
        for members in _credit_sets(plan, config.credit):
            for r in range(columns.shape[2]):
                found = edge_rewards[members, r]
                values[p, members, r], _ = _normalise(found, found, found, config)
        if config.credit == "siblings":
            for state in plan.states:  # Parents come first, so an inherited value is ready.
                if state.trained and _only_child(plan, state.index):
                    values[p, state.index] = values[p, state.parent]
    values, column_weights = _sum(values, column_weights, config)
    return np.clip(values, -config.clip, config.clip), column_weights


def check_credit(plan: TreePlan, rule: str) -> None:
    """Refuse a plan whose edges the `siblings` rule cannot credit."""
    if rule != "siblings":
        return
    for index in range(len(plan.states)):
        kids = [c for c in plan.children[index] if plan.states[c].trained]
        if len(kids) == 2:
            raise ValueError(
                "advantage.credit = siblings: a state has 2 trained children, whose normalised "
                "advantages would be +-1 whatever the rewards; use 3 or more branches, or "
                "credit = leaf"
            )
        if len(kids) == 1 and not plan.states[index].trained:
            raise ValueError(
                "advantage.credit = siblings: the first trained edge of this tree is an only child "
                f"(step {plan.states[index].step}), which has nothing to be compared with; branch "
                "at the first trained step, or use credit = leaf"
            )


def best_and_worst(advantages: LeafAdvantages, count: int, keep: str = "extremes") -> Array:
    """[P, G] bool: `count` valid samples of each group (best-of-n; BranchGRPO's width pruning).

    "extremes": the best half and the worst half of them; "best": the best. Ranked by the weighted
    sum of advantages on the full pool; ties keep canonical order.
    """
    score = advantages.ranking
    if score is None:
        score = advantages.values @ advantages.weights
    selected = np.zeros(score.shape, dtype=bool)
    for p in range(score.shape[0]):
        pool = np.flatnonzero(advantages.valid[p])
        order = pool[np.argsort(score[p, pool], kind="stable")]
        if keep == "best":
            selected[p, order[-count:]] = True
            continue
        half = count // 2
        selected[p, order[:half]] = selected[p, order[-half:]] = True
    return selected


def _columns(rewards: Array, weights: Array, combine: str) -> tuple[Array, Array]:
    """What is normalised, more being better: the weighted sum, or each of non-zero weight."""
    used = rewards[..., weights != 0].astype(np.float64)
    kept = weights[weights != 0].astype(np.float64)
    if combine == "reward":
        return (used @ kept)[..., None], np.ones(1)
    # A weight's sign belongs to its advantage: a negated loss would clip on the wrong sides.
    return used * np.sign(kept), np.abs(kept)


def _sum(values: Array, weights: Array, config: AdvantageConfig) -> tuple[Array, Array]:
    """The weighted sum of the rewards' advantages, or each by itself."""
    if config.combine == "advantage":
        return (values @ weights)[..., None], np.ones(1)
    return values, weights


def _normalise(
    values: Array, mean_of: Array, std_of: Array, config: AdvantageConfig
) -> tuple[Array, bool]:
    """(values - mean) / (std + eps), 0 for NaN; and whether the spread is too small to count."""
    mean_of, std_of = mean_of[np.isfinite(mean_of)], std_of[np.isfinite(std_of)]
    ddof = 1 if config.std == "unbiased" else 0
    if len(std_of) <= ddof or not len(mean_of):
        return np.zeros(values.shape), True
    std = std_of.std(ddof=ddof)
    # Relative to the rewards' size: rounding alone makes equal rewards differ in the last bits.
    if std <= config.zero_variance * np.abs(std_of).max():
        return np.zeros(values.shape), True
    return np.nan_to_num((values - mean_of.mean()) / (std + config.eps)), False


def _leaves_below(plan: TreePlan) -> list[list[int]]:
    """For each state, the positions in `plan.leaves` of the leaves at or below it."""
    below: list[list[int]] = [[] for _ in plan.states]
    for position, leaf in enumerate(plan.leaves):
        for index in plan.ancestry(leaf):
            below[index].append(position)
    return below


def _credit_sets(plan: TreePlan, rule: str) -> list[list[int]]:
    """Edges (by child state) that are compared with each other."""
    groups: dict[int, list[int]] = {}
    for state in plan.states:
        if state.trained and not (rule == "siblings" and _only_child(plan, state.index)):
            key = state.step if rule == "depth" else state.parent
            groups.setdefault(key, []).append(state.index)
    return list(groups.values())


def _only_child(plan: TreePlan, index: int) -> bool:
    siblings = plan.children[plan.states[index].parent]
    return sum(plan.states[child].trained for child in siblings) == 1
