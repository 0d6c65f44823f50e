"""Rewards inside a run: parts, comparisons, thresholds, metadata, failures, learning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CPU, tiny_config, tiny_wan
from tiny_reward_models import tiny_clip

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards import Samples
from dancegrpo_fast.rewards.moving_shape import MovingShape
from dancegrpo_fast.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TWO = [{"name": "moving_shape.colour"}, {"name": "moving_shape.direction"}]
FEWER = {
    "rollout.group_size": 16, "rollout.batch_size": 16, "loss.micro_batch_size": 16,
    "optimizer.learning_rate": "2.0e-4",
}  # fmt: skip
PROMPTS = ["a red square moving left", "a blue circle moving up", "a green cross moving down"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("model") / "wan")


def trained(tmp_path: Path, wan: Path, rewards: list[dict]):
    """One iteration; returns (trainer, rewards [P, G, R], pixels, texts, metrics)."""
    tmp_path.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": p, "count": i + 1}) for i, p in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    overrides = {"rewards": rewards, "data.prompts": str(tmp_path / "p.jsonl")}
    config = tiny_config(tmp_path, wan, overrides)
    trainer = Trainer(config, CPU)
    seen: dict = {}
    score = trainer.score

    def watched(drawn, prompts):
        seen["rewards"] = score(drawn, prompts)
        seen["pixels"] = trainer.family.decode(drawn.samples()).float()
        seen["prompts"] = [prompts[p] for p, _ in drawn.leaves]
        return seen["rewards"]

    trainer.score = watched
    metrics = trainer.iteration()
    return trainer, seen["rewards"], seen["pixels"], seen["prompts"], metrics


def test_two_parts_and_a_learned_reward(tmp_path, wan):
    tiny_clip(tmp_path / "clip")
    rewards = [
        {"name": "moving_shape.colour"},
        {"name": "moving_shape.direction", "weight": 0.5},
        {"name": "clip_score", "path": str(tmp_path / "clip"), "frames": [0, -1]},
        {"name": "motion_amplitude", "weight": 0.0, "threshold": 1e-3},
    ]
    trainer, array, pixels, prompts, metrics = trained(tmp_path / "run", wan, rewards)
    texts = [prompt.text for prompt in prompts]
    flat = torch.from_numpy(array).flatten(0, 1)
    # Decoded again in one batch instead of the trainer's.
    torch.testing.assert_close(
        flat[:, :2], MovingShape().parts(pixels, texts)[:, :2], rtol=1e-4, atol=1e-5
    )
    clip = trainer.rewards[2].score(Samples(pixels, texts)).values
    # A pixel near a rounding edge of 8 bits may move: 1 / 255 of one of 4000 values.
    torch.testing.assert_close(flat[:, 2], clip, rtol=0, atol=1e-3)
    assert set(flat[:, 3].tolist()) <= {0.0, 1.0}
    assert trainer.rewards[0].shared is trainer.rewards[1].shared
    names = {"moving_shape.colour", "moving_shape.direction", "clip_score", "motion_amplitude"}
    assert {name.removeprefix("reward/") for name in metrics} >= names
    assert metrics["update/grad_norm"] > 0


def test_comparisons_and_metadata(tmp_path, wan):
    (tmp_path / "told.py").write_text(
        "import torch\n"
        "from dancegrpo_fast.rewards import SampleReward, Scored\n"
        "class Told(SampleReward):\n"
        "    name = 'told'\n"
        "    def score(self, samples):\n"
        "        return Scored.of(torch.tensor([float(m['count']) for m in samples.metadata]))\n"
    )
    told = {"name": f"{tmp_path}/told.py:Told", "weight": 0}
    rewards = [{"name": "moving_shape", "win_rate": "balanced"}, told]
    _, array, pixels, prompts, metrics = trained(tmp_path / "run", wan, rewards)
    np.testing.assert_allclose(array[..., 0].sum(axis=1), 4 / 2, rtol=1e-6)
    worth = MovingShape()(pixels, [p.text for p in prompts]).reshape(2, 4)
    # The trainer compares 8-bit pixels; orders agree where the scores differ by more than that.
    for group, rate in zip(worth, array[..., 0], strict=True):
        best, worst = int(group.argmax()), int(group.argmin())
        if group[best] - group[worst] > 0.01:
            assert rate[best] > rate[worst]
    counts = [prompt.metadata["count"] for prompt in prompts]
    assert array[..., 1].flatten().tolist() == counts and len(set(counts)) > 1
    assert metrics["reward/failed"] == 0 and metrics["reward/told"] == np.mean(counts)


def test_failing_rewards_stop_with_their_reason(tmp_path, wan):
    (tmp_path / "mine.py").write_text(
        "from dancegrpo_fast.rewards.pixels import Colour\n"
        "class Mine(Colour):\n"
        "    def spec(self, prompt, metadata):\n"
        "        return super().spec('nothing', metadata)\n"
    )
    reason = r"mine.py:Mine': all 8 samples .*colour: the prompt names no colour of red, "
    with pytest.raises(UserError, match=reason):
        trained(tmp_path / "run", wan, [{"name": f"{tmp_path}/mine.py:Mine"}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewards", "other"),
    [
        (TWO, FEWER | {"advantage.combine": "advantage"}),
        (TWO, FEWER | {"advantage.combine": "loss"}),
        (TWO, FEWER | {"advantage.combine": "reward"}),
        ([{"name": "moving_shape", "threshold": 0.62}], {}),
    ],
    ids=["advantage", "loss", "reward", "threshold"],
)
def test_the_demo_learns(tmp_path, monkeypatch, rewards, other):
    """Some minutes each: the demo's recipe, measured on held-out prompts and fixed noise."""
    from dancegrpo_fast.config import load_config
    from dancegrpo_fast.run import train

    monkeypatch.chdir(ROOT)
    recipe = {
        "output": tmp_path / "run", "evaluation.every": "null", "checkpoint.every": 100,
        "rewards": json.dumps(rewards),
    } | other  # fmt: skip
    train(load_config("recipes/demo.yaml", [f"{key}={value}" for key, value in recipe.items()]))
    gain = json.loads((tmp_path / "run/summary.json").read_text())["reward"]
    # Two standard errors over the held-out prompts (measured: 4.5 to 5, the threshold 2.7).
    assert gain["gain"] > 2 * gain["standard_error"]
