"""Snapshots: all a run needs to go on exactly, at an iteration boundary; and export for users.

Randomness is a pure function of counters, so a snapshot holds weights, optimizer, average, reward
history and the iteration number: no generator states. It is written under a temporary name and
renamed when complete; its manifest holds the size and hash of every file, and a damaged snapshot is
passed over, loudly, for the one before.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dancegrpo_fast.config import CheckpointConfig, UserError
from dancegrpo_fast.parallel.reading import Reader
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.policy import Policy

logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
PATTERN = "iteration-" + "[0-9]" * 6  # Folders of snapshots, and no copies of them.


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


class Collected(dict[str, Tensor]):
    """The tensors of a snapshot by name: loading into them, then `put_back`, restores the run.

    They are views of the live ones, but for what DeepSpeed holds in slices of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writers: list[Callable[[], None]] = []

    def put_back(self) -> None:
        """Copy what was loaded to where it is used, if that is elsewhere; a collective."""
        for write in self.writers:
            write()


def collect(policy: Policy, optimizers: Mapping[str, Any]) -> Collected:
    """The tensors of a snapshot; a collective.

    Args:
        policy: What is trained.
        optimizers: An engine's, by the networks' names.
    """
    tensors = Collected()
    for name, parameter in policy.trainable().items():
        optimizer = optimizers[name.split(".", 1)[0]]
        average = None if policy.ema is None else policy.ema[name]
        if isinstance(optimizer, torch.optim.Optimizer):
            values = _live(optimizer, parameter, average)
            if policy.old is not None:
                values["old"] = policy.old[name]
        else:
            values = optimizer.read(parameter, average)
            tensors.writers.append(partial(optimizer.write, parameter, average, values))
        for key, value in values.items():
            of_all = key in ("weights", "ema", "old")
            tensors[f"{key}.{name}" if of_all else f"optimizer.{name}.{key}"] = value
    return tensors


def _live(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, average: Tensor | None
) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    if not state:  # A module that was never stepped: Adam's state before its first step.
        fused = optimizer.defaults.get("fused")  # Its counter lives beside the weights.
        state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    values = {"weights": parameter.data} | dict(state)
    return values if average is None else values | {"ema": average}


class Saver:
    """Writes snapshots, in the background if the recipe says so.

    All processes write under a temporary name; then the main one writes the manifest, renames the
    folder and removes what is no longer kept, all beside the run. `finish` waits for that, and
    `save` for the one before. All processes call both at the same places.

    Attributes:
        failures: Snapshots that could not be written.
        newest: Iteration of the newest that was written, or that the run went on from; None at
            first. Equal on all processes, which a look at the disk need not be.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.failures = 0
        self.newest: int | None = None
        # Its own group: a snapshot's exchanges must not meet those of the next iteration.
        self._group = world.side_group()
        self._thread = ThreadPoolExecutor(1, "snapshot")
        self._pending: tuple[Snapshot, Path, Future[str]] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write `folder/iteration-NNNNNN`; tensors may change once this returns."""
        self.finish()
        snapshot = replace(snapshot, extra=copy.deepcopy(snapshot.extra))
        temporary = self.folder / f"iteration-{snapshot.iteration:06d}.partial"
        problem = ""
        if self.world.is_main:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        if problem := self._said_anywhere(problem):
            return self._fail(snapshot, temporary, problem)
        options: dict[str, Any] = {"checkpoint_id": str(temporary), "process_group": self._group}
        alone = self.world.size == 1
        written: Any = None
        # Said by the writing thread, too late for a filter around this call.
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single.*")
        try:
            if self.config.background:
                written = dcp.async_save(dict(snapshot.tensors), **options, no_dist=alone)
            else:
                dcp.save(dict(snapshot.tensors), **options, no_dist=alone)
        except (OSError, dcp.CheckpointException) as error:
            problem = _reason(error)
        ending = self._thread.submit(self._end, snapshot, temporary, written, problem)
        self._pending = snapshot, temporary, ending
        if not self.config.background:
            self.finish()

    def finish(self) -> None:
        """Wait for the snapshot that is being written, if any.

        Raises:
            UserError: It could not be written and `checkpoint.on_failure` is stop.
        """
        if self._pending is None:
            return
        snapshot, temporary, ending = self._pending
        self._pending = None
        if problem := ending.result():
            self._fail(snapshot, temporary, problem)
        else:
            self.newest = snapshot.iteration

    def _end(self, snapshot: Snapshot, temporary: Path, written: Any, problem: str) -> str:
        """Wait for the files and make a snapshot of them; what went wrong, on all processes."""
        hashes = torch.zeros(self.world.size, 32, dtype=torch.uint8)
        if not problem:
            try:
                if written is not None:
                    written.result()
                own = self._own_hash(temporary)
                hashes[self.world.rank] = torch.tensor(list(own), dtype=torch.uint8)
            except (OSError, dcp.CheckpointException) as error:
                problem = _reason(error)
        if problem := self._said_anywhere(problem):
            return problem
        if self._group is not None:
            dist.all_reduce(hashes, group=self._group)  # Every row is zero on all but one.
        if self.world.is_main:
            try:
                self._complete(snapshot, hashes, temporary)
            except OSError as error:
                problem = str(error)
        return self._said_anywhere(problem)

    def _own_hash(self, temporary: Path) -> bytes:
        """SHA-256 of what this process wrote, safely on the disk; 32 zeros if it wrote nothing."""
        own = temporary / _file_of(self.world.rank)
        if not own.is_file():
            return bytes(32)
        _flush(own)
        return bytes.fromhex(file_hash(own))

    def _complete(self, snapshot: Snapshot, hashes: Tensor, temporary: Path) -> None:
        known = {_file_of(rank): bytes(row.tolist()).hex() for rank, row in enumerate(hashes)}
        files = {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": known[path.name] if path.name in known else file_hash(path),
            }
            for path in sorted(temporary.iterdir())
        }
        manifest = {"iteration": snapshot.iteration, "extra": snapshot.extra, "files": files}
        text = json.dumps(manifest | {"sha256": _own_digest(manifest)})
        (temporary / _MANIFEST).write_text(text)
        for path in temporary.iterdir():
            if path.name not in known:
                _flush(path)
        _flush(temporary)
        final = temporary.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)  # One of the same iteration, damaged or as good.
        temporary.rename(final)
        _flush(self.folder)
        every = self.config.keep_every
        # Later ones are damaged, or the run would have gone on from them: they count for nothing.
        upto = [p for p in _complete(self.folder) if _iteration_of(p) <= snapshot.iteration]
        passing = [path for path in upto if not every or _iteration_of(path) % every]
        for old in passing[: -self.config.keep]:
            shutil.rmtree(old)

    def _fail(self, snapshot: Snapshot, temporary: Path, problem: str) -> None:
        self.failures += 1
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        saved = [_iteration_of(path) for path in _complete(self.folder)]
        newest = f"the newest snapshot holds {saved[-1]}" if saved else "there is no snapshot"
        message = (
            f"checkpoint: iteration {snapshot.iteration} could not be saved in {self.folder} "
            f"({problem}); {newest}"
        )
        if self.config.on_failure == "stop":
            raise UserError(f"{message}; make room and continue with --resume latest")
        logger.error("%s; the run goes on (checkpoint.on_failure = continue)", message)

    def _said_anywhere(self, mine: str) -> str:
        return _said_anywhere(mine, self.world.size, self._group)


