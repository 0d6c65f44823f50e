"""A preference model of your own: a small network on CLIP's features (`examples/train_reward.py`).

Its folder is a CLIP folder with `preference.safetensors` beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dancegrpo_fast.rewards.clip import BatchSize, Clip, Dtype, load_clip
from dancegrpo_fast.rewards.interface import (
    SampleReward,
    Samples,
    Scored,
    WithWeights,
    checked_pixels,
)
from dancegrpo_fast.rewards.weights import build, need_file, read_state

FILE = "preference.safetensors"


class PreferenceHead(nn.Module):
    """Features of a clip and of its prompt, and their products, to a score (and a log deviation).

    Args:
        width: Of CLIP's features.
        hidden: Width of the hidden layer.
        outputs: 1, or 2 with a log standard deviation.
        frames: Of a video that are looked at, evenly spaced from the first to the last.
    """

    frames: Tensor

    def __init__(self, width: int, hidden: int, outputs: int, frames: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5 * width, hidden), nn.GELU(), nn.Linear(hidden, outputs)
        )
        self.register_buffer("frames", torch.tensor(frames))  # Goes with the weights.

    def forward(self, clips: Tensor, texts: Tensor) -> Tensor:
        """[N, outputs] of clips [N, 2, width] (`clip_features`) and unit vectors [N, width]."""
        scale = texts.shape[-1] ** 0.5  # Elements of size 1 whatever the width.
        clips, texts = clips * scale, texts[:, None] * scale
        scores: Tensor = self.layers(torch.cat([clips, texts, clips * texts], dim=1).flatten(1))
        return scores


def evenly(count: int, wanted: int) -> list[int]:
    """Positions of `wanted` frames of `count` (all, if there are no more), first and last too."""
    return torch.linspace(0, count - 1, min(wanted, count)).round().long().tolist()


def clip_features(clip: Clip, videos: Tensor) -> Tensor:
    """What is seen and how it moves: mean of the frames' unit vectors, and their linear trend.

    A mean alone is the same for a clip played backwards; the trend (least-squares slope over the
    clip, in units of half its length) changes sign. It is 0 for an image.

    Args:
        clip: The model.
        videos: [N, F, 3, H, W], uint8 or float32 in [0, 1].

    Returns:
        [N, 2, width] float32.
    """
    frames = videos.shape[1]
    features = clip.image_features(videos.flatten(0, 1)).unflatten(0, (-1, frames))
    time = torch.linspace(-1, 1, frames, device=features.device)
    slope = time / time.square().sum() if frames > 1 else torch.zeros_like(time)
    return torch.stack([features.mean(dim=1), (features * slope[:, None]).sum(dim=1)], dim=1)


def text_features(clip: Clip, prompts: Sequence[str]) -> Tensor:
    """As `Clip.text_features`, with a gradient and nothing kept: for training."""
    text = clip.model.text_model
    tokens = clip.tokenizer(
        list(prompts), padding="max_length", truncation=True,
        max_length=text.config.max_position_embeddings, return_tensors="pt",
    ).to(clip.model.device)  # fmt: skip
    pooled = text(input_ids=tokens["input_ids"]).pooler_output
    return F.normalize(F.linear(pooled.float(), clip.model.text_projection.weight.float()), dim=-1)


def small_clip(folder: str | Path, side: int) -> None:
    """Write an untrained CLIP of 0.2 million weights that reads bytes, for synthetic pictures.

    Args:
        folder: Where.
        side: Of the pictures, in pixels; patches are a quarter of it.
    """
    both = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "projection_dim": 64}  # fmt: skip
    text = {"vocab_size": 514, "max_position_embeddings": 77, "bos_token_id": 512,
            "eos_token_id": 513, "pad_token_id": 513}  # fmt: skip
    vision = {"image_size": side, "patch_size": side // 4}
    config = CLIPConfig(projection_dim=64, text_config=both | text, vision_config=both | vision)
    model = CLIPModel(config)
    # CLIP's own 0.02 takes millions of pictures to learn where things are.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    model.save_pretrained(folder)
    # Byte-level vocabularies write bytes that do not print as characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(size), encoding="utf-8")


def save_preference(
    folder: str | Path, clip_source: str | Path, clip: Clip, head: nn.Module
) -> None:
    """Write a folder that `Preference` reads.

    Args:
        folder: Where.
        clip_source: The CLIP folder that was trained on: its image processor's file is copied.
        clip: Model and tokenizer.
        head: The trained head.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clip.model.save_pretrained(folder)
    clip.tokenizer.save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (file := Path(clip_source) / name).is_file():
            (folder / name).write_bytes(file.read_bytes())
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(state, folder / FILE)


class Preference(WithWeights, SampleReward):
    """Score of a preference model that `examples/train_reward.py` trained.

    Args:
        path: Its folder.
    """

    name = "preference"
    differentiable = True

    def __init__(
        self, path: str, *, dtype: Dtype = "float32", batch_size: BatchSize = 32
    ) -> None:
        state = read_state(need_file(path, [FILE]))
        self.clip, self.batch_size = load_clip(path, "transformers", dtype), batch_size
        if {"layers.0.weight", "layers.2.weight", "frames"} - state.keys():
            raise ValueError(
                f"{path!r}: {FILE} is no head of examples/train_reward.py (or one of before it "
                "knew videos: train again)"
            )
        hidden, outputs = len(state["layers.0.weight"]), len(state["layers.2.weight"])
        width = self.clip.model.config.projection_dim
        self.head = build(lambda: PreferenceHead(width, hidden, outputs), state, torch.float32)
        self.frames = int(state["frames"])

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.clip.model, self.head]

    def _scores(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] of videos [N, F, 3, H, W]."""
        chosen = videos[:, evenly(videos.shape[1], self.frames)]
        texts = self.clip.text_features(prompts)
        scores: Tensor = self.head(clip_features(self.clip, chosen), texts)[:, 0]
        return scores

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`; `batch_size` clips at a time."""
        videos, errors = checked_pixels(samples.videos)
        values = torch.zeros(len(samples))
        for start in range(0, len(samples), self.batch_size):
            rows = slice(start, start + self.batch_size)
            values[rows] = self._scores(videos[rows], samples.prompts[rows]).cpu()
        return Scored.of(values, errors)

    def gradient_scores(self, samples: Samples) -> Tensor:
        """See `SampleReward.gradient_scores`."""
        if not samples.videos.requires_grad:
            raise ValueError("samples require no gradient; give floats that do, in [0, 1]")
        return self._scores(samples.videos.float(), samples.prompts)
