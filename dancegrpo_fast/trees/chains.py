"""Trees without a branch, for losses that need no density of the steps.

DiffusionNFT and AWM keep the samples only, and train at points of the grid that they choose;
ReFL and DRaFT differentiate the last steps. Their chains may be deterministic.
"""

from __future__ import annotations

from dataclasses import replace

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.ops.noise import NoiseKey, randint
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.trees.tree import State, TreePlan, independent_roots


def chains(config: RunConfig, schedule: Schedule, iteration: int, key: NoiseKey) -> TreePlan:
    """One chain from its own initial noise for each sample of a prompt.

    `trained` marks the steps that a reward's gradient goes through; with nft and awm none. With
    refl the grid ends at the step where the clean estimate is taken.

    Args:
        config: `rollout` and `loss.kind`.
        schedule: The recipe's whole schedule.
        iteration: Counted from 0.
        key: Gradient key of the run: refl and draft draw their first step from it.
    """
    rollout, kind = config.rollout, config.loss.kind
    begin = schedule.steps
    if kind in ("refl", "draft"):
        begin = gradient_begin(config, iteration, key)
    if kind == "refl":
        schedule = cut_after(schedule, begin)
    last = schedule.steps - 1
    plan = independent_roots(schedule, rollout.group_size, final="sample", train_last=True)

    def edge(state: State) -> State:
        if state.parent < 0:
            return state
        step = plan.states[state.parent].step
        sort = "sde" if rollout.noise_level > 0 else "ode"
        if rollout.solver == "multistep":
            sort = "multistep"
        elif step == last and rollout.final != "sample":
            sort = rollout.final
        history = sort == "multistep" and step > 0
        return replace(state, kind=sort, trained=step >= begin, history=history)

    return replace(plan, states=tuple(edge(state) for state in plan.states))


def gradient_begin(config: RunConfig, iteration: int, key: NoiseKey) -> int:
    """The first step that a reward's gradient goes through in an iteration.

    Published: ReFL takes one of the last quarter of 40 steps; DRaFT-K the last K; AlignProp's
    random truncation any.
    """
    steps = config.rollout.steps
    default = (3 * steps // 4 if config.loss.kind == "refl" else steps - 1, steps)
    first, end = config.loss.gradient_from or default
    return randint(first, end, key.fold_in(iteration).draw())


def cut_after(schedule: Schedule, step: int) -> Schedule:
    """The schedule whose last step begins at point `step` and goes to the end."""
    alphas = schedule.alphas_cumprod
    return replace(
        schedule,
        sigmas=(*schedule.sigmas[: step + 1], schedule.sigmas[-1]),
        timesteps=schedule.timesteps[: step + 1],
        alphas_cumprod=None if alphas is None else (*alphas[: step + 1], alphas[-1]),
    )


def trained_at(plan: TreePlan, span: tuple[int, int] | None) -> TreePlan:
    """The plan with every edge trained that leaves a point of [first, end); None: all points."""
    first, end = span or (0, plan.schedule.steps)
    states = tuple(
        replace(s, trained=s.parent >= 0 and first <= plan.states[s.parent].step < end)
        for s in plan.states
    )
    return replace(plan, states=states)
