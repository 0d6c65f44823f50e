"""The moving-shape reward: true clips score high, and every corruption lowers the right part."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.rewards import REWARDS, Reward
from dancegrpo_fast.rewards.moving_shape import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    MovingShape,
    Scene,
    coverage,
    parse_prompt,
    signed_distance,
)

DEMO = Path(__file__).parents[1] / "examples" / "demo"
sys.path.insert(0, str(DEMO))
import shapes  # noqa: E402

PROMPT = "a red square moving left"
COLOUR, DIRECTION, SHAPE = 0, 1, 2


def clips(prompts: list[str], seed: int = 0) -> Tensor:
    return shapes.render(prompts, torch.Generator().manual_seed(seed))


def draw(shape: str, x: Tensor, y: Tensor, area: Tensor, colour: str = "red") -> Tensor:
    """One clip [1, F, 3, 32, 32] from explicit tracks of F frames."""
    alpha = coverage(shape, x, y, area, 32)[:, None]
    return (BACKGROUND + (torch.tensor(COLOURS[colour])[:, None, None] - BACKGROUND) * alpha)[None]


def track(speed: float = -1.5, frames: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, area of a square of 81 pixels moving left."""
    x = 22 + speed * torch.arange(frames, dtype=torch.float32)
    return x, torch.full((frames,), 16.0), torch.full((frames,), 81.0)


def parts(videos: Tensor, prompt: str = PROMPT) -> Tensor:
    return MovingShape().parts(videos, [prompt] * len(videos))


@pytest.mark.parametrize("shape", SHAPES)
def test_templates_have_area_one_centred_and_the_stated_spread(shape: str) -> None:
    from dancegrpo_fast.rewards.moving_shape import _SPREAD

    line = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000 - 1  # midpoints of [-1, 1]
    x, y = line[None, :], line[:, None]
    inside = (signed_distance(shape, x, y) < 0).double()
    cell = 1e-6
    assert inside.sum().item() * cell == pytest.approx(1.0, abs=2e-3)
    assert (inside * x).sum().item() * cell == pytest.approx(0.0, abs=1e-3)
    assert (inside * y).sum().item() * cell == pytest.approx(0.0, abs=1e-3)
    assert (inside * (x**2 + y**2)).sum().item() * cell == pytest.approx(_SPREAD[shape], abs=1e-3)


def test_true_clips_score_above_nine_tenths_for_every_prompt() -> None:
    prompts = shapes.all_prompts()
    assert len(prompts) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS) == 192
    scores = MovingShape()(clips(prompts), prompts)
    assert scores.min() > 0.9 and scores.max() <= 1.0


def test_each_wrong_word_lowers_its_part_only() -> None:
    words = {COLOUR: COLOURS, SHAPE: SHAPES, DIRECTION: DIRECTIONS}
    for part, vocabulary in words.items():
        for shown in vocabulary:
            for asked in vocabulary:
                scene = ["red", "square", "left"]
                scene[{COLOUR: 0, SHAPE: 1, DIRECTION: 2}[part]] = shown
                clip = clips([str(Scene(*scene))])
                scene[{COLOUR: 0, SHAPE: 1, DIRECTION: 2}[part]] = asked
                score = parts(clip, str(Scene(*scene)))[0]
                if shown == asked:
                    assert score.min() > 0.85
                    continue
                # neighbouring directions are 45 degrees apart: exp(-4 (1 - cos 45)) = 0.31,
                # plus what the pixel grid does to the centroid
                assert score[part] < (0.36 if part == DIRECTION else 0.12), (shown, asked)
                if part != SHAPE:  # the spread expected of a blob is the named shape's
                    others = [i for i in range(3) if i != part]
                    assert score[others].min() > 0.85, (shown, asked)


def test_direction_follows_the_closed_form() -> None:
    """exp(-4 (1 - cos a)) min(1, speed / 0.96) for a clip moving at an angle a to the word."""
    area = torch.full((9,), 81.0)
    for degrees in (0, 20, 45, 70, 120, 180):
        for speed in (0.3, 0.6, 1.4):
            angle = math.radians(degrees)
            step = speed * (torch.arange(9) - 4.0)
            clip = draw("square", 16 - step * math.cos(angle), 16 - step * math.sin(angle), area)
            expected = math.exp(-4 * (1 - math.cos(angle))) * min(1, speed / 0.96)
            assert parts(clip)[0, DIRECTION].item() == pytest.approx(expected, abs=0.05)


def test_a_uniform_screen_scores_nothing() -> None:
    for colour in (COLOURS["red"], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):
        screen = torch.tensor(colour)[:, None, None].expand(1, 9, 3, 32, 32)
        assert MovingShape()(screen, [PROMPT]).item() < 0.01


def test_a_still_shape_loses_the_direction_part() -> None:
    assert parts(draw("square", *track(speed=0.0)))[0, DIRECTION] < 0.01


def test_several_blobs_lose_direction_and_shape() -> None:
    x, y, area = track()
    small = area / 2
    clip = torch.maximum(draw("square", x, y - 9, small), draw("square", x, y + 9, small))
    score = parts(clip)[0]
    assert score[SHAPE] < 0.05 and score[DIRECTION] < 0.05


