"""Win rates: sums, ties, judges that fail; thresholds; what they become in advantages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dancegrpo_fast.advantages import leaf_advantages
from dancegrpo_fast.config import AdvantageConfig
from dancegrpo_fast.rewards.combine import OnFrames, Threshold, WinRate
from dancegrpo_fast.rewards.interface import SampleReward, Samples, Scored


def samples(values, groups=None) -> Samples:
    """Pictures of one pixel whose brightness is their worth."""
    pixels = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 1, 1)
    return Samples(pixels, ["p"] * len(values), groups=groups or ())


class Bright(SampleReward):
    name = "bright"

    def score(self, samples: Samples) -> Scored:
        values = samples.videos.mean(dim=(1, 2, 3, 4))
        return Scored.of(values, {i: "dark" for i, v in enumerate(values.tolist()) if v < 0})


class Judge:
    """Compares brightness; `bias` is added to the first's, `answer` overrides."""

    name = "judge"

    def __init__(self, bias: float = 0.0, answer=None) -> None:
        self.bias, self.answer, self.pairs = bias, answer, []

    def compare(self, first: Samples, second: Samples) -> torch.Tensor:
        a, b = (s.videos.mean(dim=(1, 2, 3, 4)) for s in (first, second))
        self.pairs += list(zip(a.tolist(), b.tolist(), strict=True))
        if self.answer is not None:
            return self.answer(a, b)
        return (a + self.bias > b).float() + (a + self.bias == b).float() / 2


WORTH = [0.3, 0.1, 0.9, 0.5, 0.7]


@pytest.mark.parametrize("order", ["balanced", "both"])
@pytest.mark.parametrize("inner", [Bright(), Judge()], ids=["scores", "judge"])
def test_win_rates_of_a_clear_order(inner, order):
    rates = WinRate(inner, order).score(samples(WORTH)).values
    # Beaten others of 4: 1, 0, 4, 2, 3.
    torch.testing.assert_close(rates, torch.tensor([1, 0, 4, 2, 3]) / 4)
    assert float(rates.sum()) == pytest.approx(len(WORTH) / 2)
    order_of = [3, 1, 4, 0, 2]
    moved = WinRate(inner, order).score(samples([WORTH[i] for i in order_of])).values
    torch.testing.assert_close(moved, rates[order_of])


@pytest.mark.parametrize("order", ["balanced", "both"])
def test_any_answers_add_up_to_half_the_group(order):
    generator = torch.Generator().manual_seed(0)
    judge = Judge(answer=lambda a, b: torch.rand(len(a), generator=generator))
    rates = WinRate(judge, order).score(samples(WORTH * 2, [0] * 4 + [1] * 6)).values
    torch.testing.assert_close(rates[:4].sum(), torch.tensor(2.0))
    torch.testing.assert_close(rates[4:].sum(), torch.tensor(3.0))


def test_every_pair_is_judged_inside_its_group_only():
    judge = Judge()
    WinRate(judge).score(samples([0.1, 0.2, 0.3, 0.4, 0.5], [0, 1, 0, 1, 1]))
    found = {frozenset(round(x, 1) for x in pair) for pair in judge.pairs}
    assert len(judge.pairs) == 1 + 3
    assert found == {frozenset(p) for p in [(0.1, 0.3), (0.2, 0.4), (0.2, 0.5), (0.4, 0.5)]}


@pytest.mark.parametrize("size", [4, 5, 8])
def test_positions_are_balanced(size):
    judge = Judge()
    worth = [i / 16 for i in range(size)]
    WinRate(judge).score(samples(worth))
    first = [sum(a == w for a, _ in judge.pairs) for w in worth]
    assert len(judge.pairs) == size * (size - 1) // 2
    assert max(abs(n - (size - 1) / 2) for n in first) <= 0.5
    # A judge that always takes the first gives an odd group of equals no advantage at all.
    equal = WinRate(Judge(bias=9.0)).score(samples(worth)).values
    assert float(equal.max() - equal.min()) <= (1 / (size - 1) + 1e-6 if size % 2 == 0 else 1e-6)
    both = WinRate(Judge(bias=9.0), "both").score(samples(worth)).values
    torch.testing.assert_close(both, torch.full((size,), 0.5))


