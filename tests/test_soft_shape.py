"""The soft form of the demo's reward: a gradient everywhere, and in the hard one's direction."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.config import RewardConfig
from dancegrpo_fast.rewards import Samples, load_rewards
from dancegrpo_fast.rewards.moving_shape import BACKGROUND, COLOURS, MovingShape, coverage

DEMO = Path(__file__).parents[1] / "examples" / "demo"
sys.path.insert(0, str(DEMO))
import shapes  # noqa: E402
import soft_shape  # noqa: E402

ASKED = "a blue square moving left"
WRONG = {0: "a red square moving left", 1: "a blue square moving up", 2: "a blue cross moving left"}
SOFT, HARD = soft_shape.SoftShape(), MovingShape()


def clip(prompt: str, seed: int = 0) -> Tensor:
    return shapes.render([prompt], torch.Generator().manual_seed(seed))


def gradient(videos: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    x = videos.clone().requires_grad_(True)
    scores = SOFT.gradient_scores(Samples(x, prompts))
    (found,) = torch.autograd.grad(scores.sum(), x)
    return scores.detach(), found


def test_true_clips_beat_every_wrong_word_in_its_part() -> None:
    true = SOFT.parts(clip(ASKED), [ASKED])[0]
    assert (true > torch.tensor([0.7, 0.7, 0.5])).all() and (true <= 1).all()
    for part, shown in WRONG.items():
        # What is right in both clips differs by their random size and start only.
        wrong = SOFT.parts(clip(shown), [ASKED])[0]
        assert wrong[part] < true[part] - 0.3
        others = [i for i in range(3) if i != part]
        torch.testing.assert_close(wrong[others], true[others], rtol=0, atol=0.15)


def climb(leaf: Tensor, rate: float, drawn: Callable[[], Tensor]) -> Tensor:
    """Hard parts [3] after 80 steps up the soft reward from a clip that depends on `leaf`."""
    optimizer = torch.optim.Adam([leaf.requires_grad_(True)], lr=rate)
    for _ in range(80):
        optimizer.zero_grad()
        (-SOFT.gradient_scores(Samples(drawn(), [ASKED]))).sum().backward()
        optimizer.step()
    return HARD.parts(drawn().detach(), [ASKED])[0]


@pytest.mark.parametrize("part", [0, 2])
def test_climbing_it_climbs_the_hard_reward(part: int) -> None:
    """From a clip with one wrong word, pixels that follow the gradient are judged better there."""
    start = clip(WRONG[part])
    leaf = torch.logit(start.clamp(0.01, 0.99))
    found = climb(leaf, 0.1, lambda: torch.sigmoid(leaf))
    assert found[part] > HARD.parts(start, [ASKED])[0, part] + 0.3


def test_climbing_it_turns_a_thing_that_moves_the_wrong_way() -> None:
    """By its track: free pixels would rather shift the centroid by a haze, which no model draws."""
    frame = torch.arange(9.0)
    leaf = torch.stack([torch.full((9,), 16.3), 22 - 1.4 * frame])  # x and y: moving up.
    colour = torch.tensor(COLOURS["blue"])[:, None, None]

    def drawn() -> Tensor:
        alpha = coverage("circle", leaf[0], leaf[1], torch.tensor(80.0), 32)[:, None]
        return (BACKGROUND + (colour - BACKGROUND) * alpha)[None]

    assert HARD.parts(drawn(), [ASKED])[0, 1] < 0.1
    assert climb(leaf, 0.3, drawn)[1] > 0.5


def test_the_gradient_is_that_of_finite_differences() -> None:
    """float64, step 1e-6: central differences err by step^2 times the third derivative (1e-9 or so
    at widths of 0.07), and rounding by 1e-16 / 1e-6. Noise, as a clip of equal channels and exact
    edges lies on corners."""
    torch.manual_seed(0)
    x = clip(ASKED).double()[:, :5] * 0.9 + 0.05 * torch.rand(1, 5, 3, 32, 32, dtype=torch.float64)
    leaf = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(SOFT.parts(leaf, [WRONG[1]]).sum(), leaf)
    for _ in range(3):
        way = torch.randn_like(x)
        ends = [SOFT.parts(x + sign * 1e-6 * way, [WRONG[1]]).sum() for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((found * way).sum(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("level", [0.0, 0.06, 1.0])
def test_nothing_and_a_full_screen_are_worth_nothing_and_have_a_finite_gradient(
    level: float,
) -> None:
    scores, found = gradient(torch.full((1, 9, 3, 32, 32), level), [ASKED])
    assert scores < 0.01 and found.isfinite().all()


def test_every_pixel_of_a_sample_has_a_gradient_and_samples_do_not_mix() -> None:
    prompts = [ASKED, *WRONG.values()]
    videos = torch.cat([clip(prompt, seed) for seed, prompt in enumerate(prompts)])
    scores, found = gradient(videos, [ASKED] * 4)
    # One that moves exactly as asked sits at the top of the direction, not of all parts.
    assert (found.flatten(2).abs().amax(2) > 0).all()
    for row in range(4):
        alone = gradient(videos[row : row + 1], [ASKED])
        torch.testing.assert_close(alone[0], scores[row : row + 1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[1], found[row : row + 1], rtol=1e-4, atol=1e-7)


def test_it_is_a_reward_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    (reward,) = load_rewards([RewardConfig(name=f"{DEMO / 'soft_shape.py'}:SoftShape")])
    videos = torch.cat([clip(ASKED), clip(WRONG[0])])
    broken = videos.clone()
    broken[1, 3, 0, 5, 5] = torch.nan
    found = reward.score(Samples(broken, [ASKED] * 2))
    assert found.values[1].isnan() and found.errors == ("", "a pixel is not finite")
    whole = reward.score(Samples(videos, [ASKED] * 2)).values
    assert found.values[0] == whole[0]
    eight_bit = reward.score(Samples((videos * 255).round().to(torch.uint8), [ASKED] * 2)).values
    torch.testing.assert_close(eight_bit, whole, rtol=0, atol=0.01)  # 1 / 510 of a pixel, steepened
    with pytest.raises(ValueError, match="'a cat' is not 'a COLOUR SHAPE"):
        reward.score(Samples(videos[:1], ["a cat"]))
