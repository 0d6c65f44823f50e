"""Shared by the tests of the hosts: counts on the CPU profiler, and cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

# Operators that read a value back: on a device each of them waits for it.
SYNCS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero")
# Operators that make views or tell sizes: they launch nothing.
FREE = (
    "aten::view", "aten::reshape", "aten::_reshape_alias", "aten::as_strided", "aten::expand",
    "aten::select", "aten::slice", "aten::unsqueeze", "aten::squeeze", "aten::unbind",
    "aten::detach", "detach", "aten::empty", "aten::empty_like", "aten::empty_strided",
    "aten::resolve_conj", "aten::resolve_neg", "aten::alias", "aten::view_as", "aten::expand_as",
    "aten::lift_fresh", "aten::permute", "aten::t", "aten::transpose", "aten::is_same_size",
    "aten::to", "aten::resize_", "aten::broadcast_tensors", "aten::unsafe_view", "aten::new_empty",
    "aten::new_empty_strided", "aten::result_type", "aten::numpy_T", "aten::unflatten",
)  # fmt: skip


class Counts(NamedTuple):
    """Of one call: operators that would launch a kernel on a device, and reads of values.

    A fused op of ours is no aten operator: `ours` counts its calls.
    """

    launches: int
    syncs: int


def count(call: Callable[[], object]) -> Counts:
    """Counts the second of two calls: the first may build tables."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    outer = [event for event in profile.events() if _is_leaf(event)]
    return Counts(
        sum(event.name not in FREE and event.name not in SYNCS for event in outer),
        sum(event.name == "aten::_local_scalar_dense" for event in profile.events()),
    )


def _is_leaf(event: object) -> bool:
    """An aten operator that calls no other: what a launch of a kernel corresponds to."""
    children = [c for c in event.cpu_children if c.name.startswith("aten::")]  # type: ignore
    children = [c for c in children if c.name not in FREE]
    return event.name.startswith("aten::") and not children  # type: ignore


@pytest.fixture
def counts() -> Callable[[Callable[[], object]], Counts]:
    return count

