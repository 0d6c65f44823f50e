"""What a run shows in the terminal: one bar that stays, or one plain line an iteration."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

TREND = 20  # Iterations in the trend.
# Eighths of a block; or what every terminal can show.
_BLOCKS, _PLAIN = "".join(map(chr, range(0x2581, 0x2589))), "_.-=+*%#"


class Terminal:
    """Progress of a run on stderr: iterations, reward and its trend, speed, ETA, GPU memory.

    On a terminal a bar, rewritten in place. Elsewhere (a log file, TERM=dumb) one line
    an iteration through `logging`, which nothing rewrites.

    Args:
        total: Iterations of the run.
        done: Of these finished before.
        shown: False on all processes but one.
    """

    def __init__(
        self, total: int, done: int, *, shown: bool, stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._done, self._shown = total, done, shown
        self._rewards: list[float] = []
        self._seconds: list[float] = []
        self._ramp = _ramp(self._stream)
        # A dumb terminal shows the codes that move a bar.
        live = shown and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        # tqdm's own ETA is a mean that forgets: right where evaluations and snapshots cost time.
        self._bar = tqdm(
            total=total, initial=done, desc="iterations", disable=not live, file=self._stream
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def show(self, metrics: Mapping[str, float], spent: Mapping[str, float]) -> None:
        """Show a finished iteration.

        Args:
            metrics: What it measured.
            spent: What it took: `time/*` in seconds, `memory/peak_gib`.
        """
        self._done += 1
        self._rewards.append(metrics["reward/mean"])
        self._seconds.append(sum(x for name, x in spent.items() if name.startswith("time/")))
        shown = {"reward": f"{metrics['reward/mean']:.4g}"}
        shown["trend"] = trend(self._rewards[-TREND:], self._ramp)
        if "gate/max_gap" in metrics:
            shown["gap"] = f"{metrics['gate/max_gap']:.2g}"
        if "memory/peak_gib" in spent:
            shown["GPU"] = f"{spent['memory/peak_gib']:.1f} GiB"
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif self._shown:
            recent = self._seconds[-TREND:]
            left = (self._total - self._done) * math.fsum(recent) / len(recent)
            shown |= {"took": f"{self._seconds[-1]:.1f} s", "left": tqdm.format_interval(left)}
            line = "  ".join(f"{name} {text}" for name, text in shown.items())
            logger.info("iteration %d/%d  %s", self._done, self._total, line)


def trend(values: Sequence[float], ramp: str = _BLOCKS) -> str:
    """One character a value, from the lowest to the highest; a blank for what is no number."""
    finite = [x for x in values if math.isfinite(x)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    top = len(ramp) - 1

    def mark(x: float) -> str:
        if not math.isfinite(x):
            return " "
        return ramp[round((x - low) / (high - low) * top)] if high > low else ramp[top // 2]

    return "".join(mark(x) for x in values)


def _ramp(stream: TextIO) -> str:
    try:
        _BLOCKS.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return _PLAIN
    return _BLOCKS