def test_fading_flickering_and_shrinking_lower_shape() -> None:
    clip = draw("square", *track())
    whole = parts(clip)[0, SHAPE]
    fade = torch.linspace(1, 0, 9)[:, None, None, None]
    flicker = (torch.arange(9) % 2 == 0).float()[:, None, None, None]
    faded = BACKGROUND + (clip - BACKGROUND) * fade
    flickering = BACKGROUND + (clip - BACKGROUND) * flicker
    x, y, _ = track()
    shrinking = draw("square", x, y, torch.linspace(140, 30, 9))
    for corrupted, most in ((faded, 0.35), (flickering, 0.1), (shrinking, 0.5)):
        assert parts(corrupted)[0, SHAPE] < most * whole
    assert MovingShape()(faded, [PROMPT]) < 0.6 and MovingShape()(flickering, [PROMPT]) < 0.4


def test_speckle_lowers_shape_step_by_step() -> None:
    """The signal is dense: more speckle, less reward, with no plateau between."""
    clip = draw("square", *track())
    noise = torch.rand(clip.shape, generator=torch.Generator().manual_seed(0))
    scores = [
        parts(torch.where(noise < share, 0.95, clip))[0].mean().item()
        for share in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05)
    ]
    assert all(a > b + 0.005 for a, b in zip(scores, scores[1:], strict=False)), scores


def test_teleporting_does_not_earn_the_direction_part() -> None:
    """Jumps with the right total displacement score below steady motion."""
    x, y, area = track()
    jump = torch.where(torch.arange(9) < 5, x[0], x[-1])
    assert parts(draw("square", jump, y, area))[0, DIRECTION] < 0.6


def test_a_colour_that_changes_on_the_way_loses_its_share() -> None:
    red, blue = draw("square", *track()), draw("square", *track(), colour="blue")
    mixed = torch.cat([red[:, :6], blue[:, 6:]], dim=1)
    assert parts(mixed)[0, COLOUR].item() == pytest.approx(6 / 9, abs=0.01)


def test_a_clip_that_is_not_finite_is_nan_and_leaves_the_others_alone() -> None:
    prompts = [PROMPT] * 3
    videos = clips(prompts)
    clean = MovingShape()(videos, prompts)
    videos[1, 3, 0, 5, 5] = math.nan
    scores = MovingShape()(videos, prompts)
    assert scores[1].isnan() and torch.equal(scores[[0, 2]], clean[[0, 2]])
    videos[1, 3, 0, 5, 5] = math.inf
    assert MovingShape().parts(videos, prompts)[1].isnan().all()


def test_scores_do_not_depend_on_the_batch() -> None:
    prompts = shapes.all_prompts()[::31]
    videos = clips(prompts)
    together = MovingShape().parts(videos, prompts)
    alone = torch.cat([parts(videos[i : i + 1], p) for i, p in enumerate(prompts)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "prompt", ["a red square", "a pink square moving left", "a red square moving left fast", ""]
)
def test_a_prompt_outside_the_grammar_is_refused_by_name(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not 'a COLOUR SHAPE moving DIRECTION'") as error:
        MovingShape()(clips([PROMPT]), [prompt])
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (torch.zeros(1, 9, 32, 32, 3), "shape"),
        (torch.zeros(1, 1, 3, 32, 32), "1 frame"),
        (torch.zeros(1, 9, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 9, 3, 32, 32), "2 clips for 1 prompts"),
        (torch.full((1, 9, 3, 32, 32), -0.5), "outside"),
    ],
)
def test_wrong_videos_are_refused(videos: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovingShape()(videos, [PROMPT])


def test_it_is_a_reward_of_the_table() -> None:
    reward = REWARDS["moving_shape"]()
    assert isinstance(reward, Reward) and reward.name == "moving_shape"
    assert MovingShape()(torch.zeros(0, 9, 3, 32, 32), []).shape == (0,)


def test_prompt_files_are_disjoint_and_use_every_word_evenly() -> None:
    train = (DEMO / "train_prompts.txt").read_text(encoding="utf-8").splitlines()
    held_out = (DEMO / "heldout_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert (train, held_out) == shapes.split_prompts()
    assert len(held_out) == 64 and not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(shapes.all_prompts())
    for prompts in (train, held_out):
        scenes = [parse_prompt(p) for p in prompts]
        for vocabulary, key in ((COLOURS, "colour"), (SHAPES, "shape"), (DIRECTIONS, "direction")):
            counts = [sum(getattr(s, key) == word for s in scenes) for word in vocabulary]
            assert min(counts) > 0 and max(counts) - min(counts) <= len(prompts) / 10, counts


def test_rendered_shapes_stay_inside_the_frame() -> None:
    prompts = shapes.all_prompts() * 4
    videos = clips(prompts, seed=3)
    edge = torch.cat(
        [videos[..., 0, :], videos[..., -1, :], videos[..., :, 0], videos[..., :, -1]], dim=-1
    )
    # half a pixel of antialiasing may touch the border; the body may not
    assert edge.max() <= BACKGROUND + 0.55 * (0.95 - BACKGROUND)
    areas = ((videos.amax(2) - BACKGROUND) / (0.95 - BACKGROUND)).sum((-1, -2))
    assert (areas - areas.mean(1, keepdim=True)).abs().max() < 2.5
