"""Judges against a scripted OpenAI-compatible server: texts, pictures, parsing, yes and no."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from serving import http, scripted
from test_remote import wan  # noqa: F401  (a fixture)
from tiny_models import CPU, tiny_config

from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.rewards import REWARDS, Samples, load_rewards, score
from dancegrpo_fast.rewards import judge_prompts as prompts_of
from dancegrpo_fast.rewards.chat import yes_probability
from dancegrpo_fast.rewards.combine import Judge, WinRate
from dancegrpo_fast.rewards.judge_prompts import caption_text
from dancegrpo_fast.trainer import Trainer

FAST = {"seconds": 20.0, "concurrency": 2}


def chat(text: str, first=None) -> bytes:
    choice: dict = {"message": {"role": "assistant", "content": text}}
    if first is not None:
        top = [{"token": token, "logprob": value} for token, value in first]
        choice["logprobs"] = {"content": [{"token": "x", "top_logprobs": top}]}
    return http(json.dumps({"choices": [choice]}).encode())


def seen(body: bytes) -> tuple[list[np.ndarray], str, dict]:
    """Pictures [H, W, 3], text and fields of a request."""
    fields = json.loads(body)
    (message,) = fields["messages"]
    *images, text = message["content"]
    assert text["type"] == "text" and all(part["type"] == "image_url" for part in images)
    urls = [part["image_url"]["url"].partition("base64,")[2] for part in images]
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls]
    return pictures, text["text"], fields


class Model:
    """A scripted model; `reply(pictures, text)` gives a text or likely first tokens."""

    def __init__(self, reply) -> None:
        self.reply, self.requests = reply, []

    def __call__(self, number, head, body):
        assert head.startswith(b"POST /v1/chat/completions ")
        pictures, text, fields = seen(body)
        self.requests.append((pictures, text, fields))
        found = self.reply(pictures, text)
        return chat(found) if isinstance(found, str) else chat("x", found)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Stand-ins of the official files, with the structure of each and other words."""
    written = {}
    for (judge, version, kind), template in prompts_of.UNIFIED.items():
        source = (
            "from nowhere import nothing\n\nprompt = ''\nother = f'{nothing}'\nmessages = [\n"
            "    {'text': (\n        'Look at the picture.\\n'\n"
            f"        \"It's {{judge}} {judge} {version} {kind}\\n\"\n"
            "        f'for [{prompt}]'\n    )},\n]\nraise RuntimeError('executed')\n"
        )
        path = tmp_path / f"{judge}-{version}-{kind}.py"
        path.write_text(source)
        digest = hashlib.sha256(source.encode()).hexdigest()
        written[judge, version, kind] = replace(template, sha256=digest)
        cached = tmp_path / "dancegrpo_fast/templates" / f"{digest[:16]}.txt"
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prompts_of, "UNIFIED", written)
    return tmp_path