def advantages(rates: torch.Tensor) -> np.ndarray:
    rewards = rates.double().numpy().reshape(1, -1, 1)
    return leaf_advantages(rewards, np.ones(1), AdvantageConfig()).values[0, :, 0]


def test_ties_and_unparsable_answers_give_no_advantage():
    for inner in (Judge(answer=lambda a, b: torch.full((len(a),), 0.5)), Bright()):
        rates = WinRate(inner).score(samples([0.4] * 6)).values
        assert torch.equal(rates, torch.full((6,), 0.5))
        assert not advantages(rates).any()


def test_a_failing_judge_invents_nothing():
    # No answer where the brightest takes part: the others are compared with each other.
    def answer(a, b):
        known = (a < 0.8) & (b < 0.8)
        return torch.where(known, (a > b).float(), torch.nan)

    scored = WinRate(Judge(answer=answer)).score(samples(WORTH))
    assert scored.values[2].isnan() and scored.errors[2] == "no pair was judged"
    torch.testing.assert_close(scored.values[[0, 1, 3, 4]], torch.tensor([1, 0, 2, 3]) / 3)
    assert advantages(scored.values)[2] == 0 and np.isfinite(advantages(scored.values)).all()

    def crash(a, b):
        raise TimeoutError("no answer")

    scored = WinRate(Judge(answer=crash)).score(samples(WORTH))
    assert scored.values.isnan().all()
    assert set(scored.errors) == {"TimeoutError: no answer"}
    for bad in (lambda a, b: torch.full((len(a),), 2.0), lambda a, b: torch.zeros(len(a), 1)):
        assert WinRate(Judge(answer=bad)).score(samples(WORTH)).values.isnan().all()


def test_a_crash_costs_only_its_own_call():
    calls = []

    def sometimes(a, b):
        calls.append(len(a))
        if len(calls) == 1:
            raise ValueError("once")
        return (a > b).float()

    win = WinRate(Judge(answer=sometimes))
    win.at_once = 3
    scored = win.score(samples(WORTH))
    assert calls == [3, 3, 3, 1] and scored.values.isfinite().all()
    # The pairs (0,1), (0,2), (0,3) are lost: sample 0 was compared with sample 4 alone.
    torch.testing.assert_close(scored.values, torch.tensor([0, 0, 1, 1 / 3, 3 / 4]))


def test_a_failed_score_is_out_and_alone_is_nothing():
    scored = WinRate(Bright()).score(samples([0.2, -1.0, 0.6], [0, 0, 0]))
    assert scored.errors == ("", "dark", "")
    torch.testing.assert_close(scored.values[[0, 2]], torch.tensor([0.0, 1.0]))
    scored = WinRate(Bright()).score(samples([0.2, 0.3, 0.6], [0, 0, 1]))
    assert scored.errors[2] == "its prompt has no other sample to compare with"


def test_threshold_keeps_failures():
    scored = Threshold(Bright(), 0.5).score(samples([0.2, 0.5, 0.6, -1.0]))
    assert scored.values[:3].tolist() == [0, 0, 1]
    assert scored.values[3].isnan() and scored.errors == ("", "", "", "dark")
    # One side for all: nothing to learn, and no division by nothing.
    assert not advantages(Threshold(Bright(), 0.0).score(samples(WORTH)).values).any()


def test_chosen_frames_of_a_users_class_have_its_gradient():
    class Own:  # A class of the user's need not derive from ours.
        name, differentiable = "own", True

        def __call__(self, videos, prompts):
            return videos.mean(dim=(1, 2, 3, 4))

        def gradient_scores(self, samples):
            return self(samples.videos, samples.prompts)

    videos = torch.zeros(2, 3, 3, 1, 1, requires_grad=True)
    reward = OnFrames(Own(), [-1])
    assert reward.differentiable and not OnFrames(Bright(), [-1]).differentiable
    reward.gradient_scores(Samples(videos, ["p", "p"])).sum().backward()
    assert videos.grad[:, 2].all() and not videos.grad[:, :2].any()
