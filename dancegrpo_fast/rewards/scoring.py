"""Decode and score one rank's samples. A reward that fails gives NaN, never a number.

Rewards of this process use its device, so they run at once. Those that wait for another process
run in a thread, in order, while the next samples are drawn; decoding stays on the main thread.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards.interface import Reward, Samples, Scored, placed, score
from dancegrpo_fast.rewards.loading import deadline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Rewards of one rank's samples.

    Attributes:
        values: [n, R] float32 on the CPU, NaN where a reward failed.
        reasons: R texts: the first failure of each reward, or empty.
        clip: [F, 3, H, W] the first sample, for people to look at; empty without samples.
    """

    values: Tensor
    reasons: tuple[str, ...]
    clip: Tensor

    @property
    def first_error(self) -> str:
        """Of the first reward that failed, or empty."""
        return next((why for why in self.reasons if why), "")


def waits(reward: Reward) -> bool:
    """Whether a reward mostly waits for another process, so that it can run in a thread.

    Ours that ask a server do; one of your own says so with `remote = True`. It then gets pixels in
    CPU memory, from one thread at a time, and is never moved to a device.
    """
    inner: Any = reward
    while hasattr(inner, "_placed"):  # A reward made of another.
        inner = inner._placed
    return bool(getattr(inner, "remote", deadline(inner) is not None))


