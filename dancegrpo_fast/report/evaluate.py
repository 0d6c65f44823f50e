"""Held-out evaluation: the same prompts and the same initial noise, before and after training.

Samples are drawn by the stock diffusers pipeline, deterministically. Differences are taken per
prompt and seed, averaged per prompt, and their standard error is over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.config import EvaluationConfig
from dancegrpo_fast.ops.noise import NoiseKey, keys_table, normal_batch
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import HasParts, Reward
from dancegrpo_fast.roles import Role

# (prompts, initial latents [B, C, F, H, W]) -> pixels [B, F, 3, H, W] in [0, 1]
Draw = Callable[[Sequence[Prompt], Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What one model does on the held-out prompts.

    Attributes:
        scores: [P, S, R] of every reward, unweighted.
        names: [R].
        parts: [P, S, K] the parts that rewards report beside their score.
        part_names: [K].
        distances: [P] mean over pairs of seeds of the RMS pixel distance between their samples.
        clips: [P, F, 3, H, W] uint8, the first seed's samples.
    """

    scores: np.ndarray
    names: tuple[str, ...]
    parts: np.ndarray
    part_names: tuple[str, ...]
    distances: np.ndarray
    clips: np.ndarray

    def total(self, weights: Sequence[float]) -> np.ndarray:
        """[P, S] weighted reward; a reward of weight 0 enters nothing, not even its NaN."""
        kept = np.array(weights) != 0
        return self.scores[..., kept] @ np.array(weights)[kept]

    def save(self, path: Path) -> None:
        """Write a `.npz` without pickles."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: np.array(value) for name, value in vars(self).items()}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            values = {name: stored[name] for name in stored.files}
        texts = {name: tuple(values[name].tolist()) for name in ("names", "part_names")}
        return cls(**{**values, **texts})


@dataclass(frozen=True)
class Difference:
    """A paired difference of means over prompts."""

    base: float
    trained: float
    standard_error: float

    @property
    def gain(self) -> float:
        return self.trained - self.base

    @classmethod
    def of(cls, base: np.ndarray, trained: np.ndarray) -> Difference:
        """From two [P, ...] arrays of the same prompts; other axes are averaged first."""
        first, second = (values.reshape(len(values), -1).mean(axis=1) for values in (base, trained))
        error = (second - first).std(ddof=1) / np.sqrt(len(first)) if len(first) > 1 else np.nan
        return cls(float(first.mean()), float(second.mean()), float(error))


@torch.no_grad()
def evaluate(
    draw: Draw,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    config: EvaluationConfig,
    *,
    latent_shape: Sequence[int],
    device: torch.device,
    progress: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Draw and score every prompt with every seed.

    Args:
        draw: Draws a batch from initial noise.
        prompts: P held-out prompts.
        rewards: What is measured.
        config: Number of seeds, their root seed and the batch size.
        latent_shape: [C, F, H, W].
        device: Where latents are needed.
        progress: Called with the number of samples after each batch.
    """
    jobs = [(p, s) for s in range(config.seeds) for p in range(len(prompts))]
    videos: list[Tensor] = []
    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        latents = initial_latents(config, batch, latent_shape, device)
        drawn = draw([prompts[p] for p, _ in batch], latents)
        videos += list((drawn * 255).round().to(torch.uint8).cpu())
        progress(len(batch))
    shape = (config.seeds, len(prompts))
    stacked = torch.stack(videos).reshape(*shape, *videos[0].shape)
    flat_prompts = [prompts[p].text for _, p in np.ndindex(*shape)]
    # Scored from the 8-bit pixels that a user would save, not from floats that nobody sees.
    pixels = stacked.flatten(0, 1).float() / 255
    scores = torch.stack([reward(pixels, flat_prompts).double() for reward in rewards], dim=1)
    part_names, parts = _parts(rewards, pixels, flat_prompts)
    return Evaluation(
        scores.numpy().reshape(*shape, -1).transpose(1, 0, 2),
        tuple(reward.name for reward in rewards),
        parts.reshape(*shape, -1).transpose(1, 0, 2),
        part_names,
        _distances(stacked),
        stacked[0].numpy(),
    )


def initial_latents(
    config: EvaluationConfig,
    jobs: Sequence[tuple[int, int]],
    latent_shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    """The fixed noise [n, C, F, H, W] of some (prompt position, seed) pairs."""
    root = NoiseKey.from_seed(config.seed).fold_in(Role.EVALUATION)
    keys = keys_table([root.fold_in(p).fold_in(s).draw() for p, s in jobs])
    return normal_batch(tuple(latent_shape), keys, device=device)


def _parts(
    rewards: Sequence[Reward], pixels: Tensor, prompts: list[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    names: list[str] = []
    columns = [np.zeros((len(prompts), 0))]
    for reward in rewards:
        if isinstance(reward, HasParts):
            names += [f"{reward.name}.{part}" for part in reward.part_names]
            columns.append(reward.parts(pixels, prompts).double().numpy())
    return tuple(names), np.concatenate(columns, axis=1)


def _distances(videos: Tensor) -> np.ndarray:
    """[P] mean RMS distance between the samples of different seeds; videos [S, P, ...] uint8."""
    flat = videos.flatten(2).float() / 255
    pairs = [(i, j) for i in range(len(flat)) for j in range(i)]
    if not pairs:
        return np.full(flat.shape[1], np.nan)
    rms = [(flat[i] - flat[j]).square().mean(dim=1).sqrt() for i, j in pairs]
    return torch.stack(rms).mean(dim=0).double().numpy()
