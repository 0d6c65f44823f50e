"""What a run keeps of each evaluation for its page: every score, and small clips of some prompts.

`evaluations/000005/scores.json` and, per kept prompt, `0012.webp` (12 is the prompt's position).
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dancegrpo_fast.config import UserError
from dancegrpo_fast.report.evaluate import Difference, Evaluation

KEPT = 48  # Prompts whose clips are kept, spread over all.
LONGEST_SIDE, MOST_FRAMES = 256, 16  # Of a kept clip.


@dataclass(frozen=True)
class Record:
    """An evaluation as it is kept.

    Attributes:
        iteration: Finished iterations.
        prompts: [P] held-out prompts.
        names: [R] rewards.
        weights: [R] their weights.
        scores: [P, S, R], NaN where a reward failed.
        part_names: [K] parts that rewards report.
        parts: [P, S, K].
        distances: [P] pixel distance between two seeds' samples.
        clips: Clip of the first seed by position of the prompt, of those that are kept.
    """

    iteration: int
    prompts: tuple[str, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    scores: np.ndarray
    part_names: tuple[str, ...]
    parts: np.ndarray
    distances: np.ndarray
    clips: dict[int, Path]

    @property
    def totals(self) -> np.ndarray:
        """[P, S] weighted reward; a reward of weight 0 enters nothing, not even its NaN."""
        weights = np.array(self.weights)
        return self.scores[..., weights != 0] @ weights[weights != 0]

    def comparable(self, other: Record) -> bool:
        """Whether both measured the same samples with the same rewards."""
        same = self.prompts == other.prompts and self.scores.shape == other.scores.shape
        return same and (self.names, self.weights) == (other.names, other.weights)

    def differences(self, base: Record) -> dict[str, Difference]:
        """Each reward, each part of one and the diversity against a base."""
        found = {}
        for names, before, after in (
            (self.names, base.scores, self.scores),
            (self.part_names, base.parts, self.parts),
            (("diversity",), base.distances[:, None], self.distances[:, None]),
        ):
            for i, name in enumerate(names):
                found[name] = Difference.of(before[..., i], after[..., i])
        return found


def write_record(
    folder: Path,
    iteration: int,
    found: Evaluation,
    prompts: Sequence[str],
    weights: Sequence[float],
    *,
    fps: float,
) -> Path:
    """Keep an evaluation in a run's folder, whole or not at all; returns its folder."""
    final = folder / "evaluations" / f"{iteration:06d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    values = {
        "iteration": iteration,
        "prompts": list(prompts),
        "names": list(found.names),
        "weights": list(weights),
        "scores": _listed(found.scores),
        "part_names": list(found.part_names),
        "parts": _listed(found.parts),
        "distances": _listed(found.distances),
    }
    text = json.dumps(values, allow_nan=False)
    (partial / "scores.json").write_text(text + "\n", encoding="utf-8")
    for p in spread(len(prompts), KEPT):
        save_small(partial / f"{p:04d}.webp", found.clips[p], fps=fps)
    if final.exists():  # Of a run that was resumed from before it.
        shutil.rmtree(final)
    os.replace(partial, final)
    return final


def read_records(folder: Path) -> list[Record]:
    """The evaluations kept in a run's folder, in order.

    Raises:
        UserError: One of them is damaged.
    """
    found = []
    for file in sorted(folder.glob("evaluations/??????/scores.json")):
        try:
            found.append(_read(file))
        except (ValueError, TypeError, KeyError):
            reason = "is not what a run writes; remove its folder"
            raise UserError(f"{file}: {reason}") from None
    return found


def _read(file: Path) -> Record:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for name in ("prompts", "names", "weights", "part_names"):
        values[name] = tuple(values[name])
    for name in ("scores", "parts", "distances"):
        values[name] = np.array(values[name], dtype=np.float64)  # None becomes NaN.
    clips = {int(clip.stem): clip for clip in sorted(file.parent.glob("*.webp"))}
    return Record(clips=clips, **values)


def save_small(
    path: Path | io.BytesIO, clip: np.ndarray, *, fps: float, longest: int = LONGEST_SIDE
) -> None:
    """Write [F, 3, H, W] uint8 as WebP, animated if F > 1, small enough to go into a page.

    At most `longest` pixels a side and 16 frames, spread over the clip and as long as it. Lossless
    where that costs little: up to 64 pixels a side.
    """
    shown = spread(len(clip), MOST_FRAMES)
    frames = [Image.fromarray(clip[i].transpose(1, 2, 0)) for i in shown]
    there = max(frames[0].size)
    if there > longest:
        size = [max(1, round(side * longest / there)) for side in frames[0].size]
        frames = [frame.resize((size[0], size[1]), Image.Resampling.LANCZOS) for frame in frames]
    frames[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=max(1, round(1000 * len(clip) / fps / len(frames))),
        loop=0,
        lossless=there <= 64,
        quality=80,
    )


def spread(total: int, count: int) -> list[int]:
    """Up to `count` positions spread evenly over 0 .. total - 1."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def _listed(values: np.ndarray) -> Any:
    """Nested lists with None for what is no number, which JSON has no word for."""
    if values.ndim > 1:
        return [_listed(row) for row in values]
    return [float(x) if math.isfinite(x) else None for x in values]
