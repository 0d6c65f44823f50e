"""What one iteration asks of the networks: states, calls and stored latents of each process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dancegrpo_fast.advantages import (
    RunningRewards,
    best_and_worst,
    edge_advantages,
    leaf_advantages,
)
from dancegrpo_fast.batching import Call, Update, build_updates, leaf_owners, micro_batches
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.models import Family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.roles import Role
from dancegrpo_fast.rollout import forwards_per_step, held_states, plan_iteration
from dancegrpo_fast.tree import TreePlan
from dancegrpo_fast.updating import old_log_prob_mode


@dataclass(frozen=True)
class Work:
    """One iteration of the busiest process (rank 0). Calls are by network.

    A sample's reward is not known ahead: the scores are drawn, every sample is valid.

    Attributes:
        plan: The tree of every prompt.
        rollout: Batch sizes of the forwards of a rollout without gradients.
        agreed: Forwards a rollout makes where every rank must make the same number.
        training: Of each update, the batch sizes of its forwards and backwards.
        recomputed: Batch sizes of the forwards that recompute old log-probs.
        children: Most trained transitions in one forward and backward.
        stored: Latents that are kept to the end of the iteration.
        passing: Most latents that live besides while a level is drawn.
        samples: Samples to decode and score.
    """

    plan: TreePlan
    rollout: dict[str, list[int]]
    agreed: dict[str, int]
    training: tuple[dict[str, list[int]], ...]
    recomputed: dict[str, list[int]]
    children: int
    stored: int
    passing: int
    samples: int


def work_of(config: RunConfig, family: Family, processes: int, sp: int = 1) -> Work:
    """The work of an iteration on a number of processes.

    Raises:
        UserError: The samples cannot be spread over them.
    """
    ranks = processes // sp
    prompts, size = config.data.prompts_per_iteration, config.rollout.group_size
    spread = config.parallel.groups == "spread"
    try:
        plan = plan_iteration(config, family.grid, 0)
        owner = leaf_owners(prompts, size, ranks, spread=spread)
    except ValueError as error:
        raise UserError(str(error)) from error
    modules = family.grid.module_names(plan.schedule)
    leaves = [(int(p), int(g)) for p, g in np.argwhere(owner == 0)]
    held = held_states(plan, leaves)
    rollout, stored, passing = _rollout(plan, held, modules, config.rollout.batch_size)
    steps = forwards_per_step(plan, owner, [0] * prompts, config.rollout.batch_size)
    agreed: Counter[str] = Counter()
    for name, count in zip(modules, steps, strict=True):
        agreed[name] += count
    updates = _updates(config, plan, owner, modules, ranks)
    training = tuple(_batches(update.calls) for update in updates)
    recomputed: dict[str, list[int]] = {}
    if old_log_prob_mode(config) == "recompute":
        for update in training[1:]:
            for name, batches in update.items():
                recomputed.setdefault(name, []).extend(batches)
    most = max((sum(len(i.children) for i in c.items) for u in updates for c in u.calls), default=0)
    return Work(
        plan, rollout, dict(agreed), training, recomputed, most, stored, passing,
        -(-len(leaves) // sp),
    )  # fmt: skip


def _rollout(
    plan: TreePlan, held: dict[int, frozenset[int]], modules: Sequence[str], batch_size: int
) -> tuple[dict[str, list[int]], int, int]:
    """(forwards by network, kept latents, most others) of one process."""
    levels: list[list[int]] = [[] for _ in range(plan.schedule.steps + 1)]
    for own in held.values():
        for state in own:
            levels[plan.states[state].step].append(state)

    def kept(state: int) -> bool:
        kids = plan.children[state]
        return not kids or any(plan.states[s].trained for s in (state, *kids))

    forwards: dict[str, list[int]] = {}
    for step, name in enumerate(modules):
        inner = [s for s in levels[step] if plan.children[s]]
        batches = micro_batches(inner, batch_size, lambda state: 0)
        forwards.setdefault(name, []).extend(len(batch) for batch in batches)
    others = [sum(not kept(s) for s in level) for level in levels]
    pairs = zip(others, [*others[1:], 0], strict=True)
    stored = sum(kept(s) for level in levels for s in level)
    return forwards, stored, max(a + b for a, b in pairs)


def _updates(
    config: RunConfig, plan: TreePlan, owner: np.ndarray, modules: Sequence[str], ranks: int
) -> list[Update]:  # fmt: skip
    prompts, size = owner.shape
    weights = np.array([reward.weight for reward in config.rewards])
    drawn = np.random.default_rng(0).standard_normal((prompts, size, len(weights)))
    running = RunningRewards(config.advantage.running_window)
    advantages = leaf_advantages(
        drawn, weights, config.advantage, prompts=range(prompts), running=running
    )
    selected, edges = advantages.valid, None
    if config.advantage.best_of_n is not None:
        selected = best_and_worst(advantages, config.advantage.best_of_n, config.advantage.keep)
    if config.advantage.credit != "leaf":
        edges, _ = edge_advantages(plan, drawn, weights, config.advantage)
    key = NoiseKey.from_seed(config.seed).fold_in(Role.SELECTION).fold_in(0)  # As the trainer's.
    return build_updates(
        plan, advantages, selected, key=key, modules=modules, rank=0, world_size=ranks,
        owner=owner, updates=config.loss.updates,
        timestep_fraction=config.loss.timestep_fraction,
        timesteps=config.loss.timesteps, timestep_scope=config.loss.timestep_scope,
        micro_batch_size=config.loss.micro_batch_size, edge_values=edges,
    )  # fmt: skip


def _batches(calls: Sequence[Call]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for call in calls:
        found.setdefault(call.module, []).append(len(call.items))
    return found
