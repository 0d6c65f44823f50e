"""Rewards computed from the pixels of one image: file size, named colours, colourfulness."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from dancegrpo_fast.rewards.interface import FrameReward, SpecReward
from dancegrpo_fast.rewards.preprocess import to_uint8

#: RGB in [0, 1] of the colour words that prompts use.
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.90, 0.10),
    "orange": (0.95, 0.55, 0.10),
    "purple": (0.50, 0.15, 0.65),
    "pink": (0.95, 0.60, 0.75),
    "brown": (0.45, 0.27, 0.12),
    "cyan": (0.10, 0.85, 0.90),
    "magenta": (0.90, 0.10, 0.85),
    "white": (0.97, 0.97, 0.97),
    "grey": (0.50, 0.50, 0.50),
    "black": (0.03, 0.03, 0.03),
}
_WORDS = re.compile(rf"\b({'|'.join(PALETTE)}|gray)\b", re.IGNORECASE)
#: Distance in RGB at which a pixel is like a colour by exp(-1/2).
_WIDTH = 0.2


def colour_words(text: str) -> list[str]:
    """Names of `PALETTE` in the order of the text, each once."""
    found = (match.lower() for match in _WORDS.findall(text))
    return list(dict.fromkeys("grey" if word == "gray" else word for word in found))


def colour_shares(images: Tensor, names: Sequence[str]) -> Tensor:
    """How much each pixel is of a named colour: [M, len(names), H, W] in [0, 1].

    A pixel's likeness to the name over the sum of its likenesses to all names, so that only the
    nearest counts, and a small constant, so that a pixel far from every name counts for none.

    Args:
        images: [M, 3, H, W], uint8 or float in [0, 1].
        names: Words of `PALETTE`.
    """
    pixels = unit_pixels(images)
    total = pixels.new_full((len(pixels), *pixels.shape[-2:]), 0.05)
    kept: dict[str, Tensor] = {}
    for name, rgb in PALETTE.items():  # One at a time: 13 images at once would be 13 times as big.
        gap = (pixels - pixels.new_tensor(rgb).view(3, 1, 1)).square().sum(dim=1)
        like = torch.exp(-gap / (2 * _WIDTH**2))
        total = total + like
        if name in names:
            kept[name] = like
    return torch.stack([kept[name] * 1.05 / total for name in names], dim=1).clamp(max=1)


def unit_pixels(images: Tensor) -> Tensor:
    """Floats in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class Colour(SpecReward):
    """Share of the picture in the colours the prompt names (or `colours` of its metadata).

    Args:
        enough: Share that is worth 1, so that a picture need not be all of that colour.
    """

    name = "colour"

    def __init__(self, *, enough: Annotated[float, Field(gt=0, le=1)] = 1.0) -> None:
        self.enough = enough

    def spec(self, prompt: str, metadata: Mapping[str, Any]) -> list[str]:
        """See `SpecReward.spec`."""
        given = metadata.get("colours")
        names = list(given) if given else colour_words(prompt)
        if not names or not set(names) <= set(PALETTE):
            raise ValueError(f"the prompt names no colour of {', '.join(PALETTE)}")
        return names

    def score_frames(self, images: Tensor, spec: list[str]) -> Tensor:
        """See `SpecReward.score_frames`."""
        shares = colour_shares(images, spec).sum(dim=1).clamp(max=1).mean(dim=(1, 2))
        return (shares / self.enough).clamp(max=1)


class Colourfulness(FrameReward):
    """Hasler and Suesstrunk's measure (2003) of pixels in [0, 1]: spread and mean of opponents."""

    name = "colourfulness"
    differentiable = True
    batch_size = 1  # A picture fits the cache of a core, several do not: twice as fast.

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        red, green, blue = unit_pixels(images).flatten(2).unbind(dim=1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1)
        # 1e-12: the gradient of a root at 0 is infinite, as in a picture of one colour.
        spread = (opponents.var(dim=2, correction=0).sum(dim=1) + 1e-12).sqrt()
        mean = (opponents.mean(dim=2).square().sum(dim=1) + 1e-12).sqrt()
        return spread + 0.3 * mean


class JpegIncompressibility(FrameReward):
    """Size in kB (1000 bytes) of the picture as JPEG of quality 95 (Black et al. 2023)."""

    name = "jpeg_incompressibility"

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        rows = to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.tensor([_jpeg_bytes(Image.fromarray(row)) / 1000 for row in rows])


class JpegCompressibility(JpegIncompressibility):
    """Minus the size in units of 500 kB (Black et al. 2023)."""

    name = "jpeg_compressibility"

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        return -super().score_images(images, prompts) / 500


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
