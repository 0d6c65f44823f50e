"""What an iteration does besides products: launches, waits, collectives, time in the fused ops."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from iteration_share import OPS, timed
from torch.profiler import ProfilerActivity, profile

from dancegrpo_fast.ops import native
from dancegrpo_fast.profiling import tally

# The kernels of ops/kernels and csrc/noise_cuda.cu, as a trace names them.
FUSED = re.compile(
    r"\b(rollout|copy_outside|residual|log_prob|policy|gradient|nft_sums|nft|flow_rows)_kernel"
    r"|\b(whole|box)_kernel\b"
)


@dataclass
class Counts:
    """Of one iteration, filled when it is over.

    Attributes:
        launches: Of kernels; None without a GPU.
        values: How often the host asked for a tensor's value: on a GPU, each time it waits.
        collectives: Exchanges between processes.
        fused_share: Of the GPU's time; None without a GPU.
    """

    launches: int | None = None
    values: int = 0
    collectives: int = 0
    fused_share: float | None = None


@contextmanager
def counting(device: torch.device) -> Iterator[Counts]:
    """Around an iteration; it is slower meanwhile."""
    counts, cuda = Counts(), device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        yield counts
    events = found.profiler.kineto_results.events()  # Raw: there may be a million.
    told = tally(Counter(event.name() for event in events))
    counts.values, counts.collectives = told.values, sum(told.collectives.values())
    if cuda:
        counts.launches, counts.fused_share = told.launches, _share(events)


def _share(events: list[torch._C._autograd._KinetoEvent]) -> float:
    """Of our kernels in the time of all."""
    seconds: dict[bool, int] = defaultdict(int)
    for event in events:
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation():
            seconds[FUSED.search(event.name()) is not None] += event.duration_ns()
    return seconds[True] / max(sum(seconds.values()), 1)


@contextmanager
def timing_fused(device: torch.device) -> Iterator[dict[str, float]]:
    """Inside, the fused ops' seconds by name are summed up on the CPU; elsewhere none are."""
    seconds: dict[str, float] = defaultdict(float)
    places = [*OPS, (native.module(), "transition_gradient")] if device.type == "cpu" else []
    with ExitStack() as stack:
        for module, name in places:
            call = timed(getattr(module, name), name, seconds)
            stack.enter_context(mock.patch.object(module, name, call))
        yield seconds
