"""What the trainer asks of a model family, and what families share.

A family is our file for one diffusers model family: it loads a pipeline folder and answers a dozen
questions about it. Latents are canonical [B, C, F, H, W] everywhere outside a family's network
call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import ModelConfig, RolloutConfig, UserError
from dancegrpo_fast.schedules import Schedule, dance_schedule, from_scheduler
from dancegrpo_fast.trajectories import Place
from dancegrpo_fast.tree import TreePlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conditions:
    """What the network is told about P prompts.

    Attributes:
        prompt_embeds: [P, L, D].
        negative_embeds: [1, L, D] of the negative prompt, or None without guidance.
    """

    prompt_embeds: Tensor
    negative_embeds: Tensor | None = None

    def select(self, rows: Sequence[int]) -> Conditions:
        """The conditions of some prompts, repeated as asked."""
        return Conditions(self.prompt_embeds[list(rows)], self.negative_embeds)


class Family(Protocol):
    """One diffusers model family, loaded from a pipeline folder."""

    pipeline: Any
    grid: Grid
    device: torch.device
    guidance: float
    lora_targets: list[str]
    latent_shape: tuple[int, ...]
    action_box: tuple[tuple[int, int], ...] | None

    @property
    def modules(self) -> dict[str, nn.Module]: ...

    def encode(self, prompts: Sequence[str]) -> Conditions: ...

    def velocity(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def draw(
        self, pipeline: Any, prompts: Sequence[str], latents: Tensor, steps: int
    ) -> Tensor: ...

    def stock_pipeline(self, exported: Path | None, train: str) -> Any: ...

    def load_lines(self, exported: Path, train: str, steps: int) -> str: ...


def evaluate(
    family: Family,
    module: nn.Module,
    plan: TreePlan,
    conditions: Conditions,
    places: Sequence[Place],
    latents: Tensor,
) -> Tensor:
    """The network's output at some states: the one call that rollout and training share."""
    steps = [plan.states[state].step for _, state in places]
    # Timesteps stay float32: bfloat16 would turn 954.5 into 956.
    timesteps = torch.tensor([plan.schedule.timesteps[i] for i in steps], dtype=torch.float32)
    return family.velocity(
        module, latents, timesteps.to(latents.device), conditions.select([p for p, _ in places])
    )


@dataclass(frozen=True)
class Grid:
    """Which points a pipeline folder's sampler visits and which network runs there; no weights.

    Attributes:
        scheduler: The folder's diffusers scheduler.
        networks: Names of its networks, high noise first.
        boundary_ratio: Where the second takes over (a share of the training timesteps), or None.
    """

    scheduler: Any
    networks: tuple[str, ...]
    boundary_ratio: float | None = None

    def schedule(self, rollout: RolloutConfig) -> Schedule:
        """The sigma grid of a recipe."""
        if rollout.schedule == "dance":
            assert rollout.shift is not None
            return dance_schedule(rollout.steps, rollout.shift)
        return from_scheduler(self.scheduler, rollout.steps)

    def module_names(self, schedule: Schedule) -> tuple[str, ...]:
        """[steps] name of the network of each step; the boundary is tested on the timestep."""
        if self.boundary_ratio is None:
            return self.networks[:1] * schedule.steps
        boundary = self.boundary_ratio * self.scheduler.config.num_train_timesteps
        return tuple(self.networks[0 if t >= boundary else 1] for t in schedule.timesteps)


def read_grid(config: ModelConfig, networks: tuple[str, ...], *classes: str) -> Grid:
    """Read a pipeline folder's index and scheduler, checked before anything is loaded.

    Args:
        config: Names the folder.
        networks: Names of the networks the family trains, high noise first.
        classes: diffusers pipeline classes the family loads.
    """
    import diffusers

    path = config.path
    file = Path(path) / "model_index.json"
    if not file.is_file():
        state = "has no model_index.json" if Path(path).is_dir() else "does not exist"
        raise UserError(
            f"model.path = {path!r}: this folder {state}; give the folder of a diffusers pipeline "
            "(one written by save_pretrained or a hub download)"
        )
    index = json.loads(file.read_text(encoding="utf-8"))
    if index.get("_class_name") not in classes:
        raise UserError(
            f"model.path = {path!r}: it holds a {index.get('_class_name')}, and model.family = "
            f"{config.family} loads {', '.join(classes)}; choose the matching family"
        )
    scheduler = getattr(diffusers, index["scheduler"][1])
    present = tuple(name for name in networks if index.get(name, [None])[0] is not None)
    return Grid(
        scheduler.from_pretrained(path, subfolder="scheduler", local_files_only=True),
        present,
        index.get("boundary_ratio"),
    )
