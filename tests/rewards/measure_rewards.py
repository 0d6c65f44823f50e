"""Measures the rewards on the CPU: `python tests/rewards/measure_rewards.py [--real-size]`.

Prints a Markdown table: milliseconds per sample in batches of 1 and of 16, and their ratio; the
two batch sizes are timed in turn and medians taken. Weights are random; tiny models time the code
around the model (decoding, resizing, tokenizing), `--real-size` models the whole.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_qwen import tiny_hpsv3, tiny_videoalign
from tiny_reward_models import clip_tokenizer, images_of, tiny_clip
from transformers import CLIPModel
from transformers.initialization import no_init_weights

from dancegrpo_fast.rewards import REWARDS, Reward, Samples, clip, hpsv3, score, video_align

PLAIN = (
    "jpeg_compressibility", "colour", "colourfulness", "counting", "position",
    "motion_smoothness", "motion_amplitude", "flicker", "moving_shape",
)  # fmt: skip
PROMPT = "a red square moving left of a blue square"
SHAPE = {"moving_shape": "a red square moving left"}


def full_size(cfg: dict[str, Any]) -> clip.ClipScore:
    """CLIP score with a model of open_clip's configuration and random weights."""
    with no_init_weights():
        model = CLIPModel(clip.open_clip_config(cfg)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    side = cfg["vision_cfg"]["image_size"]
    reward = clip.ClipScore.__new__(clip.ClipScore)
    reward.clip = clip.Clip(model, clip_tokenizer(), clip.Preprocess((side, side)), clean=False)
    return reward


def milliseconds(reward: Reward, samples: Samples, batch: int) -> float:
    """Of one sample, in batches of a size."""
    start = time.perf_counter()
    for first in range(0, len(samples), batch):
        scored = score(reward, samples.of(range(first, min(first + batch, len(samples)))))
        assert not any(scored.errors), scored.errors
    return (time.perf_counter() - start) * 1000 / len(samples)


def row(label: str, what: str, reward: Reward, samples: Samples, repeats: int) -> str:
    for batch in (1, len(samples)):
        milliseconds(reward, samples.of(range(min(2, len(samples)))), batch)
    times: dict[int, list[float]] = {1: [], len(samples): []}
    for _ in range(repeats):
        for batch, found in times.items():
            found.append(milliseconds(reward, samples, batch))
    one, many = (statistics.median(found) for found in times.values())
    modules = reward.modules() if hasattr(reward, "modules") else []
    size = sum(p.numel() * p.element_size() for m in modules for p in m.parameters()) / 1e6
    return f"| `{label}` | {what} | {one:.3g} | {many:.3g} | {one / many:.2f} | {size:.3g} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--real-size", action="store_true", help="CLIP models of full size")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| reward | sample | ms, one at a time | ms, in a batch | gain | weights, MB |")
    print("|---|---|---|---|---|---|")
    images = images_of((512, 512), 16)[:, None]
    clips = images_of((64, 64), 16 * 16).reshape(16, 16, 3, 64, 64)
    if args.real_size:
        real_size(images[:4], args.repeats)
        return
    for name in PLAIN:
        motion = name in ("motion_smoothness", "motion_amplitude", "flicker", "moving_shape")
        video, what = (clips, "16 x 64 x 64") if motion else (images, "512 x 512")
        samples = Samples(video, [SHAPE.get(name, PROMPT)] * len(video), fps=8)
        print(row(name, what, REWARDS[name](), samples, args.repeats), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny_clip(Path(folder))
        reward = clip.ClipScore(folder)
        samples = Samples(images, [PROMPT] * 16)
        print(row("clip_score, tiny", "512 x 512", reward, samples, args.repeats), flush=True)
    for label, reward in tiny_readers():
        what = "512 x 512" if label.startswith("hpsv3") else "16 x 512 x 512, 8 a second"
        video = images[:8] if label.startswith("hpsv3") else images[:4].expand(-1, 16, -1, -1, -1)
        samples = Samples(video, [PROMPT] * len(video), fps=8)
        print(row(label, what, reward, samples, args.repeats), flush=True)


def tiny_readers() -> Iterator[tuple[str, Reward]]:
    """HPSv3 and VideoAlign with tiny models, at the official size of their pictures."""
    with tempfile.TemporaryDirectory() as folder:
        hpsv3.HPSV3, file = tiny_hpsv3(Path(folder))[3:]
        given = {"base": folder, "template": str(file), "dtype": "float32"}
        yield "hpsv3, tiny", hpsv3.Hps3(folder, **given)
    with tempfile.TemporaryDirectory() as folder:
        video_align.VIDEO_REWARD, file = tiny_videoalign(Path(folder), 1)[3:]
        given = {"base": folder, "template": str(file), "dtype": "float32"}
        reward = video_align.VideoAlign(folder, **given)
        reward.frame_pixels = 448 * 448
        yield "videoalign, tiny", reward


def real_size(images: torch.Tensor, repeats: int) -> None:
    """ViT-L/14 (CLIP score, aesthetic) and ViT-H/14 (HPS-v2, PickScore)."""
    vision = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
    large = {"embed_dim": 768, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    samples = Samples(images, [PROMPT] * len(images))
    for label, cfg in (("ViT-L/14", large), ("ViT-H/14", clip.VIT_H_14)):
        reward = full_size(cfg)
        print(row(label, "512 x 512", reward, samples, repeats), flush=True)
        start = time.perf_counter()
        reward.clip._encode([PROMPT])
        print(f"\n{label}: {time.perf_counter() - start:.2f} s for the text of one prompt\n")


if __name__ == "__main__":
    main()
