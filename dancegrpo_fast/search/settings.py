"""What is searched, what it cost and what was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.trees.tree import ROOT_STEP, TreePlan

METHODS = ("brute", "greedy", "beam")


@dataclass(frozen=True)
class SearchSettings:
    """What is searched.

    Attributes:
        method: "brute", "greedy" or "beam".
        width: Candidates of each visited state (K).
        steps: Steps at which states get candidates, ascending; -1 is the initial noise.
        beam: Candidates of a tree that go on (B), for "beam".

    Raises:
        ValueError: A value out of range, or a beam for another method.
    """

    method: str
    width: int
    steps: tuple[int, ...]
    beam: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r}: must be one of {', '.join(METHODS)}")
        if self.width < 1:
            raise ValueError(f"width = {self.width}: must be at least 1")
        if not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps = {list(self.steps)}: give distinct steps in ascending order")
        if (self.method == "beam") != (self.beam is not None):
            raise ValueError(
                f"beam = {self.beam} with method = {self.method!r}: it goes with 'beam', which "
                "needs it"
            )
        if self.beam is not None and self.beam < 1:
            raise ValueError(f"beam = {self.beam}: must be at least 1")

    @property
    def kept(self) -> float:
        """The most candidates of a tree that go on from a search step."""
        return float("inf") if self.method == "brute" else self.beam or 1

    def check(self, schedule: Schedule) -> None:
        """Refuse steps that the schedule does not have.

        Raises:
            ValueError: A step outside -1 .. steps - 2; the last step takes no noise.
        """
        last = schedule.steps - 2
        if self.steps[0] < ROOT_STEP or self.steps[-1] > last:
            raise ValueError(
                f"steps = {list(self.steps)}: must lie from -1 (the initial noise) to {last}, the "
                f"last stochastic step of a schedule of {schedule.steps}"
            )


@dataclass
class SearchCost:
    """What one tree cost.

    Attributes:
        evaluations: Of the model (with guidance each is two of the network).
        previews: Unfinished samples that were decoded.
        reward_calls: Samples that were scored: previews and finished ones.
    """

    evaluations: int = 0
    previews: int = 0
    reward_calls: int = 0

    @classmethod
    def total(cls, costs: Iterable[SearchCost]) -> SearchCost:
        """Of several trees together."""
        rows = [(c.evaluations, c.previews, c.reward_calls) for c in costs]
        return cls(*map(sum, zip(*rows, strict=True)))


@dataclass(frozen=True)
class Found:
    """What the search in one tree found.

    Attributes:
        plan: The tree as it grew; an edge is trained if it leads to a candidate.
        latents: [C, F, H, W] of searched states, of their candidates and of finished samples.
        log_prob: Of the edges into candidates, as drawn.
        previews: [R] values of the previews that were made, by candidate.
        scores: [R] values of the finished samples, by state.
        ranked: States of the finished samples, best first, failed ones last.
        cost: What it took.
    """

    plan: TreePlan
    latents: dict[int, Tensor]
    log_prob: dict[int, Tensor]
    previews: dict[int, np.ndarray]
    scores: dict[int, np.ndarray]
    ranked: tuple[int, ...]
    cost: SearchCost

    @property
    def sample(self) -> Tensor:
        """[C, F, H, W] the best finished sample."""
        return self.latents[self.ranked[0]]

    @property
    def siblings(self) -> tuple[tuple[int, ...], ...]:
        """The candidates of each searched state; initial noise is not the policy's choice."""
        kids = self.plan.children
        return tuple(group for group in kids if group and self.plan.states[group[0]].trained)
