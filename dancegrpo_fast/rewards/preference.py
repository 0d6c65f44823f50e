"""A preference model of your own: a small network on CLIP's features (`examples/train_reward.py`).

Its folder is a CLIP folder with `preference.safetensors` beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dancegrpo_fast.rewards.clip import BatchSize, Clip, Dtype, load_clip
from dancegrpo_fast.rewards.interface import FrameReward, WithWeights
from dancegrpo_fast.rewards.weights import build, need_file, read_state

FILE = "preference.safetensors"


class PreferenceHead(nn.Module):
    """Image features, text features and their products to a score (and a log deviation).

    Args:
        width: Of CLIP's features.
        hidden: Width of the hidden layer.
        outputs: 1, or 2 with a log standard deviation.
    """

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, outputs)
        )

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """[N, outputs] of unit vectors [N, width] each."""
        scale = images.shape[-1] ** 0.5  # Elements of size 1 whatever the width.
        images, texts = images * scale, texts * scale
        scores: Tensor = self.layers(torch.cat([images, texts, images * texts], dim=-1))
        return scores


def text_features(clip: Clip, prompts: Sequence[str]) -> Tensor:
    """As `Clip.text_features`, with a gradient and nothing kept: for training."""
    text = clip.model.text_model
    tokens = clip.tokenizer(
        list(prompts), padding="max_length", truncation=True,
        max_length=text.config.max_position_embeddings, return_tensors="pt",
    ).to(clip.model.device)  # fmt: skip
    pooled = text(input_ids=tokens["input_ids"]).pooler_output
    return F.normalize(F.linear(pooled.float(), clip.model.text_projection.weight.float()), dim=-1)


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


class Preference(WithWeights, FrameReward):
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
        if {"layers.0.weight", "layers.2.weight"} - state.keys():
            raise ValueError(f"{path!r}: {FILE} is no head of examples/train_reward.py")
        hidden, outputs = len(state["layers.0.weight"]), len(state["layers.2.weight"])
        width = self.clip.model.config.projection_dim
        self.head = build(lambda: PreferenceHead(width, hidden, outputs), state, torch.float32)

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.clip.model, self.head]

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        images, texts = self.clip.image_features(images), self.clip.text_features(prompts)
        scores: Tensor = self.head(images, texts)[:, 0]
        return scores
