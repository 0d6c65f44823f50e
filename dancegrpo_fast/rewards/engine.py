"""What a reward server computes with: a thread and a copy of the reward per device, one queue.

A thread takes all jobs of one shape that wait and scores them together, without waiting for more:
alone a job is not delayed, and under load batches grow by themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards.interface import Placeable, Reward, Samples, Scored, score
from dancegrpo_fast.rewards.scoring import attempt

logger = logging.getLogger(__name__)


class Expired(Exception):
    """The job was not begun before its client stopped to wait."""


class Stopped(Exception):
    """The server is stopping."""


@dataclass(eq=False)  # A job is itself: equal pixels do not make it another.
class Job:
    """Samples that wait for scores.

    Attributes:
        samples: In CPU memory.
        give_up: `time.monotonic()` after which nobody waits.
        done: Its `Scored`, or `Expired` or `Stopped`.
    """

    samples: Samples
    give_up: float
    done: Future[Scored] = field(default_factory=Future)

    def fits(self, other: Job) -> bool:
        """Whether both can be one batch."""
        mine, theirs = self.samples, other.samples
        return (
            mine.videos.shape[1:] == theirs.videos.shape[1:]
            and mine.videos.dtype == theirs.videos.dtype
            and mine.fps == theirs.fps
        )


class Engine:
    """One reward on one device or several.

    Args:
        replicas: The reward, once per device.
        devices: Where each of them computes.
        largest_batch: Samples that are scored together; a larger job stays whole.
    """

    def __init__(
        self, replicas: Sequence[Reward], devices: Sequence[torch.device], *, largest_batch: int
    ) -> None:
        first = replicas[0]
        self.name, self.largest_batch = first.name, largest_batch
        self.groupwise = bool(getattr(first, "groupwise", False))
        self.counts: Counter[str] = Counter(jobs=0, samples=0, failed=0, batches=0, expired=0)
        self.seconds = 0.0
        self._jobs: deque[Job] = deque()
        self._wake, self._stopping = threading.Condition(), False
        self._threads = [
            threading.Thread(target=self._work, args=pair, name=f"{self.name}-{n}", daemon=True)
            for n, pair in enumerate(zip(replicas, devices, strict=True))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Stopped: It will not be scored.
        """
        with self._wake:
            if self._stopping:
                raise Stopped
            self._jobs.append(job)
            self._wake.notify()

    @property
    def waiting(self) -> int:
        """Jobs that no thread has taken."""
        return len(self._jobs)

    def stop(self, seconds: float) -> None:
        """Refuse jobs, fail the waiting ones, and let the running ones finish for some time."""
        with self._wake:
            self._stopping = True
            left, self._jobs = list(self._jobs), deque()
            self._wake.notify_all()
        for job in left:
            _finish(job, Stopped())
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _take(self) -> list[Job]:
        """Waits for jobs and takes a batch of one shape, in order of arrival; empty at the end."""
        with self._wake:
            while not self._jobs and not self._stopping:
                self._wake.wait()
            batch: list[Job] = []
            for job in list(self._jobs):
                total = sum(len(taken.samples) for taken in batch) + len(job.samples)
                if not batch or (job.fits(batch[0]) and total <= self.largest_batch):
                    batch.append(job)
                    self._jobs.remove(job)
            return batch

    def _work(self, reward: Reward, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # It takes no "cuda".
        if isinstance(reward, Placeable):
            reward.place(device)
        while batch := self._take():
            now = time.monotonic()
            late = [job for job in batch if job.give_up < now]
            for job in late:
                self._count(expired=1)
                _finish(job, Expired())
            batch = [job for job in batch if job.give_up >= now]
            if batch:
                self._score(reward, device, batch)

    def _score(self, reward: Reward, device: torch.device, batch: Sequence[Job]) -> None:
        start = time.monotonic()
        try:
            found = _together(reward, device, batch)
        except Exception as error:  # One client's samples must not cost another its scores.
            logger.info("%s: %d jobs are scored one by one: %s", self.name, len(batch), error)
            found = [_alone(reward, device, job.samples) for job in batch]
        failed = sum(bool(why) for scored in found for why in scored.errors)
        self._count(
            time.monotonic() - start,
            jobs=len(batch),
            batches=1,
            samples=sum(len(job.samples) for job in batch),
            failed=failed,
        )
        for job, scored in zip(batch, found, strict=True):
            _finish(job, scored)

    def _count(self, seconds: float = 0.0, **counts: int) -> None:
        with self._wake:
            self.counts.update(counts)
            self.seconds += seconds


def _finish(job: Job, result: Scored | Exception) -> None:
    if not job.done.set_running_or_notify_cancel():
        return  # The client has left.
    if isinstance(result, Exception):
        job.done.set_exception(result)
    else:
        job.done.set_result(result)


def _on(samples: Samples, device: torch.device) -> Samples:
    return replace(samples, videos=samples.videos.to(device))


def _together(reward: Reward, device: torch.device, batch: Sequence[Job]) -> list[Scored]:
    """Scores of several jobs from one call.

    Raises:
        Exception: Whatever the reward raises; ValueError for another number of scores.
    """
    samples = batch[0].samples if len(batch) == 1 else _joined([job.samples for job in batch])
    with torch.no_grad():
        scored = score(reward, _on(samples, device))
    if scored.values.shape != (len(samples),):
        raise ValueError(f"{len(samples)} samples, scores {list(scored.values.shape)}")
    found, start = [], 0
    for job in batch:
        stop = start + len(job.samples)
        found.append(Scored(scored.values[start:stop], scored.errors[start:stop]))
        start = stop
    return found


def _alone(reward: Reward, device: torch.device, samples: Samples) -> Scored:
    """Scores of one job, all NaN with the reason if it cannot be scored."""
    try:
        with torch.no_grad():
            return attempt(reward, _on(samples, device))
    except (UserError, torch.cuda.OutOfMemoryError) as error:  # A reward of the wrong shape.
        return Scored.of(
            torch.full((len(samples),), torch.nan), dict.fromkeys(range(len(samples)), str(error))
        )


def _joined(several: Sequence[Samples]) -> Samples:
    """One batch; prompts' groups of different jobs stay apart."""
    metadata: list[Any] = []
    groups: list[int] = []
    for samples in several:
        metadata += samples.metadata or [{}] * len(samples)
        numbers = {g: len(set(groups)) + n for n, g in enumerate(dict.fromkeys(samples.groups))}
        groups += [numbers[g] for g in samples.groups]
    return Samples(
        torch.cat([samples.videos for samples in several]),
        [prompt for samples in several for prompt in samples.prompts],
        several[0].fps,
        metadata if any(samples.metadata for samples in several) else (),
        groups,
    )
