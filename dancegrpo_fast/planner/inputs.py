"""What a network of each family is given, by shape: no encoder is asked.

Texts that a family trims to their length are taken at their longest (`model.max_text_length`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.models import Condition, Family


def condition(family: Family) -> Condition:
    """A prompt's condition with empty tensors; inside `without_storage` they have no storage."""
    network = family.source.config(family.grid.networks[0])
    positive = {
        name: torch.empty(size, dtype=family.dtype)
        for name, size in TEXT[family.config.family](family, network).items()
    }
    guided = any(scale != 1 for scale in family.guidance.values())
    negative = {name: torch.empty_like(tensor) for name, tensor in positive.items()}
    images: dict[str, Tensor] = {}
    if family.takes_image:
        images = IMAGES[family.config.family](family, network)
    return Condition(positive, negative if guided else None, images)


def _wan(family: Family, network: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"text": (family.max_text_length, network["text_dim"])}


def _joint(family: Family, network: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"text": (family.max_text_length, network["joint_attention_dim"])}


def _joint_and_pooled(family: Family, network: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return _joint(family, network) | {"pooled": (network["pooled_projection_dim"],)}


def _sd3(family: Family, network: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    clip, t5 = 77, family.max_text_length  # CLIP's tokens come before T5's.
    return {
        "text": (clip + t5, network["joint_attention_dim"]),
        "pooled": (network["pooled_projection_dim"],),
    }


def _hunyuan(family: Family, network: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        "text": (family.max_text_length, network["text_embed_dim"]),
        "pooled": (network["pooled_projection_dim"],),
    }


def _sd(family: Family, network: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"text": (family.text_length, network["cross_attention_dim"])}


TEXT: dict[str, Callable[[Family, dict[str, Any]], dict[str, tuple[int, ...]]]] = {
    "flux": _joint_and_pooled,
    "hunyuan_video": _hunyuan,
    "qwen_image": _joint,
    "qwen_image_edit": _joint,
    "sd": _sd,
    "sd3": _sd3,
    "skyreels_i2v": _hunyuan,
    "wan": _wan,
    "wan_i2v": _wan,
}


def _first_frame(family: Family, network: dict[str, Any]) -> dict[str, Tensor]:
    channels, _, height, width = family.latent_shape
    return {"image": torch.empty(channels, 1, height, width)}


def _wan_images(family: Family, network: dict[str, Any]) -> dict[str, Tensor]:
    channels, frames, height, width = family.latent_shape
    if network["in_channels"] == channels:  # TI2V-5B: the image's latents stand in the sample.
        return _first_frame(family, network)
    given = {"image": torch.empty(network["in_channels"] - channels, frames, height, width)}
    if network["image_dim"] is not None:
        encoder = family.source.config("image_encoder")  # CLIP: its patches and a class token.
        tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1
        given["image_tokens"] = torch.empty(tokens, network["image_dim"], dtype=family.dtype)
    return given


IMAGES: dict[str, Callable[[Family, dict[str, Any]], dict[str, Tensor]]] = {
    # The edited image has about a million pixels whatever the sample's size; here: the sample's.
    "qwen_image_edit": _first_frame,
    "skyreels_i2v": _first_frame,
    "wan_i2v": _wan_images,
}
