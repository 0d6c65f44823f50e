"""The steps of a plan: which of a sample are trained, what each is worth in the policy term."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.ops.noise import NoiseKey, permutation
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.transitions import Transition, transition
from dancegrpo_fast.trees.tree import TreePlan

_OF_SAMPLES, _OF_GROUPS = 1, 2  # Domains below the selection key; 0 is batching's.


def timestep_subsets(
    plan: TreePlan,
    chosen: np.ndarray,
    key: NoiseKey,
    *,
    fraction: float = 1.0,
    timesteps: str | Sequence[int] = "random",
    scope: str = "sample",
) -> dict[tuple[int, int], frozenset[int]]:
    """Steps that each chosen sample is trained on, out of the trained steps on its way.

    Args:
        plan: The tree of every prompt.
        chosen: [P, G] bool, the samples that are trained.
        key: Selection key of the iteration.
        fraction: Share of the trained steps, rounded down as DanceGRPO does (15 x 0.6 -> 9), but
            never to none.
        timesteps: "random" (DanceGRPO), "first" (its ablation), or the steps themselves.
        scope: "sample": each sample has its own random steps (DanceGRPO); "group": those of a
            prompt share them.
    """
    subsets = {}
    for p, g in np.argwhere(chosen).tolist():
        steps = _steps(plan, plan.leaf_edges[g])
        if not isinstance(timesteps, str):
            steps = [step for step in steps if step in timesteps]
        elif fraction < 1.0 and scope == "group":
            every = _steps(plan, [edge for way in plan.leaf_edges for edge in way])
            drawn = key.fold_in(_OF_GROUPS).fold_in(p).draw()
            kept = [every[i] for i in permutation(len(every), drawn)[: _share(every, fraction)]]
            steps = [step for step in steps if step in kept]
        elif fraction < 1.0:
            order: Sequence[int] = range(len(steps))
            if timesteps == "random":
                drawn = key.fold_in(_OF_SAMPLES).fold_in(p).fold_in(g).draw()
                order = permutation(len(steps), drawn).tolist()
            steps = [steps[i] for i in order[: _share(steps, fraction)]]
        subsets[p, g] = frozenset(steps)
    return subsets


def edge_weights(plan: TreePlan, schedule: Schedule, config: RunConfig) -> np.ndarray:
    """[states] float64 factor of the policy term of each trained edge; 0 elsewhere.

    The factor multiplies the clipped objective, that is the advantage after it was clamped. The
    divisor and the KL do not know of it (TempFlow-GRPO, GRPO-Guard).

        uniform      1
        std          s / mean of s: s is the standard deviation of the edge's noise, the mean runs
                     over the trainable steps of the schedule (TempFlow-GRPO's c s sqrt(dt): c is
                     2.25 for SD3 at 10 steps and level 0.7)
        inverse_dt   1 / (sigma - sigma') (GRPO-Guard)
        a list       its number for the step

    Args:
        plan: The tree of every prompt; it may have re-spaced the steps after its window.
        schedule: The recipe's whole schedule.
        config: The recipe.
    """
    rule, rollout = config.loss.timestep_weights, config.rollout
    weights = np.zeros(len(plan.states))

    def deviation(step: int, noise_scale: float) -> float:
        return transition(
            schedule, step, step + 1, dynamics=rollout.dynamics, kind="sde",
            level=rollout.noise_level, noise_scale=noise_scale,
        ).s  # fmt: skip

    trainable = schedule.steps if rollout.train_last else schedule.steps - 1
    mean = 1.0
    if rule == "std":
        mean = float(np.mean([deviation(step, 1.0) for step in range(trainable)]))
    for state in plan.states:
        if not state.trained:
            continue
        step = plan.states[state.parent].step
        if rule == "uniform":
            weights[state.index] = 1.0
        elif rule == "std":
            weights[state.index] = deviation(step, state.noise_scale) / mean
        elif rule == "inverse_dt":
            weights[state.index] = 1.0 / (schedule.sigmas[step] - schedule.sigmas[step + 1])
        else:
            weights[state.index] = rule[step]
    return weights


def transitions_of(plan: TreePlan, config: RunConfig) -> tuple[Transition, ...]:
    """[states] transition of the edge into each state of a recipe's plan."""
    rollout = config.rollout
    return plan.transitions(
        dynamics=rollout.dynamics, level=rollout.noise_level, kl=config.loss.kl,
        exact_density=rollout.exact_density,
    )  # fmt: skip


def check_noise(plan: TreePlan, config: RunConfig) -> None:
    """Refuse steps that a model's grid leaves undefined, and to train one that adds no noise."""
    dynamics = config.rollout.dynamics
    try:
        rows = transitions_of(plan, config)
    except ValueError as error:
        raise ValueError(
            f"rollout.dynamics = {dynamics!r}: not with this model's schedule of "
            f"{plan.schedule.steps} steps: {error}; use other dynamics or another number of steps"
        ) from error
    for state, row in zip(plan.states, rows, strict=True):
        if state.trained and row.s == 0 and config.loss.kind == "policy_gradient":
            raise ValueError(
                f"rollout.dynamics = {dynamics!r}: step {plan.states[state.parent].step} of this "
                f"model's schedule of {plan.schedule.steps} adds no noise, so it has no density to "
                "train; use rollout.train_last = false, or another number of steps"
            )


def _steps(plan: TreePlan, edges: Sequence[int]) -> list[int]:
    """Steps at which some edges begin, ascending."""
    return sorted({plan.states[plan.states[edge].parent].step for edge in edges})


def _share(steps: Sequence[int], fraction: float) -> int:
    return max(1, int(len(steps) * fraction))
