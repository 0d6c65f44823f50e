"""Rewards: what a sample is worth. One file per kind; your own is `path/to/file.py:ClassName`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.rewards.moving_shape import MovingShape


@runtime_checkable
class Reward(Protocol):
    """Scores samples. Called without gradients, on batches, on the process's device."""

    name: str

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] float32 of videos [B, F, 3, H, W] float32 in [0, 1]; NaN where it failed."""
        ...


@runtime_checkable
class HasParts(Reward, Protocol):
    """A reward that also reports what its score is made of."""

    part_names: tuple[str, ...]

    def parts(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[B, len(part_names)]."""
        ...


REWARDS: dict[str, type[Reward]] = {"moving_shape": MovingShape}


def load_rewards(configs: Sequence[RewardConfig]) -> list[Reward]:
    """The rewards a recipe names.

    Raises:
        UserError: A name that is neither one of ours nor an existing `file.py:ClassName`.
    """
    return [_load(f"rewards.{index}.name", config.name) for index, config in enumerate(configs)]


def _load(field: str, name: str) -> Reward:
    if name in REWARDS:
        return REWARDS[name]()
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(
            f"{field} = {name!r}: no such reward; known: {', '.join(REWARDS)}; your own is "
            "path/to/file.py:ClassName"
        )
    if not Path(path).is_file():
        raise UserError(f"{field} = {name!r}: {path} is not a file; paths count from {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(f"user_reward_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise UserError(f"{field} = {name!r}: {path} defines no {class_name}")
    reward = getattr(module, class_name)()
    if not isinstance(reward, Reward):
        raise UserError(
            f"{field} = {name!r}: {class_name} needs a `name` and `__call__(videos, prompts)`"
        )
    return reward
