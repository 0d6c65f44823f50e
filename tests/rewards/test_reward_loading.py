"""From recipe to reward: names, options, parts, combinations; what a rank's scoring does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_reward_models import images_of, tiny_clip
from torch import nn

from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.rewards import (
    REWARDS,
    Reward,
    SampleReward,
    Samples,
    Scored,
    load_rewards,
    score,
)
from dancegrpo_fast.rewards.scoring import check_whole_groups, score_latents

CUSTOM = '''
import torch
from typing import Annotated, Literal
from pydantic import Field

class Bright:
    name = "bright"
    def __init__(self, *, gain: Annotated[float, Field(gt=0)] = 1.0, mode: Literal["a", "b"] = "a"):
        self.gain = gain
    def __call__(self, videos, prompts):
        return self.gain * videos.mean(dim=(1, 2, 3, 4))

class Counted:
    name, calls, part_names = "counted", 0, ("low", "high")
    def __call__(self, videos, prompts):
        return self.parts(videos, prompts).sum(dim=1)
    def parts(self, videos, prompts):
        Counted.calls += 1
        flat = videos.flatten(1)
        return torch.stack([flat.amin(dim=1), flat.amax(dim=1)], dim=1)

class Judge:
    name = "judge"
    def compare(self, first, second):
        a, b = (s.videos.float().mean(dim=(1, 2, 3, 4)) for s in (first, second))
        return (a > b).float() + (a == b).float() / 2

class Nothing:
    name = "nothing"
'''


@pytest.fixture
def custom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CUSTOM)


def test_a_reward_may_take_anything(custom):
    Path("loose.py").write_text(
        "class Loose:\n    name = 'loose'\n    def __init__(self, a, *rest, **more):\n"
        "        self.given = (a, more)\n    def __call__(self, videos, prompts):\n        pass\n"
    )
    reward = one(name="loose.py:Loose", path="p", options={"a": 1, "b": [2]})
    assert reward.given == (1, {"b": [2], "path": "p"})
    assert refused({"name": "loose.py:Loose"}) == [
        "rewards.0.options.a: is missing; loose.py:Loose needs it"
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("class X(:", "x.py does not load: SyntaxError: invalid syntax (x.py, line 1)"),
        ("import no_such", "x.py does not load: ModuleNotFoundError: No module named 'no_such'"),
        ("class X:\n    def __init__(self):\n        raise RuntimeError('no weights')",
         "cannot be built: RuntimeError: no weights ("),
        ("X = 3", "x.py defines no X"),
    ],
)  # fmt: skip
def test_a_file_of_the_users_that_fails_is_one_line_with_its_place(custom, text, reason):
    Path("x.py").write_text(text)
    (line,) = refused({"name": "x.py:X"})
    assert line.startswith(f"rewards.0.name = 'x.py:X': {reason}")
    if "(" in reason[-2:]:
        assert line.endswith("x.py, line 3)")


def test_two_rewards_of_one_name_are_refused(custom):
    """Metrics and scores are kept by name: one would stand for both."""
    again = {"name": "mine.py:Bright", "options": {"gain": 2}}
    (line,) = refused({"name": "mine.py:Bright"}, again)
    assert "rewards.1.name = 'mine.py:Bright': calls itself 'bright', as rewards.0 does" in line


@pytest.mark.parametrize("made", ["[1.0] * len(prompts)", "numpy.ones(len(prompts))"])
def test_scores_need_be_no_tensor(custom, made):
    Path("x.py").write_text(
        "import numpy\nclass X:\n    name = 'x'\n    def __call__(self, videos, prompts):\n"
        f"        return {made}\n"
    )
    found = score(one(name="x.py:X"), Samples(images_of((8, 8), 2), ["a", "b"]))
    assert found.values.tolist() == [1, 1]


def one(**settings) -> Reward:
    (reward,) = load_rewards([RewardConfig(**settings)])
    return reward


def refused(*settings: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_rewards([RewardConfig(**given) for given in settings])
    return str(caught.value).split("\n")


def test_options_reach_the_reward(custom):
    videos = images_of((8, 8), 2)[:, None].float() / 255
    plain, double = (one(name="mine.py:Bright", options=o) for o in ({}, {"gain": 2.0}))
    assert torch.equal(double(videos, ["", ""]), 2 * plain(videos, ["", ""]))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"name": "clip"}, "rewards.0.name = 'clip': no such reward; known: moving_shape, "),
        ({"name": "moving_shape.size"}, "moving_shape has no part 'size'; known: colour, direc"),
        ({"name": "mine.py:Bright", "options": {"gian": 2.0}},
         "rewards.0.options.gian = 2.0: mine.py:Bright has no such option; did you mean gain?"),
        ({"name": "mine.py:Bright", "options": {"gain": 0.0}},
         "rewards.0.options.gain = 0.0: must be greater than 0"),
        ({"name": "mine.py:Bright", "options": {"gain": "2"}},
         "rewards.0.options.gain = '2': must be a valid number"),
        ({"name": "mine.py:Bright", "options": {"mode": "c"}},
         "rewards.0.options.mode = 'c': must be 'a' or 'b'"),
        ({"name": "mine.py:Bright", "options": {"path": "x"}},
         "rewards.0.options.path: stands outside the options, as rewards.0.path"),
        ({"name": "mine.py:Bright", "path": "x"},
         "rewards.0.path = 'x': mine.py:Bright takes none; leave it out"),
        ({"name": "mine.py:Bright", "offload": True}, "mine.py:Bright has no weights; leave it"),
        ({"name": "mine.py:Nothing"}, "Nothing needs a `name` and `__call__(videos, prompts)`"),
        ({"name": "mine.py:Judge"}, "it compares pairs; set rewards.0.win_rate to balanced or bo"),
        ({"name": "mine.py:Judge", "win_rate": "both", "frames": [0]}, "compares whole samples"),
        ({"name": "laion_aesthetic"}, "rewards.0.path: is missing; laion_aesthetic needs it"),
        ({"name": "clip_score", "path": "gone/away"},
         "rewards.0.name = 'clip_score': cannot be built with path = 'gone/away': "),
    ],
)  # fmt: skip
def test_one_line_with_field_value_and_way_out(custom, settings, line):
    (found,) = refused(settings)
    assert line in found and found.startswith("rewards.0.")


def test_all_problems_come_together(custom):
    lines = refused({"name": "x"}, {"name": "moving_shape"}, {"name": "mine.py:Bright",
                    "options": {"gain": -1.0, "mode": 3}})  # fmt: skip
    assert [line.split(":")[0].split(" =")[0] for line in lines] == [
        "rewards.0.name",
        "rewards.2.options.gain",
        "rewards.2.options.mode",
    ]


@pytest.mark.parametrize(
    "wrong", [{"frames": []}, {"frames": [0.5]}, {"win_rate": "random"}, {"threshold": "x"},
              {"options": 3}, {"threshold": float("nan")}, {"treshold": 0.5}],
)  # fmt: skip
def test_the_section_is_strict(wrong):
    with pytest.raises(ValidationError):
        RewardConfig(name="a", **wrong)


def test_combinations(custom):
    videos = torch.tensor([0.1, 0.9, 0.5, 0.5]).view(4, 1, 1, 1, 1).expand(-1, 3, 3, 4, 4).clone()
    videos[:, 2] = 0  # The last frame is black.
    name, prompts = "mine.py:Bright", ["p"] * 4
    first = one(name=name, frames=[0, 1])(videos, prompts)
    torch.testing.assert_close(first, videos[:, 0, 0, 0, 0])
    passed = one(name=name, frames=[0], threshold=0.5)(videos, prompts)
    assert passed.tolist() == [0, 1, 0, 0]
    rates = one(name=name, win_rate="balanced")(videos, prompts)
    torch.testing.assert_close(rates, torch.tensor([0, 1, 0.5, 0.5]))
    assert one(name=name, win_rate="both", threshold=0.4)(videos, prompts).tolist() == [0, 1, 1, 1]
    assert torch.equal(one(name="mine.py:Judge", win_rate="both")(videos, prompts), rates)


def test_parts_share_one_run(custom):
    Path("mine.py").write_text(CUSTOM)
    names = [f"moving_shape.{part}" for part in ("colour", "direction")]
    first, second = load_rewards([RewardConfig(name=name) for name in names])
    assert [first.name, second.name] == names
    assert first.shared is second.shared
    (shape,) = load_rewards([RewardConfig(name="moving_shape")])
    videos = images_of((16, 16), 10).reshape(2, 5, 3, 16, 16).float() / 255
    prompts = ["a red square moving left", "a blue circle moving up"]
    runs = []
    parts = shape.parts

    def counted(*arguments):
        runs.append(1)
        return parts(*arguments)

    first.shared.inner.parts = counted
    samples = Samples(videos, prompts)
    scores = torch.stack([r.score(samples).values for r in (first, second)], dim=1)
    assert torch.equal(scores, parts(videos, prompts)[:, :2]) and len(runs) == 1
    again = Samples(videos.flip(0), prompts)
    assert torch.equal(first.score(again).values, parts(videos.flip(0), prompts)[:, 0])
    assert len(runs) == 2


def test_every_reward_of_the_catalogue_exists():
    for name, entry in REWARDS.items():
        made = entry.load()
        assert made.name == name
        assert entry.measures and entry.range and entry.cheats
        assert bool(entry.weights) == (entry.memory != "none")


def test_weights_are_placed_and_offloaded(tmp_path, monkeypatch):
    tiny_clip(tmp_path)
    config = {"name": "clip_score", "path": str(tmp_path)}
    moves: list[str] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(str(device)) or self)
    staying = load_rewards([RewardConfig(**config)], "meta")[0]
    leaving = load_rewards([RewardConfig(**config, offload=True, frames=[0])], "meta")[0]
    monkeypatch.undo()
    assert moves.count("meta") == 1  # The second stays in CPU memory until it is needed.
    where: list[tuple[str, str]] = []
    for reward, label in ((staying, "staying"), (leaving, "leaving")):
        reward.place = lambda device, label=label: where.append((label, str(device)))
        reward.score = lambda samples: Scored.of(torch.zeros(len(samples)))
    run([staying, leaving], torch.rand(2, 3, 1, 4, 4), ["a", "b"])
    assert where == [("staying", "cpu"), ("leaving", "cpu"), ("leaving", "cpu")]


# ---- scoring a rank's samples --------------------------------------------------------------------


class Mean(SampleReward):
    """Scores by brightness; the samples whose prompt is "bad" fail, "raise" fails the batch."""

    name = "mean"

    def __init__(self, groupwise: bool = False) -> None:
        self.groupwise, self.seen = groupwise, []

    def score(self, samples: Samples) -> Scored:
        self.seen.append(samples)
        if "raise" in samples.prompts:
            raise RuntimeError("out of order")
        bad = {i: "too bad" for i, p in enumerate(samples.prompts) if p == "bad"}
        return Scored.of(samples.videos.float().mean(dim=(1, 2, 3, 4)), bad)


def run(rewards, latents, prompts, **options):
    def decode(latent):  # [B, C, F, H, W] -> [B, F, 3, H, W]
        return latent.transpose(1, 2)

    return score_latents(latents, prompts, decode, rewards, batch_size=2, **options)


def test_failures_are_nan_with_their_reason(caplog):
    latents = torch.rand(5, 3, 2, 4, 4)
    scores = run([Mean()], latents, ["a", "bad", "a", "raise", "a"])
    means = latents.mean(dim=(1, 2, 3, 4))
    assert scores.values[:, 0].isnan().tolist() == [False, True, True, True, False]
    torch.testing.assert_close(scores.values[[0, 4], 0], means[[0, 4]])
    assert scores.first_error == "mean: too bad"
    assert "failed for 1 samples: mean: too bad" in caplog.text
    assert "failed for 2 samples: mean: RuntimeError: out of order" in caplog.text


def test_whole_groups_and_metadata_arrive():
    latents, metadata = torch.rand(5, 3, 2, 4, 4), [{"n": i} for i in range(5)]
    apart, together = Mean(), Mean(groupwise=True)
    prompts, groups = ["a", "a", "b", "a", "a"], [0, 0, 1, 2, 2]  # The same text drawn twice.
    scores = run([apart, together], latents, prompts, groups=groups, metadata=metadata, fps=16.0)
    assert [list(s.groups) for s in apart.seen] == [[0, 0], [1, 2], [2]]
    (whole,) = together.seen
    assert list(whole.groups) == groups and list(whole.metadata) == metadata and whole.fps == 16
    assert whole.videos.dtype == torch.uint8
    torch.testing.assert_close(scores.values[:, 1] / 255, scores.values[:, 0], rtol=0, atol=2e-3)
    assert torch.equal(scores.clip, latents[0].transpose(0, 1))


def test_a_broken_sample_is_not_compared():
    latents = torch.rand(4, 3, 1, 4, 4)
    latents[1, 0, 0, 2, 2] = torch.nan
    together = Mean(groupwise=True)
    scores = run([together], latents, ["a", "a", "b", "b"])
    assert scores.values[:, 0].isnan().tolist() == [False, True, False, False]
    assert [list(s.groups) for s in together.seen] == [[0, 1, 1]]
    assert run([Mean(groupwise=True)], latents[1:2], ["a"]).values.isnan().all()


def test_no_samples_no_scores():
    scores = run([Mean(), Mean(groupwise=True)], torch.rand(0, 3, 2, 4, 4), [])
    assert scores.values.shape == (0, 2) and scores.clip.numel() == 0


def test_a_reward_of_the_wrong_shape_ends_the_run():
    class Wrong:
        name = "wrong"

        def __call__(self, videos, prompts):
            return torch.zeros(len(prompts), 1)

    with pytest.raises(UserError, match=r"wrong returned shape \(2, 1\) for 2 samples"):
        run([Wrong()], torch.rand(2, 3, 1, 4, 4), ["a", "b"])


def test_groups_must_not_be_split():
    whole, split = np.array([[0, 0], [1, 1]]), np.array([[0, 0, 0], [0, 1, 1]])
    check_whole_groups([Mean(), Mean(groupwise=True)], whole)
    check_whole_groups([Mean()], split)
    with pytest.raises(UserError, match=r"rewards.1.name = 'mean': compares all samples"):
        check_whole_groups([Mean(), Mean(groupwise=True)], split)


def test_infinite_scores_are_no_scores():
    scored = Scored.of(torch.tensor([1.0, torch.inf, torch.nan, 2.0]), {3: "late"})
    assert scored.values.isnan().tolist() == [False, True, True, True]
    assert scored.errors == ("", "it returned inf", "it returned nan", "late")


def test_samples_are_checked():
    video = torch.rand(2, 4, 3, 8, 8)
    assert Samples(video[:, 0], ["a", "b"]).videos.shape == (2, 1, 3, 8, 8)
    assert list(Samples(video, ["a", "a"]).groups) == [0, 0]
    for wrong in (
        (video[0, 0], ["a"]), (video.transpose(1, 2), ["a", "b"]), (video, ["a"]),
        (video.int(), ["a", "b"]), (video, ["a", "b"], 8.0, [{}]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Samples(*wrong)
