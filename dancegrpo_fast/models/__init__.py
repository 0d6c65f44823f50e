"""One file per diffusers model family."""

from __future__ import annotations

import torch

from dancegrpo_fast.config import ModelConfig
from dancegrpo_fast.models.conditions import Condition, Conditions
from dancegrpo_fast.models.export import export
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.flux import FluxFamily
from dancegrpo_fast.models.hunyuan_video import HunyuanVideoFamily
from dancegrpo_fast.models.qwen_image import QwenImageFamily
from dancegrpo_fast.models.qwen_image_edit import QwenImageEditFamily
from dancegrpo_fast.models.sd import StableDiffusionFamily
from dancegrpo_fast.models.sd3 import StableDiffusion3Family
from dancegrpo_fast.models.skyreels_i2v import SkyReelsFamily
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.models.wan import WanFamily
from dancegrpo_fast.models.wan_i2v import WanImageToVideoFamily

FAMILIES: dict[str, type[Family]] = {
    "flux": FluxFamily,
    "hunyuan_video": HunyuanVideoFamily,
    "qwen_image": QwenImageFamily,
    "qwen_image_edit": QwenImageEditFamily,
    "sd": StableDiffusionFamily,
    "sd3": StableDiffusion3Family,
    "skyreels_i2v": SkyReelsFamily,
    "wan": WanFamily,
    "wan_i2v": WanImageToVideoFamily,
}


def open_family(config: ModelConfig, device: torch.device | None = None) -> Family:
    """The family that `config` names, from configurations alone: no weights are read."""
    return FAMILIES[config.family](config, device)


def load_family(config: ModelConfig, device: torch.device) -> Family:
    """`open_family`, with its networks on the device."""
    return open_family(config, device).load()


__all__ = [
    "FAMILIES",
    "Condition",
    "Conditions",
    "Family",
    "Grid",
    "export",
    "load_family",
    "open_family",
]