def _said_anywhere(mine: str, size: int, group: dist.ProcessGroup | None = None) -> str:
    """The first process's problem that has one, on all processes."""
    if size == 1:
        return mine
    text = torch.zeros(200, dtype=torch.uint8)
    raw = mine.encode(errors="replace")[:200]
    text[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    parts = [torch.empty_like(text) for _ in range(size)]
    dist.all_gather(parts, text, group=group)
    for rank, part in enumerate(parts):
        if said := bytes(part.tolist()).rstrip(b"\0").decode(errors="replace"):
            return f"process {rank}: {said}"
    return ""


def _file_of(rank: int) -> str:
    """DCP's name of the file that a process writes."""
    return f"__{rank}_0.distcp"


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


def load(folder: Path, tensors: Collected, world: World) -> Snapshot | None:
    """Load the newest undamaged snapshot into `tensors`; None if there is none. A collective."""
    iteration = 10**9
    while (iteration := _newest_before(iteration, folder, world)) >= 0:
        candidate = folder / f"iteration-{iteration:06d}"
        manifest, damage = _check(candidate, world)
        if not damage:
            return _read(candidate, manifest, tensors, world)
        if world.is_main:
            logger.warning("snapshot %s is damaged (%s); trying the one before", candidate, damage)
    return None


def load_one(candidate: Path, tensors: Collected, world: World) -> Snapshot:
    """Load the snapshot that the user named into `tensors`. A collective."""
    manifest, damage = _check(candidate, world)
    if damage:
        raise UserError(
            f"--resume {candidate}: is no usable snapshot ({damage}); name a folder like "
            "RUN/snapshots/iteration-000010, or use --resume latest"
        )
    return _read(candidate, manifest, tensors, world)


def _read(
    candidate: Path, manifest: dict[str, Any], tensors: Collected, world: World
) -> Snapshot:
    reader = Reader(str(candidate))
    metadata = reader.read_metadata().state_dict_metadata
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
        dcp.load(tensors, storage_reader=reader, no_dist=world.size == 1)
    tensors.put_back()
    return Snapshot(manifest["iteration"], tensors, manifest["extra"])


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
    return sorted(path.parent for path in folder.glob(f"{PATTERN}/{_MANIFEST}"))


def _newest_before(iteration: int, folder: Path, world: World) -> int:
    """The main process's view of what there is, on all; -1 is nothing."""
    found = [_iteration_of(path) for path in _complete(folder)] if world.is_main else []
    newest = torch.tensor(max((n for n in found if n < iteration), default=-1))
    world.all_reduce(newest, "max")
    return int(newest)


def _check(candidate: Path, world: World) -> tuple[dict[str, Any], str]:
    """A snapshot's manifest, and what is wrong with its files (or nothing), on all processes.

    Each process reads its share of the files.
    """
    manifest: dict[str, Any] = {}
    damage = ""
    try:
        manifest = json.loads((candidate / _MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _own_digest(manifest):
            damage = f"{_MANIFEST} differs from what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damage = f"{_MANIFEST} cannot be read: {type(error).__name__} {error}"
    if not damage:
        share = list(manifest["files"].items())[world.rank :: world.size]
        damage = next(filter(None, (_damage(candidate / name, e) for name, e in share)), "")
    return manifest, _said_anywhere(damage, world.size)


def _damage(path: Path, expected: Mapping[str, Any]) -> str:
    try:
        same = path.stat().st_size == expected["bytes"] and file_hash(path) == expected["sha256"]
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return "" if same else f"{path.name} differs from what was written"


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
