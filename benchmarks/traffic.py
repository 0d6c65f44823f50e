"""Collectives and bytes of one iteration: ours against the public call pattern, counted.

    python benchmarks/traffic.py [--json PATH]

Starts 4 gloo processes on a tiny Wan and counts every collective of the rollout and of the update,
by group: inside a machine (2 processes here) and between machines. "Received" is what one process
receives: (n - 1) / n of a gathered or reduced buffer, twice that for an all-reduce.

The public pattern is DanceGRPO's (commit of fastvideo/train_grpo_hunyuan.py read for the design):
FULL_SHARD over the whole world; every forward of the rollout gathers all weights, batch 1; every
backward gathers them again and reduces all gradients; no accumulation. Both patterns run the same
code of ours with other settings, and must end with the same weights: that is checked first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from timing import environment, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import tiny_config, tiny_wan  # noqa: E402

from dancegrpo_fast.parallel.world import World, leave  # noqa: E402
from dancegrpo_fast.trainer import Trainer  # noqa: E402

PROCESSES, MACHINE = 4, 2
# One prompt a process, its group as DanceGRPO's FLUX recipe has it, on 8 steps.
COMMON = {
    "data.prompts_per_iteration": PROCESSES, "rollout.group_size": 8, "rollout.steps": 8,
    "loss.timestep_fraction": 0.6, "rollout.tree.kind": "shared_root",
    "optimizer.max_grad_norm": 1e6,
}  # fmt: skip
PATTERNS: dict[str, dict[str, Any]] = {
    "public": {
        "rollout.batch_size": 1, "loss.micro_batch_size": 1, "parallel.gather_rollout": False,
    },
    "ours": {
        "rollout.batch_size": 8, "loss.micro_batch_size": 8,
        "parallel.dp_replicate": PROCESSES // MACHINE,
    },
    "ours, gradients once per update": {
        "rollout.batch_size": 8, "loss.micro_batch_size": 8, "parallel.defer_reduction": True,
        "parallel.dp_replicate": PROCESSES // MACHINE,
    },
}  # fmt: skip
# What FSDP2 and the trainer call, and how much of which argument one process receives.
# (torch 2.13 calls the first two all_gather_single and reduce_scatter_single.)
CALLS = {
    "all_gather_into_tensor": (0, 1.0), "reduce_scatter_tensor": (1, 1.0),
    "all_gather_single": (0, 1.0), "reduce_scatter_single": (1, 1.0), "all_reduce": (0, 2.0),
}  # fmt: skip


class Counts:
    """Collectives and received bytes by (stage, kind, reach)."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.stage = "load"

    def record(self, name: str, arguments: tuple, options: dict) -> None:
        group = options.get("group") or dist.group.WORLD
        ranks = dist.get_process_group_ranks(group)
        machines = {rank // MACHINE for rank in ranks}
        position, factor = CALLS[name]
        if len(ranks) < 2:
            return
        tensor = (*arguments, *options.values())[position]
        size = tensor.numel() * tensor.element_size()
        # Small host values (norms, metrics) are counted apart from weights and gradients.
        kind = "values" if size < 1024 else name.replace("single", "tensor").replace("into_", "")
        key = f"{self.stage}/{kind}/{'between' if len(machines) > 1 else 'inside'}"
        self.calls[key] += 1
        self.bytes[key] += int(size * factor * (len(ranks) - 1) / len(ranks))


def worker(folder: Path) -> None:
    """One of the processes: runs each pattern and writes what it counted."""
    torch.set_num_threads(1)
    results, weights = {}, {}
    for position, (name, pattern) in enumerate(PATTERNS.items()):
        changes = COMMON | pattern
        config = tiny_config(folder / f"{os.environ['RANK']}-{position}", folder / "model", changes)
        world = World.from_environment(config.parallel)
        trainer = Trainer(config, world)
        trainer.engine.optimizers = {
            key: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
            for key, module in trainer.policy.modules.items()
        }
        counts = Counts()
        sample, update = trainer.sample, trainer.update
        trainer.sample = lambda *a, f=sample, c=counts: _in(c, "rollout", f, a)
        trainer.update = lambda *a, f=update, c=counts: _in(c, "update", f, a)
        with _counted(counts):
            trainer.iteration()
        results[name] = {"calls": dict(counts.calls), "received": dict(counts.bytes)}
        weights[name] = {
            key: p.full_tensor().detach().clone() for key, p in trainer.policy.trainable().items()
        }
    first = weights["public"]
    for name, other in weights.items():
        gap = max((first[key] - other[key]).abs().max().item() for key in first)
        assert gap < 1e-5, f"{name}: weights differ from the public pattern's by {gap}"
    if int(os.environ["RANK"]) == 0:
        size = sum(p.numel() * 4 for p in first.values())
        (folder / "result.json").write_text(json.dumps({"parameters": size, "patterns": results}))
    world.close()


def _in(counts: Counts, stage: str, function: Any, arguments: tuple) -> Any:
    before, counts.stage = counts.stage, stage
    result = function(*arguments)
    counts.stage = before
    return result


def _counted(counts: Counts) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    inner = [False]  # One of these may be written in terms of another.
    for name in CALLS:
        original = getattr(dist, name, None)
        if original is None:
            continue

        def call(*arguments: Any, name: str = name, original: Any = original, **options: Any):
            if inner[0]:
                return original(*arguments, **options)
            counts.record(name, arguments, options)
            inner[0] = True
            try:
                return original(*arguments, **options)
            finally:
                inner[0] = False

        stack.enter_context(mock.patch.object(dist, name, call))
    return stack


def summary(result: dict[str, Any]) -> list[str]:
    """The table, a line a pattern and stage."""
    header = f"{'pattern':<34}{'stage':<9}{'gathers':>8}{'reduces':>8}{'all-red.':>9}"
    lines = [header + f"{'inside':>12}{'between':>12}  (bytes received)"]
    for name, found in result["patterns"].items():
        for stage in ("rollout", "update"):
            calls, received = found["calls"], found["received"]

            def count(kind: str, stage: str = stage, calls: Any = calls) -> int:
                return sum(n for key, n in calls.items() if key.startswith(f"{stage}/{kind}/"))

            kinds = ("all_gather_tensor", "reduce_scatter_tensor", "all_reduce")
            row = [count(kind) for kind in kinds]
            total = [
                sum(n for k, n in received.items() if k.startswith(stage) and k.endswith(reach))
                for reach in ("inside", "between")
            ]
            lines.append(
                f"{name:<34}{stage:<9}{row[0]:>8}{row[1]:>8}{row[2]:>9}{total[0]:>12}{total[1]:>12}"
            )
    return lines


def launch(folder: Path) -> dict[str, Any]:
    """Runs the workers; returns what process 0 counted."""
    tiny_wan(folder / "model")
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={PROCESSES}", __file__, "--worker", str(folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(done.stderr[-6000:])
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        leave(0)
    with tempfile.TemporaryDirectory() as folder:
        result = launch(Path(folder))
    print(f"{PROCESSES} processes, {MACHINE} a machine; parameters: {result['parameters']} bytes")
    print("\n".join(summary(result)))
    write_json(arguments.json, {"environment": environment(), **result})


if __name__ == "__main__":
    main()
