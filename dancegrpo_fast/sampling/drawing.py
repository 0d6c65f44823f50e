"""Draw one rank's part of an iteration: the trees of the plan, or searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from tqdm import tqdm

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models import Conditions, Family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.parallel.engine import Engine
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.rollout import draw_trees, forwards_per_step, held_states, steps_kept
from dancegrpo_fast.sampling.searching import SearchScoring, draw_searches, searches
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.trees.candidates import walk
from dancegrpo_fast.trees.timesteps import transitions_of
from dancegrpo_fast.trees.tree import TreePlan


def draw_part(
    config: RunConfig,
    family: Family,
    engine: Engine,
    world: World,
    plan: TreePlan,
    conditions: Conditions,
    owner: np.ndarray,
    *,
    key: NoiseKey,
    searching: SearchScoring | None,
    keep: Literal["all", "samples", "training"],
    keep_outputs: bool,
    keep_graphs: bool,
    bar: Callable[[int], tqdm],
    at_step: Callable[[], object],
) -> Trajectories:
    """Draw this rank's samples.

    Args:
        config: The recipe.
        family: Draws.
        engine: Holds the networks.
        world: This process.
        plan: The tree of every prompt.
        conditions: Of the prompts.
        owner: [P, G] rank that draws each sample, -1 if none does.
        key: Latent key of the iteration.
        searching: Makes the scores of a search; other samples are scored when they are drawn.
        keep: What is stored, see `rollout.draw_trees`; a search keeps what training reads.
        keep_outputs: As there.
        keep_graphs: As there.
        bar: A progress bar over a number of states.
        at_step: Called before each denoising step.
    """
    rollout, rank = config.rollout, world.data_rank
    walked, table = walk(rollout, plan, owner)
    held = held_states(walked, [(int(p), int(g)) for p, g in np.argwhere(table == rank)])
    steps = steps_kept(walked, keep)
    count = sum(walked.states[s].step < steps for own in held.values() for s in own)
    forwards = None
    if engine.rollout_calls_agree:
        forwards = forwards_per_step(walked, table, conditions.kinds, rollout.batch_size)
    networks = engine.by_forward() if forwards else engine.gathered()
    with bar(count) as shown, networks as modules:
        if searches(config):
            assert searching is not None

            def before_step(states: int) -> None:
                at_step()
                shown.update(states)

            return draw_searches(
                config, family, modules, plan, conditions, searching,
                key=key, prompts=sorted(held), forwards=forwards, before_step=before_step,
            )  # fmt: skip
        return draw_trees(
            family,
            modules,
            plan,
            coefficient_table(transitions_of(plan, config), device=world.device),
            conditions,
            key=key,
            owner=owner,
            rank=rank,
            batch_size=rollout.batch_size,
            latent_dtype=rollout.latent_dtype,
            keep=keep,
            keep_outputs=keep_outputs,
            keep_graphs=keep_graphs,
            offload=rollout.offload,
            forwards=forwards,
            progress=shown.update,
            at_step=at_step,
        )
