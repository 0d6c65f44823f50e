"""Paired statistics of two models on the same prompts and seeds, and best-of-n curves.

Samples of one prompt are not independent, prompts are: everything is averaged per prompt first,
and every interval is over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Paired:
    """A trained model against the base by one measure.

    Attributes:
        base, trained: Means over prompts.
        difference: Of the means.
        low, high: 95% interval of the difference (Student's t over prompts); NaN for one prompt.
        win_rate: Share of pairs (prompt, seed) that the trained model wins, ties counting half;
            averaged per prompt first.
        win_low, win_high: 95% interval of it (Wilson over prompts: conservative, because the
            share of wins of a prompt varies less than a single win).
        prompts: Prompts with a pair that has both scores.
        missing: Pairs without both.
    """

    base: float
    trained: float
    difference: float
    low: float
    high: float
    win_rate: float
    win_low: float
    win_high: float
    prompts: int
    missing: int

    @property
    def verdict(self) -> str:
        """better, worse, or unclear: whether the interval holds 0."""
        if self.low > 0 or self.high < 0:
            return "better" if self.low > 0 else "worse"
        return "unclear"


def paired(base: np.ndarray, trained: np.ndarray) -> Paired:
    """Compare scores [P, S] of the same prompts and seeds; pairs with a NaN are left out."""
    if base.shape != trained.shape or base.ndim != 2:
        raise ValueError(f"scores have shapes {base.shape} and {trained.shape}; need equal [P, S]")
    both = np.isfinite(base) & np.isfinite(trained)
    rows = both.any(axis=1)
    n = int(rows.sum())
    if n == 0:
        nan = math.nan
        return Paired(nan, nan, nan, nan, nan, nan, nan, nan, 0, int(both.size))
    first, second = (row_means(values[rows], both[rows]) for values in (base, trained))
    gaps = np.where(both, trained, 0) - np.where(both, base, 0)
    won = row_means(((np.sign(gaps) + 1) / 2)[rows], both[rows])
    difference = second - first
    mean = float(difference.mean())
    half = math.nan
    if n > 1:
        half = student_t(n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    win_low, win_high = wilson(float(won.mean()), n)
    return Paired(
        float(first.mean()), float(second.mean()), mean, mean - half, mean + half,
        float(won.mean()), win_low, win_high, n, int((~both).sum()),
    )  # fmt: skip


def row_means(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Means [P] over what is there in each row of [P, S]; every row has something."""
    means: np.ndarray = np.where(there, values, 0.0).sum(axis=1) / there.sum(axis=1)
    return means


@lru_cache
def student_t(degrees: int, level: float = 0.95) -> float:
    """The two-sided quantile of Student's t: P(|T| < t) = level.

    With t = sqrt(nu) tan(theta) the density becomes cos(theta)^(nu - 1), integrated by the
    trapezoid rule; off by less than 1e-6 of itself for levels up to 0.99.
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"degrees = {degrees}, level = {level}: need >= 1 and in (0, 1)")
    # Beyond 12 / sqrt(nu) nothing is left that a double could hold.
    theta = np.linspace(0, min(math.pi / 2, 12 / math.sqrt(degrees)), 100_001)
    density = np.cos(theta) ** (degrees - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(level, mass / mass[-1], theta)))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n."""
    z = 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class BestOf:
    """What choosing the best of n by one reward does to a measure.

    Attributes:
        n: Samples to choose from.
        mean: Expected measure of the chosen one.
        standard_error: Over prompts; NaN for one.
        prompts: Prompts with enough samples.
    """

    n: int
    mean: float
    standard_error: float
    prompts: int


def best_of(
    selector: np.ndarray, measured: np.ndarray, counts: Sequence[int]
) -> list[BestOf]:
    """Best-of-n curve: exact expectations over all subsets of the samples that were drawn.

    Of S samples in ascending order the i-th (from 1) is the best of a random subset of n with
    probability C(i-1, n-1) / C(S, n); equal ones share theirs. The same prompts stand behind every
    point: those with max(counts) samples that have both scores.

    Args:
        selector: [P, S] scores to choose by.
        measured: [P, S] scores of the chosen.
        counts: Values of n.
    """
    there = np.isfinite(selector) & np.isfinite(measured)
    rows = np.flatnonzero(there.sum(axis=1) >= max(counts))
    curve = []
    for n in counts:
        pairs = [(selector[p, there[p]], measured[p, there[p]]) for p in rows]
        values = np.array([_expected(*pair, n) for pair in pairs])
        error = values.std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        mean = float(values.mean()) if len(rows) else math.nan
        curve.append(BestOf(n, mean, float(error), len(rows)))
    return curve


def _expected(selector: np.ndarray, measured: np.ndarray, n: int) -> float:
    size = len(selector)
    order = np.argsort(selector, kind="stable")
    whole = math.comb(size, n)
    chances = np.array([math.comb(i, n - 1) / whole for i in range(size)])
    _, equal = np.unique(selector[order], return_inverse=True)
    shared = np.bincount(equal, weights=chances) / np.bincount(equal)
    return float(shared[equal] @ measured[order])
