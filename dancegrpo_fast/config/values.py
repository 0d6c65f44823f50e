"""Fields that take a name or a list; checked here so that an error is one line about both."""

from __future__ import annotations

import math
from typing import Any

TIMESTEP_WEIGHTS = ("uniform", "std", "inverse_dt")


def check_timesteps(value: Any) -> Any:
    """random, first, or a list of steps."""
    steps = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    if value in ("random", "first") or (steps and value == sorted(set(value)) and value):
        return value
    raise ValueError("must be 'random', 'first' or a list of ascending steps, such as [0, 1, 2]")


def check_timestep_weights(value: Any) -> Any:
    """A rule's name, or a positive number for each trainable step."""
    if isinstance(value, list) and value:
        if all(type(v) in (int, float) and 0 < v < math.inf for v in value):
            return [float(v) for v in value]
    elif value in TIMESTEP_WEIGHTS:
        return value
    names = ", ".join(map(repr, TIMESTEP_WEIGHTS))
    raise ValueError(f"must be {names} or a list of positive numbers, one a trainable step")
