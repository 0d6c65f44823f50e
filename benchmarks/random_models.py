"""A trainer of a model of any size with random weights: what it costs, not what it learns.

Configurations stand in benchmarks/sizes; no file of weights, no encoder and no download. The real
classes, engines and loop run; embeddings are random tensors of the right shapes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models import Condition, Conditions, Family
from dancegrpo_fast.models.embeddings import Embeddings
from dancegrpo_fast.models.family import DTYPES
from dancegrpo_fast.models.loading import build
from dancegrpo_fast.models.source import Source
from dancegrpo_fast.ops.noise import NoiseKey, normal
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.placing import assign
from dancegrpo_fast.planner.inputs import condition
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.trainer import Trainer

SIZES = Path(__file__).parent / "sizes"


class Contrast:
    """A cheap reward of every sample: the deviation of its pixels."""

    name = "contrast"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos.flatten(1).std(dim=1).float()


def resized(name: str, folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> Path:
    """A copy of benchmarks/sizes/NAME with other numbers in its components' configurations."""
    shutil.copytree(SIZES / name, folder, dirs_exist_ok=True)
    for component, values in changes.items():
        path = folder / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(values)))
    return folder


def random_trainer(config: RunConfig, world: World) -> Trainer:
    """The trainer of a recipe whose `model.path` holds configurations only."""
    with (
        mock.patch.object(Source, "check", lambda *_: None),
        mock.patch.object(Family, "fill", fill),
    ):
        trainer = Trainer(config, world)
    family: Any = trainer.family
    vae: Any = build(family.source.component_class("vae"), family.source.folder / "vae")
    _randomise(vae, DTYPES[config.model.vae_dtype], torch.device("cpu"))
    if config.model.vae_tiling:
        vae.enable_tiling()
    family._idle["vae"] = vae.eval().requires_grad_(False)
    trainer.embeddings = RandomEmbeddings(family)
    return trainer


class RandomEmbeddings(Embeddings):
    """Conditions of the right shapes, equal for equal prompts."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def conditions(self, prompts: Sequence[Prompt]) -> Conditions:
        """See `Embeddings.conditions`."""
        return Conditions.of([self._row(prompt) for prompt in prompts])

    alone = conditions

    def _row(self, prompt: Prompt) -> Condition:
        key = NoiseKey.from_seed(len(prompt.text))
        flat = condition(self.family).flat()
        drawn = {
            name: normal(tuple(tensor.shape), key.fold_in(i).draw()).to(tensor.dtype)
            for i, (name, tensor) in enumerate(sorted(flat.items()))
        }
        return Condition.from_flat(drawn).to(self.family.device)


def fill(family: Family, name: str, module: nn.Module) -> None:
    """In place of `Family.fill`: random weights, the same on every process."""
    trained = {path for path, p in module.named_parameters() if p.requires_grad}
    exact = set(getattr(module, "_keep_in_fp32_modules", None) or [])
    wide = {p for p in module.state_dict() if p in trained or not exact.isdisjoint(p.split("."))}
    _randomise(module, family.dtype, family.device, wide)


def _randomise(
    module: nn.Module, dtype: torch.dtype, device: torch.device, wide: set[str] = frozenset()  # type: ignore[assignment]
) -> None:
    """Matrices of a deviation that keeps activations at their size, norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(0)
    state = module.state_dict()
    for path, tensor in state.items():
        if ".lora_" in path:
            continue  # Adapters begin as always.
        shape = tuple(tensor.shape)
        if len(shape) > 1:
            value = torch.randn(shape, generator=generator, device=device)
            value *= max(tensor[0].numel(), 1) ** -0.5
        else:
            full = torch.ones if path.endswith("weight") else torch.zeros
            value = full(shape, device=device)
        assign(module, path, value, torch.float32 if path in wide else dtype, device)
    for path, buffer in list(module.named_buffers()):
        if path not in state:
            assign(module, path, buffer, buffer.dtype, device)
