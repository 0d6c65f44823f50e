"""Rewards made of rewards: on chosen frames, one part alone, pairwise win rate, threshold.

Weights and the place where several rewards meet (reward, advantage or loss) are the recipe's
`advantage.combine`; these work on the scores of one reward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dancegrpo_fast.rewards.interface import (
    HasParts,
    Reward,
    SampleReward,
    Samples,
    Scored,
    not_a_number,
    score,
    score_parts,
)


@runtime_checkable
class Judge(Protocol):
    """Compares two samples of one prompt; a reward without scores of its own."""

    name: str

    def compare(self, first: Samples, second: Samples) -> Tensor:
        """[K] in [0, 1]: how far the first of each pair wins; 0.5 for a tie and for an answer that
        says neither, NaN where there was no answer."""
        ...


@runtime_checkable
class Movable(Protocol):
    """A reward or judge with weights; see `Placeable`."""

    offload: bool

    def place(self, device: torch.device | str) -> object:
        """Move the weights."""
        ...


class _Wrapped(SampleReward):
    """Keeps the inner reward's name and place."""

    offload: bool = False

    def __init__(self, inner: Reward | Judge) -> None:
        self.name, self._placed, self.device = inner.name, inner, torch.device("cpu")
        self.groupwise = getattr(inner, "groupwise", False)

    def place(self, device: torch.device | str) -> None:
        """See `Placeable.place`."""
        self.device = torch.device(device)
        if isinstance(self._placed, Movable):
            self._placed.place(device)


class OnFrames(_Wrapped):
    """The reward of some frames only, as a shorter video; positions count from the end if < 0."""

    def __init__(self, inner: Any, frames: Sequence[int]) -> None:
        super().__init__(inner)
        self.inner, self.frames = inner, tuple(frames)
        able = hasattr(inner, "gradient_scores")  # A class of the user's need not have it.
        self.differentiable = able and getattr(inner, "differentiable", False)

    def _chosen(self, samples: Samples) -> Samples:
        count = samples.videos.shape[1]
        if outside := [i for i in self.frames if not -count <= i < count]:
            raise ValueError(f"frames = {list(self.frames)}: the videos have {count}, no {outside}")
        return replace(samples, videos=samples.videos[:, list(self.frames)])

    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        return score(self.inner, self._chosen(samples))

    def gradient_scores(self, samples: Samples) -> Tensor:
        """See `SampleReward.gradient_scores`."""
        if not self.differentiable:
            return super().gradient_scores(samples)
        scores: Tensor = self.inner.gradient_scores(self._chosen(samples))
        return scores


class Threshold(_Wrapped):
    """1 above the threshold, else 0 (DanceGRPO's binary rewards); a failure stays a failure."""

    def __init__(self, inner: Reward, threshold: float) -> None:
        super().__init__(inner)
        self.inner, self.threshold = inner, threshold

    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        scored = score(self.inner, samples)
        passed = (scored.values > self.threshold).float()
        return Scored(torch.where(scored.values.isnan(), torch.nan, passed), scored.errors)


@dataclass
class SharedParts:
    """A reward with parts that is run once for all of its parts in a recipe."""

    inner: HasParts

    def __post_init__(self) -> None:
        self._samples: Callable[[], Samples | None] = lambda: None
        self._parts: tuple[Tensor, dict[int, str]] | None = None

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[int, str]]:
        """Parts [N, K] and reasons by position; those of the last samples are kept."""
        if self._parts is None or self._samples() is not samples:
            self._parts = score_parts(self.inner, samples)
            self._samples = weakref.ref(samples)  # Weak: pixels must not outlive their batch.
        return self._parts


class Part(_Wrapped):
    """One measure of a reward that has several."""

    def __init__(self, shared: SharedParts, part: str) -> None:
        super().__init__(shared.inner)
        self.shared, self.column = shared, shared.inner.part_names.index(part)
        self.name = f"{shared.inner.name}.{part}"

    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        parts, errors = self.shared(samples)
        return Scored.of(parts[:, self.column], errors)


