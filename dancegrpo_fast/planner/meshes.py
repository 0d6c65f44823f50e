"""The settings of `parallel` that are compared, and what the alternatives to a choice cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dancegrpo_fast.config import ParallelConfig

if TYPE_CHECKING:
    from dancegrpo_fast.planner.estimate import Estimate, Hardware

COMPARED: dict[str, tuple[tuple[str, ...], ...]] = {
    "fsdp": (
        ("dp_replicate", "dp_shard", "sp"),
        ("checkpointing",),
        ("defer_reduction",),
        ("gather_rollout",),
    ),
    "ddp": (("checkpointing",),),
    "deepspeed": (("zero_stage",), ("checkpointing",)),
}
"""Of each engine: fields whose values are compared; those that are changed together."""

_CHECKPOINTING = ("none", "selective", "full")
_ZERO = ("zero_stage", "offload_optimizer")  # Which another engine refuses.


def engines(given: ParallelConfig, hardware: Hardware) -> Iterator[ParallelConfig]:
    """The recipe's engine, and what is tried where nothing of it fits."""
    yield given
    if hardware.gpus > 1 and given.engine != "fsdp":
        default = {name: ParallelConfig.model_fields[name].default for name in _ZERO}
        yield given.model_copy(update={"engine": "fsdp", **default})


def meshes(given: ParallelConfig, hardware: Hardware) -> Iterator[ParallelConfig]:
    """Of the given engine, the settings worth comparing.

    With FSDP these are copies of the weights in whole machines, or one on all GPUs.
    """
    if given.engine == "fsdp":
        yield from _sharded(given, hardware)
        return
    staged = given.engine == "deepspeed" and hardware.gpus > 1
    for stage in (1, 2, 3) if staged else (given.zero_stage,):
        for checkpointing in _CHECKPOINTING:
            yield given.model_copy(update={"zero_stage": stage, "checkpointing": checkpointing})


def _sharded(given: ParallelConfig, hardware: Hardware) -> Iterator[ParallelConfig]:
    if hardware.gpus == 1:
        axes = [(1, 1, 1)]
    else:
        inside = min(hardware.machine, hardware.gpus)
        sizes = {inside * k for k in range(1, hardware.gpus // inside + 1)}
        sizes |= {1, 2, 4, hardware.gpus}
        axes = [
            (hardware.gpus // size, size // sp, sp)
            for size in sorted(sizes)
            if hardware.gpus % size == 0
            for sp in (1, 2, 4, 8)
            if size % sp == 0 and sp <= inside
        ]
    several = hardware.gpus > 1
    for copies, shards, sp in axes:
        for checkpointing in _CHECKPOINTING:
            for defer in (False, True) if several else (False,):
                for gather in (True, False) if several else (True,):
                    yield given.model_copy(
                        update={
                            "dp_replicate": copies, "dp_shard": shards, "sp": sp,
                            "checkpointing": checkpointing, "defer_reduction": defer,
                            "gather_rollout": gather,
                        }
                    )  # fmt: skip


def reasons(best: Estimate, others: Sequence[Estimate], hardware: Hardware) -> Iterator[str]:
    """For each choice, what the alternatives would cost, all else equal."""
    chosen = best.config.parallel
    compared = COMPARED[chosen.engine]
    keys = [name for together in compared for name in together]

    def like(estimate: Estimate, free: tuple[str, ...]) -> bool:
        parallel = estimate.config.parallel
        return all(getattr(parallel, k) == getattr(chosen, k) for k in keys if k not in free)

    for free in compared:
        rivals = [e for e in others if e is not best and like(e, free)]
        if not rivals:
            continue
        fitting = [e for e in rivals if e.fits(hardware)]
        rival = min(fitting or rivals, key=lambda e: e.total)
        need = rival.memory.total(rival.memory.peak)
        name = " ".join(f"{k}={getattr(chosen, k)}" for k in free).lower()
        other = " ".join(f"{k}={getattr(rival.config.parallel, k)}" for k in free).lower()
        theirs, ours = _seconds(rival.total), _seconds(best.total)
        if not fitting:
            yield f"{name}: {other} needs {need / 1e9:.0f} GB in {rival.memory.peak}"
        elif theirs == ours:
            yield f"{name}: {other} takes as long, {ours} s"
        else:
            yield f"{name}: {other} takes {theirs} s instead of {ours} s"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
