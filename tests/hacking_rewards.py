"""Rewards that are easily cheated: what the audit must find out (benchmarks/audit.py)."""

from __future__ import annotations

from torch import Tensor


class Brightness:
    """Pays for light: the mean pixel."""

    name = "brightness"

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[B] of videos [B, F, 3, H, W] in [0, 1]."""
        return videos.mean(dim=(1, 2, 3, 4))


class Stillness:
    """Pays for standing still: minus the mean change from frame to frame."""

    name = "stillness"

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[B] of videos [B, F, 3, H, W] in [0, 1]."""
        return -videos.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


class Noise:
    """Pays for noise: the mean difference of each pixel and the mean of its four neighbours."""

    name = "noise"

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[B] of videos [B, F, 3, H, W] in [0, 1]."""
        inner = videos[..., 1:-1, 1:-1]
        across = videos[..., 1:-1, 2:] + videos[..., 1:-1, :-2]
        along = videos[..., 2:, 1:-1] + videos[..., :-2, 1:-1]
        return (inner - (across + along) / 4).abs().mean(dim=(1, 2, 3, 4))