def samples(*worth, frames: int = 1, prompts=None, **other) -> Samples:
    """Grey pictures of 6 x 4 whose brightness (of 255) is their worth."""
    pixels = torch.tensor(worth, dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    videos = pixels.expand(-1, frames, 3, 6, 4)
    return Samples(videos, prompts or ["a {cat} \u00e9"] * len(worth), **other)


# ---- what is asked -------------------------------------------------------------------------------


def test_texts_are_read_out_of_the_authors_files_and_not_run(texts):
    model = Model(lambda pictures, text: "Final Score: 4")
    with scripted(model) as url:
        reward = REWARDS["unified_reward"](url, version="1", image="png", **FAST)
        assert score(reward, samples(10, 200)).values.tolist() == [4, 4]
    pictures, text, fields = model.requests[0]
    expected = "Look at the picture.\nIt's {judge} point 1 image\nfor [a {cat} \u00e9]"
    assert text == expected
    assert {len(p) for p, _, _ in model.requests} == {1}
    assert sorted(int(p[0][0, 0, 0]) for p, _, _ in model.requests) == [10, 200]
    assert pictures[0].shape == (6, 4, 3) and fields["temperature"] == 0
    assert fields["model"] == "UnifiedReward" and "logprobs" not in fields


def test_only_the_one_text_of_a_file_is_taken():
    assert caption_text("a = f'x {prompt}'\nb = f'{other} {prompt}'") == "x {prompt}"
    for source in ("a = 'no {prompt}'", "a = f'{prompt}'\nb = f'again {prompt}'"):
        with pytest.raises(ValueError, match="texts with {prompt}, not one"):
            caption_text(source)


def test_another_version_of_a_file_is_refused(texts, tmp_path):
    (tmp_path / "mine.py").write_text("f'{prompt}'")
    config = RewardConfig(
        name="unified_reward", path="http://x", options={"template": str(tmp_path / "mine.py")}
    )
    with pytest.raises(UserError, match="is another version .*give that file as options.template"):
        load_rewards([config])
    named = str(tmp_path / "point-2-image.py")
    reward = REWARDS["unified_reward"]("http://x", template=named)
    with pytest.raises(ValueError, match="no text for videos, only for images"):
        reward.text("a", "video")


def test_frames_of_a_video_and_jpeg():
    model = Model(lambda pictures, text: "Score: 5")
    videos = torch.arange(12, dtype=torch.uint8).view(1, 12, 1, 1, 1).expand(-1, -1, 3, 16, 16) * 20
    with scripted(model) as url:
        reward = REWARDS["judge_score"](url, frames=5, image="jpeg", **FAST)
        score(reward, Samples(videos, ["a"]))
    pictures, text, fields = model.requests[0]
    # int(i * 12 / 5) for i in 0..4; JPEG of a flat grey is within 1 of it.
    assert [round(p.mean() / 20) for p in pictures] == [0, 2, 4, 7, 9]
    assert "a video that was made" in text
    assert "data:image/jpeg" in json.dumps(fields)


# ---- what is read --------------------------------------------------------------------------------

POINTS = [
    ("unified_reward", {"version": "1"}, "cat (object): 1\nFinal Score: 3.5", 3.5),
    ("unified_reward", {"version": "1"}, "Final Score: 9", None),
    ("unified_reward", {"version": "1"}, "I like it", None),
    ("unified_reward", {},
     "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 3.5", 3.0),
    ("unified_reward", {"part": "style"},
     "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 3.5", 3.5),
    ("unified_reward", {},
     "Alignment Score (1-5): 2\nPhysics Score (1-5): 3\nStyle Score (1-5): 4", 3.0),
    ("unified_reward", {}, "Alignment Score (1-5): 2.5\nStyle Score (1-5): 3.5", None),
    ("unified_reward", {"part": "physics"}, "Alignment Score (1-5): 2.5", None),
    ("judge_score", {}, "Score: 2 would be low.\nScore: 7.5", 7.5),
    ("judge_score", {}, "**Score:** 7", None),
    ("judge_score", {}, "Score: **7**", 7.0),
    ("judge_score", {}, "Score: 11", None),
    ("judge_score", {}, "", None),
]  # fmt: skip
THINK = "<think>Image 2 is better at first</think>"
PAIRS = [
    ("unified_reward_pair", {"version": "1"}, "Image 1 is better.", 1.0),
    ("unified_reward_pair", {"version": "1"}, "image 2 is better", 0.0),
    ("unified_reward_pair", {"version": "1"}, "Both images are equally good.", 0.5),
    ("unified_reward_pair", {}, "Alignment Score:\n Image 1: 0.6\n Image 2: 0.4\n\nCoherence Score:"
     "\n Image 1: 0.3\n Image 2: 0.7\n\nStyle Score:\n Image 1: 0.9\n Image 2: 0.1", 0.6),
    ("unified_reward_pair", {}, "Alignment Score:\n Image 1: 0.6\n Image 2: 0.4", 0.5),
    ("unified_reward_pair", {}, "A\n Image 1: 0\n Image 2: 0\n" * 3, 0.5),
    ("unified_reward_think", {}, THINK + "<answer>Image 1 is better</answer>", 1.0),
    ("unified_reward_think", {"version": "1"}, "<answer>\nImage 2 is better\n</answer>", 0.0),
    ("unified_reward_think", {}, THINK, 0.5),  # Cut off before the answer.
    ("unified_reward_think", {}, "<answer>Image 1 is better. Image 2 is better</answer>", 0.5),
    ("judge_pair", {}, "<answer>1</answer> no: <answer> 2 </answer>", 0.0),
    ("judge_pair", {}, "<answer>TIE</answer>", 0.5),
    ("judge_pair", {}, "1", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "reply", "expected"), POINTS)
def test_scores_are_read_or_missing(texts, name, options, reply, expected):
    with scripted(Model(lambda pictures, text: reply)) as url:
        scored = score(REWARDS[name](url, **options, **FAST), samples(7))
    if expected is None:
        assert math.isnan(scored.values[0]) and "no score in the reply" in scored.errors[0]
    else:
        assert scored.values[0] == pytest.approx(expected) and scored.errors == ("",)


@pytest.mark.parametrize(("name", "options", "reply", "expected"), PAIRS)
def test_comparisons_are_read_or_ties(texts, name, options, reply, expected):
    model = Model(lambda pictures, text: reply)
    with scripted(model) as url:
        judge = REWARDS[name](url, **options, **FAST)
        assert isinstance(judge, Judge)
        won = judge.compare(samples(7), samples(9))
    assert won.tolist() == pytest.approx([expected])
    assert [int(picture[0, 0, 0]) for picture in model.requests[0][0]] == [7, 9]


@pytest.mark.parametrize(
    "answer", [b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"x"]
)
def test_what_is_no_completion_is_no_score(answer):
    with scripted(lambda number, head, body: http(answer)) as url:
        for name in ("judge_score", "yes_probability"):
            assert score(REWARDS[name](url, **FAST), samples(1)).values.isnan().all()
        assert REWARDS["judge_pair"](url, **FAST).compare(samples(1), samples(2)).isnan().all()


def test_a_broken_picture_is_not_shown():
    model = Model(lambda pictures, text: "Score: 5")
    videos = torch.rand(2, 1, 3, 4, 4)
    videos[1, 0, 0, 0, 0] = torch.inf
    with scripted(model) as url:
        scored = score(REWARDS["judge_score"](url, **FAST), Samples(videos, ["a", "b"]))
        won = REWARDS["judge_pair"](url, **FAST).compare(
            Samples(videos, ["a", "a"]), Samples(videos.flip(0), ["a", "a"])
        )
    assert scored.errors == ("", "a pixel is not finite") and won.isnan().all()
    assert len(model.requests) == 1


def test_replies_are_kept_by_pixels_and_text():
    model = Model(lambda pictures, text: "Score: 5" if pictures[0][0, 0, 0] < 100 else "none")
    with scripted(model) as url:
        reward = REWARDS["judge_score"](url, cache=2, **FAST)
        for _ in range(2):
            score(reward, samples(1, 1, 2))
        assert len(model.requests) == 2 and reward.chat.pool.counts["cached"] == 4
        score(reward, samples(1, prompts=["another"]))
        score(reward, samples(2))
        assert len(model.requests) == 3
        score(reward, samples(1))  # It was the oldest of three.
        assert len(model.requests) == 4


# ---- yes and no ----------------------------------------------------------------------------------

LN = math.log


@pytest.mark.parametrize(
    ("first", "expected", "missed"),
    [
        ([("yes", LN(0.6)), ("no", LN(0.2))], 0.75, False),
        ([("Yes", LN(0.3)), (" yes", LN(0.2)), ("\u0120YES", LN(0.1)), ("No", LN(0.2))], 0.75, 0),
        ([("yes", LN(0.9)), ("x", LN(0.05))], 0.9 / 0.95, True),
        ([("no", LN(0.9)), ("x", LN(0.05))], 0.05 / 0.95, True),
        ([("yesterday", LN(0.5)), ("nothing", LN(0.5))], None, None),
        ([("yes", -800.0), ("no", -800.0)], None, None),  # Both vanish in float64.
    ],
)
def test_yes_against_no(first, expected, missed):
    found = yes_probability(first)
    if expected is None:
        assert found is None
    else:
        assert found[0] == pytest.approx(expected, rel=1e-12) and found[1] == missed


def test_yes_probability_of_single_samples(caplog):
    def reply(pictures, text):
        value = int(pictures[0][0, 0, 0]) / 255
        if value == 0:
            return [("maybe", -0.1), ("so", -3.0)]
        if value == 1:
            return [("yes", -0.01), ("so", -5.0)]
        return [("yes", LN(value)), ("no", LN(1 - value))]

    model = Model(reply)
    with scripted(model) as url:
        reward = REWARDS["yes_probability"](url, criterion="Is it red?", **FAST)
        scored = score(reward, samples(51, 0, 255, 204))
    bound = math.exp(-0.01) / (math.exp(-0.01) + math.exp(-5.0))
    expected = torch.tensor([0.2, math.nan, bound, 0.8])
    torch.testing.assert_close(scored.values, expected, equal_nan=True)
    assert "neither yes nor no is likely" in scored.errors[1]
    assert reward.chat.pool.counts["floored"] == 1
    assert "1 of 4 replies" in caplog.text
    _, text, fields = model.requests[0]
    assert "Is it red? Answer with one word" in text
    assert fields["top_logprobs"] == 20 and fields["logprobs"] and fields["max_tokens"] == 1


def test_yes_probability_against_a_reference_in_both_orders(tmp_path):
    bias = 0.2

    def reply(pictures, text):
        a, b = (int(p[0, 0, 0]) / 255 for p in pictures)
        yes = 0.5 + (a - b) / 2 + bias  # It likes whatever comes first.
        return [("yes", LN(yes)), ("no", LN(1 - yes))]

    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 6), (102,) * 3).save(tmp_path / "in/r.png")
    Image.new("RGB", (4, 6)).save(tmp_path / "out.png")
    metadata = [{"reference": name} for name in ("r.png", "r.png", "../out.png", "gone.png")]
    with scripted(Model(reply)) as url:
        reward = REWARDS["yes_probability"](url, references=str(tmp_path / "in"), **FAST)
        scored = score(reward, samples(102, 153, 102, 102, metadata=metadata))
        missing = score(reward, samples(102))
    # The bias is gone: equal pictures get a half.
    torch.testing.assert_close(scored.values[:2], torch.tensor([0.5, 0.6]))
    assert "lies outside" in scored.errors[2] and "gone.png" in scored.errors[3]
    assert "name no reference" in missing.errors[0]


