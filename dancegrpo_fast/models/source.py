"""A diffusers pipeline folder, read without its weights: its index, configurations and grid."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dancegrpo_fast.config import ModelConfig, RolloutConfig, UserError
from dancegrpo_fast.schedules import Schedule, dance_schedule, from_scheduler


@dataclass(frozen=True)
class Source:
    """A pipeline folder.

    Attributes:
        folder: Where it is.
        index: Its `model_index.json`.
    """

    folder: Path
    index: dict[str, Any]

    @classmethod
    def of(cls, config: ModelConfig, pipelines: tuple[str, ...]) -> Source:
        """Read a pipeline folder's index, checked before anything is loaded.

        Args:
            config: Names the folder.
            pipelines: diffusers pipeline classes the family loads.
        """
        folder = Path(config.path)
        file = folder / "model_index.json"
        if not file.is_file():
            state = "has no model_index.json" if folder.is_dir() else "does not exist"
            raise UserError(
                f"model.path = {config.path!r}: this folder {state}; give the folder of a "
                "diffusers pipeline (one written by save_pretrained or a hub download)"
            )
        index = json.loads(file.read_text(encoding="utf-8"))
        if index.get("_class_name") not in pipelines:
            raise UserError(
                f"model.path = {config.path!r}: it holds a {index.get('_class_name')}, and "
                f"model.family = {config.family} loads {', '.join(pipelines)}; choose the matching "
                "family"
            )
        return cls(folder, index)

    @property
    def pipeline_class(self) -> Any:
        """The diffusers class of the folder."""
        import diffusers

        return getattr(diffusers, self.index["_class_name"])

    def has(self, component: str) -> bool:
        """Whether the folder holds a component."""
        return bool(self.index.get(component, [None])[0])

    def component_class(self, component: str) -> Any:
        """The diffusers or transformers class of a component."""
        import importlib

        library, name = self.index[component]
        return getattr(importlib.import_module(library), name)

    def config(self, component: str) -> dict[str, Any]:
        """The `config.json` of a component, with its class's defaults for what is absent."""
        path = self.folder / component / "config.json"
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {**_defaults(self.component_class(component)), **stored}

    def scheduler(self) -> Any:
        """The folder's diffusers scheduler."""
        cls = self.component_class("scheduler")
        return cls.from_pretrained(self.folder, subfolder="scheduler", local_files_only=True)


def _defaults(cls: Any) -> dict[str, Any]:
    import inspect

    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@dataclass(frozen=True)
class Grid:
    """Which points a pipeline's sampler visits and which network runs there; no weights.

    Attributes:
        scheduler: The folder's diffusers scheduler.
        networks: Names of its networks, high noise first.
        boundary_ratio: Where the second takes over (a share of the training timesteps), or None.
        mu: Resolution-dependent shift its pipeline passes, or None.
        unshifted: "scheduler" where the pipeline leaves the unshifted sigmas to the scheduler,
            "1/T" where it passes linspace(1, 1/T, T) (FLUX, Qwen-Image), "0" where it passes
            linspace(1, 0, T + 1) without the end (HunyuanVideo).
    """

    scheduler: Any
    networks: tuple[str, ...]
    boundary_ratio: float | None = None
    mu: float | None = None
    unshifted: str = "scheduler"

    def schedule(self, rollout: RolloutConfig) -> Schedule:
        """The sigma grid of a recipe."""
        if rollout.schedule == "dance":
            assert rollout.shift is not None
            return dance_schedule(rollout.steps, rollout.shift)
        count = rollout.steps
        sigmas = {
            "scheduler": None,
            "1/T": np.linspace(1.0, 1 / count, count).tolist(),
            "0": np.linspace(1.0, 0.0, count + 1)[:-1].tolist(),
        }[self.unshifted]
        return from_scheduler(self.scheduler, count, self.mu, sigmas=sigmas)

    def module_names(self, schedule: Schedule) -> tuple[str, ...]:
        """[steps] name of the network of each step; the boundary is tested on the timestep."""
        if self.boundary_ratio is None:
            return self.networks[:1] * schedule.steps
        boundary = self.boundary_ratio * self.scheduler.config.num_train_timesteps
        return tuple(self.networks[0 if t >= boundary else 1] for t in schedule.timesteps)
