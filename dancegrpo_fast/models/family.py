"""What the trainer asks of a model family, and what families share.

A family is our file for one diffusers model family: it loads a pipeline folder and answers a dozen
questions about it. Latents are canonical [B, C, F, H, W] everywhere outside a family's network call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.schedules import Schedule
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
    device: torch.device
    guidance: float
    lora_targets: list[str]
    latent_shape: tuple[int, ...]
    action_box: tuple[tuple[int, int], ...] | None

    @property
    def modules(self) -> dict[str, nn.Module]: ...

    def schedule(self, steps: int) -> Schedule: ...

    def module_names(self, schedule: Schedule) -> tuple[str, ...]: ...

    def encode(self, prompts: Sequence[str]) -> Conditions: ...

    def velocity(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def draw(
        self, pipeline: Any, prompts: Sequence[str], latents: Tensor, steps: int
    ) -> Tensor: ...

    def stock_pipeline(self, exported: Path | None, train: str) -> Any: ...

    def load_lines(self, exported: Path, train: str) -> str: ...


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


def pipeline_folder(path: str, pipeline_classes: Mapping[str, Any]) -> str:
    """The class name of the diffusers pipeline in a folder, checked before anything is loaded."""
    import json

    index = Path(path) / "model_index.json"
    if not index.is_file():
        state = "has no model_index.json" if Path(path).is_dir() else "does not exist"
        raise UserError(
            f"model.path = {path!r}: this folder {state}; give the folder of a diffusers pipeline "
            "(one written by save_pretrained or a hub download)"
        )
    name = json.loads(index.read_text()).get("_class_name")
    if name not in pipeline_classes:
        raise UserError(
            f"model.path = {path!r}: it holds a {name}, and this family loads "
            f"{', '.join(pipeline_classes)}; choose the matching model.family"
        )
    return name
