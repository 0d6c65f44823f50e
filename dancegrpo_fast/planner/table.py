"""A plan in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dancegrpo_fast.config import ParallelConfig
from dancegrpo_fast.planner.estimate import Estimate, Hardware
from dancegrpo_fast.planner.meshes import COMPARED


def mesh_text(estimate: Estimate, given: ParallelConfig | None = None) -> str:
    """The mesh as overrides of a recipe.

    Args:
        estimate: On the mesh.
        given: The recipe's settings; what else differs from them is set, too.
    """
    parallel = estimate.config.parallel
    names = ["engine", *(name for together in COMPARED[parallel.engine] for name in together)]
    if parallel.sp > 1 and "sp" not in names:
        names.append("sp")
    if given is not None:
        other = (name for name in ParallelConfig.model_fields if name not in names)
        names += [name for name in other if getattr(parallel, name) != getattr(given, name)]
    values = ((name, getattr(parallel, name)) for name in names)
    texts = {None: "null", True: "true", False: "false"}
    return " ".join(
        f"parallel.{name}={texts[v] if v is None or isinstance(v, bool) else v}"
        for name, v in values
    )


def compared_text(estimate: Estimate, given: ParallelConfig) -> str:
    """What a recommended mesh was compared with, for a recipe's settings."""
    engine = estimate.config.parallel.engine
    fields = ", ".join(name for together in COMPARED[engine] for name in together)
    if engine == given.engine:
        return f"compared: engine {engine}, the recipe's, with values of {fields}"
    return (
        f"compared: engine {given.engine}, the recipe's, of which nothing fits, and {engine} with "
        f"values of {fields}"
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


def batch_lines(
    largest: Mapping[str, int], tokens: int | None, *, compared: bool = False
) -> list[str]:
    """The largest batches that fit, and the image tokens of one call.

    Args:
        largest: By field.
        tokens: Of a state.
        compared: Log-probs of the rollout's batches are compared with those of training's.
    """
    lines = []
    for field, size in largest.items():
        of_tokens = "" if tokens is None else f", {size} x {tokens} image tokens a call"
        lines.append(f"  {field}={size}{of_tokens}" if size else f"  {field}: not even 1 fits")
    if compared:
        lines.append(
            "  (loss.old_log_prob = rollout: in batches of more than 1 ratios begin at 1 only up "
            "to rounding; watch gate/max_gap)"
        )
    return ["largest batches that fit there (with loss.reuse_forwards both, else either):", *lines]


def plan_values(estimate: Estimate, hardware: Hardware) -> dict[str, Any]:
    """The same for programs: bytes, FLOPs, projected seconds."""
    memory, parallel = estimate.memory, estimate.config.parallel
    keys = (
        "engine", "dp_replicate", "dp_shard", "sp", "checkpointing", "defer_reduction",
        "gather_rollout", "zero_stage", "offload_optimizer",
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
