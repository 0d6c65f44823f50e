"""Search: scores that fail or tie, and settings that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from search_cases import LAST, made_sampler, score, searched
from torch import Tensor
from tree_stand_ins import SHAPE

from dancegrpo_fast.search import SearchSettings

# ------------------------------------------------------------------ scores that fail or tie


def failing(positions: Sequence[int]):
    """`score`, NaN for some of the first 4 samples it is shown."""
    calls = []

    def judged(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        values = score(latents, trees)
        if not calls:
            values[list(positions)] = np.nan
        calls.append(len(latents))
        return values

    return judged


def test_a_failed_score_is_never_chosen() -> None:
    settings = SearchSettings("greedy", 4, (1,))
    (one,) = searched(settings, 1)
    candidates = one.siblings[0]
    chosen = next(i for i, s in enumerate(candidates) if one.plan.children[s])
    others = [i for i in range(4) if i != chosen]
    second = max(others, key=lambda i: one.previews[candidates[i]][0])
    (other,) = searched(settings, 1, score=failing([chosen]))
    assert other.plan.children[other.siblings[0][second]]
    (last,) = searched(settings, 1, score=failing(others[:1] + others[1:2] + [chosen]))
    assert last.plan.children[last.siblings[0][others[2]]]
    with pytest.raises(ValueError, match=r"all 4 previews of tree 0 at step 2 have no score"):
        searched(settings, 1, score=failing(range(4)))


def test_where_all_fail_it_may_keep_going() -> None:
    settings = SearchSettings("greedy", 4, (1,))
    (one,) = searched(settings, 1, score=failing(range(4)), keep_going=True)
    assert one.plan.states[one.ranked[0]].path == ()  # The first went on.
    assert all(np.isnan(one.previews[s][0]) for s in one.siblings[0])
    (other,) = searched(settings, 1, score=failing([0, 1, 2]), keep_going=True)
    assert other.plan.children[other.siblings[0][3]]

    def nothing(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        return np.full((len(latents), 1), np.nan)

    (last,) = searched(SearchSettings("brute", 3, (0,)), 1, score=nothing, keep_going=True)
    assert len(last.ranked) == 3 and all(np.isnan(row).all() for row in last.scores.values())
    (beam,) = searched(SearchSettings("beam", 3, (0,), 2), 1, score=nothing, keep_going=True)
    assert len(beam.ranked) == 2


def test_a_beam_is_narrower_where_scores_fail() -> None:
    settings = SearchSettings("beam", 4, (1,), beam=3)
    (one,) = searched(settings, 1, score=failing([0, 2]))
    assert len(one.ranked) == 2
    assert not one.plan.children[one.siblings[0][0]]


def test_failed_samples_come_last() -> None:
    settings = SearchSettings("brute", 4, (1,))
    (one,) = searched(settings, 1, score=failing([0, 2]))
    assert [np.isnan(one.scores[s][0]) for s in one.ranked] == [False, False, True, True]
    with pytest.raises(ValueError, match=r"all 4 finished samples of tree 0 have no score"):
        searched(settings, 1, score=failing(range(4)))


def test_an_infinite_score_is_a_failed_one() -> None:
    def infinite(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        values = score(latents, trees)
        values[1] = np.inf
        return values

    (one,) = searched(SearchSettings("brute", 3, (0,)), 1, score=infinite)
    assert one.plan.states[one.ranked[-1]].path == ((0, 1),)


def test_equal_scores_keep_the_first() -> None:
    def equal(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        return np.full((len(latents), 1), 0.25)

    # 40 is where a sort that is not stable would show.
    for settings in (SearchSettings("greedy", 40, (0, 2)), SearchSettings("brute", 40, (2,))):
        (one,) = searched(settings, 1, score=equal)
        assert one.plan.states[one.ranked[0]].path == ()
    (one,) = searched(SearchSettings("beam", 3, (0, 2), beam=2), 1, score=equal)
    assert [one.plan.states[s].path for s in one.ranked] == [(), ((2, 1),)]


def test_weights_rank_and_a_weight_of_zero_decides_nothing() -> None:
    def three(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        first = score(latents, trees)
        second = latents.double().mean(dim=(1, 2, 3, 4))[:, None].numpy()
        return np.concatenate([first, second, np.full_like(first, np.nan)], axis=1)

    settings = SearchSettings("brute", 5, (0,))
    (one,) = searched(settings, 1, score=three, weights=(0.5, -2.0, 0.0))
    totals = [0.5 * one.scores[s][0] - 2.0 * one.scores[s][1] for s in one.ranked]
    assert totals == sorted(totals, reverse=True)
    (plain,) = searched(settings, 1)
    assert plain.ranked != one.ranked


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("best", 3, (0,)), "method = 'best': must be one of brute, greedy, beam"),
        (("greedy", 0, (0,)), "width = 0: must be at least 1"),
        (("greedy", 3, ()), "steps = []: give distinct steps in ascending order"),
        (("greedy", 3, (2, 1)), "steps = [2, 1]: give distinct steps in ascending order"),
        (("greedy", 3, (1, 1)), "steps = [1, 1]: give distinct steps in ascending order"),
        (("greedy", 3, (1,), 2), "beam = 2 with method = 'greedy'"),
        (("beam", 3, (1,)), "beam = None with method = 'beam'"),
        (("beam", 3, (1,), 0), "beam = 0: must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        SearchSettings(*arguments)


def test_what_does_not_fit_is_refused() -> None:
    for steps in ((-2, 0), (LAST,)):
        with pytest.raises(ValueError, match="must lie from -1 .* to 3"):
            searched(SearchSettings("greedy", 2, steps))
    with pytest.raises(ValueError, match="score returned"):
        searched(SearchSettings("greedy", 2, (0,)), score=lambda x, trees: score(x, trees)[:, 0])
    with pytest.raises(ValueError, match=r"roots = \[2, 3, .*must be \[2, 1, C"):
        searched(SearchSettings("greedy", 3, (0,)), roots=torch.zeros(2, 3, *SHAPE))
    silent = replace(made_sampler(), level=0.0)
    with pytest.raises(ValueError, match=r"weights = \[0.0\]: all are 0"):
        searched(SearchSettings("greedy", 3, (0,)), weights=(0.0,))
    with pytest.raises(ValueError, match="noise_level = 0: every candidate"):
        searched(SearchSettings("greedy", 3, (-1, 0)), sampler=silent)
    assert len(searched(SearchSettings("brute", 3, (-1,)), sampler=silent)[0].ranked) == 3
    with pytest.raises(ValueError, match="final = 'sample'"):
        made_sampler(final="sample")
