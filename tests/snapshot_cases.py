"""Snapshots of one tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import CPU

from dancegrpo_fast import checkpoint
from dancegrpo_fast.config import CheckpointConfig


def saver(folder: Path, **settings) -> checkpoint.Saver:
    return checkpoint.Saver(folder, CheckpointConfig(**settings), CPU)


def snapshot(iteration: int, value: float = 1.0) -> checkpoint.Snapshot:
    return checkpoint.Snapshot(iteration, {"w": torch.full((1000,), value)}, {"done": iteration})


def loaded(folder: Path) -> tuple[int, float]:
    tensors = checkpoint.Collected()
    tensors["w"] = torch.zeros(1000)
    found = checkpoint.load(folder, tensors, CPU)
    assert found is not None and (tensors["w"] == tensors["w"][0]).all()
    return found.iteration, float(tensors["w"][0])
