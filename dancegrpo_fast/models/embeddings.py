"""What networks are told about prompts, computed once per prompt and kept on disk by content.

One safetensors file per prompt, named by a hash of all that its tensors depend on: another text
encoder, length, negative prompt or image is another file, so a folder may serve any number of
runs and nothing in it is ever stale.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from inspect import getfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models.conditions import Condition, Conditions
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.loading import weight_files
from dancegrpo_fast.models.source import Source, components, locate, read_index
from dancegrpo_fast.prompt import Prompt

logger = logging.getLogger(__name__)

FORMAT = 1  # Of the files and of what families put in them; raise it when either changes.

# Settings that do not reach `Family.embed`. Whatever is added to ModelConfig counts until it is
# listed here: an embedding made twice is cheaper than a wrong one.
_DRAWN = {"first_frame", "first_frame_steps"}
_ELSEWHERE = {"fps", "path", "revision", "guidance", "guidance_2", "embedded_guidance", *_DRAWN}
_OF_IMAGES = {"height", "width", "frames", "vae_dtype", "vae_tiling"}
_SMALL = (".json", ".txt", ".model", ".jinja")  # Configurations and vocabularies.
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # Of each weight file, beside its header.


def embeddings_folder(config: RunConfig) -> Path:
    """Where a recipe keeps embedded prompts."""
    return Path(config.data.embeddings or Path(config.output) / "embeddings")


class Group(Protocol):
    """The processes of a run, as `parallel.world.World` gives them."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce(self, values: Tensor, op: str) -> None: ...
    def barrier(self) -> None: ...


