"""Pixels as reward models were trained to see them, without torchvision.

Two paths. The exact one quantises to the 8 bits a saved image would hold and resizes with Pillow,
like the official code. The smooth one keeps floats and resizes with torch's antialiased bicubic
kernel (the same filter without rounding), so that gradients reach the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

#: Mean and standard deviation of CLIP's training images, by channel.
CLIP_MEAN: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """Resize, cut or pad, and normalise.

    Attributes:
        size: (height, width) that the model sees.
        mode: `shortest` scales the shorter side to `resize` and cuts the centre; `squash` ignores
            the aspect; `longest` scales the longer side and pads with black (HPS-v2).
        resize: Length of the shorter side before the cut; None is the smaller of `size`.
        crop: Where the centre lies when an odd number of pixels is cut: transformers rounds down,
            torchvision (open_clip, ImageReward) to even.
        mean, std: By channel.
    """

    size: tuple[int, int]
    mode: Literal["shortest", "squash", "longest"] = "shortest"
    resize: int | None = None
    crop: Literal["down", "even"] = "down"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_transformers(cls, settings: dict[str, Any], default_size: int) -> Preprocess:
        """From the contents of `preprocessor_config.json` (of a CLIP image processor).

        Raises:
            ValueError: A setting that this file does not implement.
        """
        for name, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
            if settings.get(name, wanted) is not wanted:
                raise ValueError(f"preprocessor: {name} = {settings[name]} is not implemented")
        if settings.get("resample", 3) != 3:
            raise ValueError(f"preprocessor: resample = {settings['resample']}; only 3 (bicubic)")
        if abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError("preprocessor: rescale_factor is not 1/255")
        size = settings.get("size", {"shortest_edge": default_size})
        size = {"shortest_edge": size} if isinstance(size, int) else size
        mean = tuple(settings.get("image_mean", CLIP_MEAN))
        std = tuple(settings.get("image_std", CLIP_STD))
        if "shortest_edge" not in size:
            return cls((size["height"], size["width"]), mode="squash", mean=mean, std=std)
        cut = settings.get("crop_size", size["shortest_edge"])
        cut = {"height": cut, "width": cut} if isinstance(cut, int) else cut
        if not settings.get("do_center_crop", True):
            raise ValueError("preprocessor: do_center_crop = false leaves images of many sizes")
        side = size["shortest_edge"]
        return cls((cut["height"], cut["width"]), resize=side, mean=mean, std=std)

    @classmethod
    def from_open_clip(cls, settings: dict[str, Any], size: int | Sequence[int]) -> Preprocess:
        """From `preprocess_cfg` of `open_clip_config.json` and the model's image size.

        Raises:
            ValueError: A setting that this file does not implement.
        """
        if settings.get("interpolation", "bicubic") != "bicubic":
            raise ValueError(f"open_clip: interpolation = {settings['interpolation']}")
        size = settings.get("size", size)
        height, width = (size, size) if isinstance(size, int) else size
        modes: dict[str, Literal["shortest", "squash", "longest"]] = {
            "shortest": "shortest",
            "squash": "squash",
        }
        mode = settings.get("resize_mode", "shortest")
        if mode not in modes or (mode == "shortest" and height != width):
            raise ValueError(f"open_clip: resize_mode = {mode} with {height} x {width}")
        return cls(
            (height, width),
            mode=modes[mode],
            crop="even",
            mean=tuple(settings.get("mean", CLIP_MEAN)),
            std=tuple(settings.get("std", CLIP_STD)),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 3, *size] float32 of images [N, 3, H, W] in [0, 1] or uint8, on their device.

        The smooth path is taken for images that require a gradient.
        """
        height, width = images.shape[-2:]
        if self.mode == "longest":
            # HPS-v2 resizes floats, so both paths are the same but for the 8 bits.
            pixels = images if images.requires_grad else to_uint8(images).float() / 255
            pixels = _pad(resize_float(pixels, _fit(height, width, max(self.size))), self.size)
            return self._normalise(pixels)
        target = self.size
        if self.mode == "shortest":
            target = _cover(height, width, self.resize or min(self.size))
        if images.requires_grad:
            pixels = resize_float(images.float(), target).clamp(0, 1)
        else:
            pixels = resize_uint8(to_uint8(images), target).float() / 255
        return self._normalise(_centre(pixels, self.size, self.crop))

    def _normalise(self, pixels: Tensor) -> Tensor:
        shape = (-1, 1, 1)
        return (pixels - pixels.new_tensor(self.mean).view(shape)) / pixels.new_tensor(
            self.std
        ).view(shape)


def to_uint8(images: Tensor) -> Tensor:
    """8-bit pixels, as an image file holds them; uint8 passes through."""
    if images.dtype == torch.uint8:
        return images
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def resize_uint8(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bicubic resize of uint8 [N, 3, H, W] to (height, width), on the same device."""
    if tuple(images.shape[-2:]) == size:
        return images
    # Pillow's fixed-point filter is what the official code ran; torch's differs by one level.
    out = np.empty((len(images), *size, 3), dtype=np.uint8)
    for index, row in enumerate(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
        picture = Image.fromarray(row).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        out[index] = np.asarray(picture)
    return torch.from_numpy(out).permute(0, 3, 1, 2).to(images.device)


def resize_float(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic resize of floats [N, 3, H, W]; may overshoot the range of the input."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


def _cover(height: int, width: int, side: int) -> tuple[int, int]:
    """Size with the shorter side at `side`; the longer is cut to whole pixels."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def _fit(height: int, width: int, side: int) -> tuple[int, int]:
    """Size with the longer side at `side`; the shorter is rounded."""
    scale = side / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _centre(images: Tensor, size: tuple[int, int], rounding: str) -> Tensor:
    starts = []
    for have, want in zip(images.shape[-2:], size, strict=True):
        starts.append((have - want) // 2 if rounding == "down" else round((have - want) / 2))
    return images[..., starts[0] : starts[0] + size[0], starts[1] : starts[1] + size[1]]


def _pad(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Black on both sides, the odd pixel below and to the right."""
    down, right = size[0] - images.shape[-2], size[1] - images.shape[-1]
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