# ---- inside a run --------------------------------------------------------------------------------


def pixel_judge(bias: float):
    """Prefers the redder picture, and by `bias` the first."""

    def reply(pictures, text):
        half = len(pictures) // 2
        a, b = (
            np.mean([p[..., 0].astype(float) - p[..., 1] for p in part])
            for part in (pictures[:half], pictures[half:])
        )
        if a + bias == b:
            return "<answer>tie</answer>"
        return f"reasons <answer>{1 if a + bias > b else 2}</answer>"

    return reply


def test_both_orders_correct_a_judge_that_likes_the_first_picture():
    worth = [10, 200, 120, 60]
    videos = torch.zeros(4, 1, 3, 4, 4, dtype=torch.uint8)
    videos[:, :, 0] = torch.tensor(worth, dtype=torch.uint8).view(-1, 1, 1, 1)
    with scripted(Model(pixel_judge(bias=55.0))) as url:
        judge = REWARDS["judge_pair"](url, **FAST)
        rates = WinRate(judge, "both").score(Samples(videos, ["a"] * 4)).values
        always_first = [judge.compare(Samples(videos[[i]], ["a"]), Samples(videos[[j]], ["a"]))
                        for i, j in ((0, 3), (3, 0))]  # fmt: skip
    assert [float(won) for won in always_first] == [1, 1]  # The bias decides between these two.
    assert rates.tolist() == pytest.approx([0.5 / 3, 1.0, 2 / 3, 0.5 / 3])
    assert float(rates.sum()) == pytest.approx(2)


