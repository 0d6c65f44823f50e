"""Scores of a run's evaluation: failures, batches, parts, and what they do to means and files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor, nn

from dancegrpo_fast.config import EvaluationConfig, Interrupted, UserError
from dancegrpo_fast.held_out import HeldOut
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.evaluate import Difference, Evaluation, _measured, evaluate
from dancegrpo_fast.report.metrics import JsonLines, read_metrics
from dancegrpo_fast.report.picture import write_picture
from dancegrpo_fast.report.result import HeldOutResult, write_still
from dancegrpo_fast.rewards import PartsReward
from dancegrpo_fast.rewards.interface import Samples, WithWeights
from dancegrpo_fast.run import train

PROMPTS = [Prompt(f"prompt {n}") for n in range(3)]


class Mean:
    """Records what it is called with."""

    name = "mean"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        self.calls.append(prompts)
        return videos.mean(dim=(1, 2, 3, 4))


class Fails(Mean):
    name = "fails"

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        if "prompt 1" in prompts:
            raise RuntimeError("no answer")
        return super().__call__(videos, prompts)


class Ranks(Mean):
    name = "ranks"
    groupwise = True


class Model(WithWeights, PartsReward):
    """With weights that must be placed, and a need to know the frame rate."""

    name, part_names, offload = "model", ("half", "double"), True

    def __init__(self) -> None:
        self.network, self.at = nn.Linear(1, 1), "cpu"

    def modules(self) -> list[nn.Module]:
        return [self.network]

    def place(self, device: torch.device | str) -> None:
        self.at = "away" if device == "cpu" else "device"

    def score_parts(self, samples: Samples) -> tuple[Tensor, dict[int, str]]:
        assert samples.fps == 8 and self.at == "device"
        mean = samples.videos.double().div(255).mean(dim=(1, 2, 3, 4))
        return torch.stack([mean / 2, mean * 2], dim=1).float(), {}

    def total(self, parts: Tensor) -> Tensor:
        return parts[:, 0] * 2


def drawn(prompts, latents: Tensor) -> Tensor:
    """Grey by the noise; samples of prompt 2 hold a pixel that is no number."""
    grey = latents.mean(dim=(1, 2, 3, 4)).sigmoid()
    videos = grey[:, None, None, None, None].expand(-1, 2, 3, 4, 4).clone()
    for video, prompt in zip(videos, prompts, strict=True):
        if prompt.text == "prompt 2":
            video[0, 0, 0, 0] = torch.nan
    return videos


def measured(rewards, batch_size: int = 2) -> Evaluation:
    return evaluate(
        drawn, PROMPTS, rewards, EvaluationConfig(seeds=2, batch_size=batch_size),
        latent_shape=(1, 1, 2, 2), sample_shape=(2, 3, 4, 4),
        world=World(0, 1, torch.device("cpu")), fps=8,
    )  # fmt: skip


def test_a_failed_reward_or_sample_has_no_score_and_ends_nothing(caplog):
    found = measured([Mean(), Fails()])
    numbers = np.isfinite(found.scores).all(axis=1)  # [P, R]
    assert numbers.tolist() == [[True, True], [True, False], [False, False]]
    assert np.isfinite(found.distances).tolist() == [True, True, False]  # Black against black is 0.
    gaps = np.abs(np.diff(found.scores[:2, :, 0]))[:, 0]
    # Scores below 1 in float32: their difference is off by a few times 6e-8.
    np.testing.assert_allclose(found.distances[:2], gaps, rtol=0, atol=5e-7)
    assert "reward failed for 2 samples: fails: RuntimeError: no answer" in caplog.text
    assert "2 held-out samples have no score: pixels are not finite" in caplog.text


def test_rewards_get_batches_and_those_that_compare_get_whole_groups():
    plain, whole = Mean(), Ranks()
    measured([plain, whole], batch_size=3)
    texts = [prompt.text for prompt in PROMPTS for _ in range(2)]
    assert plain.calls == [texts[:3], texts[3:]] and whole.calls == [texts]


def test_parts_come_from_the_placed_model_and_know_the_frame_rate():
    found = measured([Mean(), Model()])
    assert found.part_names == ("model.half", "model.double")
    mean = found.scores[:2, :, 0]  # float32
    np.testing.assert_allclose(found.parts[:2, :, 0], mean / 2, rtol=1e-6)
    np.testing.assert_allclose(found.parts[:2, :, 1], mean * 2, rtol=1e-6)
    assert np.isnan(found.parts[2]).all()


def test_differences_leave_out_pairs_with_a_failed_score():
    base = np.array([[1.0, 2.0], [3.0, np.nan], [np.nan, np.nan], [5.0, 6.0]])
    trained = np.array([[2.0, np.nan], [5.0, 7.0], [1.0, 1.0], [6.0, 7.0]])
    found = Difference.of(base, trained)
    # Prompts 0, 1 and 3: base 1, 3, 5.5; trained 2, 5, 6.5; gains 1, 2, 1.
    assert (found.base, found.trained) == pytest.approx((9.5 / 3, 4.5))
    assert found.standard_error == pytest.approx(np.std([1, 2, 1], ddof=1) / math.sqrt(3))
    assert math.isnan(Difference.of(base[2:3], trained[2:3]).gain)


def result(base: np.ndarray, trained: np.ndarray, prompts: tuple[str, ...]) -> HeldOutResult:
    def one(scores: np.ndarray) -> Evaluation:
        count = len(scores)
        clips = np.zeros((count, 2, 3, 8, 8), np.uint8)
        parts, distances = np.zeros((*scores.shape, 0)), np.full(count, np.nan)
        return Evaluation(scores[..., None], ("a",), parts, (), distances, clips)

    return HeldOutResult(prompts, one(base), one(trained), (1.0,))


def test_a_summary_holds_json_where_nothing_is_a_number(tmp_path, monkeypatch):
    """One prompt has no standard error, one seed no diversity."""
    from test_config import RECIPE

    from dancegrpo_fast.config import RunConfig
    from dancegrpo_fast.report.result import Outcome, write_summary

    found = result(np.ones((1, 1)), np.full((1, 1), 2.0), ("a",))
    outcome = Outcome(RunConfig.model_validate(RECIPE), {}, {}, "", found)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = write_summary(outcome, tmp_path).read_text()
    summary = json.loads(text, parse_constant=refuse)
    assert summary["reward"]["gain"] == 1.0 and summary["reward"]["standard_error"] is None
    assert summary["diversity"] == {"base": None, "trained": None, "ratio": None}


def test_a_prompt_with_dollar_signs_is_no_formula(tmp_path):
    clips = np.zeros((1, 2, 3, 8, 8), np.uint8)
    line = [(0, 0.1), (1, 0.2)]
    file = tmp_path / "report.png"
    write_picture(file, line, line, [0, 0], ["$a_b_c$ or $\\frob$"], clips, clips)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompt", [chr(0x7EA2) * 30, "a dot " * 4000, "a\nb"])
def test_the_picture_of_any_prompt_is_drawn_without_a_word(tmp_path, prompt):
    """A font without a prompt's letters said so once for each of them."""
    clips = np.zeros((1, 2, 3, 8, 8), np.uint8)
    assert write_picture(tmp_path / "r.png", [(0, 0.1)], [], [], [prompt], clips, clips).is_file()


