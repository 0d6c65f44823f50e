"""Parts in which a rank draws and scores its samples, and which are drawn again for training.

Noise is a function of the path, so a sample drawn later, or a second time, is the same sample:
bit for bit where the network gives the same bits in another batch, up to its rounding elsewhere.
All tables here are equal on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.advantages import LeafAdvantages, best_and_worst
from dancegrpo_fast.config import RolloutConfig, RunConfig, UserError
from dancegrpo_fast.models import Family
from dancegrpo_fast.models.precision import lower_precision
from dancegrpo_fast.parallel.world import World, scorers
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import Reward
from dancegrpo_fast.rewards.scoring import Scoring
from dancegrpo_fast.trajectories import Trajectories

_TEXT = 400  # Bytes of a reason that ranks tell each other.


def chunks(rollout: RolloutConfig, owner: np.ndarray, *, waiting: bool) -> list[np.ndarray]:
    """The parts of an iteration's samples, in order: [P, G] rank that draws each, -1 if none does.

    A part has at most `rollout.chunk` samples of each rank. Where their trees are kept for training
    it holds whole prompts, at least one: no state is drawn in two parts. Without a number, a reward
    that waits has parts of about one batch to be scored while the next is drawn. Every rank draws
    something in every part, because networks are gathered for each: a rank that has no more samples
    draws its last one again.

    Args:
        rollout: `chunk`, `redraw` and `batch_size`.
        owner: [P, G] rank of each sample.
        waiting: A reward waits for another process.

    Raises:
        UserError: A number that would change nothing.
    """
    if rollout.chunk is not None and not (rollout.redraw or waiting):
        raise UserError(
            f"rollout.chunk = {rollout.chunk}: has no effect here: no reward waits for a server, "
            "and all trajectories are kept; set rollout.redraw (with advantage.best_of_n), or null"
        )
    size = rollout.chunk or (rollout.batch_size if waiting else owner.size)
    number = _numbers(owner, size, whole_prompts=not rollout.redraw)
    parts = [np.where(number == k, owner, -1) for k in range(number.max() + 1)]
    for rank in np.unique(owner):
        last = tuple(np.argwhere(owner == rank)[-1])
        for part in parts[number[last] + 1 :]:
            part[last] = rank
    return parts


def _numbers(owner: np.ndarray, size: int, *, whole_prompts: bool) -> np.ndarray:
    """[P, G] part of each sample: in canonical order, so that subtrees stay together."""
    number = np.zeros_like(owner)
    for rank in np.unique(owner):
        own = [(int(p), int(g)) for p, g in np.argwhere(owner == rank)]
        units = [[leaf] for leaf in own]
        if whole_prompts:
            units = [list(group) for _, group in groupby(own, key=lambda leaf: leaf[0])]
        part = filled = 0
        for unit in units:
            if filled and filled + len(unit) > size:
                part, filled = part + 1, 0
            filled += len(unit)
            for leaf in unit:
                number[leaf] = part
    return number


def scorers_of(parts: list[np.ndarray], owner: np.ndarray, sp: int) -> np.ndarray:
    """[P, G] rank that decodes and scores each sample: a group's ranks share each part's.

    Args:
        parts: Of `chunks`.
        owner: [P, G] data rank of each sample.
        sp: Ranks in a group.
    """
    scorer = np.full_like(owner, -1)
    for part in parts:
        new = (part >= 0) & (scorer < 0)
        scorer[new] = scorers(owner[new], sp)
    return scorer


def selection(
    config: RunConfig, owner: np.ndarray, advantages: LeafAdvantages
) -> tuple[np.ndarray, np.ndarray]:
    """[P, G] which samples are trained on, and the rank that holds each, -1 if none does.

    Args:
        config: `advantage.best_of_n` and `keep`, `rollout.redraw`.
        owner: [P, G] rank of each sample.
        advantages: Of all samples.
    """
    selected, rule = advantages.valid, config.advantage
    if rule.best_of_n is not None:
        selected = best_and_worst(advantages, rule.best_of_n, rule.keep)
    if not config.rollout.redraw:
        return selected, owner
    return selected, redrawn(owner, selected & advantages.valid, advantages.valid)


def check_frames(config: RunConfig) -> None:
    """Refuse a reward that is to see frames which samples do not have."""
    count = config.model.frames
    for index, reward in enumerate(config.rewards):
        if outside := [i for i in reward.frames or () if not -count <= i < count]:
            raise UserError(
                f"rewards.{index}.frames = {reward.frames}: samples have model.frames = {count}, "
                f"no {outside[0]}; must be from {-count} to {count - 1}, or null for all"
            )


def arithmetic(
    family: Family, rollout: RolloutConfig, keep: str
) -> AbstractContextManager[None]:
    """Inside, networks compute as a draw wants it that keeps "all", "samples" or "training"."""
    if rollout.pool_dtype is None or keep != "samples":
        return nullcontext()
    return lower_precision(family, rollout.pool_dtype)


def redrawn(owner: np.ndarray, chosen: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[P, G] rank that draws each sample again for training, -1 if none does.

    A rank without a chosen sample draws one of its own, a valid one if there is any: it owes the
    others calls of zero weight, and 0 x NaN is NaN.

    Args:
        owner: [P, G] rank of each sample.
        chosen: [P, G] bool, samples that are trained.
        valid: [P, G] bool, samples whose rewards are numbers.
    """
    again = np.where(chosen, owner, -1)
    for rank in np.unique(owner):
        if not (again == rank).any():
            own = owner == rank
            usable = own & valid
            again[tuple(np.argwhere(usable if usable.any() else own)[0])] = rank
    return again


