"""The audit on synthetic clips: each planted change is found, honest ones are not; closed forms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dancegrpo_fast.report.audit import CHECKS, TRAITS, audit, traits

PROMPTS, SEEDS, FRAMES, SIZE = 12, 3, 5, 40
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "audit_cpu.json"


def clips(seed: int = 0, **changes: float) -> Tensor:
    """[P, S, F, 3, H, W] uint8: a soft blob of a drawn colour that drifts over a shaded ground.

    `changes`: light (added), chroma (times the distance from grey), red (added), noise (deviation),
    speed (times), blur (radius times), grid (height of lines each 8 pixels), same (share of the
    first seed that all seeds are), jitter (deviation of a change of each clip's brightness).
    """
    rng = np.random.default_rng(seed)
    own = np.random.default_rng(seed + 1000)  # Changes draw from another stream than the clips.
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    videos = np.empty((PROMPTS, SEEDS, FRAMES, 3, SIZE, SIZE))
    for p in range(PROMPTS):
        colour = rng.uniform(0.1, 0.9, 3)
        for s in range(SEEDS):
            place, way = rng.uniform(0.3, 0.7, 2), rng.normal(size=2)
            way = way / np.hypot(*way) * 0.03 * changes.get("speed", 1)
            shift = own.normal() * changes.get("jitter", 0)
            for f in range(FRAMES):
                far = np.hypot(x - place[0] - way[0] * f, y - place[1] - way[1] * f)
                blob = 1 / (1 + np.exp((far - 0.2) / (0.006 * changes.get("blur", 1))))
                ground = 0.25 + 0.2 * y
                frame = ground + blob * (colour[:, None, None] - ground)
                videos[p, s, f] = frame + shift
    grey = videos.mean(axis=3, keepdims=True)
    videos = grey + (videos - grey) * changes.get("chroma", 1) + changes.get("light", 0)
    videos[:, :, :, 0] += changes.get("red", 0)
    lines = (np.arange(SIZE) % 8 < 2)[:, None] | (np.arange(SIZE) % 8 < 2)
    videos = videos + changes.get("grid", 0) * lines + own.normal(
        size=videos.shape
    ) * changes.get("noise", 0)
    same = changes.get("same", 0)
    videos = videos * (1 - same) + videos[:, :1] * same
    return torch.from_numpy((videos.clip(0, 1) * 255).round().astype(np.uint8))


PLANTED = [
    ({"light": 0.3}, {"brightness"}),
    ({"light": -0.2}, {"brightness"}),
    ({"chroma": 2.0}, {"saturation"}),
    ({"chroma": 0.2}, {"saturation"}),
    ({"red": 0.2}, {"colour cast"}),
    ({"light": 0.6}, {"clipped pixels"}),
    ({"noise": 0.05}, {"noise in flat areas", "fine detail"}),
    ({"blur": 4.0}, {"fine detail"}),
    ({"grid": 0.06}, {"grid"}),
    ({"speed": 0.0}, {"motion"}),
    ({"speed": 3.0}, {"motion"}),
    ({"same": 0.9}, {"diversity in groups"}),
]


@pytest.mark.parametrize(("changes", "expected"), PLANTED)
def test_a_planted_change_is_found(changes, expected):
    found = {f.name for f in audit(clips(), clips(**changes)) if f.flagged}
    assert expected <= found
    # What a change must not be taken for: motion and diversity are not touched by static ones.
    still = {"motion", "diversity in groups"} - expected
    if "chroma" not in changes and changes.get("light", 0) < 0.5 and "noise" not in changes:
        assert not still & found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"light": 0.03}, {"chroma": 1.2}, {"speed": 1.3}, {"blur": 0.8}, {"same": 0.1},
     {"jitter": 0.05}, {"noise": 0.002}],
)  # fmt: skip
def test_moderate_changes_are_not_flagged(seed, changes):
    assert [f.name for f in audit(clips(seed), clips(seed, **changes)) if f.flagged] == []


def test_other_seeds_are_no_change():
    """Chance alone: other prompts' clips entirely."""
    for seed in range(3):
        found = audit(clips(seed), clips(seed + 10))
        assert [f.name for f in found if f.flagged] == []


def test_rewards_not_trained_on_and_captions():
    """A fall is flagged, of captions with advice of its own; a rise and the trained one never."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(PROMPTS, SEEDS))
    fall, rise = base - 0.6 + rng.normal(size=base.shape) * 0.1, base + 1
    scores = {"clip_score": (base, fall), "hps": (base, fall), "mine": (base, fall)}
    scores["other"] = base, rise
    told = {f.name: f for f in audit(clips(), clips(), scores=scores, trained_on=["mine"])}
    assert told["clip_score (not trained on)"].flagged and told["hps (not trained on)"].flagged
    assert "captions" in told["clip_score (not trained on)"].advice
    assert not told["other (not trained on)"].flagged
    assert not any(name.startswith("mine") for name in told)
    few = {"hps": (base[:1], fall[:1])}
    (one,) = [f for f in audit(clips()[:1], clips()[:1], scores=few) if "hps" in f.name]
    assert not one.flagged  # One prompt is no evidence.


def test_images_have_no_motion_and_a_single_seed_no_diversity():
    base = clips()[:, :1, :1]
    found = {f.name for f in audit(base, base)}
    assert found == set(CHECKS) - {"motion", "diversity in groups"}


def test_a_finding_says_the_threshold_and_what_to_try():
    (found,) = [f for f in audit(clips(), clips(speed=0.0)) if f.name == "motion"]
    assert found.threshold.startswith("below 0.6 or above 1.8 of the base, here 0.0")
    assert found.trained == 0 and found.base > 0 and "motion_amplitude" in found.advice


# ---- traits against closed forms -----------------------------------------------------------------


def flat(colour: tuple[int, int, int], frames: int = 1, size: int = 32) -> Tensor:
    pixel = torch.tensor(colour, dtype=torch.uint8).view(1, 1, 3, 1, 1)
    return pixel.expand(1, frames, 3, size, size)


def test_traits_of_one_colour():
    found = {name: value[0] for name, value in traits(flat((255, 0, 51), frames=3)).items()}
    assert set(found) == set(TRAITS)
    # float32 of values up to 1: a few of their ulps.
    assert found["brightness"] == pytest.approx(0.299 + 0.114 * 0.2, rel=1e-6)
    assert found["saturation"] == pytest.approx(1.0)
    assert (found["red"], found["green"], found["blue"]) == pytest.approx((1.0, 0.0, 0.2))
    assert found["clipped pixels"] == pytest.approx(2 / 3)
    assert found["fine detail"] == 0 and found["grid"] == 0 and found["motion"] == 0
    assert found["noise in flat areas"] == 0 and np.isnan(found["diversity in groups"])


def test_traits_of_stripes():
    """Period 2 lies beyond half the highest frequency, period 8 partly; only 8 is a grid's."""
    columns = torch.arange(32)

    def stripes(period: int) -> dict[str, float]:
        on = (columns // (period // 2) % 2 * 200).to(torch.uint8)
        video = on.expand(1, 1, 3, 32, 32)
        return {name: value[0] for name, value in traits(video).items()}

    assert stripes(2)["fine detail"] == pytest.approx(1.0)
    # Of a square wave of period 8 the harmonics 1 and 3 (of 8) lie at 1/8 and 3/8: their energies
    # are as 1/sin^2(pi/8) to 1/sin^2(3 pi/8), sampled.
    low, high = 1 / np.sin(np.pi / 8) ** 2, 1 / np.sin(3 * np.pi / 8) ** 2
    assert stripes(8)["fine detail"] == pytest.approx(high / (low + high), rel=1e-4)
    # All energy repeats every 8 pixels, or none of it does.
    assert stripes(8)["grid"] > np.log(1000) and stripes(32)["grid"] < np.log(2)


def test_noise_is_estimated_and_edges_are_not_noise():
    """Gaussian noise of deviation 0.1: the median estimates it within 5% from 3800 pixels.

    The luma of independent channels has sqrt(0.299^2 + 0.587^2 + 0.114^2) of their deviation; the
    standard error of a median of |N| is about 1.3% here, with neighbours sharing pixels some more.
    """
    generator = torch.Generator().manual_seed(0)
    noisy = 0.5 + 0.1 * torch.randn(1, 1, 3, 64, 64, generator=generator)
    found = traits((noisy.clamp(0, 1) * 255).round().to(torch.uint8))["noise in flat areas"][0]
    assert found == pytest.approx(0.1 * np.sqrt(0.299**2 + 0.587**2 + 0.114**2), rel=0.05)
    edge = flat((20, 20, 20), size=64).clone()
    edge[..., 20:40, 10:50] = 230
    assert traits(edge)["noise in flat areas"][0] == 0


def test_diversity_is_the_mean_distance_to_the_others():
    videos = torch.cat([flat((v, v, v), frames=2) for v in (0, 51, 255)])
    # Grey clips 0, 0.2 and 1: RMS distances are differences of their levels.
    expected = [(0.2 + 1) / 2, (0.2 + 0.8) / 2, (1 + 0.8) / 2]
    assert traits(videos)["diversity in groups"] == pytest.approx(expected, rel=1e-6)


def test_tiny_pictures():
    found = traits(flat((9, 9, 9), frames=2, size=2))
    assert np.isnan(found["noise in flat areas"]).all() and found["grid"][0] == 0


# ---- the demo, as measured -----------------------------------------------------------------------


def test_the_measured_hacks_were_flagged_and_the_honest_runs_were_not():
    """benchmarks/audit.py trains the demo with three cheated rewards and the honest one."""
    runs = json.loads(MEASURED.read_text())["runs"]
    assert {run["reward"] for run in runs} == {"honest", "brightness", "stillness", "noise"}
    for run in runs:
        flagged = {f["name"] for f in run["findings"] if f["flagged"]}
        if run["reward"] == "honest":
            assert flagged == set()
        else:
            assert run["expected"] in flagged
    assert sorted((run["reward"], run["seed"]) for run in runs) == sorted(
        (name, seed) for name in {run["reward"] for run in runs} for seed in range(3)
    )


@pytest.mark.slow
def test_a_cheated_reward_is_flagged_and_the_honest_one_is_not():
    """Trains both on the demo and audits them; benchmarks/audit.py says whether it held."""
    command = [sys.executable, "benchmarks/audit.py"]
    done = subprocess.run(command, cwd=MEASURED.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
