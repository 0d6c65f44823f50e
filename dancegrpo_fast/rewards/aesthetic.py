"""LAION's aesthetic predictor (improved-aesthetic-predictor): a small network on CLIP features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dancegrpo_fast.rewards.clip import BatchSize, Dtype, load_clip
from dancegrpo_fast.rewards.interface import FrameReward, WithWeights
from dancegrpo_fast.rewards.weights import build, need_file, read_state

FILE = "sac+logos+ava1-l14-linearMSE.pth"


class ScoreHead(nn.Module):
    """Five linear maps in a row, as trained: dropout between them and no activation anywhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Dropout keeps the numbers of the layers; it does nothing in evaluation.
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[N] of features [N, width]."""
        return self.layers(features)[:, 0]


class Aesthetic(WithWeights, FrameReward):
    """Predicted rating of the picture alone, about 1 to 10; the prompt is not read.

    Args:
        path: The predictor's file, or a folder or hub id that holds it under its own name.
        clip: The CLIP model whose image features it was trained on.
    """

    name = "laion_aesthetic"
    differentiable = True

    def __init__(
        self,
        path: str,
        *,
        clip: str = "openai/clip-vit-large-patch14",
        dtype: Dtype = "float32",
        batch_size: BatchSize = 32,
    ) -> None:
        file = Path(path) if Path(path).is_file() else need_file(path, [FILE])
        state = read_state(file)
        self.clip, self.batch_size = load_clip(clip, dtype=dtype), batch_size
        width = self.clip.model.config.projection_dim
        self.head = build(lambda: ScoreHead(width), state, torch.float32)

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.clip.model, self.head]

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        scores: Tensor = self.head(self.clip.image_features(images))
        return scores
