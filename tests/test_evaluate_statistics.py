"""Paired statistics and best-of-n curves against closed forms, brute force and scipy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from dancegrpo_fast.report.compare import best_of, paired, student_t, wilson


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 63, 552, 3199, 100_000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_students_quantile(degrees, level):
    # 100,000 cells: the trapezoid's error is about the square of a cell's width, 1e-8 or so.
    expected = stats.t.ppf((1 + level) / 2, degrees)
    assert student_t(degrees, level) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("share", "n"), [(0.0, 5), (1.0, 5), (0.5, 8), (0.75, 64)])
def test_wilson(share, n):
    expected = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    # At 0 and 1 the bound is 0 and 1, up to rounding.
    assert wilson(share, n) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)


def test_the_interval_is_that_of_a_paired_t_test_of_prompts():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(20, 3)) + rng.normal(size=(20, 1)) * 5
    trained = base + 0.3 + rng.normal(size=(20, 3))
    found = paired(base, trained)
    test = stats.ttest_rel(trained.mean(axis=1), base.mean(axis=1)).confidence_interval()
    assert (found.low, found.high) == pytest.approx((test.low, test.high), rel=1e-6)
    assert found.difference == pytest.approx((trained - base).mean())
    assert found.win_rate == pytest.approx((trained > base).mean())
    assert (found.prompts, found.missing) == (20, 0)
    # The prompts' own spread is far larger than the difference: pairing is what finds it.
    assert found.verdict == "better"
    assert paired(trained, base).verdict == "worse" and paired(base, base).verdict == "unclear"


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """2000 draws of 6 prompts: 95% within 4 binomial standard errors (0.5% each)."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        base = rng.normal(size=(6, 2))
        found = paired(base, base + 0.5 + rng.normal(size=(6, 1)) + rng.normal(size=(6, 2)))
        held += found.low <= 0.5 <= found.high
    assert abs(held / 2000 - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


def test_pairs_without_both_scores_are_left_out():
    """An unequal number of samples must not weigh prompts; a prompt without a pair is no prompt."""
    nan = np.nan
    base = np.array([[1.0, 2.0, nan], [4.0, 4.0, 4.0], [nan, 1.0, 1.0]])
    trained = np.array([[2.0, nan, 9.0], [4.0, 5.0, 3.0], [1.0, nan, nan]])
    found = paired(base, trained)
    assert (found.prompts, found.missing) == (2, 5)
    assert (found.base, found.trained, found.difference) == (2.5, 3.0, 0.5)
    assert found.win_rate == pytest.approx((1.0 + (0.5 + 1.0 + 0.0) / 3) / 2)


def test_one_prompt_and_none():
    one = paired(np.array([[1.0, 2.0]]), np.array([[2.0, 3.0]]))
    assert one.difference == 1 and np.isnan(one.low) and one.verdict == "unclear"
    none = paired(np.full((2, 1), np.nan), np.ones((2, 1)))
    assert none.prompts == 0 and none.missing == 2 and none.verdict == "unclear"
    with pytest.raises(ValueError, match="need equal"):
        paired(np.ones((2, 1)), np.ones((2, 2)))


def by_hand(selector, measured, n) -> float:
    """The mean over all subsets of what the best by `selector` measures; ties average."""
    values = []
    for subset in combinations(range(len(selector)), n):
        most = max(selector[i] for i in subset)
        values.append(np.mean([measured[i] for i in subset if selector[i] == most]))
    return float(np.mean(values))


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(2)
    selector = rng.integers(0, 3, size=(5, 6)).astype(float) if ties else rng.normal(size=(5, 6))
    # With ties whole classes share their chances: measured must be equal inside a class for the
    # subsets' average to say the same; so it is a function of the selector there.
    measured = np.sin(selector * 3) if ties else rng.normal(size=(5, 6))
    for point in best_of(selector, measured, [1, 2, 4, 6]):
        expected = [by_hand(s, m, point.n) for s, m in zip(selector, measured, strict=True)]
        assert point.mean == pytest.approx(np.mean(expected), rel=1e-12)
        error = np.std(expected, ddof=1) / np.sqrt(5)
        assert point.standard_error == pytest.approx(error, rel=1e-9, abs=1e-15)


def test_best_of_all_and_of_one():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, np.nan]])
    one, two = best_of(scores, scores, [1, 2])
    assert one.mean == (2.0 + 2.5) / 2 and two.mean == ((3 + 3 + 2) / 3 + 5.0) / 2
    # The second prompt has two scores only: with 3 among the counts it stands behind no point.
    assert [point.mean for point in best_of(scores, scores, [1, 3])] == [2.0, 3.0]
    assert np.isnan(best_of(scores, scores, [4])[0].mean)
