"""Files of numbers, one JSON object a line, and clips as GIFs."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dancegrpo_fast.config import UserError


def check_new(path: Path) -> None:
    """Refuse a file with lines, which a run that is not resumed would mix its own with.

    Raises:
        UserError: It holds some.
    """
    if path.exists() and path.stat().st_size:
        raise UserError(
            f"output = {str(path.parent)!r}: already holds a run; "
            "continue it with --resume latest, or name another folder"
        )


def check_folder(output: str) -> None:
    """Refuse a folder that cannot be made or written, without making it.

    Raises:
        UserError: It is a file, lies below one, or may not be written.
    """
    folder = Path(output)
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not output or not above.is_dir():
        what = above if output else "this"
        raise UserError(f"output = {output!r}: {what} is no folder; name one")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"output = {output!r}: {above} may not be written; name another folder")


class JsonLines:
    """Appends to a file of one JSON object a line. One process only.

    Args:
        path: The file; its folder is created if missing.
        resumed: Finished iterations of the snapshot the run continues from; later lines, which the
            run will write again, are dropped. None starts a run.

    Raises:
        UserError: The file holds lines and the run is not resumed, or it is damaged before its last
            line.
    """

    def __init__(self, path: Path, *, resumed: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resumed is not None:
            _drop_after(path, resumed)
        else:
            check_new(path)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append one line; JSON has no NaN or infinity, such a value is `null`.

        What a full disk refuses is written with the next line.
        """
        numbers = {name: float(value) for name, value in values.items()}
        line = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        # One write of one whole line: a crash can only cut the last one, which resume drops.
        self._file.write(json.dumps({"iteration": iteration, **line}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """Returns the lines of a `metrics.jsonl`; a last line cut by a crash is left out.

    Raises:
        UserError: A line before the last is no JSON object with an `iteration`.
    """
    text = Path(path).read_text(encoding="utf-8")
    *whole, _cut = text.split("\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            values = json.loads(line)
            values["iteration"] = int(values["iteration"])
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}: line {number} is no JSON object with an iteration; repair or remove it"
            ) from None
        lines.append(values)
    return lines


def _drop_after(path: Path, resumed: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if (line["iteration"] or 0) <= resumed]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def plain(value: Any) -> Any:
    """A value for JSON, with null for what is no finite number: JSON has no word for these."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Clip:
    """A clip in a run's `clips/`.

    Attributes:
        tag: Name of the series, such as a prompt.
        path: The GIF.
        frames: How many; 1 is a still image.
        height: In pixels.
        width: In pixels.
    """

    tag: str
    path: Path
    frames: int
    height: int
    width: int


def save_clip(
    folder: Path,
    tag: str,
    video: Tensor,
    iteration: int,
    *,
    fps: float = 8,
    beside: Sequence[Clip] = (),
) -> Clip:
    """Write `<tag>_<iteration>.gif` of [F, 3, H, W] in [0, 1] into a folder.

    Args:
        folder: Made if missing.
        tag: Of which the file's name keeps what every file system takes.
        video: The clip.
        iteration: Finished iterations.
        fps: Frames per second; a GIF has at most 100.
        beside: Clips of the same iteration, whose files stay.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", tag).strip("_")[:80] or "clip"
    path = folder / f"{name}_{iteration:06d}.gif"
    if path in [clip.path for clip in beside]:  # Prompts in Chinese, or with one beginning.
        path = folder / f"{name}_{len(beside) + 1}_{iteration:06d}.gif"
    folder.mkdir(exist_ok=True)
    # Whole or not at all: a full disk must not leave half a picture for the page to read.
    partial = path.with_suffix(".partial")
    write_gif(partial, video, fps=min(fps, 100))
    os.replace(partial, path)
    frames, _, height, width = video.shape
    return Clip(tag, path, frames, height, width)


def gif_bytes(video: Tensor, *, fps: float = 8) -> bytes:
    """Encodes [F, 3, H, W] in [0, 1] as an endlessly looping GIF.

    Values outside are clamped and NaN is black. GIF keeps time in hundredths of a second and 256
    colours a frame.
    """
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"video has shape {list(video.shape)}; expected [F, 3, H, W], none empty")
    if not 0 < fps <= 100:
        raise ValueError(f"fps = {fps}: must be above 0 and at most 100")
    levels = video.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round()
    pixels = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    # Undithered: dither flickers from frame to frame and hides what the model draws.
    frames = [Image.fromarray(frame).quantize(dither=Image.Dither.NONE) for frame in pixels]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=round(100 / fps) * 10,
        loop=0,
    )
    return buffer.getvalue()


def write_gif(path: str | Path, video: Tensor, *, fps: float = 8) -> None:
    """Writes [F, 3, H, W] in [0, 1] as a GIF file."""
    Path(path).write_bytes(gif_bytes(video, fps=fps))