@pytest.mark.parametrize("kept", [0, 20, 400])
def test_a_kept_evaluation_that_was_cut_off_is_named(tmp_path, kept):
    path = tmp_path / "evaluation-base-1.npz"
    result(np.ones((3, 2)), np.ones((3, 2)), ("a",)).base.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"base-1\.npz: cannot be read .*the base is evaluated ag"):
        Evaluation.load(path)


def test_the_picture_of_a_run_whose_evaluations_failed(tmp_path):
    with_log = JsonLines(tmp_path / "metrics.jsonl")
    with_log.write(1, {"reward/mean": 1.0})
    with_log.write(1, {"evaluation/reward": math.nan, "evaluation/standard_error": math.nan})
    with_log.close()
    failed = np.full((1, 1), np.nan)
    assert write_still(result(failed, failed, ("a",)), tmp_path).is_file()


def test_an_evaluation_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    def cut(path: Path, **arrays: np.ndarray) -> None:
        path.write_bytes(b"PK")
        raise OSError("killed here")

    monkeypatch.setattr(np, "savez_compressed", cut)
    kept = tmp_path / "evaluation-base-1.npz"
    with pytest.raises(OSError, match="killed here"):
        result(np.ones((1, 1)), np.ones((1, 1)), ("a",)).base.save(kept)
    assert not kept.exists()


class Remote(Mean):
    name, remote = "remote", True


def test_pixels_are_where_training_has_them():
    """On the device, but for rewards that wait for a server or compare samples."""
    seen: dict[str, str] = {}

    def recording(kind: type[Mean]) -> Mean:
        class Recording(kind):  # type: ignore[misc, valid-type]
            def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
                seen[self.name] = videos.device.type
                return torch.zeros(len(prompts))

        return Recording()

    rewards = [recording(kind) for kind in (Mean, Ranks, Remote)]
    samples = Samples(torch.zeros(3, 1, 3, 2, 2, dtype=torch.uint8), ["a", "a", "b"])
    scores, _ = _measured(rewards, samples, 2, torch.device("meta"))
    assert scores.tolist() == [[0.0] * 3] * 3
    assert seen == {"mean": "meta", "ranks": "cpu", "remote": "cpu"}


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path, tiny_wan_folder, monkeypatch):
    """Snapshot 1 is on disk, its evaluation is not: the resumed run makes it, and only once."""
    (tmp_path / "held_out.txt").write_text("a red dot\na blue dot")
    changes = {
        "iterations": 2, "checkpoint.every": 1, "checkpoint.background": False,
        "evaluation.prompts": str(tmp_path / "held_out.txt"), "evaluation.every": 1,
    }  # fmt: skip
    config = tiny_config(tmp_path, tiny_wan_folder, changes)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "now", killed)
        with pytest.raises(Interrupted):
            train(config)
    train(config, resume=True)
    lines = read_metrics(Path(config.output) / "metrics.jsonl")
    evaluated = [line["iteration"] for line in lines if "evaluation/reward" in line]
    assert evaluated == [0, 1, 2]


def test_held_out_prompts_have_the_column_of_the_training_ones(tmp_path, tiny_wan_folder):
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.csv").write_text(f"caption,prompt\n{name},no\n")
    changes = {
        "data.prompts": str(tmp_path / "train.csv"), "data.column": "caption",
        "evaluation.prompts": str(tmp_path / "held_out.csv"),
    }  # fmt: skip
    found = HeldOut(tiny_config(tmp_path, tiny_wan_folder, changes)).prompts
    assert [prompt.text for prompt in found] == ["held_out"]
