"""Snapshots: all a run needs to go on exactly, at an iteration boundary; and export for users.

Randomness is a pure function of counters, so a snapshot holds weights, optimizer, average, reward
history and the iteration number: no generator states. It is written under a temporary name and
renamed when complete; its manifest holds the size and hash of every file, and a damaged snapshot is
passed over, loudly, for the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dancegrpo_fast.config import CheckpointConfig, UserError
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.policy import Policy

logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


@dataclass
class Snapshot:
    """The state of a run after `iteration` iterations.

    Attributes:
        iteration: Iterations done.
        tensors: Weights, average and optimizer state by name; loaded in place.
        extra: JSON values: counters and the reward history.
    """

    iteration: int
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)


def collect(
    policy: Policy, optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The tensors of a snapshot, as views of the live ones (loading into them restores the run)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.trainable().items():
        tensors[f"weights.{name}"] = parameter.data
        state = optimizers[name.split(".", 1)[0]].state[parameter]
        if not state:  # A module that was never stepped: Adam's state before its first step.
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for key, value in state.items():
            tensors[f"optimizer.{name}.{key}"] = value
    for name, value in (policy.ema or {}).items():
        tensors[f"ema.{name}"] = value
    return tensors


class Saver:
    """Writes snapshots, in the background if the recipe says so.

    A snapshot is written under a temporary name by all processes; `finish` waits for it, writes its
    manifest, renames it and removes what is no longer kept. `save` finishes the one before. All
    processes call both at the same places.

    Attributes:
        failures: Snapshots that could not be written.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.failures = 0
        # Its own group: a snapshot's exchanges must not meet those of the next iteration.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[Snapshot, Future[Any] | None, str] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write `folder/iteration-NNNNNN`; tensors may change once this returns."""
        self.finish()
        final = self.folder / f"iteration-{snapshot.iteration:06d}"
        partial = self.folder / f"{final.name}.partial"
        problem = ""
        if self.world.is_main:
            try:
                for stale in (final, partial):
                    shutil.rmtree(stale, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        if problem := self._problem_anywhere(problem):
            self._pending = snapshot, None, problem
            return self.finish()
        options: dict[str, Any] = {"checkpoint_id": str(partial), "process_group": self._group}
        alone = self.world.size == 1
        future: Future[Any] | None = None
        # Said by the writing thread, too late for a filter around this call.
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single.*")
        try:
            if self.config.background:
                future = dcp.async_save(dict(snapshot.tensors), **options, no_dist=alone)
            else:
                dcp.save(dict(snapshot.tensors), **options, no_dist=alone)
        except (OSError, dcp.CheckpointException) as error:
            problem = _reason(error)
        self._pending = snapshot, future, problem
        if not self.config.background:
            self.finish()

    def finish(self) -> None:
        """Wait for the snapshot that is being written, if any.

        Raises:
            UserError: It could not be written and `checkpoint.on_failure` is stop.
        """
        if self._pending is None:
            return
        snapshot, future, problem = self._pending
        self._pending = None
        if future is not None:
            try:
                future.result()
            except (OSError, dcp.CheckpointException) as error:
                problem = _reason(error)
        final = self.folder / f"iteration-{snapshot.iteration:06d}"
        partial = self.folder / f"{final.name}.partial"
        problem = self._problem_anywhere(problem)
        if self.world.is_main and not problem:
            try:
                self._complete(snapshot, partial, final)
            except OSError as error:
                problem = str(error)
        if problem := self._problem_anywhere(problem):
            self._fail(snapshot, partial, problem)

    def _complete(self, snapshot: Snapshot, partial: Path, final: Path) -> None:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in sorted(partial.iterdir())
        }
        manifest = {"iteration": snapshot.iteration, "extra": snapshot.extra, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest))
        for path in partial.iterdir():
            _flush(path)
        partial.rename(final)
        _flush(self.folder)
        every = self.config.keep_every
        passing = [
            path for path in _complete(self.folder) if not every or _iteration_of(path) % every
        ]
        for old in passing[: -self.config.keep]:
            shutil.rmtree(old)

    def _fail(self, snapshot: Snapshot, partial: Path, problem: str) -> None:
        self.failures += 1
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        saved = [_iteration_of(path) for path in _complete(self.folder)]
        newest = f"the newest snapshot holds {saved[-1]}" if saved else "there is no snapshot"
        message = (
            f"checkpoint: iteration {snapshot.iteration} could not be saved in {self.folder} "
            f"({problem}); {newest}"
        )
        if self.config.on_failure == "stop":
            raise UserError(f"{message}; make room and continue with --resume latest")
        logger.error("%s; the run goes on (checkpoint.on_failure = continue)", message)

    def _problem_anywhere(self, mine: str) -> str:
        """The first process's problem that has one, on all processes."""
        if self.world.size == 1:
            return mine
        problems: list[bytes] = [b""] * self.world.size
        text = torch.zeros(200, dtype=torch.uint8)
        raw = mine.encode(errors="replace")[:200]
        text[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        parts = [torch.empty_like(text) for _ in problems]
        dist.all_gather(parts, text, group=self._group)
        for rank, part in enumerate(parts):
            if said := bytes(part.tolist()).rstrip(b"\0").decode(errors="replace"):
                return f"process {rank}: {said}"
        return ""


def _reason(error: BaseException) -> str:
    """One line of what went wrong on this or another process."""
    inner = getattr(error, "failures", None)
    if inner:  # DCP wraps every process's exception.
        error = next(iter(inner.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:180]


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder before it gets its final name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _iteration_of(folder: Path) -> int:
    return int(folder.name.removeprefix("iteration-"))


def load(folder: Path, tensors: dict[str, Tensor], world: World) -> Snapshot | None:
    """Load the newest undamaged snapshot into `tensors`; None if there is none."""
    for candidate in reversed(_complete(folder)):
        manifest, damage = _check(candidate)
        if damage:
            logger.warning("snapshot %s is damaged (%s); trying the one before", candidate, damage)
            continue
        metadata = dcp.FileSystemReader(str(candidate)).read_metadata().state_dict_metadata
        stored = {name: getattr(entry, "size", None) for name, entry in metadata.items()}
        own = {name: tensor.shape for name, tensor in tensors.items()}
        if differing := sorted(n for n in stored | own if stored.get(n) != own.get(n)):
            raise UserError(
                f"--resume: snapshot {candidate} holds other tensors than this configuration "
                f"({differing[0]} and {len(differing) - 1} more differ); resume with the recipe it "
                "was made with, or start in another output folder"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a.*")
            dcp.load(tensors, checkpoint_id=str(candidate), no_dist=world.size == 1)
        return Snapshot(manifest["iteration"], tensors, manifest["extra"])
    return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(folder: Path) -> str:
    """One SHA-256 over the tensors of a folder's safetensors files: names, shapes, types, bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            # Free text, which safetensors writes in an order that differs from run to run.
            header.pop("__metadata__", None)
            tensors = json.dumps(header, sort_keys=True)
            digest.update(f"{path.relative_to(folder)} {tensors}".encode())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"iteration-??????/{_MANIFEST}"))


def _check(candidate: Path) -> tuple[dict[str, Any], str]:
    """A snapshot's manifest, and what is wrong with its files (or nothing)."""
    try:
        manifest = json.loads((candidate / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (ValueError, KeyError) as error:
        return {}, f"{_MANIFEST} cannot be read: {error}"
    for name, expected in files.items():
        path = candidate / name
        if not path.is_file():
            return manifest, f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or file_hash(path) != expected["sha256"]:
            return manifest, f"{name} differs from what was written"
    return manifest, ""
