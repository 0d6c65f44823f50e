"""Where a run's numbers and clips are shown while it goes on: TensorBoard, Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from dancegrpo_fast.config import LoggingConfig, RunConfig, UserError
from dancegrpo_fast.report.metrics import Clip


class Tracker(Protocol):
    """Takes what a run logs. Lives on one process, the main one."""

    def write(self, iteration: int, values: Mapping[str, float], clips: Sequence[Clip]) -> None:
        """Show numbers and clips of so many finished iterations (0 is the untrained model).

        After an OSError of a full disk the next call works again.
        """

    def close(self) -> None:
        """Hand over what is left."""


class TensorBoard:
    """Scalars and GIFs in a run's `tensorboard/`; of a resumed run, later points are hidden."""

    def __init__(self, config: RunConfig, resumed: int | None) -> None:
        self._folder = str(Path(config.output) / "tensorboard")
        self._board: SummaryWriter | None = None
        self._open(purge_step=None if resumed is None else resumed + 1)

    def write(self, iteration: int, values: Mapping[str, float], clips: Sequence[Clip]) -> None:
        board = self._open()
        try:
            for name, number in values.items():
                board.add_scalar(name, float(number), iteration)
            for clip in clips:
                # SummaryWriter.add_video writes nothing without moviepy: the event is made by hand.
                image = Summary.Image(
                    height=clip.height,
                    width=clip.width,
                    colorspace=3,
                    encoded_image_string=clip.path.read_bytes(),
                )
                summary = Summary(value=[Summary.Value(tag=clip.tag, image=image)])
                board._get_file_writer().add_summary(summary, iteration)
        except OSError:
            # A writer that failed never writes again: the next call opens a new one.
            self._board = None
            with suppress(OSError):  # It says once more what the caller is told.
                board.close()
            raise

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _open(self, *, purge_step: int | None = None) -> SummaryWriter:
        if self._board is None:
            self._board = SummaryWriter(self._folder, purge_step=purge_step)
        return self._board


class WeightsAndBiases:
    """One W&B run, continued under the same id when the run is resumed.

    Points stand over the iteration, not over W&B's own step, which never goes back: iterations that
    a resumed run repeats are there twice.
    """

    def __init__(self, config: RunConfig, resumed: int | None) -> None:
        import wandb

        folder, ours = Path(config.output), config.logging
        kept = folder / "wandb-id.txt"
        if resumed is None or not kept.is_file():
            kept.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=ours.project or "dancegrpo-fast",
                name=ours.name or folder.resolve().name,
                id=kept.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(folder),
                mode="offline" if ours.offline else None,  # None leaves it to WANDB_MODE.
                config=config.model_dump(mode="json"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"logging.trackers: Weights & Biases does not start ({error}); run `wandb login`, "
                "set logging.offline = true and `wandb sync` later, or leave wandb out"
            ) from error
        self._wandb: Any = wandb
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, values: Mapping[str, float], clips: Sequence[Clip]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        media = {clip.tag: self._media(clip) for clip in clips}
        self._run.log({"iteration": iteration, **numbers, **media})

    def _media(self, clip: Clip) -> Any:
        if clip.frames == 1:
            return self._wandb.Image(str(clip.path))
        return self._wandb.Video(str(clip.path), format="gif")

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[RunConfig, int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_trackers(config: LoggingConfig) -> None:
    """Refuse a tracker whose package is missing, before the run writes anything."""
    if "wandb" in config.trackers and find_spec("wandb") is None:
        raise UserError(
            f"logging.trackers = {config.trackers}: the package wandb is not installed; "
            "pip install wandb, or leave it out (metrics.jsonl is always written)"
        )


def open_trackers(config: RunConfig, resumed: int | None) -> list[Tracker]:
    """Start the trackers of a recipe.

    Args:
        config: The recipe.
        resumed: Finished iterations of the snapshot the run continues from; None starts a run.
    """
    return [_TRACKERS[name](config, resumed) for name in config.logging.trackers]
