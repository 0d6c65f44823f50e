"""Counts launches and host syncs of a step on the CPU profiler; as a script, prints the table.

Run: PYTHONPATH=.:tests/integrations python tests/integrations/counting.py
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dancegrpo_fast.ops import autograd

# Leaves that make views or memory: nothing would be launched for them.
_FREE = {
    "aten::" + name
    for name in (
        "_reshape_alias alias as_strided broadcast_tensors detach empty empty_like empty_strided "
        "expand expand_as is_same_size lift_fresh narrow new_empty new_empty_strided permute "
        "reshape resize_ resolve_conj resolve_neg result_type select slice squeeze t to transpose "
        "unbind unflatten unsafe_view unsqueeze view view_as item _local_scalar_dense"
    ).split()
}


class Counts(NamedTuple):
    """Of one call.

    Attributes:
        launches: aten operators that would each launch a kernel on a device.
        fused: Calls of our fused ops (1 or 2 launches each).
        syncs: Values that are read back: on a device each waits for it.
    """

    launches: int
    fused: int
    syncs: int


class _Counted:
    """Kernels that count their calls."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.calls = kernels, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kernels, name)
        if isinstance(found, type):  # Refused
            return found

        def call(*args: Any) -> Any:
            self.calls += 1
            return found(*args)

        return call


def count(call: Callable[[], object]) -> Counts:
    """Counts the second of two calls: the first may build tables."""
    call()
    kernels, threads = autograd.kernels_of("native")
    counted = _Counted(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "kernels_of", lambda name: (counted, threads))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    launches = sum(_launches(event) for event in events)
    syncs = sum(event.name == "aten::_local_scalar_dense" for event in events)
    return Counts(launches, counted.calls, syncs)


def _launches(event: Any) -> bool:
    """A leaf: an operator that calls none that launches."""
    if event.name in _FREE:
        return False
    inside = {child.name for child in event.cpu_children if child.name.startswith("aten::")}
    return inside <= _FREE


def main() -> None:
    """One row per host and call: the host's order of operations, and ours."""
    print("| call | launches before | syncs before | launches after | syncs after |")
    print("|---|---|---|---|---|")
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        calls = getattr(importlib.import_module(path.stem), "CALLS", {})
        for name, make in calls.items():
            before, after = count(make(True)), count(make(False))
            ours = f"{after.launches} + {after.fused} fused"
            print(f"| {name} | {before.launches} | {before.syncs} | {ours} | {after.syncs} |")


if __name__ == "__main__":
    main()
