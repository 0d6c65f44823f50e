"""DeQA-Score and VisionReward against their formulas, with stand-ins of the authors' files."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from test_judges import FAST, LN, Model, samples, scripted

from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.rewards import REWARDS, Samples, checklists, load_rewards, score
from dancegrpo_fast.rewards.checklists import Checklist, square, whole_seconds
from dancegrpo_fast.rewards.loading import deadline
from dancegrpo_fast.rewards.transport import Pool

# ---- DeQA ----------------------------------------------------------------------------------------


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """A stand-in of `scorer.py`: the prompt is set inside a method, and nothing may run."""
    source = (
        "import nothing_there\nclass Scorer:\n    def __init__(self):\n"
        "        self.other = 1\n"
        "        prompt = 'USER: How good?\\n<|image|>\\nASSISTANT: It is'\n"
        "raise RuntimeError('executed')\n"
    )
    path = tmp_path / "scorer.py"
    path.write_text(source)
    digest = hashlib.sha256(source.encode()).hexdigest()
    monkeypatch.setattr(checklists, "DEQA", replace(checklists.DEQA, sha256=digest))
    return str(path)


def test_deqa_is_the_mean_rating_of_the_word_that_ends_the_answer(scorer):
    chances = {"excellent": 0.1, "good": 0.4, "fair": 0.2, "poor": 0.05, "bad": 0.05}

    def reply(pictures, text):
        if pictures[0][2, 2, 0] == 9:
            return [(" good", LN(0.6)), ("Good", LN(0.2)), ("x", LN(0.01))]
        if pictures[0][2, 2, 0] == 8:
            return [("nice", LN(0.6))]
        return [*((f" {word}", LN(p)) for word, p in chances.items()), ("nice", LN(0.2))]

    model = Model(reply)
    with scripted(raw(model)) as url:
        reward = REWARDS["deqa"](url, template=scorer, **FAST)
        scored = score(reward, samples(7, 9, 8))
    # 0.1 * 5 + 0.4 * 4 + 0.2 * 3 + 0.05 * 2 + 0.05 * 1 of 0.8; four unseen words have 0.01 each.
    expected = [2.85 / 0.8, (0.8 * 4 + 0.01 * (5 + 3 + 2 + 1)) / 0.84, math.nan]
    torch.testing.assert_close(scored.values, torch.tensor(expected), equal_nan=True)
    assert "no rating is likely" in scored.errors[2] and reward.chat.counts["floored"] == 1
    (pictures, text, fields), *_ = (r for r in model.requests if r[0][0][2, 2, 0] == 7)
    assert text == "How good?\n" and fields["model"] == "DeQA-Score"
    user, assistant = fields["messages"]
    assert [part["type"] for part in user["content"]] == ["text", "image_url"]
    assert assistant == {"role": "assistant", "content": "It is"}
    assert fields["continue_final_message"] and fields["add_generation_prompt"] is False
    # 6 x 4 became 6 x 6 with CLIP's mean beside it.
    assert pictures[0].shape == (6, 6, 3) and pictures[0][0, 0].tolist() == [122, 116, 104]
    assert pictures[0][0, 1].tolist() == [7, 7, 7] and pictures[0][0, 5].tolist() == [122, 116, 104]


def raw(model):
    """The scripted model, asked with the text before the picture and an answer begun."""

    def answer(number, head, body):
        fields = json.loads(body)
        user, *_ = fields["messages"]
        text, image = user["content"]
        plain = fields | {"messages": [{"role": "user", "content": [image, text]}]}
        found = model(number, head, json.dumps(plain).encode())
        pictures, said, _ = model.requests[-1]
        model.requests[-1] = pictures, said, fields
        return found

    return answer


def test_deqa_of_a_video_is_the_mean_over_frames(scorer):
    model = Model(lambda pictures, text: [("good", LN(0.5)), ("bad", LN(0.5))]
                  if pictures[0][0, 0, 0] < 50 else [("bad", 0.0), ("good", -80.0)])  # fmt: skip
    videos = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)
    with scripted(raw(model)) as url:
        scored = score(REWARDS["deqa"](url, template=scorer, **FAST), Samples(videos, ["a"]))
    # The unseen words of the first have 0.5 each, so all five are alike: 3; the second is bad.
    assert float(scored.values) == pytest.approx((3 + 1) / 2, rel=1e-6)


def test_square_of_odd_sizes():
    picture = torch.full((3, 3, 6), 200, dtype=torch.uint8)
    whole = square(picture)
    assert whole.shape == (3, 6, 6) and bool((whole[:, 1:4] == 200).all())
    assert whole[:, 0, 0].tolist() == whole[:, 4, 5].tolist() == [122, 116, 104]


# ---- VisionReward --------------------------------------------------------------------------------


@pytest.fixture
def vision(tmp_path, monkeypatch):
    """Stand-ins in a copy of the repository: 30 and 3 questions with weights of ours."""
    weights = [0.5, *(round(0.01 * (k + 1), 2) for k in range(27))]
    texts = {
        "image": ["\n".join(f"Is it {k}? " for k in range(30)) + "\n",
                  json.dumps({"coef": weights, "intercept": [0.25]})],
        "video": ['Has it "[[prompt]]"?\nIs it well?\nIs it long?', "[0.9, 0.3, 0.6]"],
    }  # fmt: skip
    written = {}
    for kind, pair in texts.items():
        found = []
        for template, text in zip(checklists.VISION_REWARD[kind], pair, strict=True):
            path = tmp_path / template.url.partition(f"{checklists._COMMIT}/")[2]
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            found.append(replace(template, sha256=digest))
        written[kind] = tuple(found)
    monkeypatch.setattr(checklists, "VISION_REWARD", written)
    return str(tmp_path)


def test_an_image_is_scored_by_its_answers_and_masks(vision):
    def reply(pictures, text):
        number, bright = int(text.split()[-1].strip("?")), int(pictures[0][0, 0, 0])
        if bright == 1:
            return "Yes."
        if bright == 2:  # No face (question 1): 25 and 26 count nothing. Odd ones are a no.
            return "no" if number % 2 else "yes, it is"
        return "Noticeably" if number == 29 else "yes"

    model = Model(reply)
    with scripted(model) as url:
        reward = REWARDS["vision_reward"](url, template=vision, **FAST)
        scored = score(reward, samples(1, 2, 3))
    signs = [(0 if k in (25, 26) else -1 if k % 2 else 1) for k in range(3, 30)]
    second = sum(0.01 * (k + 1) * sign for k, sign in enumerate(signs)) + 0.25
    expected = torch.tensor([sum(0.01 * (k + 1) for k in range(27)) + 0.25, second, math.nan])
    torch.testing.assert_close(scored.values, expected, equal_nan=True)
    assert "neither yes nor no: 'Noticeably'" in scored.errors[2]
    assert len(model.requests) == 90 and model.requests[0][2]["model"] == "VisionReward"


def test_a_video_is_the_mean_of_weighted_answers_of_a_frame_a_second(vision):
    model = Model(lambda pictures, text: "no" if "well" in text else "yes")
    pixels = torch.arange(20, dtype=torch.uint8).view(1, 20, 1, 1, 1).expand(1, 20, 3, 4, 4)
    with scripted(model) as url:
        reward = REWARDS["vision_reward"](url, template=vision, **FAST)
        scored = score(reward, Samples(pixels, ['a "cat"'], fps=8))
        with pytest.raises(UserError, match="nobody says how many frames a second"):
            score(reward, Samples(pixels, ["a"]))
    assert float(scored.values) == pytest.approx((0.9 - 0.3 + 0.6) / 3)
    asked = sorted((text, [int(p[0, 0, 0]) for p in pictures]) for pictures, text, _ in
                   model.requests)  # fmt: skip
    # 19 / 8 = 2.4 s: seconds 0, 1, 2. All but the last question keep the end of their line.
    assert asked == [('Has it "a "cat""?\n', [0, 8, 16]), ("Is it long?", [0, 8, 16]),
                     ("Is it well?\n", [0, 8, 16])]  # fmt: skip


def test_seconds_have_their_nearest_frames():
    assert whole_seconds(5, 8.0) == [0]  # 0.5 s rounds to 0.
    assert whole_seconds(13, 8.0) == [0, 8, 12]  # 1.5 s rounds to 2.
    assert whole_seconds(4, 0.5) == [0, 0, 1, 1, 2, 2, 3]  # The earlier of two alike.


def test_the_alignment_of_another_server_is_added(vision, monkeypatch):
    class Stub:
        def __init__(self, path):
            assert path == "http://other"
            self.pool = Pool(["http://other"], None, 7.0, 1)

        def score(self, seen):
            return checklists.Scored.of(torch.tensor([0.5, 0.0]), {1: "it slept"})

    monkeypatch.setattr("dancegrpo_fast.rewards.remote.Remote", Stub)
    with scripted(Model(lambda pictures, text: "yes")) as url:
        reward = REWARDS["vision_reward"](url, template=vision, alignment="http://other", **FAST)
        scored = score(reward, samples(1, 1))
    assert float(scored.values[0]) == pytest.approx(0.5 * 0.5 + 3.78 + 0.25, rel=1e-6)
    assert math.isnan(scored.values[1]) and scored.errors == ("", "it slept")
    # Both servers are asked in one call, one after the other: 20 s and 7 s.
    assert reward.chat.pool.seconds == 20.0 and deadline(reward) == 27.0
    alone = REWARDS["vision_reward"](url, template=vision, **FAST)
    assert deadline(alone) == 20.0 and deadline(REWARDS["flicker"]()) is None
    settings = {"template": vision, "alignment": "http://other", **FAST}
    config = RewardConfig(name="vision_reward", path=url, options=settings)
    load_rewards([config], timeout_seconds=28.0)
    with pytest.raises(UserError, match=r"options.seconds = 27: must be below .*seconds = 27,"):
        load_rewards([config], timeout_seconds=27.0)


def test_lists_and_weights_of_other_lengths_do_not_score():
    with pytest.raises(ValueError):
        Checklist(("a", "b"), (1.0,)).score([True, True], "video")


@pytest.mark.parametrize("name", ["deqa", "vision_reward"])
def test_offline_the_message_says_which_file_to_give(name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as raised:
        load_rewards([RewardConfig(name=name, path="http://127.0.0.1:1")])
    line = str(raised.value)
    assert "name it in options.template" in line and "\n" not in line
    assert ("scorer.py" in line) if name == "deqa" else ("weight.json" in line or "_qa_" in line)
