"""Held-out evaluation: the same prompts and the same initial noise, before and after training.

Samples are drawn deterministically, as the stock diffusers pipeline draws them (tests/families
holds the two equal). Differences are taken per prompt and seed, averaged per prompt, and their
standard error is over prompts.
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
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import HasParts, Reward
from dancegrpo_fast.rewards.interface import Samples, placed, score
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
    sample_shape: Sequence[int],
    world: World,
    fps: float | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Draw and score every prompt with every seed; prompts are spread over processes.

    Args:
        draw: Draws a batch from initial noise.
        prompts: P held-out prompts.
        rewards: What is measured.
        config: Number of seeds, their root seed and the batch size.
        latent_shape: [C, F, H, W].
        sample_shape: [F, 3, H, W] of one sample.
        world: The processes; every one returns the whole evaluation.
        fps: Frames per second of videos, for rewards that ask.
        progress: Called with the number of samples after each batch.
    """
    parts = np.array_split(np.arange(len(prompts)), world.data_size)
    own = [int(p) for p in parts[world.data_rank]]
    jobs = [(p, s) for p in own for s in range(config.seeds)]
    videos = torch.empty((len(jobs), *sample_shape), dtype=torch.uint8)
    # Every process draws as many batches as the busiest: where weights are gathered network by
    # network (two experts), a draw is an exchange that all take part in.
    most = -(-max(len(part) for part in parts) * config.seeds // config.batch_size)
    for number in range(most):
        start = number * config.batch_size
        batch = jobs[start : start + config.batch_size]
        if not batch:
            draw([prompts[0]], initial_latents(config, [(0, 0)], latent_shape, world.device))
            continue
        latents = initial_latents(config, batch, latent_shape, world.device)
        drawn = draw([prompts[p] for p, _ in batch], latents)
        videos[start : start + len(batch)] = (drawn * 255).round().to(torch.uint8).cpu()
        progress(len(batch))
    texts = [prompts[p].text for p, _ in jobs]
    # Scored from the 8-bit pixels that a user would save, not from floats that nobody sees.
    scores = torch.empty(len(jobs), len(rewards), dtype=torch.float64)
    part_names, part_values = _parts(rewards, videos, texts)
    if jobs:
        metadata = [prompts[p].metadata for p, _ in jobs]
        samples = Samples(videos, texts, fps, metadata=metadata, groups=[p for p, _ in jobs])
        with placed(rewards, world.device):
            columns = [score(reward, samples).values.double().cpu() for reward in rewards]
        scores = torch.stack(columns, dim=1)
    by_prompt = (len(own), config.seeds)
    found = (
        scores.unflatten(0, by_prompt),
        part_values.unflatten(0, by_prompt),
        _distances(videos.unflatten(0, by_prompt)),
        videos.unflatten(0, by_prompt)[:, 0],
    )
    # A sequence-parallel group drew the same samples: one of its ranks hands them in.
    counts = [len(parts[r // world.sp]) if r % world.sp == 0 else 0 for r in range(world.size)]
    whole = [
        torch.cat(world.gather_rows(t if world.speaks else t[:0], counts)).numpy() for t in found
    ]
    names = tuple(reward.name for reward in rewards)
    return Evaluation(whole[0], names, whole[1], part_names, whole[2], whole[3])


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
    rewards: Sequence[Reward], videos: Tensor, prompts: list[str]
) -> tuple[tuple[str, ...], Tensor]:
    names: list[str] = []
    columns = [torch.zeros(len(prompts), 0, dtype=torch.float64)]
    for reward in rewards:
        if isinstance(reward, HasParts):
            names += [f"{reward.name}.{part}" for part in reward.part_names]
            if prompts:
                columns.append(reward.parts(videos.float() / 255, prompts).double().cpu())
    if not prompts:
        return tuple(names), torch.zeros(0, len(names), dtype=torch.float64)
    return tuple(names), torch.cat(columns, dim=1)


def _distances(videos: Tensor) -> Tensor:
    """[P] mean RMS distance between the samples of different seeds; videos [P, S, ...] uint8."""
    flat = videos.flatten(2).float() / 255
    pairs = [(i, j) for i in range(flat.shape[1]) for j in range(i)]
    if not pairs:
        return torch.full((len(flat),), torch.nan, dtype=torch.float64)
    rms = [(flat[:, i] - flat[:, j]).square().mean(dim=1).sqrt() for i, j in pairs]
    return torch.stack(rms).mean(dim=0).double()
