"""A diffusers pipeline folder, read without its weights: its index, configurations and grid.

It is named by its path or by a hub id; a hub id stands for the copy in the local hub cache, which
`dancegrpo-fast fetch` makes. Nothing is downloaded here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dancegrpo_fast.config import ModelConfig, RolloutConfig, UserError
from dancegrpo_fast.models.loading import STEMS, stored_shapes, weight_files
from dancegrpo_fast.schedules import Schedule, dance_schedule, from_scheduler

INDEX = "model_index.json"
_WITHOUT_WEIGHTS = re.compile("(Tokenizer|Processor)(Fast)?$|(FeatureExtractor|Scheduler)$")
# transformers makes a tokenizer that knows no word where none of these is there.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder here can be a hub id, `organisation/name`."""
    return not Path(path).exists() and _HUB_ID.fullmatch(path) is not None


def locate(path: str, revision: str | None = None, field: str = "model.path") -> Path:
    """The folder of a pipeline: `path` itself, or the local copy of a hub id.

    Args:
        path: A folder, or a hub id.
        revision: Branch, tag or commit of a hub id; None is its main branch.
        field: Configuration field that named it, for the error message.

    Raises:
        UserError: There is no such folder, and no such copy.
    """
    where = f"{field} = {path!r}"
    if Path(path).exists():
        if revision is not None:
            raise UserError(
                f"model.revision = {revision!r}: {path} is a folder, which has no revisions; leave "
                "it out, or give a hub id as model.path"
            )
        return Path(path)
    if not is_hub_id(path):
        raise UserError(
            f"{where}: this folder does not exist (paths count from {Path.cwd()}); give the folder "
            "of a diffusers pipeline, or a hub id (organisation/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # The index alone is asked for: a copy of the needed files is no complete snapshot.
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=[INDEX], local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        at = "" if revision is None else f" at revision {revision!r}"
        raise UserError(
            f"{where}: is no folder in {Path.cwd()}, and the local hub cache holds no such model"
            f"{at}; run `dancegrpo-fast fetch RECIPE` where there is internet, or give the folder "
            "of a diffusers pipeline"
        ) from None


def read_index(folder: Path, where: str) -> dict[str, Any]:
    """The `model_index.json` of a pipeline folder; `where` names the field in the error message."""
    file = folder / INDEX
    if not file.is_file():
        raise UserError(
            f"{where}: this folder has no {INDEX}; give the folder of a diffusers pipeline (one "
            "written by save_pretrained or a hub download)"
        )
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        index["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: {file} is no pipeline index; fetch or save it again") from None
    return index


def components(index: dict[str, Any], unused: Iterable[str] = ()) -> dict[str, str]:
    """Name -> class name of the components that an index lists, but for `unused` ones."""
    return {
        name: entry[1]
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] and name not in set(unused)
    }


def needed_files(index: dict[str, Any], unused: Iterable[str] = ()) -> list[str]:
    """Patterns of the files that loading needs: configurations, vocabularies, safetensors."""
    patterns = [INDEX]
    for name, kind in components(index, unused).items():
        patterns += [f"{name}/*.{ending}" for ending in ("json", "txt", "model", "jinja")]
        if not _WITHOUT_WEIGHTS.search(kind):
            # Not every safetensors file: variants (fp16, non_ema) lie beside.
            patterns += [f"{name}/{stem}.safetensors" for stem in STEMS]
            patterns += [f"{name}/{stem}-?????-of-?????.safetensors" for stem in STEMS]
    return patterns


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
            config: Names the folder or hub id.
            pipelines: diffusers pipeline classes the family loads.
        """
        folder, where = locate(config.path, config.revision), f"model.path = {config.path!r}"
        index = read_index(folder, where)
        if index["_class_name"] not in pipelines:
            raise UserError(
                f"{where}: it holds a {index['_class_name']}, and model.family = {config.family} "
                f"loads {', '.join(pipelines)}; choose the matching family"
            )
        return cls(folder, index)

    def check(self, unused: Iterable[str] = ()) -> None:
        """Refuse a folder that lacks something, before anything is loaded.

        Args:
            unused: Components that nothing needs.

        Raises:
            UserError: One line per component that is missing, incomplete or damaged.
        """
        lines = []
        for name, kind in components(self.index, unused).items():
            folder = self.folder / name
            weighty = not _WITHOUT_WEIGHTS.search(kind)
            if not (folder / "config.json" if weighty else folder).exists():
                lines.append(
                    f"{folder}: is missing or has no configuration, and {INDEX} names it ({kind}); "
                    "complete the folder, or fetch it with `dancegrpo-fast fetch RECIPE`"
                )
                continue
            if "Tokenizer" in kind and not any(p for v in _VOCABULARIES for p in folder.glob(v)):
                told = "holds no vocabulary; fetch it again (`dancegrpo-fast fetch RECIPE`)"
                lines.append(f"{folder}: {told}")
            try:
                for file in sorted(folder.glob("*.json")):
                    _parsed(file)
                for file in weight_files(folder) if weighty else ():
                    stored_shapes(file)
            except UserError as error:
                lines.append(str(error))
        if lines:
            raise UserError("\n".join(lines))

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
        try:
            return getattr(importlib.import_module(library), name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{self.folder / INDEX}: names {library}.{name} as {component}, which cannot be "
                f"had ({error}); update {library}, or fetch the folder again"
            ) from None

    def config(self, component: str) -> dict[str, Any]:
        """The `config.json` of a component, with its class's defaults for what is absent."""
        stored = _parsed(self.folder / component / "config.json")
        return {**_defaults(self.component_class(component)), **stored}

    def scheduler(self) -> Any:
        """The folder's diffusers scheduler."""
        _parsed(self.folder / "scheduler" / "scheduler_config.json")
        cls = self.component_class("scheduler")
        return cls.from_pretrained(self.folder, subfolder="scheduler", local_files_only=True)


def _parsed(file: Path) -> Any:
    """What a configuration or vocabulary holds.

    Raises:
        UserError: It is not there, or no JSON.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict) and file.name.endswith("config.json"):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{file}: cannot be read ({reason}); complete the folder, or fetch it with "
            "`dancegrpo-fast fetch RECIPE`"
        ) from None
    return value


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
