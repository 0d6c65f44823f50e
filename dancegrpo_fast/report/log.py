"""What a run writes while it goes on: numbers, clips, evaluations, and the page made of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.faults import is_full_disk
from dancegrpo_fast.report.evaluate import Evaluation
from dancegrpo_fast.report.metrics import Clip, JsonLines, save_clip
from dancegrpo_fast.report.record import write_record
from dancegrpo_fast.report.run_page import write_page
from dancegrpo_fast.report.trackers import open_trackers

logger = logging.getLogger(__name__)


class RunLog:
    """A run's log on the main process; on the others every call does nothing.

    `metrics.jsonl` holds what the recipe determines, so that two runs can be compared line by line;
    `times.jsonl` what the machine adds: seconds, samples per second, memory. `iteration` counts
    finished iterations: 0 is the untrained model. A disk that is full costs a line or a picture,
    not the run, unless the recipe wants to stop.
    """

    def __init__(self, config: RunConfig, is_main: bool, *, resumed: int | None) -> None:
        self.config, self.is_main, self.folder = config, is_main, Path(config.output)
        if is_main:
            self._metrics = JsonLines(self.folder / "metrics.jsonl", resumed=resumed)
            self._times = JsonLines(self.folder / "times.jsonl", resumed=resumed or 0)
            self._trackers = open_trackers(config, resumed)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_main:
            self._metrics.close()
            self._times.close()
            for tracker in self._trackers:
                tracker.close()

    def write(
        self,
        iteration: int,
        values: Mapping[str, float],
        clips: Sequence[tuple[str, Tensor]] = (),
    ) -> None:
        """Log numbers and clips [F, 3, H, W] in [0, 1] by tag."""
        if not self.is_main:
            return
        with self._sparing(iteration):
            self._metrics.write(iteration, values)
        saved: list[Clip] = []
        folder, fps = self.folder / "clips", self.config.model.fps or 8
        for tag, video in clips:
            with self._sparing(iteration):
                saved.append(save_clip(folder, tag, video, iteration, fps=fps, beside=saved))
        for tracker in self._trackers:
            with self._sparing(iteration):
                tracker.write(iteration, values, saved)

    def spent(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log what an iteration took."""
        if not self.is_main:
            return
        with self._sparing(iteration):
            self._times.write(iteration, values)
        for tracker in self._trackers:
            with self._sparing(iteration):
                tracker.write(iteration, values, [])

    def evaluation(self, iteration: int, found: Evaluation, prompts: Sequence[str]) -> None:
        """Keep what the page shows of an evaluation."""
        if self.is_main:
            weights = [reward.weight for reward in self.config.rewards]
            with self._sparing(iteration):
                fps = self.config.model.fps or 8
                write_record(self.folder, iteration, found, prompts, weights, fps=fps)

    def page(self, iteration: int) -> Path | None:
        """Write the page anew from what is on disk; None on other processes or where it fails.

        A page can be made again from its files: whatever hinders it is logged and ends no run.
        """
        if not self.is_main:
            return None
        try:
            return write_page(self.folder)
        except Exception as error:
            logger.error(
                "%s: no report after iteration %d (%s: %s); the run goes on, and `dancegrpo-fast "
                "report` makes it later",
                self.config.output, iteration, type(error).__name__, error,
            )  # fmt: skip
        return None

    @contextmanager
    def _sparing(self, iteration: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_full_disk(error) or self.config.checkpoint.on_failure == "stop":
                raise
            logger.error(
                "%s: iteration %d could not be logged (%s); the run goes on "
                "(checkpoint.on_failure = continue)",
                self.config.output, iteration, error,
            )  # fmt: skip
