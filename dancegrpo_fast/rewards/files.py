"""Images and videos on disk, each with the prompt it was made from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards.interface import Samples

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
VIDEOS = frozenset({".mp4", ".webm", ".mov", ".mkv", ".avi"})
SUFFIXES = IMAGES | VIDEOS | {".gif"}


@dataclass(frozen=True)
class Job:
    """A file, the position of its prompt, and that of the first prompt with the same text."""

    file: Path
    prompt: int
    group: int


def find_jobs(folder: Path, prompts: Sequence[Prompt]) -> list[Job]:
    """The images and videos of a folder (not below it), those of one text together.

    A prompt is found by `file` in its metadata (of all prompts, or of none), else by the number
    that the file's name begins with (0 is the first prompt; `dancegrpo-fast sample` names files
    so), else by order, if there are as many files as prompts. A single prompt is that of all files.

    Raises:
        UserError: No file, or files whose prompt is not clear.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    where = f"folder = {str(folder)!r}"
    if not files:
        raise UserError(f"{where}: holds no file of {', '.join(sorted(SUFFIXES))}")
    named = {str(p.metadata["file"]): i for i, p in enumerate(prompts) if "file" in p.metadata}
    numbers = [re.match(r"\d+", path.name) for path in files]
    if named:
        unknown = [path.name for path in files if path.name not in named]
        places = [(path, named[path.name]) for path in files if path.name in named]
        reason = f"no prompt has file {', '.join(unknown[:3])}" if unknown else ""
    elif len(prompts) == 1:
        places, reason = [(path, 0) for path in files], ""
    elif all(numbers):
        places = [(path, int(n[0])) for path, n in zip(files, numbers, strict=True) if n]
        beyond = [path.name for path, index in places if index >= len(prompts)]
        reason = f"{beyond[0]} counts beyond the {len(prompts)} prompts" if beyond else ""
    else:
        places = [(path, index) for index, path in enumerate(files)]
        reason = (
            ""
            if len(files) == len(prompts)
            else f"{len(files)} files for {len(prompts)} prompts, and names without numbers"
        )
    if reason:
        raise UserError(
            f"{where}: {reason}; begin each name with the number of its prompt (0 is the first), "
            'or name it as "file" in a .jsonl of prompts'
        )
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt.text, index)
    jobs = [Job(path, index, first[prompts[index].text]) for path, index in places]
    return sorted(jobs, key=lambda job: (job.group, job.file.name))


def read(path: Path) -> tuple[Tensor, float | None]:
    """Pixels [F, 3, H, W] uint8 and frames per second, None for an image.

    Raises:
        OSError: The file cannot be read.
        ValueError: Its values do not fit 8 bits, or its frames one size.
    """
    if path.suffix.lower() in VIDEOS:
        return _read_video(path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to white.
                raise ValueError(f"{path.name} has more than 8 bits a channel; save it with 8")
            frames = [np.array(f.convert("RGB")) for f in ImageSequence.Iterator(image)]
            # GIF keeps milliseconds per frame; 0 is taken as 100, as browsers do.
            milliseconds = image.info.get("duration") or 100
    except (OSError, ValueError):
        raise
    except Exception as error:  # Pillow's readers raise many things where a file is damaged.
        raise OSError(f"{path.name}: {type(error).__name__}: {error}") from error
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return pixels, 1000 / milliseconds if len(frames) > 1 else None


def _read_video(path: Path) -> tuple[Tensor, float | None]:
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = stream.average_rate
    except (av.FFmpegError, IndexError) as error:
        raise OSError(f"{path.name} is no readable video: {error}") from error
    if not frames:
        raise OSError(f"{path.name} holds no frame")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), float(rate) if rate else None


def batches(
    jobs: Sequence[Job],
    prompts: Sequence[Prompt],
    *,
    size: int,
    whole_prompts: bool,
    unreadable: dict[int, str],
) -> Iterator[tuple[list[int], Samples]]:
    """Yields (positions in `jobs`, their samples); those of one batch have one shape and rate.

    Args:
        jobs: As `find_jobs` orders them.
        prompts: All of them.
        size: Files at once.
        whole_prompts: A batch holds all files of one prompt instead, whatever their number.
        unreadable: Filled with the positions of files that could not be read, and why.

    Raises:
        UserError: Files of one prompt differ in shape and `whole_prompts` is set.
    """
    rows: list[int] = []
    videos: list[Tensor] = []
    rate: float | None = None

    def batch() -> tuple[list[int], Samples]:
        own = [prompts[jobs[row].prompt] for row in rows]
        texts, metadata = [p.text for p in own], [p.metadata for p in own]
        groups = [jobs[row].group for row in rows]
        return rows, Samples(torch.stack(videos), texts, rate, metadata, groups)

    for row, job in enumerate(jobs):
        try:
            pixels, fps = read(job.file)
        except (OSError, ValueError) as error:
            unreadable[row] = f"cannot be read: {error}"
            continue
        if rows:
            same = pixels.shape == videos[0].shape and fps == rate
            together = job.group == jobs[rows[0]].group
            if whole_prompts and together and not same:
                raise UserError(
                    f"{job.file}: differs in size, frames or rate from {jobs[rows[0]].file.name}, "
                    "with which it is to be compared; make them alike"
                )
            if not together if whole_prompts else (not same or len(rows) >= size):
                yield batch()
                rows, videos = [], []
        rows.append(row)
        videos.append(pixels)
        rate = fps
    if rows:
        yield batch()
