"""One file per diffusers model family."""

from __future__ import annotations

import torch

from dancegrpo_fast.config import ModelConfig
from dancegrpo_fast.models.conditions import Condition, Conditions
from dancegrpo_fast.models.export import export
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.models.wan import WanFamily

FAMILIES: dict[str, type[Family]] = {"wan": WanFamily}


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
