"""Samples drawn in parts, as a process of `torchrun`; also failures and signals.

    torchrun --nproc-per-node 2 tests/pool_worker.py MODEL OUT

writes OUT/RANK.pt; `test_pools` reads it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed_worker import one_config, whole_weights
from tiny_models import Bright

from dancegrpo_fast.config import ParallelConfig, UserError
from dancegrpo_fast.parallel.stopping import StopRequested
from dancegrpo_fast.parallel.world import World, leave
from dancegrpo_fast.trainer import Trainer

# Batches of one: then the network's bits do not depend on what is drawn together.
POOL = {
    "rollout.group_size": 6, "rollout.batch_size": 1, "advantage.best_of_n": 2,
    "rollout.steps": 3,
}  # fmt: skip
AGAIN = {"rollout.redraw": True, "rollout.chunk": 2}
# Process 1's samples, the second prompt's, are all failures; or 5 of 2 x 6 go to the first.
FAILED = [[0.1, 0.5, 0.3, 0.2, 0.9, 0.4], [np.nan] * 6]
CASES: dict[str, tuple[dict[str, Any], list[list[float]] | None]] = {
    "ddp": ({"parallel.engine": "ddp"}, None),
    "fsdp": ({}, None),
    "gathering": ({"parallel.gather_rollout": False}, FAILED),
    "sp": ({"parallel.sp": 2}, None),
    # One prompt over both: the best and the worst are process 0's.
    "idle": (
        {"data.prompts_per_iteration": 1, "rollout.chunk": 1},
        [[3.0, -3.0, 0.5, 0.25, 0.5, 0.1]],
    ),
    # Three of process 0's and the last of process 1's, which owes calls that it has no samples for.
    "uneven": (
        {"data.prompts_per_iteration": 1, "rollout.chunk": 1, "advantage.best_of_n": 4,
         "loss.micro_batch_size": 1},
        [[3.0, -3.0, 2.0, 0.1, 0.2, -2.0]],
    ),
    # Kept, and scored in the thread while the next prompt is drawn: parts of 6 and 3 samples.
    "overlap": ({"data.prompts_per_iteration": 3}, None),
}  # fmt: skip


class Remote(Bright):
    """Runs in the thread."""

    remote = True


def versions(changes: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case with everything drawn at once and kept, and in parts."""
    kept = {key: value for key, value in changes.items() if key != "rollout.chunk"}
    if name == "overlap":
        return kept, changes | {"rewards": [{"name": f"{__file__}:Remote"}]}
    return kept, AGAIN | changes


def run(
    folder: Path, model: Path, world: World, changes: dict[str, Any], rewards: Any
) -> dict[str, Any]:
    """Two iterations."""
    trainer = Trainer(one_config(folder, model, POOL | changes, world), world)
    seen: dict[str, Any] = {"rewards": [], "planned": []}
    score, schedule = trainer.score, trainer.schedule_updates

    def recorded_score(*arguments: Any) -> np.ndarray:
        found = score(*arguments)
        if rewards is not None:
            found = 0 * found + np.array(rewards, np.float32)[..., None]
        seen["rewards"].append(found.tolist())
        return found

    def recorded_updates(*arguments: Any) -> Any:
        updates = schedule(*arguments)
        seen["planned"].append(sum(len(update.calls) for update in updates))
        seen["trains"] = any(i.weights.any() for u in updates for c in u.calls for i in c.items)
        return updates

    trainer.score, trainer.schedule_updates = recorded_score, recorded_updates  # type: ignore
    seen["metrics"] = [trainer.iteration() for _ in range(2)]
    return seen | {"weights": whole_weights(trainer), "parts": len(trainer.chunks)}


def failing(folder: Path, model: Path, world: World) -> str:
    """What a process says when 4 of 8 samples fail, all of them process 1's."""
    reward = {"name": f"{Path(__file__).parent / 'tiny_models.py'}:FailsOnFail", "max_failed": 0.4}
    config = one_config(folder, model, {"rewards": [reward]}, world, "a red square\na fail")
    trainer = Trainer(config, world)
    try:
        trainer.iteration()
    except UserError as error:
        return f"{error} [{len(trainer.saved_iterations())}]"
    return "went on"


def stopped(folder: Path, model: Path, world: World) -> tuple[str, int]:
    """(stage, parts begun) where processes stop when process 1 is told so in its second part."""
    trainer = Trainer(one_config(folder, model, POOL | AGAIN, world), world)
    begun, sample = 0, trainer.sample

    def told(*arguments: Any, **named: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == 2 and world.rank == 1:
            trainer.stopping.told_by = "SIGTERM"
        return sample(*arguments, **named)

    trainer.sample = told  # type: ignore[method-assign]
    try:
        trainer.iteration()
    except StopRequested:
        trainer.stopping.settle()
        return trainer.current, begun
    return "went on", begun


def main(model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, (changes, rewards) in CASES.items():
        world = World.from_environment(
            ParallelConfig(timeout_seconds=120.0, sp=changes.get("parallel.sp", 1))
        )
        found[name] = [
            run(out / f"{name}-{number}", model, world, version, rewards)
            for number, version in enumerate(versions(changes, name))
        ]
    world = World.from_environment(ParallelConfig(timeout_seconds=120.0))
    found["failing"] = failing(out / "failing", model, world)
    found["stopped"] = stopped(out / "stopped", model, world)
    torch.save(found, out / f"{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
