"""How many states fit in one call: what a budget in tokens comes to where states have one size.

Every sample of a run has the same frames, height and width, and prompts of unequal text lengths
never share a call: a call's tokens are its states times a constant, up to the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models import Family
from dancegrpo_fast.planner.estimate import Estimate, Hardware, Planner

_ALL = 1 << 30  # More states than a process has.
FIELDS = {
    "rollout.batch_size": ("rollout", "decode", "score"),
    "loss.micro_batch_size": ("train",),
}
"""Fields that count states, and the phases whose memory they decide."""


def largest_batches(planner: Planner, estimate: Estimate, hardware: Hardware) -> dict[str, int]:
    """The largest value of each field that fits, on an estimate's mesh; 0 if not even 1 does.

    Each is found with the other as it is, or together where they must be equal
    (`loss.reuse_forwards`); no larger than what a process ever has at once.
    """
    if estimate.config.loss.reuse_forwards:
        return dict.fromkeys(FIELDS, _of_fields(planner, estimate, hardware, tuple(FIELDS)))
    return {field: _of_fields(planner, estimate, hardware, (field,)) for field in FIELDS}


def _of_fields(
    planner: Planner, estimate: Estimate, hardware: Hardware, fields: Sequence[str]
) -> int:
    phases = [phase for field in fields for phase in FIELDS[field]]

    def with_size(size: int) -> RunConfig:
        config = estimate.config
        for section, name in (field.split(".") for field in fields):
            part = getattr(config, section).model_copy(update={name: size})
            config = config.model_copy(update={section: part})
        return config

    def of(config: RunConfig) -> Planner:
        return Planner(config, planner.family, planner.networks, iteration=planner.iteration)

    def fits(size: int) -> bool:
        changed = of(with_size(size))
        memory = changed.estimate(hardware).memory
        return all(memory.total(phase) <= hardware.usable for phase in phases)

    config = with_size(_ALL)
    work = of(config).work(hardware.gpus, config.parallel.sp)
    calls = [work.rollout] if "rollout.batch_size" in fields else work.training
    return _largest(max(size for call in calls for sizes in call.values() for size in sizes), fits)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where all smaller ones do.

    A new size takes seconds to trace, and mostly all fit or few: those are tried first.
    """
    if fits(most):
        return most
    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def image_tokens(family: Family) -> int | None:
    """Of a state; None for a network without tokens (a UNet)."""
    if not family.sequence:
        return None
    pairs = zip(family.latent_shape[1:], family.token_patch(), strict=True)
    return math.prod(size // patch for size, patch in pairs)
