"""Stopping together: a signal that one process got ends all of them at the same place.

Each process asks at the same places of the run (every denoising step, every micro-batch, between
iterations). Asking starts an asynchronous MAX over a gloo group and reads the answer of the time
before: no GPU sync, and nobody leaves a collective that others still wait in.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dancegrpo_fast.parallel.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NO, SOON, NOW = 0, 1, 2  # Go on; stop where nothing is lost; the grace period is over.


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside, every signal is a KeyboardInterrupt: while loading there is nothing to save yet."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequested(Exception):
    """All processes leave the run here."""


class Stopping:
    """What this process was told, and what all have agreed on.

    Attributes:
        agreed: `NO`, `SOON` or `NOW`; equal on all processes at the same place.
        told_by: Name of the signal this process got, or empty.
    """

    def __init__(self, world: World, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.agreed = NO
        self.told_by = ""
        self._told_at = 0.0
        self._group = world.side_group()
        self._asked: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are requests; a second SIGINT is for a user who cannot wait."""
        previous = {number: signal.signal(number, self._tell) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def ask(self, *, until: int = NOW) -> None:
        """One place where all processes may stop.

        Args:
            until: `SOON` stops for any request; `NOW` only after the grace period.

        Raises:
            StopRequested: On all processes, or none.
        """
        mine = self._wanted()
        if self._group is None:
            self.agreed = mine
        else:
            if self._asked is not None:
                flag, work = self._asked
                work.wait()
                self.agreed = max(self.agreed, int(flag))
            flag = torch.tensor(mine, dtype=torch.int32)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = flag, work
        if self.agreed >= until:
            raise StopRequested

    def settle(self) -> None:
        """Wait for the last answer: nothing may be under way when the group closes."""
        if self._asked is not None:
            self._asked[1].wait()
            self._asked = None

    def _wanted(self) -> int:
        if not self.told_by:
            return NO
        late = time.monotonic() - self._told_at >= self.grace_seconds
        return NOW if late else SOON

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if self.told_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.told_by:
            self.told_by, self._told_at = signal.Signals(number).name, time.monotonic()
