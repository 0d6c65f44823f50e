"""Recipes of DiffusionNFT and AWM on the tiny pipeline, and float64 numbers for them."""

from __future__ import annotations

import torch

CHAINS = {"rollout.tree.kind": "independent_roots", "rollout.noise_level": 0}
NFT = CHAINS | {"loss.kind": "nft", "loss.kl_weight": 0.1, "policy.train": "lora"}
AWM = CHAINS | {"loss.kind": "awm", "loss.old_weight": 1.0, "loss.clip_range": 0.5}
KINDS = {"nft": NFT, "awm": AWM}
SHAPE = (2, 1, 3, 5)


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