class Embeddings:
    """Conditions of prompts, from their folder or from the family's encoders.

    Attributes:
        family: Whose prompts they are; its encoders are loaded only when a prompt is missing.
        folder: Shared by all processes, and by any number of runs.
    """

    def __init__(self, family: Family, folder: Path, world: Group) -> None:
        self.family, self.folder, self.world = family, folder, world
        self._present: set[str] = set()  # Keys that every process knows to be on disk.

    def conditions(self, prompts: Sequence[Prompt]) -> Conditions:
        """Conditions of P prompts on the device: read, or embedded and written.

        All processes call it with the same prompts; each embeds a part of what is missing.
        """
        keys = [self.key(prompt) for prompt in prompts]
        return self._found(keys, prompts, self._complete(dict(zip(keys, prompts, strict=True))))

    def alone(self, prompts: Sequence[Prompt]) -> Conditions:
        """As `conditions`, for prompts of this process only: it embeds all that is missing."""
        keys = [self.key(prompt) for prompt in prompts]
        by_key = dict(zip(keys, prompts, strict=True))
        missing = {key: by_key[key] for key in by_key if not self._readable(key)}
        return self._found(keys, prompts, self._make(missing) if missing else {})

    @torch.no_grad()
    def embed(
        self,
        prompts: Mapping[str, Prompt],
        plan: Callable[[int], object] = lambda count: None,
        progress: Callable[[int], object] = lambda count: None,
    ) -> int:
        """Complete the folder ahead of a run; returns how many prompts were missing.

        Args:
            prompts: By key, what is to be there in the end; the same on all processes.
            plan: Called once with the number that this process will embed.
            progress: Called after each of them with 1.
        """
        missing = self._missing(list(prompts))
        own = missing[self.world.rank :: self.world.size]
        plan(len(own))
        if own:
            # One by one: a large prompt file must not fill the memory. The encoders stay meanwhile.
            with self.family.encoder_pipeline() as pipeline:
                for key in own:
                    row = self.family.embed(pipeline, prompts[key])
                    self.write(key, row, prompts[key].text)
                    progress(1)
        self.world.barrier()
        return len(missing)

    def write(self, key: str, row: Condition, text: str) -> None:
        """Put one prompt's condition into the folder, whole or not at all."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f".{key[:8]}-{uuid.uuid4().hex}.partial"
        # Cloned: safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in row.flat().items()
        }
        try:
            save_file(tensors, partial, metadata={"prompt": text, "format": str(FORMAT)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, key: str) -> Condition | None:
        """A prompt's condition on the CPU; None if there is none or its file is damaged."""
        if not self._readable(key):
            return None
        # Read, not mapped: the file may be replaced while the run holds the tensors.
        return Condition.from_flat(load_bytes(self.path(key).read_bytes()))

    def path(self, key: str) -> Path:
        """The file of a prompt; subfolders keep listings short."""
        return self.folder / key[:2] / f"{key}.safetensors"

    # ---- what an embedding depends on ------------------------------------------------------------

    def key(self, prompt: Prompt) -> str:
        """SHA-256 of all that a prompt's condition depends on."""
        image = self._drawing if prompt.image is None else _file_hash(prompt.image)
        parts = [self._identity, prompt.text, image]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _identity(self) -> str:
        family, config = self.family, self.family.config
        left_out = _ELSEWHERE | (set() if family.takes_image else _OF_IMAGES)
        settings = config.model_dump(exclude=left_out)
        # Of guidance only the side of 1 counts: whether there is a second branch, of which network.
        scales = (config.guidance, config.guidance_2)
        guided = [None if scale is None else (scale > 1) - (scale < 1) for scale in scales]
        if not any(guided):
            del settings["negative_prompt"]
        settings["max_text_length"] = family.max_text_length
        if ".py:" in config.family:  # A user's class: what it embeds may change with its file.
            settings["family"] = [type(family).__name__, _file_hash(Path(getfile(type(family))))]
        parts = [*family.encoders, *(["vae"] if family.takes_image else [])]
        folders = {name: _component_hash(family.source.folder / name) for name in parts}
        made_by = {name: version(name) for name in ("diffusers", "transformers")}
        text = json.dumps([FORMAT, settings, guided, folders, made_by], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _drawing(self) -> str | None:
        """What draws the image of prompts that bring none, where something does."""
        config = self.family.config
        if config.first_frame is None or not self.family.takes_image:
            return None
        folder = locate(config.first_frame, field="model.first_frame")
        source = Source(folder, read_index(folder, "model.first_frame"))
        source.check()
        hashes = {name: _component_hash(folder / name) for name in components(source.index)}
        return json.dumps([config.first_frame_steps, hashes], sort_keys=True)

    # ---- embedding -----------------------------------------------------------------------------

    def _complete(self, prompts: dict[str, Prompt]) -> dict[str, Condition]:
        """Put what is missing on disk, over all processes; returns what this one has embedded."""
        unknown = [key for key in prompts if key not in self._present]
        if not unknown:
            return {}
        missing = self._missing(unknown)
        own = missing[self.world.rank :: self.world.size]
        made = self._make({key: prompts[key] for key in own}) if own else {}
        if missing:
            self.world.barrier()
        self._present |= set(unknown)
        return made

    def _found(
        self, keys: list[str], prompts: Sequence[Prompt], made: Mapping[str, Condition]
    ) -> Conditions:
        """What was made just now, and the rest from the folder."""
        rows: dict[str, Condition] = {}
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in rows:
                row = made.get(key) or self.read(key)
                row = row or self._make({key: prompt})[key]  # Damaged since it was looked at.
                rows[key] = row.to(self.family.device)
        return Conditions.of([rows[key] for key in keys])

    def _missing(self, keys: list[str]) -> list[str]:
        """Those that some process cannot read; the same answer for all, before anyone writes."""
        absent = torch.tensor([not self._readable(key) for key in keys], dtype=torch.int32)
        self.world.all_reduce(absent, "max")
        return [key for key, gone in zip(keys, absent.tolist(), strict=True) if gone]

    def _make(self, prompts: dict[str, Prompt]) -> dict[str, Condition]:
        rows = dict(zip(prompts, self.family.encode(list(prompts.values())).rows, strict=True))
        for key, prompt in prompts.items():
            self.write(key, rows[key], prompt.text)
        return rows

    def _readable(self, key: str) -> bool:
        """Whether a prompt's file is there and whole, by its header and size."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt"):
                return True
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); the prompt is embedded again", path, error)
            return False


def _component_hash(folder: Path) -> str:
    """What a component is: small files whole; of weights the headers and bytes at fixed places."""
    digest = hashlib.sha256()
    small = [path for path in folder.iterdir() if path.suffix in _SMALL]
    weights = weight_files(folder) if any(folder.glob("*.safetensors")) else []
    for path in sorted([*small, *weights]):
        content = _sampled_hash(path) if path in weights else _file_hash(path)
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        digest.update(file.read(min(start, size)))
        for number in range(_SAMPLES):
            file.seek(start + (size - start) * number // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(start, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
