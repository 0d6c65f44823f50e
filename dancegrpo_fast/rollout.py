"""Draw the trees of one iteration: one network evaluation per state, level by level.

A rank draws the states that its own leaves need. Every latent is a function of (seed, iteration,
prompt, path, step), so what one rank draws does not depend on what the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dancegrpo_fast.advantages import check_credit
from dancegrpo_fast.config import RolloutConfig, RunConfig
from dancegrpo_fast.batching import micro_batches
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import DTYPES, Family, evaluate
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.ops import sample_transition
from dancegrpo_fast.ops.noise import DrawKey, NoiseKey, keys_table, normal_batch, randint
from dancegrpo_fast.roles import Role
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.trajectories import Fan, Place, Trajectories
from dancegrpo_fast.tree import (
    ROOT_STEP,
    TreePlan,
    branch_points,
    independent_roots,
    noise_key,
    shared_root,
    trunk_with_branches,
    window,
)


def plan_iteration(config: RunConfig, grid: Grid, iteration: int) -> TreePlan:
    """The tree of every prompt of an iteration, checked against the credit rule."""
    key = NoiseKey.from_seed(config.seed).fold_in(Role.WINDOW).fold_in(iteration).draw()
    plan = plan_trees(config.rollout, grid.schedule(config.rollout), key)
    check_credit(plan, config.advantage.credit)
    return plan


def plan_trees(config: RolloutConfig, schedule: Schedule, key: DrawKey) -> TreePlan:
    """The tree a recipe describes; `key` draws the window's start where it is left open."""
    tree, size = config.tree, config.group_size
    final, train_last = config.final, config.train_last
    match tree.kind:
        case "shared_root":
            return shared_root(schedule, size, final=final, train_last=train_last)
        case "independent_roots":
            return independent_roots(schedule, size, final=final, train_last=train_last)
        case "window":
            assert tree.window_size is not None
            start = tree.window_start
            if start is None:
                end = schedule.steps if config.train_last else schedule.steps - 1
                low, high = tree.window_range or (0, end)
                start = randint(low, high - tree.window_size + 1, key)
            return window(
                schedule, size, start, tree.window_size, final=final, train_last=train_last
            )
        case "branch_points":
            assert tree.branches is not None
            return branch_points(
                schedule, tree.branch_steps, tree.branches, final=final, train_last=train_last
            )
        case "trunk_with_branches":
            assert tree.branches is not None
            return trunk_with_branches(
                schedule, tree.branch_steps, tree.branches,
                trunks=tree.trunks, final=final, train_last=train_last,
            )  # fmt: skip


@torch.no_grad()
def draw_trees(
    family: Family,
    modules: Mapping[str, nn.Module],
    plan: TreePlan,
    coefficients: Tensor,
    conditions: Conditions,
    *,
    key: NoiseKey,
    owner: np.ndarray,
    rank: int,
    batch_size: int,
    latent_dtype: str = "float32",
    progress: Callable[[int], object] = lambda count: None,
) -> Trajectories:
    """Draw this rank's part of P trees.

    Args:
        family: Answers `model_output`, latent shape and action box.
        modules: Networks by name (unwrapped: nothing here needs gradients).
        plan: The tree of every prompt.
        coefficients: [states, 8] of `plan.transitions`, on the device.
        conditions: Of the P prompts.
        key: Latent key of the iteration; the prompt's position is folded in here.
        owner: [P, G] rank of each leaf.
        rank: This process.
        batch_size: States per forward.
        latent_dtype: Storage of latents; the network and the log-prob see the rounded values.
        progress: Called with the number of states after each forward.
    """
    leaves = [(int(p), int(g)) for p, g in np.argwhere(owner == rank)]
    held = held_states(plan, leaves)
    keys = {p: key.fold_in(p) for p in held}
    names = family.grid.module_names(plan.schedule)
    drawn = Trajectories(plan, coefficients, leaves)
    front = _draw_roots(family, plan, held, keys, conditions, DTYPES[latent_dtype])
    for step in range(plan.schedule.steps):
        drawn.keep(front)
        following = {}
        kinds = conditions.kinds
        for batch in micro_batches(sorted(front), batch_size, lambda place: kinds[place[0]]):
            fan = Fan.of(batch, [[c for c in plan.children[s] if c in held[p]] for p, s in batch])
            latents = torch.stack([front[place] for place in batch])
            output = evaluate(family, modules[names[step]], plan, conditions, batch, latents)
            sampled = sample_transition(
                output,
                latents,
                drawn.edge_coefficients(fan.edges),
                keys=keys_table([noise_key(keys[p], plan.states[c], step) for p, c in fan.edges]),
                child_offsets=fan.offsets,
                action_box=family.action_box,
                latent_dtype=DTYPES[latent_dtype],
            )
            for row, edge in enumerate(fan.edges):
                following[edge] = sampled.next_latents[row]
                if plan.states[edge[1]].kind == "sde":
                    drawn.log_prob[edge] = sampled.log_prob[row]
            progress(len(batch))
        front = following
    drawn.keep(front)
    return drawn


def held_states(plan: TreePlan, leaves: list[tuple[int, int]]) -> dict[int, frozenset[int]]:
    """For each prompt, the states that some (prompt, leaf position) pairs need."""
    positions: dict[int, list[int]] = {}
    for p, g in leaves:
        positions.setdefault(p, []).append(g)
    return {p: plan.restricted_to(own) for p, own in positions.items()}


def _draw_roots(
    family: Family,
    plan: TreePlan,
    held: Mapping[int, frozenset[int]],
    keys: Mapping[int, NoiseKey],
    conditions: Conditions,
    dtype: torch.dtype,
) -> dict[Place, Tensor]:
    places = [(p, s) for p in held for s in sorted(held[p]) if plan.states[s].parent < 0]
    draws = keys_table([noise_key(keys[p], plan.states[s], ROOT_STEP) for p, s in places])
    noise = normal_batch(family.latent_shape, draws, dtype=dtype, device=family.device)
    roots = family.begin(noise, conditions.select([p for p, _ in places]))
    return dict(zip(places, roots, strict=True))