def test_a_pixel_judge_gives_a_run_its_signal(tmp_path, wan):  # noqa: F811
    with scripted(Model(pixel_judge(bias=0.0))) as url:
        options = {"seconds": 60.0, "frames": 2}
        reward = {"name": "judge_pair", "path": url, "options": options, "win_rate": "balanced"}
        trainer = Trainer(tiny_config(tmp_path, wan, {"rewards": [reward]}), CPU)
        kept: dict = {}
        sampled = trainer.score

        def watched(drawn, prompts):
            kept["pixels"] = trainer.family.decode(drawn.samples()).float()
            kept["rewards"] = sampled(drawn, prompts)
            return kept["rewards"]

        trainer.score = watched
        metrics = trainer.iteration()
    rates = kept["rewards"][..., 0]
    np.testing.assert_allclose(rates.sum(axis=1), rates.shape[1] / 2, rtol=1e-6)
    frames = kept["pixels"].shape[1]
    chosen = kept["pixels"][:, [0, frames // 2]] if frames > 2 else kept["pixels"]
    red = (chosen[:, :, 0] - chosen[:, :, 1]).mean(dim=(1, 2, 3)).reshape(rates.shape)
    assert (rates.argmax(axis=1) == red.argmax(dim=1).numpy()).all()
    assert metrics["reward/failed"] == 0 and metrics["update/grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("judge_pair", {}, "it compares pairs; set rewards.0.win_rate"),
        ("judge_score", {"options": {"secnds": 1}}, "options.secnds: Extra inputs"),
        ("judge_score", {"options": {"frames": 0}}, "options.frames: Input should be greater"),
        ("judge_score", {"options": {"question": "no place"}}, "must hold {prompt}"),
        ("yes_probability", {"options": {"references": "gone"}}, "'gone': is no folder"),
        ("unified_reward", {"options": {"version": "1", "part": "style"}}, "leave it out"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(name, settings, line):
    with pytest.raises(UserError) as raised:
        load_rewards([RewardConfig(name=name, path="http://127.0.0.1:1", **settings)])
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_a_deadline_that_the_other_processes_do_not_wait_for_is_refused():
    def load(timeout: float, **options):
        config = RewardConfig(name="judge_score", path="http://127.0.0.1:1", options=options)
        return load_rewards([config], timeout_seconds=timeout)

    assert load(601.0) and load(300.0, seconds=299.0)
    for timeout, options in ((600.0, {}), (300.0, {"seconds": 300.0})):
        with pytest.raises(UserError, match="options.seconds = .*00: must be below parallel"):
            load(timeout, **options)
