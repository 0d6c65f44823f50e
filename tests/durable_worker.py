"""Runs that are stopped, damaged, continued and spoiled, as a process of `torchrun`.

    torchrun --nproc-per-node 2 tests/durable_worker.py resumed MODEL OUT
    torchrun --nproc-per-node 2 tests/durable_worker.py troubled MODEL OUT
    torchrun --nproc-per-node 4 tests/durable_worker.py continued MODEL OUT

`test_durable_runs` looks at what they leave in OUT.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from distributed_worker import _record, one_config, whole_weights

from dancegrpo_fast import rollout
from dancegrpo_fast.config import Interrupted, ParallelConfig, RunConfig, UserError
from dancegrpo_fast.parallel.world import World, leave
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.updating import policy_gradient as updating

LIMIT = 120.0  # A collective that another process never joins fails after this.
COMMON = {
    "policy.ema_decay": 0.9, "loss.updates": 2, "loss.micro_batch_size": 4, "iterations": 4,
    "checkpoint.every": 1, "checkpoint.keep": 9, "parallel.timeout_seconds": LIMIT,
    "rollout.tree.kind": "window", "rollout.tree.window_size": 2,
    "advantage.scope": "running", "advantage.running_window": 20,
}  # fmt: skip
# AdamW's first steps have the size of the learning rate whatever the gradient's: a larger eps keeps
# the rounding of another mesh from becoming a step.
MESH = COMMON | {"policy.train": "lora", "optimizer.eps": 1e-4, "iterations": 2}
KINDS = ("full", "lora")
SIGNALLED = {  # place: (method of the trainer, its call, the newest snapshot then)
    "rollout": ("sample", 2, 1),
    "scoring": ("score", 2, 1),
    "update": ("update", 2, 2),
    "save": ("save", 1, 2),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_number(path: Path) -> None:
    """Still JSON: only a hash of its own shows it."""
    text = path.read_text()
    assert '"ema_updates": 8' in text
    path.write_text(text.replace('"ema_updates": 8', '"ema_updates": 9'))


DAMAGES = {
    "flipped": ("__1_0.distcp", flip),
    "truncated": ("__0_0.distcp", cut),
    "missing": ("__1_0.distcp", Path.unlink),
    "metadata": (".metadata", flip),
    "manifest": ("manifest.json", flip_number),
    "cut_manifest": ("manifest.json", cut),
}


@contextmanager
def fresh_world() -> Iterator[World]:
    """`train` leaves the group at its end: each part of this worker joins anew."""
    world = World.from_environment(ParallelConfig(timeout_seconds=LIMIT))
    try:
        yield world
    finally:
        world.close()


def config_of(folder: Path, model: Path, overrides: dict[str, Any]) -> RunConfig:
    with fresh_world() as world:
        return one_config(folder, model, overrides, world)


@contextmanager
def warnings_said() -> Iterator[list[str]]:
    """What our loggers say at level WARNING and above on this process."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("dancegrpo_fast")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def halves(model: Path, out: Path, kind: str) -> None:
    """Four iterations; and two, a resume, and two."""
    overrides = COMMON | {"policy.train": kind}
    train(config_of(out / f"whole-{kind}", model, overrides))
    train(config_of(out / f"half-{kind}", model, overrides | {"iterations": 2}))
    train(config_of(out / f"half-{kind}", model, overrides), resume=True)


def damaged(model: Path, out: Path) -> dict[str, Any]:
    """What is loaded, and said, when the newest of two snapshots is damaged in each way."""
    config = config_of(out / "damaged", model, COMMON | {"policy.train": "lora"})
    source, target = (out / name / "run" / "snapshots" for name in ("half-lora", "damaged"))
    found: dict[str, Any] = {}
    with fresh_world() as world:
        trainer = Trainer(config, world)
        for name, (file, damage) in DAMAGES.items():
            if world.is_main:
                shutil.rmtree(target, ignore_errors=True)
                for kept in ("iteration-000003", "iteration-000004"):
                    shutil.copytree(source / kept, target / kept)
                damage(target / "iteration-000004" / file)
            world.barrier()
            with warnings_said() as said:
                assert trainer.resume()
            world.barrier()
            found[name] = trainer.done, said
    return found


def stopped(model: Path, out: Path) -> dict[str, Any]:
    """A signal to process 1 alone, at each place: both leave, and the run goes on."""
    found: dict[str, Any] = {}
    for place, (method, at, _) in SIGNALLED.items():
        overrides = COMMON | {"policy.train": "lora", "checkpoint.every": 2}
        config = config_of(out / f"stopped-{place}", model, overrides)
        original, calls = getattr(Trainer, method), []

        def signalled(
            self: Trainer, *arguments: Any, original=original, calls=calls, at=at
        ) -> Any:
            calls.append(1)
            if len(calls) == at and self.world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *arguments)

        with mock.patch.object(Trainer, method, signalled):
            try:
                train(config)
                found[place] = "not interrupted"
            except Interrupted as interrupted:
                found[place] = str(interrupted)
        if place in ("scoring", "update"):
            train(config, resume=True)
    return found


def spoiled(model: Path, out: Path) -> dict[str, Any]:
    """Losses of process 1 alone that are NaN: in the second iteration, then in all."""
    config = config_of(out / "spoiled", model, COMMON | {"policy.train": "lora"})
    found: dict[str, Any] = {"metrics": [], "weights": []}
    loss = updating.policy_gradient_loss
    with fresh_world() as world:
        trainer = Trainer(config, world)

        def nan_here(*arguments: Any, **options: Any) -> Any:
            result = loss(*arguments, **options)
            if world.rank == 1 and trainer.done in (1, 3, 4):
                result.loss.register_hook(lambda gradient: gradient * torch.nan)
            return result

        with mock.patch.object(updating, "policy_gradient_loss", nan_here):
            for _ in range(4):
                found["metrics"].append(trainer.iteration())
                found["weights"].append(whole_weights(trainer))
            try:
                trainer.iteration()
            except UserError as error:
                found["error"] = str(error)
    return found


def continued(folder: Path, model: Path, world: World, source: Path) -> dict[str, Any]:
    """The third iteration of a run that two processes began, on these; what was drawn and came."""
    snapshots = folder / "run" / "snapshots"
    if world.is_main:
        shutil.copytree(source / "run" / "snapshots", snapshots)
    config = one_config(folder, model, MESH, world)
    trainer = Trainer(config, world)
    assert trainer.resume() and trainer.done == 2
    found: dict[str, Any] = {"keys": [], "calls": []}
    _record(trainer, found)
    noise_key = rollout.noise_key

    def recorded_key(base: Any, state: Any, step: int) -> Any:
        key = noise_key(base, state, step)
        found["keys"].append(f"{state.index} {step} {key}")
        return key

    with mock.patch.object(rollout, "noise_key", recorded_key):
        found["metrics"] = trainer.iteration()
    return found


def main(what: str, model: Path, out: Path) -> None:
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    if what == "troubled":
        torch.save(stopped(model, out), out / f"stopped-{rank}.pt")
        torch.save(spoiled(model, out), out / f"spoiled-{rank}.pt")
        return
    if what == "resumed":
        for kind in KINDS:
            halves(model, out, kind)
        torch.save(damaged(model, out), out / f"damaged-{rank}.pt")
        train(config_of(out / "begun", model, MESH))
    with fresh_world() as world:
        found = continued(out / f"continued-{world.size}", model, world, out / "begun")
        torch.save(found, out / f"continued-{world.size}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave(0)
