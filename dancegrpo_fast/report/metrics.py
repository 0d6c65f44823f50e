"""Metrics of a run: one JSON object a line, TensorBoard scalars, and sample clips as GIFs."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.faults import is_full_disk

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes `metrics.jsonl`, `tensorboard/` and `clips/` in a run's folder. One process only.

    `iteration` counts finished iterations: 0 is the untrained model.

    Args:
        run_dir: Folder of the run; created if missing.
        resumed: Finished iterations of the snapshot the run continues from; later lines, which the
            run will write again, are dropped here and hidden in TensorBoard. None starts a run.

    Raises:
        UserError: The folder holds metrics and the run is not resumed, or the file is damaged
            before its last line.
    """

    def __init__(self, run_dir: str | Path, *, resumed: int | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "metrics.jsonl"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if resumed is not None:
            _drop_after(self.path, resumed)
        elif self.path.exists() and self.path.stat().st_size:
            raise UserError(
                f"output = {str(run_dir)!r}: already holds a run; "
                "continue it with --resume latest, or name another folder"
            )
        self._file = open(self.path, "a", encoding="utf-8")
        self._board: SummaryWriter | None = None
        self._open_board(purge_step=None if resumed is None else resumed + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Appends one line and one TensorBoard point per value.

        JSON has no NaN or infinity: such a value is `null` in the file, itself in TensorBoard.
        """
        numbers = {name: float(value) for name, value in values.items()}
        line = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        # One write of one whole line: a crash can only cut the last one, which resume drops.
        self._file.write(json.dumps({"iteration": iteration, **line}, allow_nan=False) + "\n")
        self._file.flush()
        board = self._open_board()
        for name, number in numbers.items():
            board.add_scalar(name, number, iteration)

    def add_clip(self, tag: str, video: Tensor, iteration: int, *, fps: float = 8) -> Path:
        """Saves `clips/<tag>_<iteration>.gif` and shows it in TensorBoard; returns the file.

        Args:
            tag: Name of the series, such as a prompt.
            video: [F, 3, H, W] in [0, 1]; F = 1 is a still image.
            iteration: Finished iterations.
            fps: Frames per second.
        """
        encoded = gif_bytes(video, fps=fps)
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", tag).strip("_")[:80]
        path = self.run_dir / "clips" / f"{name}_{iteration:06d}.gif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded)
        # SummaryWriter.add_video writes nothing without moviepy, so the event is made by hand.
        height, width = video.shape[-2:]
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._open_board()._get_file_writer().add_summary(summary, iteration)
        return path

    def recover(self) -> None:
        """Go on after a write that failed, as on a full disk.

        What was to be in `metrics.jsonl` is written with the next line; TensorBoard's writer never
        writes again once it failed, so the next line opens a new one.
        """
        board, self._board = self._board, None
        with suppress(OSError):  # It says once more what the caller already knows.
            if board is not None:
                board.close()

    def _open_board(self, *, purge_step: int | None = None) -> SummaryWriter:
        if self._board is None:
            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)
        return self._board

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class RunLog:
    """A run's `MetricsLog` on the main process, nothing on the others.

    A disk that is full costs a line or a picture, not the run, unless the recipe wants to stop.
    """

    def __init__(self, config: RunConfig, is_main: bool, *, resumed: int | None) -> None:
        self.config = config
        self.files = MetricsLog(config.output, resumed=resumed) if is_main else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.files is not None:
            self.files.close()

    def write(
        self,
        iteration: int,
        values: Mapping[str, float],
        clips: Sequence[tuple[str, Tensor]] = (),
    ) -> None:
        """Log numbers and clips [F, 3, H, W] by tag, of so many finished iterations."""
        if self.files is None:
            return
        try:
            self.files.write(iteration, values)
            for tag, video in clips:
                self.files.add_clip(tag, video, iteration)
        except OSError as error:
            if not is_full_disk(error) or self.config.checkpoint.on_failure == "stop":
                raise
            logger.error(
                "%s: iteration %d could not be logged (%s); the run goes on "
                "(checkpoint.on_failure = continue)",
                self.config.output, iteration, error,
            )  # fmt: skip
            self.files.recover()


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


def _drop_after(path: Path, resumed: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if (line["iteration"] or 0) <= resumed]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
