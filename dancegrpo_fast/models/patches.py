"""Latents as sequences of 2 x 2 patches (FLUX, Qwen-Image), and the shift by their number."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, 1, H, W] as patches [B, H W / 4, 4 C]."""
    batch, channels, _, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """What `pack` was given."""
    batch, _, size = patches.shape
    squares = patches.reshape(batch, height // 2, width // 2, size // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // 4, 1, height, width)


def calculate_shift(scheduler: Any, patches: int, *, max_shift: float) -> float:
    """mu of a sample of `patches` tokens: linear between two lengths, as the stock pipelines.

    Args:
        scheduler: Holds the lengths and the shifts there.
        patches: Tokens of one sample.
        max_shift: What the pipeline takes where the scheduler holds none.
    """
    at = scheduler.config.get
    few, many = at("base_image_seq_len", 256), at("max_image_seq_len", 4096)
    low, high = at("base_shift", 0.5), at("max_shift", max_shift)
    slope = (high - low) / (many - few)
    return patches * slope + (low - slope * few)
