"""One file per diffusers model family."""

from __future__ import annotations

import torch

from dancegrpo_fast.config import ModelConfig
from dancegrpo_fast.models.family import Conditions, Family
from dancegrpo_fast.models.wan import WanFamily

FAMILIES = {"wan": WanFamily}


def load_family(config: ModelConfig, device: torch.device) -> Family:
    """Load `config.path` as the family it names."""
    return FAMILIES[config.family](config, device)


__all__ = ["FAMILIES", "Conditions", "Family", "load_family"]
