"""Windows of trained steps: where one stands in an iteration, and what follows it.

A window's place is a pure function of the iteration: nothing of it is in a snapshot. Source:
MixGRPO and MixGRPO-Flash, arXiv 2507.21802.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dancegrpo_fast.config import RolloutConfig, TreeConfig
from dancegrpo_fast.ops.noise import NoiseKey, randint
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.trees.tree import TreePlan


def window_start(config: RolloutConfig, iteration: int, key: NoiseKey) -> int:
    """First step of the window in an iteration.

    Args:
        config: `tree` has a window_size.
        iteration: Counted from 0.
        key: Window key of the run; `random` draws from it.
    """
    tree = config.tree
    assert tree.window_size is not None
    if tree.window_start is not None:
        return tree.window_start
    end = config.steps if config.train_last else config.steps - 1
    low, high = tree.window_range or (0, end)
    last = high - tree.window_size
    if tree.window_order == "random":
        return randint(low, last + 1, key.fold_in(iteration // tree.window_iterations).draw())
    places = range(low, last + 1, tree.window_stride)
    stays = window_stays(tree, places)
    left = iteration % sum(stays)  # After the last place the window begins anew.
    for place, stay in zip(places, stays, strict=True):
        if left < stay:
            return place
        left -= stay
    raise AssertionError("the remainder is below the sum")


def window_stays(tree: TreeConfig, places: range) -> list[int]:
    """Iterations that an ordered window stays at each of its places.

        progressive   tau
        decaying      from tau at the first place down to 1 at the last, linearly, rounded up
        exponential   ceil(tau exp(-k max(0, place - place_0)))

    with tau = window_iterations, k = window_decay, place_0 = window_decay_from.
    """
    tau, count = tree.window_iterations, len(places)
    if tree.window_order == "decaying":
        # Whole numbers: a float a hair above one would round up a stay too many.
        return [tau - j * (tau - 1) // max(count - 1, 1) for j in range(count)]
    if tree.window_order == "exponential":
        beyond = [max(0, place - tree.window_decay_from) for place in places]
        return [math.ceil(tau * math.exp(-tree.window_decay * steps)) for steps in beyond]
    return [tau] * count


def thinned(schedule: Schedule, first: int, share: float) -> Schedule:
    """A schedule with only a share of its steps from point `first` on, at points of its own.

    int(share x steps) of them (one at least), as evenly as whole points allow; the end stays.
    """
    steps = schedule.steps - first
    if steps == 0:
        return schedule
    count = max(1, int(steps * share))
    points = [*range(first), *(first + (j * steps) // count for j in range(count + 1))]
    return replace(
        schedule,
        sigmas=tuple(schedule.sigmas[i] for i in points),
        timesteps=tuple(schedule.timesteps[i] for i in points[:-1]),
    )


def without_history_across(plan: TreePlan, modules: Sequence[str]) -> TreePlan:
    """The plan whose multistep edges forget what another network (of `modules`) estimated."""
    states = list(plan.states)
    for s in plan.states:
        parent = plan.states[s.parent]
        if s.history and modules[parent.step] != modules[plan.states[parent.parent].step]:
            states[s.index] = replace(s, history=False)
    return replace(plan, states=tuple(states))