@dataclass
class Scores(ABC):
    """The scores of one iteration: of this rank's samples as they come, then of every rank's.

    Attributes:
        prompts: P prompts.
        scorer: [P, G] rank that scores each sample.
        rewards: R rewards.
        family: Decodes.
        config: The recipe.
        world: This process.
    """

    prompts: Sequence[Prompt]
    scorer: np.ndarray
    rewards: Sequence[Reward]
    family: Family
    config: RunConfig
    world: World

    def __post_init__(self) -> None:
        self._reasons: tuple[str, ...] = ("",) * len(self.rewards)

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is still being scored ends; after an exception nobody waits for it."""

    @abstractmethod
    def due(self, drawn: Trajectories) -> int:
        """How many of some samples this rank has to score."""

    @abstractmethod
    def add(self, drawn: Trajectories, progress: Callable[[int], object]) -> None:
        """Decode those samples, and score them or have it begun."""

    @abstractmethod
    def gathered(self) -> tuple[np.ndarray, tuple[str, Tensor] | None]:
        """Rewards [P, G, R] of all ranks' samples, and this rank's first prompt and sample."""

    def failure(self, rewards: np.ndarray, iteration: int) -> str:
        """Why the run cannot go on with these rewards of an iteration; empty if it can.

        A collective where it is not empty; the same on every rank.
        """
        for column, reward in enumerate(self.config.rewards):
            failed = ~np.isfinite(rewards[..., column])
            if not reward.weight or not (failed.all() or failed.mean() > reward.max_failed):
                continue
            share = f"all {failed.size}"
            if not failed.all():
                share = f"{failed.sum()} of {failed.size} (max_failed = {reward.max_failed:g})"
            why = self._first_text(self._reasons[column]) or "it returned NaN"
            return (
                f"rewards.{column}.name = {reward.name!r}: {share} samples of iteration "
                f"{iteration} failed ({why}); the weights are untouched: mend the reward and "
                "continue with --resume latest"
            )
        return ""

    def _first_text(self, own: str) -> str:
        """The first rank's text that is not empty."""
        row = torch.zeros(1, _TEXT, dtype=torch.uint8)
        given = own.encode("utf-8", "replace")[:_TEXT]
        row[0, : len(given)] = torch.tensor(list(given), dtype=torch.uint8)
        texts = self.world.gather_rows(row, [1] * self.world.size)
        found = (bytes(text[0].tolist()).rstrip(b"\0").decode("utf-8", "ignore") for text in texts)
        return next(filter(None, found), "")


class PartScoring(Scores):
    """The scores of samples that are drawn part by part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scored = np.argwhere(self.scorer == self.world.rank)
        self._leaves = [(int(p), int(g)) for p, g in scored]
        self._own = [self.prompts[p] for p, _ in self._leaves]
        self._scoring = Scoring(
            [prompt.text for prompt in self._own],
            self.family.decode,
            self.rewards,
            batch_size=self.config.rollout.batch_size,
            groups=[p for p, _ in self._leaves],
            metadata=[prompt.metadata for prompt in self._own],
            fps=self.config.model.fps,
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._scoring.__exit__(kind)

    def due(self, drawn: Trajectories) -> int:
        """See `Scores`."""
        return len(self._due(drawn))

    def add(self, drawn: Trajectories, progress: Callable[[int], object]) -> None:
        """See `Scores`."""
        self._scoring.add(drawn.samples(self._due(drawn)), progress)

    def _due(self, drawn: Trajectories) -> list[tuple[int, int]]:
        due = set(self._leaves[self._scoring.taken :])
        return [leaf for leaf in drawn.leaves if leaf in due]

    def gathered(self) -> tuple[np.ndarray, tuple[str, Tensor] | None]:
        """See `Scores`."""
        own = self._scoring.finish()
        self._reasons = own.reasons
        clip = (self._own[0].text, own.clip) if self._own else None
        return self.world.gather_rewards(own.values, self.scorer), clip
