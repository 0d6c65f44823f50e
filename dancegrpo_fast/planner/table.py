"""A plan in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dancegrpo_fast.planner.estimate import Estimate, Hardware


def mesh_text(estimate: Estimate) -> str:
    """The mesh as overrides of a recipe."""
    parallel = estimate.config.parallel
    if parallel.engine != "fsdp":
        return f"parallel.engine={parallel.engine} parallel.checkpointing={parallel.checkpointing}"
    shard = "null" if parallel.dp_shard is None else parallel.dp_shard
    return (
        f"parallel.engine=fsdp parallel.dp_replicate={parallel.dp_replicate} "
        f"parallel.dp_shard={shard} parallel.sp={parallel.sp} "
        f"parallel.checkpointing={parallel.checkpointing} "
        f"parallel.defer_reduction={str(parallel.defer_reduction).lower()} "
        f"parallel.gather_rollout={str(parallel.gather_rollout).lower()}"
    )


def plan_lines(estimate: Estimate, hardware: Hardware) -> list[str]:
    """Memory by phase, work, traffic and projected time of the busiest process."""
    memory = estimate.memory
    names = list(dict.fromkeys(name for rows in memory.phases.values() for name in rows))
    width = max(len(name) for name in names) + 2
    lines = [
        f"on {hardware.gpus} GPUs of {hardware.memory / 1e9:g} GB, {hardware.machine} a machine: "
        + mesh_text(estimate),
        "",
        f"{'GB on the busiest GPU':<{width}}" + "".join(f"{phase:>9}" for phase in memory.phases),
    ]
    for name in names:
        row = [memory.phases[phase].get(name) for phase in memory.phases]
        cells = (f"{'':>9}" if v is None else f"{v / 1e9:>9.2f}" for v in row)
        lines.append(f"{name:<{width}}" + "".join(cells))
    totals = "".join(f"{memory.total(phase) / 1e9:>9.2f}" for phase in memory.phases)
    lines.append(f"{'total':<{width}}" + totals)
    need, usable = memory.total(memory.peak) / 1e9, hardware.usable / 1e9
    verdict = "fits" if estimate.fits(hardware) else "DOES NOT FIT"
    lines.append(
        f"peak: {memory.peak}, {need:.2f} GB: {verdict} ({usable:.1f} GB usable, "
        f"{hardware.reserve:.0%} left for the driver, NCCL and fragmentation)"
    )
    if memory.host:
        lines.append(f"host memory beside: {memory.host / 1e9:.2f} GB a process")
    left_out = (*memory.unknown, "activations of the encoders", "evaluation, workspaces of kernels")
    lines += [f"not counted: {text}" for text in left_out]
    lines += ["", *_cost_lines(estimate, hardware)]
    return lines


def _cost_lines(estimate: Estimate, hardware: Hardware) -> list[str]:
    head = f"{'an iteration, projected':<26}{'TFLOP':>12}{'GB received':>13}{'':>14}"
    lines = [f"{head}{'collectives':>13}{'s':>9}"]
    for phase, flops in estimate.flops.items():
        moved = estimate.received.get(phase)
        cells = f"{'':>40}"
        seconds = estimate.seconds[phase]
        if moved is not None:
            where = f"{moved.between / 1e9:.1f} far"
            size = (moved.inside + moved.between) / 1e9
            cells = f"{size:>13.2f}{where:>14}{moved.collectives:>13}"
            seconds += estimate.seconds[f"{phase} transfers"]
        lines.append(f"{phase:<26}{flops / 1e12:>12.1f}{cells}{seconds:>9.1f}")
    products = sum(estimate.flops.values()) / 1e12
    lines.append(f"{'total':<26}{products:>12.1f}{'':>40}{estimate.total:>9.1f}")
    lines.append(
        f"projected at {hardware.efficiency:.0%} of {hardware.peak / 1e12:g} TFLOP/s, "
        f"{hardware.inside / 1e9:g} GB/s inside a machine and {hardware.link / 1e9:g} GB/s "
        "between, transfers not overlapped; without embedding, scoring and saving"
    )
    return lines


def batch_lines(largest: Mapping[str, int], tokens: int | None) -> list[str]:
    """The largest batches that fit, and the image tokens of one call."""
    lines = []
    for field, size in largest.items():
        of_tokens = "" if tokens is None else f", {size} x {tokens} image tokens a call"
        lines.append(f"  {field}={size}{of_tokens}" if size else f"  {field}: not even 1 fits")
    return ["largest batches that fit there (with loss.reuse_forwards both, else either):", *lines]


def plan_values(estimate: Estimate, hardware: Hardware) -> dict[str, Any]:
    """The same for programs: bytes, FLOPs, projected seconds."""
    memory, parallel = estimate.memory, estimate.config.parallel
    keys = (
        "engine", "dp_replicate", "dp_shard", "sp", "checkpointing", "defer_reduction",
        "gather_rollout",
    )  # fmt: skip
    return {
        "hardware": vars(hardware),
        "mesh": {key: getattr(parallel, key) for key in keys},
        "memory": memory.phases,
        "peak": {"phase": memory.peak, "bytes": memory.total(memory.peak)},
        "fits": estimate.fits(hardware),
        "host": memory.host,
        "not_counted": memory.unknown,
        "flops": estimate.flops,
        "received": {phase: vars(moved) for phase, moved in estimate.received.items()},
        "projected_seconds": estimate.seconds,
    }