class WinRate(_Wrapped):
    """Share of the prompt's other samples that a sample beats (Pref-GRPO, arXiv 2508.20751).

    Every unordered pair is judged once or, with `both`, in both orders. `balanced` alternates
    which sample stands first, so that each is first in half of its pairs (odd ones out by one):
    a judge that prefers the first picture then helps all samples alike. A pair without an answer
    counts for neither; a sample without any answered pair has no score. A reward that scores
    samples apart can be the judge too: the higher score wins.

    With every pair answered the win rates of G samples add up to G / 2.
    """

    #: Pairs per call of the judge, and samples per call of a reward.
    at_once = 16

    def __init__(
        self, inner: Reward | Judge, order: Literal["balanced", "both"] = "balanced"
    ) -> None:
        super().__init__(inner)
        self.inner, self.groupwise, self.order = inner, True, order

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        if not len(samples):
            return Scored.of(torch.zeros(0))
        members: dict[int, list[int]] = {}
        for index, number in enumerate(samples.groups):
            members.setdefault(number, []).append(index)
        pairs = [pair for group in members.values() for pair in self._ordered(group)]
        outcomes, errors = self._outcomes(samples, pairs)
        wins, counts = torch.zeros(len(samples)), torch.zeros(len(samples))
        for (first, second), won in zip(pairs, outcomes.tolist(), strict=True):
            if not_a_number(won):
                continue
            wins[first] += won
            wins[second] += 1 - won
            counts[first] += 1
            counts[second] += 1
        for group in members.values():
            if len(group) == 1:
                errors[group[0]] = "its prompt has no other sample to compare with"
        missing = {i: errors.get(i, "no pair was judged") for i in range(len(samples))}
        return Scored.of(wins / counts, {i: why for i, why in missing.items() if not counts[i]})

    def _ordered(self, group: list[int]) -> list[tuple[int, int]]:
        """Pairs of one group, the one that the judge sees first standing first."""
        pairs = []
        for (a, first), (b, second) in combinations(enumerate(group), 2):
            turned = (a + b) % 2 == 0
            if self.order == "both":
                pairs += [(first, second), (second, first)]
            else:
                pairs.append((second, first) if turned else (first, second))
        return pairs

    def _outcomes(
        self, samples: Samples, pairs: list[tuple[int, int]]
    ) -> tuple[Tensor, dict[int, str]]:
        """[pairs] how far the first wins, NaN without an answer; and reasons by sample."""
        errors: dict[int, str] = {}
        if not isinstance(self.inner, Judge):
            every = range(len(samples))
            chunks = [every[i : i + self.at_once] for i in every[:: self.at_once]]
            found = [score(self.inner, self._moved(samples.of(rows))) for rows in chunks]
            reasons = [why for scored in found for why in scored.errors]
            errors = {i: why for i, why in enumerate(reasons) if why}
            values = torch.cat([scored.values for scored in found])
            a, b = (values[[pair[k] for pair in pairs]] for k in (0, 1))
            won = (a > b).float() + (a == b).float() / 2
            return torch.where(a.isnan() | b.isnan(), torch.nan, won), errors
        outcomes = []
        for chunk in self._calls(samples, pairs):
            first, second = (self._moved(samples.of([pair[k] for pair in chunk])) for k in (0, 1))
            try:
                won = self.inner.compare(first, second).float().cpu()
                if won.shape != (len(chunk),):
                    raise ValueError(f"compared {len(chunk)} pairs and gave {list(won.shape)}")
                outside = won.isfinite() & ((won < 0) | (won > 1))
                won = torch.where(outside, torch.nan, won)
            except Exception as error:  # A judge may raise anything; the other pairs still count.
                won = torch.full((len(chunk),), torch.nan)
                for judged in {i for pair in chunk for i in pair}:
                    errors[judged] = f"{type(error).__name__}: {error}"
            outcomes.append(won)
        return torch.cat(outcomes) if outcomes else torch.zeros(0), errors

    def _calls(
        self, samples: Samples, pairs: list[tuple[int, int]]
    ) -> Iterator[list[tuple[int, int]]]:
        """Pairs for one call. A call never mixes prompts: what a crash costs must not depend on
        which other prompts a process holds."""
        for _, group in groupby(pairs, key=lambda pair: samples.groups[pair[0]]):
            chunk = list(group)
            yield from (chunk[i : i + self.at_once] for i in range(0, len(chunk), self.at_once))

    def _moved(self, samples: Samples) -> Samples:
        """The samples where the judge is: all of a prompt wait in CPU memory."""
        return replace(samples, videos=samples.videos.to(self.device))
