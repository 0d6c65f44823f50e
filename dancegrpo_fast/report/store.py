"""Samples and scores on disk by what they are made of, so that nothing is computed twice.

A sample is named by a hash of the weights, the settings, the prompt and the seed; a score by its
sample, what the reward is told, and the reward. Another order of prompts, more seeds, a new reward
or an interrupted call reuse everything that is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.ops.noise import NoiseKey, keys_table, normal_batch
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.roles import Role


def digest(*parts: Any) -> str:
    """32 hex digits of a SHA-256 over values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Asked:
    """A prompt of an evaluation, named by its content.

    Attributes:
        prompt: The prompt.
        drawn: Hash of what its samples depend on: text, image, and which of equal prompts it is.
        told: Hash of what rewards are told beside it.
    """

    prompt: Prompt
    drawn: str
    told: str

    @classmethod
    def all_of(cls, prompts: Sequence[Prompt]) -> list[Asked]:
        """Every prompt; equal ones are counted, so that each has noise of its own."""
        seen = Counter[tuple[str, str]]()
        found = []
        for prompt in prompts:
            image = "" if prompt.image is None else _file_hash(prompt.image)
            copy = seen[prompt.text, image]
            seen[prompt.text, image] += 1
            drawn = digest(prompt.text, image, copy)
            found.append(cls(prompt, drawn, digest(dict(prompt.metadata))))
        return found


def initial_latents(
    jobs: Sequence[tuple[Asked, int]], root: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """The noise [n, C, F, H, W] of (prompt, seed) pairs: of its content, whatever its place."""
    key = NoiseKey.from_seed(root).fold_in(Role.EVALUATION)
    # fold_in takes 63 bits; a draw by place (`evaluate.initial_latents`) folds small numbers.
    keys = [key.fold_in(int(a.drawn[:16], 16) >> 1).fold_in(s).draw() for a, s in jobs]
    return normal_batch(tuple(shape), keys_table(keys), device=device)


def reward_digest(config: RewardConfig) -> str:
    """Of all that its scores depend on; files by their names, sizes and times of change."""
    file, _, _ = config.name.rpartition(":")
    own = _file_hash(Path(file)) if file.endswith(".py") and Path(file).is_file() else ""
    weights = []
    if config.path is not None and Path(config.path).exists():
        root = Path(config.path)
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        weights = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    settings = config.model_dump(mode="json", exclude={"weight", "offload"})
    return digest(settings, own, weights)


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Store:
    """The results of an evaluation's folder; processes share it, each writes files of its own.

    Args:
        folder: `OUT`; made if missing.
        rank: Of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._scores = folder / "scores"
        self._scores.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, float] = {}
        self.reload()

    # ---- samples -------------------------------------------------------------------------------

    def sample(self, model: str, drawn: str, root: int, seed: int) -> str:
        """Name of a sample of `Asked.drawn`."""
        return digest(model, drawn, root, seed)

    def file(self, model: str, sample: str, frames: int) -> Path:
        """Where a sample lies: PNG, or losslessly coded video."""
        return self.folder / "samples" / model[:12] / f"{sample}.{'png' if frames == 1 else 'mkv'}"

    def write(self, file: Path, video: Tensor, fps: float) -> None:
        """Write [F, 3, H, W] uint8 without loss; a file that is there is whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{self.rank}-partial{file.suffix}")
        frames = video.permute(0, 2, 3, 1).contiguous().numpy()
        if len(frames) == 1:
            Image.fromarray(frames[0]).save(partial)
        else:
            with av.open(str(partial), "w") as container:
                stream = container.add_stream("ffv1", rate=max(1, round(fps)))
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = "bgr0"
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
        os.replace(partial, file)

    def read(self, file: Path) -> Tensor:
        """[F, 3, H, W] uint8.

        Raises:
            UserError: The file is damaged.
        """
        try:
            if file.suffix == ".png":
                frames = np.array(Image.open(file).convert("RGB"))[None]
            else:
                with av.open(str(file)) as container:
                    decoded = container.decode(video=0)
                    frames = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
        except (OSError, ValueError, SyntaxError, IndexError, av.FFmpegError) as error:
            reason = f"cannot be read ({error}); remove it, and it is drawn again"
            raise UserError(f"{file}: {reason}") from None
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    # ---- scores --------------------------------------------------------------------------------

    def reload(self) -> None:
        """Read every process's scores.

        A line that a crash has cut is left out, and cut off the file if it is this process's own.
        """
        for path in sorted(self._scores.glob("*.jsonl")):
            *lines, cut = path.read_bytes().split(b"\n")
            if cut and path == self._own:
                with path.open("rb+") as file:
                    file.truncate(path.stat().st_size - len(cut))
            for number, line in enumerate(lines, 1):
                try:
                    name, value = json.loads(line)
                    self.values[name] = float(value)
                except (ValueError, TypeError):
                    reason = "is not what `evaluate` writes; remove that line"
                    raise UserError(f"{path}: line {number} {reason}") from None

    @property
    def _own(self) -> Path:
        return self._scores / f"rank-{self.rank}.jsonl"

    def add(self, found: dict[str, float]) -> None:
        """Keep scores by name; those that failed (NaN) are not kept and are tried again."""
        kept = {name: value for name, value in found.items() if math.isfinite(value)}
        with self._own.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps([name, value])}\n" for name, value in kept.items())
        self.values |= kept