@torch.no_grad()
def score_latents(
    latents: Tensor,
    prompts: Sequence[str],
    decode: Callable[[Tensor], Tensor],
    rewards: Sequence[Reward],
    *,
    batch_size: int,
    groups: Sequence[int] = (),
    metadata: Sequence[Mapping[str, Any]] = (),
    fps: float | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Scores:
    """Decode n latents [n, C, F, H, W] and score them all; see `Scoring`."""
    with Scoring(
        prompts, decode, rewards, batch_size=batch_size, groups=groups, metadata=metadata, fps=fps
    ) as scoring:
        scoring.add(latents, progress)
        return scoring.finish()


class Scoring:
    """Rewards of n samples that come in parts, in order. Close it: a thread may be at work.

    Rewards that compare the samples of a prompt run once all of these have come, on 8-bit pixels in
    CPU memory; the others on each batch. Pixels of at most two parts wait for the thread.

    Args:
        prompts: n prompts.
        decode: Latents to pixels [B, F, 3, H, W] in [0, 1].
        rewards: R rewards. One that raises gives NaN for its batch and is logged.
        batch_size: Samples at once.
        groups: n numbers, equal for the samples of one prompt; empty goes by the prompts.
        metadata: n mappings from the prompts' file, or empty.
        fps: Frames per second of the videos, where known.

    Attributes:
        taken: Samples that have come.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        decode: Callable[[Tensor], Tensor],
        rewards: Sequence[Reward],
        *,
        batch_size: int,
        groups: Sequence[int] = (),
        metadata: Sequence[Mapping[str, Any]] = (),
        fps: float | None = None,
    ) -> None:
        nothing = torch.zeros(len(prompts), 1, 3, 1, 1)
        self._all = Samples(nothing, prompts, fps, metadata, groups)
        self._decode, self._rewards, self._batch_size = decode, rewards, batch_size
        self._values = torch.full((len(prompts), len(rewards)), torch.nan)
        self._reasons = [""] * len(rewards)
        self._clip = torch.zeros(0)
        together = [bool(getattr(reward, "groupwise", False)) for reward in rewards]
        self._apart = [column for column, whole in enumerate(together) if not whole]
        self._together = [column for column, whole in enumerate(together) if whole]
        self._left = Counter(self._all.groups)  # Samples of each prompt that have not come.
        self._kept: dict[int, Tensor | None] = {}  # Pixels [F, 3, H, W] uint8; None: not finite.
        self._waiting = {column for column, reward in enumerate(rewards) if waits(reward)}
        self._thread = _Thread() if self._waiting else None
        self._pending: deque[list[Future[None]]] = deque()  # Of each part.
        self.taken = 0

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            # A user who presses Ctrl-C twice does not wait for a server.
            self._thread.close(wait=kind is not KeyboardInterrupt)

    @torch.no_grad()
    def add(
        self, latents: Tensor, progress: Callable[[int], object] = lambda count: None
    ) -> None:
        """Decode the next samples and begin to score them.

        Args:
            latents: [k, C, F, H, W].
            progress: Called with the number of samples after each batch.
        """
        here = [r for column, r in enumerate(self._rewards) if column not in self._waiting]
        while len(self._pending) > 1:
            self._collect()
        self._pending.append([])
        with placed(here, latents.device):
            for start in range(0, len(latents), self._batch_size):
                videos = self._decode(latents[start : start + self._batch_size])
                rows = list(range(self.taken, self.taken + len(videos)))
                if not self.taken:
                    self._clip = videos[0].clone().cpu()  # No view: it outlives the batch.
                self._score(self._apart, rows, videos)
                if self._together:
                    self._keep(rows, videos)
                self.taken += len(videos)
                progress(len(videos))
            if self._together:
                self._score_complete_groups()

    def finish(self) -> Scores:
        """Wait for what is still being scored.

        Raises:
            UserError: A reward returned another number of scores.
        """
        assert self.taken == len(self._all), "samples are missing"
        while self._pending:
            self._collect()
        return Scores(self._values, tuple(self._reasons), self._clip)

    def _keep(self, rows: Sequence[int], videos: Tensor) -> None:
        # 8 bits have no NaN: a broken sample must not turn into a black one.
        fine = videos.isfinite().flatten(1).all(dim=1).tolist()
        pixels = (videos * 255).round().clamp(0, 255).to("cpu", torch.uint8)
        for row, good, video in zip(rows, fine, pixels, strict=True):
            self._kept[row] = video if good else None
            self._left[self._all.groups[row]] -= 1

    def _score_complete_groups(self) -> None:
        complete = [row for row in self._kept if not self._left[self._all.groups[row]]]
        came = {row: self._kept.pop(row) for row in complete}
        pixels = {row: video for row, video in came.items() if video is not None}
        if len(pixels) < len(came):
            for column in self._together:
                why = f"{self._rewards[column].name}: a pixel is not finite"
                self._reasons[column] = self._reasons[column] or why
        if pixels:
            self._score(self._together, list(pixels), torch.stack(list(pixels.values())))

    def _score(self, columns: Sequence[int], rows: list[int], videos: Tensor) -> None:
        """Score samples now, or have it done; rewards share what is read of one `Samples`."""
        later = [column for column in columns if column in self._waiting]
        samples = replace(self._all.of(rows), videos=videos)
        self._run([column for column in columns if column not in later], rows, samples)
        if later:
            assert self._thread is not None
            waiting = replace(samples, videos=videos.cpu())
            job = self._thread.submit(lambda: self._run(later, rows, waiting))
            self._pending[-1].append(job)

    def _run(self, columns: Sequence[int], rows: list[int], samples: Samples) -> None:
        with torch.no_grad():  # Of this thread.
            for column in columns:
                reward = self._rewards[column]
                scored = attempt(reward, samples)
                self._values[rows, column] = scored.values
                reason = next((f"{reward.name}: {why}" for why in scored.errors if why), "")
                self._reasons[column] = self._reasons[column] or reason

    def _collect(self) -> None:
        """Wait for the oldest part that is being scored."""
        for job in self._pending.popleft():
            job.result()


class _Thread:
    """Runs jobs one after the other; does not keep the process alive."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Have it run; the future ends with it, or raises what it raises."""
        future: Future[None] = Future()
        self._jobs.put((future, job))
        return future

    def close(self, *, wait: bool) -> None:
        """Drop what has not begun, and wait for what has."""
        while not self._jobs.empty():
            try:
                self._jobs.get_nowait()
            except queue.Empty:  # The thread has taken it.
                break
        self._jobs.put(None)
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            future, job = entry
            try:
                job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del entry, job  # Its pixels.


def check_whole_groups(rewards: Sequence[Reward], owner: np.ndarray) -> None:
    """Refuse rewards that compare the samples of a prompt where ranks share its samples.

    Args:
        rewards: R rewards.
        owner: [P, G] rank that scores each sample.

    Raises:
        UserError: The first such reward, by its place in the recipe.
    """
    for index, reward in enumerate(rewards):
        if getattr(reward, "groupwise", False) and (owner != owner[:, :1]).any():
            raise UserError(
                f"rewards.{index}.name = {reward.name!r}: compares all samples of a prompt, but "
                f"{owner.shape[0]} prompts over {owner.max() + 1} processes split some; make "
                "data.prompts_per_iteration a multiple of the processes, with parallel.sp = 1 and "
                "parallel.groups = together"
            )


def attempt(reward: Reward, samples: Samples) -> Scored:
    """Scores of a reward that may raise anything: NaN with the reason, and a line in the log.

    Raises:
        UserError: It returned another number of scores.
    """
    try:
        scored = score(reward, samples)
    except Exception as error:  # A user's reward may raise anything; the run goes on.
        reason = f"{type(error).__name__}: {error}"
        scored = Scored(torch.full((len(samples),), torch.nan), (reason,) * len(samples))
    if scored.values.shape != (len(samples),):
        raise UserError(
            f"reward {reward.name} returned shape {tuple(scored.values.shape)} for {len(samples)} "
            f"samples; it must return [{len(samples)}]"
        )
    reasons = Counter(why for why in scored.errors if why)
    for why, count in reasons.items():
        logger.warning("reward failed for %d samples: %s: %s", count, reward.name, why)
    return scored
