"""A set of prompts, and which of them each iteration draws."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dancegrpo_fast.config import DataConfig, RunConfig, UserError
from dancegrpo_fast.data.files import Malformed, read_prompts
from dancegrpo_fast.ops.noise import NoiseKey, permutation
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.roles import Role

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file.

    Attributes:
        prompts: The prompts; repeated lines are repeated prompts, drawn as often as they stand.
    """

    prompts: tuple[Prompt, ...]

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        field: str = "data.prompts",
        column: str = "prompt",
        malformed: Malformed = "refuse",
    ) -> PromptSet:
        """Everything that `files.read_prompts` finds; see there."""
        return cls(tuple(read_prompts(source, field=field, column=column, malformed=malformed)))

    @classmethod
    def held_out(cls, config: RunConfig) -> PromptSet:
        """The recipe's held-out prompts; their file has the columns of the training one."""
        source = config.evaluation.prompts
        assert source is not None
        return cls.load(source, field="evaluation.prompts", column=config.data.column)

    @classmethod
    def of(cls, config: DataConfig) -> PromptSet:
        """The training prompts of a recipe: those of its source that pass its filters.

        Raises:
            UserError: See `files.read_prompts`; or nothing passes.
        """
        whole = cls.load(config.prompts, column=config.column, malformed=config.malformed)
        dropped = Counter[str]()
        kept = []
        for prompt in whole.prompts:
            if reason := _unwanted(prompt.text, config):
                dropped[reason] += 1
            else:
                kept.append(prompt)
        if dropped:
            told = ", ".join(f"{count} by data.{name}" for name, count in sorted(dropped.items()))
            if not kept:
                raise UserError(
                    f"data.prompts = {config.prompts!r}: the filters leave none of its "
                    f"{len(whole.prompts)} prompts ({told} left out); widen them"
                )
            logger.info("%d of %d prompts are kept (%s)", len(kept), len(whole.prompts), told)
        return cls(tuple(kept))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts' texts."""
        return tuple(prompt.text for prompt in self.prompts)

    def need_images(self, field: str) -> None:
        """Refuse prompts without an image, for families that start from one.

        Args:
            field: Configuration field that named the file.
        """
        missing = [number for number, p in enumerate(self.prompts, 1) if p.image is None]
        if missing:
            raise UserError(
                f"{field}: prompt {missing[0]} of {len(self.prompts)} has no image ({len(missing)} "
                "have none), and this family starts from one; give a .jsonl file with an \"image\" "
                "a line, or model.first_frame"
            )

    def batch(self, iteration: int, seed: int, count: int) -> list[tuple[int, Prompt]]:
        """Returns the `count` prompts of one iteration as (index in the file, prompt).

        Each epoch goes through a fresh permutation. Up to `len(prompts)` prompts are distinct in
        an iteration: the rest of an epoch, too short for one more, is left out (other prompts each
        time). A larger count goes round the set without leaving any out.

        Args:
            iteration: Counted from 0.
            seed: The run's seed.
            count: Prompts of every iteration, at least 1.
        """
        if iteration < 0 or count < 1:
            raise ValueError(f"iteration = {iteration}, count = {count}: need >= 0 and >= 1")
        total = len(self.prompts)
        epoch_length = total - total % count if count <= total else total
        chosen = []
        for position in range(iteration * count, (iteration + 1) * count):
            epoch, place = divmod(position, epoch_length)
            index = int(_epoch_order(total, seed, epoch)[place])
            chosen.append((index, self.prompts[index]))
        return chosen


class Draws:
    """The prompts of one iteration after another.

    Without skipping they are `PromptSet.batch`, a function of the iteration. With it, a prompt
    whose group taught nothing is left out for some epochs, so they are a function of the rewards
    too, which every process holds; what is to be known of these is `state`, kept in snapshots.

    Attributes:
        place: With skipping: positions of all epochs that are behind.
        until: Prompts that are left out, and the epoch in which each comes back.
    """

    def __init__(self, prompts: PromptSet, config: DataConfig, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.count, self.epochs = config.prompts_per_iteration, config.skip_zero_variance
        self.place = 0
        self.until: dict[int, int] = {}
        total = len(prompts.prompts)
        if self.epochs is not None and self.count > total:
            raise UserError(
                f"data.skip_zero_variance = {self.epochs}: each iteration draws all {total} "
                f"prompts (prompts_per_iteration = {self.count}), so none can be left out; set it "
                "to null"
            )

    def batch(self, iteration: int) -> list[tuple[int, Prompt]]:
        """The (index, prompt) pairs of an iteration; changes nothing."""
        if self.epochs is None:
            return self.prompts.batch(iteration, self.seed, self.count)
        return [(index, self.prompts.prompts[index]) for _, index in self._next()]

    def _next(self) -> list[tuple[int, int]]:
        """(position, index) of the next prompts.

        Like the rest of an epoch that is too short for an iteration, an epoch with too few prompts
        passes: in a later one those that are left out have come back.
        """
        total = len(self.prompts.prompts)
        epoch, place = divmod(self.place, total)
        while True:
            order = _epoch_order(total, self.seed, epoch).tolist()
            left = [
                (epoch * total + position, order[position])
                for position in range(place, total)
                if self.until.get(order[position], 0) <= epoch
            ]
            if len(left) >= self.count:
                return left[: self.count]
            epoch, place = epoch + 1, 0

    def finish(self, silent: Sequence[bool]) -> dict[str, float]:
        """Go on to the next iteration.

        Args:
            silent: Which prompts of this one had a group without a spread in its rewards.

        Returns:
            Metrics: the share of prompts that are left out now.
        """
        if self.epochs is None:
            return {}
        drawn, total = self._next(), len(self.prompts.prompts)
        self.place = drawn[-1][0] + 1
        for (position, index), quiet in zip(drawn, silent, strict=True):
            if quiet:
                self.until[index] = position // total + 1 + self.epochs
        epoch = self.place // total
        self.until = {index: back for index, back in self.until.items() if back > epoch}
        return {"data/skipped": len(self.until) / total}

    @property
    def state(self) -> dict[str, Any]:
        """What a snapshot keeps, for JSON."""
        return {"place": self.place, "until": {str(i): e for i, e in self.until.items()}}

    @state.setter
    def state(self, stored: Mapping[str, Any]) -> None:
        self.place = stored["place"]
        self.until = {int(index): epoch for index, epoch in stored["until"].items()}


def _unwanted(text: str, config: DataConfig) -> str:
    """The filter that a prompt does not pass; empty if it passes all."""
    if config.min_length is not None and len(text) < config.min_length:
        return "min_length"
    if config.max_length is not None and len(text) > config.max_length:
        return "max_length"
    if config.match is not None and not re.search(config.match, text):
        return "match"
    if config.exclude is not None and re.search(config.exclude, text):
        return "exclude"
    return ""


@lru_cache(maxsize=4)
def _epoch_order(total: int, seed: int, epoch: int) -> np.ndarray:
    order = permutation(total, NoiseKey.from_seed(seed).fold_in(Role.DATA).fold_in(epoch).draw())
    order.flags.writeable = False  # shared by every caller through the cache
    return order
