"""One file per diffusers model family."""

from __future__ import annotations

import torch

from dancegrpo_fast.config import ModelConfig
from dancegrpo_fast.models.family import Conditions, Family, Grid, read_grid
from dancegrpo_fast.models.wan import NETWORKS, WanFamily

FAMILIES = {"wan": WanFamily}


def load_family(config: ModelConfig, device: torch.device) -> Family:
    """Load `config.path` as the family it names."""
    return FAMILIES[config.family](config, device)


def load_grid(config: ModelConfig) -> Grid:
    """Only the sigma grid and the networks' names of `config.path`: no weights are read."""
    return read_grid(config, NETWORKS, "WanPipeline")


__all__ = ["FAMILIES", "Conditions", "Family", "Grid", "load_family", "load_grid"]
