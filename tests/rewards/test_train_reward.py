"""`examples/train_reward.py` on videos and scored samples, and the demo trained on the result."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dancegrpo_fast.config import RewardConfig
from dancegrpo_fast.rewards import Samples, load_rewards
from dancegrpo_fast.rewards.preference import (
    Preference,
    PreferenceHead,
    clip_features,
    evenly,
    save_preference,
    small_clip,
)

ROOT = Path(__file__).resolve().parents[2]


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


def write_clip(path: Path, video: torch.Tensor) -> None:
    """[F, 3, H, W] in [0, 1] as an animated PNG, which loses nothing."""
    frames = [Image.fromarray((f.permute(1, 2, 0) * 255).round().byte().numpy()) for f in video]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def moving_clips(folder: Path, prompts: list[str], seed: int) -> Path:
    """Two clips a prompt, one of them played backwards, with the scores 1 and 0."""
    render = loaded(ROOT / "examples/demo/shapes.py").render
    folder.mkdir()
    lines = []
    for i, (prompt, video) in enumerate(
        zip(prompts, render(prompts, torch.Generator().manual_seed(seed)), strict=True)
    ):
        for score, clip in ((1.0, video), (0.0, video.flip(0))):
            name = f"{i:04d}_{score:.0f}.png"
            write_clip(folder / name, clip)
            lines.append(json.dumps({"prompt": prompt, "file": name, "scores": {"me": score}}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder / "samples.jsonl"


# ---- what the model sees -------------------------------------------------------------------------


def test_frames_are_spread_evenly():
    assert evenly(9, 3) == [0, 4, 8]
    assert evenly(9, 9) == evenly(9, 50) == list(range(9))
    assert evenly(1, 3) == [0]
    assert evenly(9, 1) == [0]


def test_mean_and_trend_of_features():
    generator = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 2, 1, 4, generator=generator, dtype=torch.float64)
    time = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    # Away from a line the least-squares fit must not follow: 1 -4 6 -4 1 is orthogonal to lines.
    bend = torch.tensor([1.0, -4, 6, -4, 1], dtype=torch.float64)[:, None]
    features = start + slope * time + bend
    clip = SimpleNamespace(image_features=lambda images: features.float().flatten(0, 1))
    found = clip_features(clip, torch.zeros(2, 5, 3, 8, 8))
    assert found.shape == (2, 2, 4)
    # float32 sums of 5 values up to 10.
    torch.testing.assert_close(found[:, 0], features.mean(1).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 1], slope[:, 0].float(), rtol=0, atol=1e-5)
    one = SimpleNamespace(image_features=lambda images: features[:, 0].float())
    image = clip_features(one, torch.zeros(2, 1, 3, 8, 8))
    assert torch.equal(image[:, 1], torch.zeros(2, 4))


def test_a_video_is_scored_with_its_motion(tmp_path):
    torch.manual_seed(0)
    small_clip(tmp_path, 32)
    from dancegrpo_fast.rewards.clip import load_clip

    clip, head = load_clip(str(tmp_path), "transformers"), PreferenceHead(64, 16, 1, frames=3)
    save_preference(tmp_path, tmp_path, clip, head)
    reward = Preference(str(tmp_path), batch_size=2)
    videos = torch.rand(5, 9, 3, 32, 32)
    prompts = ["a red square", "a red square", "a", "b", "c"]
    values = reward.score(Samples(videos, prompts)).values
    with torch.no_grad():
        seen = (videos[:, [0, 4, 8]] * 255).round() / 255  # As 8-bit files hold them.
        features = [clip.image_features(seen[:, t]) for t in range(3)]
        mean, trend = sum(features) / 3, (features[2] - features[0]) / 2
        text = clip.text_features(prompts)
        parts = [mean, trend, text, mean * text, trend * text]
        # sqrt(64) on vectors, 64 on products: elements of size 1.
        scaled = [x * s for x, s in zip(parts, (8, 8, 8, 64, 64), strict=True)]
        expected = head.layers(torch.cat(scaled, dim=1))[:, 0]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    backwards = reward.score(Samples(videos.flip(1), prompts)).values
    assert (values - backwards).abs().min() > 1e-4
    # One image: nothing moves. Pixels that are not finite: no score, and the others keep theirs.
    still = reward.score(Samples(videos[:, :1].repeat(1, 3, 1, 1, 1), prompts)).values
    image = reward.score(Samples(videos[:, 0], prompts)).values
    torch.testing.assert_close(still, image, rtol=1e-4, atol=1e-5)
    videos[1, 3, 0, 0, 0] = torch.nan
    scored = reward.score(Samples(videos, prompts))
    assert scored.errors[1] == "a pixel is not finite" and scored.values[1].isnan()
    torch.testing.assert_close(scored.values[2:], values[2:])


def test_gradients_reach_the_frames_that_are_seen(tmp_path):
    torch.manual_seed(0)
    small_clip(tmp_path, 32)
    from dancegrpo_fast.rewards.clip import load_clip

    clip = load_clip(str(tmp_path), "transformers")
    save_preference(tmp_path, tmp_path, clip, PreferenceHead(64, 16, 2, frames=2))
    (reward,) = load_rewards([RewardConfig(name="preference", path=str(tmp_path))])
    videos = ((torch.rand(2, 5, 3, 32, 32) * 255).round() / 255).requires_grad_()
    samples = Samples(videos, ["a", "b"])
    scores = reward.gradient_scores(samples)
    torch.testing.assert_close(scores.detach(), reward.score(samples).values, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), videos)
    moved = gradient.abs().amax(dim=(0, 2, 3, 4)) > 0
    assert moved.tolist() == [True, False, False, False, True]
    with pytest.raises(ValueError, match="require no gradient"):
        reward.gradient_scores(Samples(videos.detach(), ["a", "b"]))


# ---- what it is trained on -----------------------------------------------------------------------


def scored_line(prompt: str, file: str, *scores: float | None) -> str:
    named = {f"reward{i}": score for i, score in enumerate(scores)}
    return json.dumps({"prompt": prompt, "file": file, "seed": 0, "scores": named})


def test_scored_samples_are_compared_within_their_prompt(tmp_path, script):
    for name, lines in {
        "base": [("a", "x.gif", 0.5), ("a", "y.gif", 0.2), ("b", "z.gif", 0.9)],
        "later": [("a", "x.gif", 0.5), ("a", "failed.gif", None)],
    }.items():
        (tmp_path / name).mkdir()
        text = "\n".join(scored_line(*line) for line in lines)
        (tmp_path / name / "samples.jsonl").write_text(text)
    files = [str(tmp_path / name / "samples.jsonl") for name in ("base", "later")]
    found = [
        (pair.prompt, str(pair.first.relative_to(tmp_path)), str(pair.second.relative_to(tmp_path)),
         pair.label)
        for pair in script.read_pairs(files)
    ]  # fmt: skip
    # The samples of two runs meet; z.gif is alone with its prompt.
    assert found == [
        ("a", "base/x.gif", "base/y.gif", 1),
        ("a", "base/x.gif", "later/x.gif", 0.5),
        ("a", "base/y.gif", "later/x.gif", 0),
    ]
    both = tmp_path / "both.jsonl"
    both.write_text(scored_line("a", "x.gif", 0.1, 0.2))
    with pytest.raises(ValueError, match="both.jsonl, line 1: no pair"):
        script.read_pairs([str(both)])


def test_a_batch_holds_whole_prompts(script):
    pairs = [script.Pair(p, Path(f"{p}{i}"), Path(f"{p}{j}"), 1)
             for p in "abcd" for i in range(4) for j in range(i)]  # fmt: skip
    found = script.batches(pairs, 12)
    assert sorted(map(hash, sum(found, []))) == sorted(map(hash, pairs))
    assert [len(batch) for batch in found] == [12, 12]
    assert all(len({pair.prompt for pair in batch}) == 2 for batch in found)


def test_strangers_belong_to_other_prompts(tmp_path, script):
    torch.manual_seed(0)
    small_clip(tmp_path, 32)
    from dancegrpo_fast.rewards.clip import load_clip

    clip, head = load_clip(str(tmp_path), "transformers"), PreferenceHead(64, 16, 1, frames=3)
    for i in range(6):
        write_clip(tmp_path / f"{i}.png", torch.rand(3, 3, 32, 32))
    files = [tmp_path / f"{i}.png" for i in range(6)]
    pairs = [
        script.Pair("a", files[0], files[1], 1),
        script.Pair("a", files[2], files[0], 1),
        script.Pair("b", files[3], files[4], 1),
        script.Pair("a", files[5], files[0], 0),
    ]
    reward_of = {}
    with torch.no_grad():
        first, second, strangers = script.scores(clip, head, pairs, frozen=False)
        for prompt in "ab":
            for file in files:
                video = script.read(file)[0][None]
                text = clip.text_features([prompt])
                reward_of[prompt, file] = head(clip_features(clip, video), text)[0, 0]
    for i, pair in enumerate(pairs):
        for found, file in ((first, pair.first), (second, pair.second)):
            torch.testing.assert_close(found[i, 0], reward_of[pair.prompt, file])
    # Half a batch away: 0 meets 2 and 2 meets 0; 1 and 3 have one prompt.
    assert strangers.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(strangers[0], reward_of["a", files[3]])
    torch.testing.assert_close(strangers[2], reward_of["b", files[0]])
    losses = [-F.logsigmoid(first[i, 0] - strangers[i]) for i in (0, 2)]
    torch.testing.assert_close(script.stranger_loss(first[:, 0], strangers), sum(losses) / 2)
    assert script.stranger_loss(first[:, 0], torch.full((4,), torch.nan)) == 0


def test_files_are_moved_without_a_seam(script):
    video = torch.arange(2 * 3 * 5 * 6, dtype=torch.uint8).reshape(2, 3, 5, 6)
    places = set()
    for _ in range(100):
        found = script.moved(video, 1)
        assert found.shape == video.shape and found.dtype == torch.uint8
        padded = F.pad(video.float(), (1, 1, 1, 1), mode="replicate").byte()
        (place,) = [(y, x) for y in range(3) for x in range(3)
                    if torch.equal(padded[..., y : y + 5, x : x + 6], found)]  # fmt: skip
        places.add(place)
    assert len(places) == 9  # (8/9)^100 that a given one is missing: 1e-5.
    assert script.moved(video, 0) is video


def test_scored_clips_become_a_reward(tmp_path, script, capsys):
    prompts = ["a red square moving left", "a blue circle moving up", "a green cross moving down"]
    train = moving_clips(tmp_path / "train", prompts, seed=0)
    more = moving_clips(tmp_path / "more", prompts, seed=1)
    out = tmp_path / "out"
    accuracy, _ = script.main([
        "--pairs", str(train), str(more), "--held-out", str(train), "--new-clip", "32",
        "--out", str(out), "--epochs", "3", "--batch", "9", "--shift", "1", "--frames", "5",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert "strangers" in printed and f"accuracy {accuracy:.3f}: rewards:" in printed
    (reward,) = load_rewards([RewardConfig(name="preference", path=str(out))])
    assert reward.frames == 5
    right = []
    for pair in script.read_pairs([str(train)]):
        clips = torch.stack([script.read(path)[0] for path in (pair.first, pair.second)])
        good, bad = reward.score(Samples(clips, [pair.prompt] * 2)).values
        right.append(float(good > bad))
    # The folder is the best epoch, not the last: its ranking is the one that was returned.
    assert sum(right) / len(right) == pytest.approx(accuracy)


# ---- the demo ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clips_played_backwards_are_worse(tmp_path, script):
    """Held-out prompts, real clips: what no single frame shows is learned. Minutes."""
    shapes = loaded(ROOT / "examples/demo/shapes.py")
    train, held_out = shapes.split_prompts()
    accuracy, error = script.main([
        "--pairs", str(moving_clips(tmp_path / "train", train * 8, seed=0)),
        "--held-out", str(moving_clips(tmp_path / "held_out", held_out, seed=1)),
        "--new-clip", "32", "--out", str(tmp_path / "out"), "--keep",
        "--epochs", "12", "--batch", "480", "--shift", "2",
    ])  # fmt: skip
    assert accuracy > 0.9 and error < 0.1


@pytest.mark.slow
def test_the_demo_learns_what_it_was_not_shown(tmp_path, script):
    """The commands of docs/reward-service.md, one seed: the verifiable reward rises too."""
    command = [sys.executable, "-m", "dancegrpo_fast"]
    files = []
    for name, seeds in (("train", 16), ("heldout", 8)):
        folder = tmp_path / name
        subprocess.run(
            [*command, "sample", "recipes/demo.yaml", "--gif", "--reward", "moving_shape",
             "--prompts", f"examples/demo/{name}_prompts.txt", "--seeds", str(seeds), "--seed",
             "7", "--out", str(folder)], cwd=ROOT, check=True,
        )  # fmt: skip
        files.append(str(folder / "samples.jsonl"))
    weights, run = tmp_path / "weights", tmp_path / "run"
    script.main([
        "--pairs", files[0], "--held-out", files[1], "--new-clip", "32", "--out", str(weights),
        "--keep", "--epochs", "16", "--batch", "480", "--shift", "2",
    ])  # fmt: skip
    rewards = f"rewards=[{{name: preference, path: {weights}}}, {{name: moving_shape, weight: 0}}]"
    settings = [
        "iterations=3", "data.prompts_per_iteration=16", "rollout.group_size=12",
        "rollout.steps=5", "rollout.schedule=dance", "rollout.shift=1.0", "rollout.dynamics=dance",
        "rollout.tree={kind: shared_root}", "loss.timesteps=first", "loss.timestep_fraction=0.5",
    ]  # fmt: skip
    subprocess.run(
        [*command, "train", "recipes/demo.yaml", *settings, rewards, f"output={run}"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    measures = json.loads((run / "summary.json").read_text())["measures"]
    for name in ("preference", "moving_shape"):
        assert measures[name]["gain"] > 3 * measures[name]["standard_error"], name
