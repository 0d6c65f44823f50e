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
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dancegrpo_fast.config import UserError
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


def save(folder: Path, snapshot: Snapshot, world: World, keep: int) -> None:
    """Write `folder/iteration-NNNNNN` and remove all but the newest `keep` snapshots."""
    final = folder / f"iteration-{snapshot.iteration:06d}"
    partial = folder / f"{final.name}.partial"
    if world.is_main:
        for stale in (final, partial):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single.*")
        dcp.save(dict(snapshot.tensors), checkpoint_id=str(partial), no_dist=world.size == 1)
    world.barrier()
    if world.is_main:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in sorted(partial.iterdir())
        }
        manifest = {"iteration": snapshot.iteration, "extra": snapshot.extra, "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest))
        partial.rename(final)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


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
