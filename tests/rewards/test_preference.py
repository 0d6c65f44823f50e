"""Losses of reward models against closed forms; a model trained on the demo's pairs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate
from tiny_reward_models import tiny_clip

from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.rewards import REWARDS, Samples, load_rewards
from dancegrpo_fast.rewards.moving_shape import COLOURS, SHAPES, parse_prompt
from dancegrpo_fast.rewards.preference_losses import (
    agreement,
    bradley_terry,
    bradley_terry_ties,
    soft_labels,
    uncertain_bradley_terry,
    yes_or_no,
)

ROOT = Path(__file__).resolve().parents[2]
F64 = {"dtype": torch.float64}


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, **F64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **F64).requires_grad_()


# ---- losses --------------------------------------------------------------------------------------


def test_bradley_terry():
    better, worse = tensor(1.0, -2.0, 700.0, -700.0), tensor(0.5, 1.0, 0.0, 0.0)
    margin = tensor(0.0, 0.5, 0.0, 0.0)
    expected = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(3.5)), 0.0, 700.0]
    found = bradley_terry(better, worse, margin)
    assert float(found) == pytest.approx(sum(expected) / 4, rel=1e-14)
    assert float(bradley_terry(tensor(0.0), tensor(0.0))) == pytest.approx(math.log(2))
    assert torch.autograd.gradcheck(bradley_terry, (random(5), random(5, seed=1), 0.3))


def test_ties_take_the_rest_of_the_probability():
    for theta in (1.001, 2.0, 5.0):
        for d in (-30.0, -1.0, 0.0, 0.7, 30.0):
            losses = [bradley_terry_ties(tensor(d), tensor(outcome), theta).item()
                      for outcome in (1, 0.5, 0)]  # fmt: skip
            assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, rel=1e-12)
            assert math.exp(-losses[0]) == pytest.approx(1 / (1 + theta * math.exp(-d)), rel=1e-12)
    # At a difference of 0 a tie has (theta - 1) / (theta + 1).
    assert bradley_terry_ties(tensor(0), tensor(0.5)).item() == pytest.approx(-math.log(4 / 6))
    outcome = tensor(1, 0.5, 0)
    assert torch.autograd.gradcheck(lambda d: bradley_terry_ties(d, outcome), (random(3),))
    with pytest.raises(ValueError, match="theta = 1.0: must be above 1"):
        bradley_terry_ties(tensor(0), tensor(1), 1.0)
    with pytest.raises(ValueError, match="outcome: must be 0, 0.5 or 1"):
        bradley_terry_ties(tensor(0), tensor(0.7))


@pytest.mark.parametrize(("gap", "a", "b"), [(0.0, 0.1, 0.1), (1.5, 0.5, 1.0), (-4.0, 6.0, 8.0)])
def test_the_expected_loss_of_gaussian_scores(gap, a, b):
    std = math.hypot(a, b)

    def integrand(z: float) -> float:
        density = math.exp(-0.5 * ((z - gap) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        return float(np.logaddexp(0, -z)) * density

    low, high = gap - 12 * std, gap + 12 * std
    expected, _ = integrate.quad(integrand, low, high, points=[0.0], limit=200)
    logs = (tensor(math.log(a)), tensor(math.log(b)))
    found = uncertain_bradley_terry(tensor(gap), tensor(0.0), *logs).item()
    # The kink of a softplus seen from a deviation of 10 limits 64 points; nearby it is smooth.
    assert found == pytest.approx(expected, rel=1e-9 if std < 1.2 else 1e-3)


def test_gaussian_scores_without_deviation_are_bradley_terry():
    better, worse = random(4), random(4, seed=1)
    none = torch.full((4,), -40.0, **F64)
    found = uncertain_bradley_terry(better, worse, none, none)
    torch.testing.assert_close(found, bradley_terry(better, worse), rtol=1e-14, atol=0)
    inputs = (better, worse, random(4, seed=2), random(4, seed=3))
    assert torch.autograd.gradcheck(uncertain_bradley_terry, inputs)
    # Where the order is wrong, uncertainty lowers the loss: that is what the deviation is for.
    sure, unsure = (
        uncertain_bradley_terry(tensor(-3), tensor(0), tensor(s), tensor(s)).item()
        for s in (-5.0, 0.0)
    )
    assert unsure > sure  # Jensen: the expected loss of a convex function only grows.


def test_soft_labels():
    scores, labels = random(4, 2), tensor(1, 0, 0.5, 0.7)
    labels = torch.stack([labels, 1 - labels], dim=1)
    loss = soft_labels(scores, labels)
    p = scores.softmax(dim=1)
    expected = torch.special.xlogy(labels, labels / p).sum(dim=1)
    torch.testing.assert_close(loss, expected.mean())
    # A hard label is Bradley-Terry; agreement costs nothing.
    hard = soft_labels(scores[:1], labels[:1])
    torch.testing.assert_close(hard, bradley_terry(scores[:1, 0], scores[:1, 1]))
    assert soft_labels(labels[3:].log(), labels[3:]).item() == pytest.approx(0, abs=1e-15)
    weight = tensor(0.5, 1, 0, 2)
    torch.testing.assert_close(soft_labels(scores, labels, weight), (expected * weight).mean())
    assert torch.autograd.gradcheck(lambda s: soft_labels(s, labels), (scores,))
    with pytest.raises(ValueError, match="sum to 1"):
        soft_labels(scores, labels * 0.9)


def test_yes_or_no():
    logits = random(3, 7)
    outcome, p = tensor(1, 0, 0.25), logits.softmax(dim=1)
    yes, no = p[:, 1] + p[:, 4], p[:, 2]
    expected = -(outcome * yes.log() + (1 - outcome) * no.log()).mean()
    torch.testing.assert_close(yes_or_no(logits, outcome, [1, 4], [2]), expected)
    assert torch.autograd.gradcheck(lambda x: yes_or_no(x, outcome, [1, 4], [2]), (logits,))
    far = yes_or_no(tensor(800, 0, -800)[None], tensor(0), [0], [2])
    assert far.item() == pytest.approx(1600)  # No infinity.
    for words in (([], [1]), ([1, 2], [2])):
        with pytest.raises(ValueError, match="must be distinct and not empty"):
            yes_or_no(logits, outcome, *words)


def test_agreement():
    # Confidence 0.75 in four pairs of which three are right: calibrated. A tie counts for neither.
    d = math.log(3)
    right, gap = agreement(tensor(d, d, -d, d, 9.0), tensor(1, 1, 0, 0, 0.5))
    assert right == 0.75 and gap == pytest.approx(0, abs=1e-12)
    assert agreement(tensor(50, 50), tensor(1, 0)) == (0.5, pytest.approx(0.5))
    assert agreement(tensor(0.0), tensor(1)) == (0.5, pytest.approx(0))
    assert all(map(math.isnan, agreement(tensor(1), tensor(0.5))))


# ---- training ------------------------------------------------------------------------------------


def loaded(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Its dataclass looks its own module up.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return loaded(ROOT / "examples/train_reward.py")


def demo_pairs(folder: Path, name: str, count: int, seed: int) -> Path:
    """Pictures of the demo's shapes: one as asked, one of another colour; either may be first."""
    rng = np.random.default_rng(seed)
    shapes = loaded(ROOT / "examples/demo/shapes.py")
    train, held_out = shapes.split_prompts()
    chosen = [str(p) for p in rng.choice(train if name == "train" else held_out, count)]
    wrong = []
    for prompt in chosen:
        scene = parse_prompt(prompt)
        others = [c for c in COLOURS if c != scene.colour]
        wrong.append(f"a {rng.choice(others)} {rng.choice(SHAPES)} moving {scene.direction}")
    generator = torch.Generator().manual_seed(seed)
    pictures = [shapes.render(texts, generator)[:, 0] for texts in (chosen, wrong)]
    lines = []
    for i, prompt in enumerate(chosen):
        for which, batch in zip(("good", "bad"), pictures, strict=True):
            pixels = (batch[i].permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{name}-{i}-{which}.png")
        files = [f"{name}-{i}-good.png", f"{name}-{i}-bad.png"]
        label = int(rng.integers(2))
        first, second = files if label else files[::-1]
        lines.append(json.dumps({"prompt": prompt, "first": first, "second": second,
                                 "label": label}))  # fmt: skip
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return path


def arguments(folder: Path, train: Path, held_out: Path, *more: str) -> list[str]:
    return ["--pairs", str(train), "--held-out", str(held_out), "--clip", str(folder / "clip"),
            "--out", str(folder / "out"), *more]  # fmt: skip


@pytest.mark.parametrize("loss", ["bt", "ties", "soft", "uncertain"])
def test_every_loss_trains_and_its_folder_is_a_reward(tmp_path, script, loss):
    tiny_clip(tmp_path / "clip")
    train = demo_pairs(tmp_path, "train", 24, seed=0)
    lines = train.read_text().splitlines()
    tie = json.loads(lines[0]) | {"label": 0.5}
    train.write_text("\n".join([json.dumps(tie), *lines[1:]]))
    options = ["--loss", loss, "--epochs", "2", "--batch", "8", "--hidden", "16"]
    freeze = ["--freeze-clip"] if loss == "ties" else []
    accuracy, _ = script.main(arguments(tmp_path, train, train, *options, *freeze))
    (reward,) = load_rewards([RewardConfig(name="preference", path=str(tmp_path / "out"))])
    pairs = script.read_pairs([str(train)])
    right = []
    for pair in pairs:
        pixels = torch.stack([script.read(path)[0] for path in (pair.first, pair.second)])
        a, b = reward.score(Samples(pixels, [pair.prompt] * 2)).values
        if pair.label != 0.5:
            right.append(float((a > b) == (pair.label == 1)))
    # The folder holds what was trained: its ranking is the one that was measured.
    assert np.mean(right) == pytest.approx(accuracy)
    before = tiny_clip(tmp_path / "again").state_dict()["visual_projection.weight"]
    same = torch.equal(reward.clip.model.state_dict()["visual_projection.weight"], before)
    assert same == bool(freeze)


def test_a_folder_without_a_head_is_refused(tmp_path):
    tiny_clip(tmp_path)
    with pytest.raises(UserError, match="holds no preference.safetensors"):
        load_rewards([RewardConfig(name="preference", path=str(tmp_path))])
    assert REWARDS["preference"].load().name == "preference"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "no pair"),
        ('{"prompt": "a", "first": "x.png"}', "'second'"),
        ('{"prompt": "a", "first": "x.png", "second": "../y.png"}', "outside"),
        ('{"prompt": "a", "first": "x.png", "second": "y.png", "label": 2}', "outside"),
        ("[]", "no pair"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, script, line, reason):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f"p.jsonl, line 1: .*{reason}"):
        script.read_pairs([str(tmp_path / "p.jsonl")])


@pytest.mark.slow
def test_held_out_pairs_are_ranked(tmp_path, script):
    """A tiny CLIP from random weights learns which colour a prompt asks for; about a minute."""
    tiny_clip(tmp_path / "clip")
    train = demo_pairs(tmp_path, "train", 3000, seed=0)
    held_out = demo_pairs(tmp_path, "held_out", 300, seed=1)
    options = ["--epochs", "8", "--batch", "50", "--learning-rate", "2e-3"]
    accuracy, error = script.main(arguments(tmp_path, train, held_out, *options))
    assert accuracy > 0.9 and error < 0.1
