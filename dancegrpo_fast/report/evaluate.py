"""Held-out evaluation: the same prompts and the same initial noise, before and after training.

Samples are drawn deterministically, as the stock diffusers pipeline draws them (tests/families
holds the two equal). Differences are taken per prompt and seed, averaged per prompt, and their
standard error is over prompts.
"""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.config import EvaluationConfig, UserError
from dancegrpo_fast.ops.noise import NoiseKey, keys_table, normal_batch
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.compare import row_means
from dancegrpo_fast.rewards import HasParts, Reward
from dancegrpo_fast.rewards.interface import Samples, placed, score_parts
from dancegrpo_fast.rewards.scoring import attempt, waits
from dancegrpo_fast.roles import Role

logger = logging.getLogger(__name__)

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

    @property
    def diversity(self) -> float:
        """Mean distance over the prompts that have one; NaN without any, as with a single seed."""
        known = self.distances[np.isfinite(self.distances)]
        return float(known.mean()) if known.size else math.nan

    def save(self, path: Path) -> None:
        """Write a `.npz` without pickles."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: np.array(value) for name, value in vars(self).items()}
        partial = path.with_name(f"partial-{path.name}")  # A killed run must not leave half a file.
        np.savez_compressed(partial, **arrays)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            UserError: The file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                values = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
            reason = f"cannot be read ({error}); remove it, and the base is evaluated again"
            raise UserError(f"{path}: {reason}") from None
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
        """From two [P, ...] arrays of the same prompts; other axes are averaged first.

        What is no number in one of them is left out of both; NaN where nothing is left.
        """
        pair = [values.reshape(len(values), -1) for values in (base, trained)]
        both = np.isfinite(pair[0]) & np.isfinite(pair[1])
        rows = both.any(axis=1)
        if not rows.any():
            return cls(math.nan, math.nan, math.nan)
        first, second = (row_means(values[rows], both[rows]) for values in pair)
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
    broken = torch.zeros(len(jobs), dtype=torch.bool)
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
        broken[start : start + len(batch)] = not_finite(drawn)
        videos[start : start + len(batch)] = (drawn * 255).round().to(torch.uint8).cpu()
        progress(len(batch))
    texts = [prompts[p].text for p, _ in jobs]
    # Scored from the 8-bit pixels that a user would save, not from floats that nobody sees.
    having = [reward for reward in rewards if isinstance(reward, HasParts)]
    part_names = tuple(f"{reward.name}.{part}" for reward in having for part in reward.part_names)
    scores = torch.zeros(len(jobs), len(rewards), dtype=torch.float64)
    part_values = torch.zeros(len(jobs), len(part_names), dtype=torch.float64)
    if jobs:
        metadata = [prompts[p].metadata for p, _ in jobs]
        samples = Samples(videos, texts, fps, metadata=metadata, groups=[p for p, _ in jobs])
        with placed(rewards, world.device):
            scores, part_values = _measured(rewards, samples, config.batch_size, world.device)
        scores[broken], part_values[broken] = torch.nan, torch.nan
    if broken.any():
        logger.warning("%d held-out samples have no score: pixels are not finite", broken.sum())
    by_prompt = (len(own), config.seeds)
    own_rows = (
        scores.unflatten(0, by_prompt),
        part_values.unflatten(0, by_prompt),
        _distances(videos.unflatten(0, by_prompt), broken.unflatten(0, by_prompt)),
        videos.unflatten(0, by_prompt)[:, 0],
    )
    # A sequence-parallel group drew the same samples: one of its ranks hands them in.
    counts = [len(parts[r // world.sp]) if r % world.sp == 0 else 0 for r in range(world.size)]
    whole = [
        torch.cat(world.gather_rows(t if world.speaks else t[:0], counts)).numpy() for t in own_rows
    ]
    names = tuple(reward.name for reward in rewards)
    return Evaluation(whole[0], names, whole[1], part_names, whole[2], whole[3])


def not_finite(videos: Tensor) -> Tensor:
    """[n] on the CPU: samples [n, ...] that 8 bits, which have no NaN, would turn into pictures."""
    return ~videos.isfinite().flatten(1).all(dim=1).cpu()


def as_in_training(
    rewards: Sequence[Reward], samples: Samples, device: torch.device
) -> list[Samples]:
    """The samples for each reward, with pixels where training has them; moved at most once.

    They stay as they are for a reward that waits for a server or compares samples, and are on the
    process's device for any other.
    """
    stays = [waits(reward) or bool(getattr(reward, "groupwise", False)) for reward in rewards]
    moved = samples if all(stays) else replace(samples, videos=samples.videos.to(device))
    return [samples if stay else moved for stay in stays]


def _measured(
    rewards: Sequence[Reward], samples: Samples, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scores [n, R] and parts [n, K] float64, NaN where a reward failed.

    In batches, which rewards share: parts of one reward run it once. Those that compare samples get
    all of them.
    """
    widths = [len(r.part_names) if isinstance(r, HasParts) else 0 for r in rewards]
    scores = torch.full((len(samples), len(rewards)), torch.nan, dtype=torch.float64)
    parts = [torch.full((len(samples), width), torch.nan, dtype=torch.float64) for width in widths]

    def run(columns: Sequence[int], rows: slice, batch: Samples) -> None:
        chosen = [rewards[column] for column in columns]
        batches = as_in_training(chosen, batch, device)
        for column, reward, there in zip(columns, chosen, batches, strict=True):
            scores[rows, column] = attempt(reward, there).values.double()
            # A reward that fails has no parts, and has said why.
            if isinstance(reward, HasParts) and scores[rows, column].isfinite().any():
                parts[column][rows] = score_parts(reward, there)[0].double().cpu()

    together = [c for c, reward in enumerate(rewards) if getattr(reward, "groupwise", False)]
    apart = [c for c in range(len(rewards)) if c not in together]
    for start in range(0, len(samples) if apart else 0, batch_size):
        rows = range(start, min(start + batch_size, len(samples)))
        run(apart, slice(rows.start, rows.stop), samples.of(rows))
    if together:
        run(together, slice(None), samples)
    return scores, torch.cat(parts, dim=1)


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


def _distances(videos: Tensor, broken: Tensor) -> Tensor:
    """[P] mean RMS distance between the samples of different seeds, without broken ones.

    Args:
        videos: [P, S, ...] uint8.
        broken: [P, S] bool: samples whose pixels were no numbers.
    """
    found = torch.full((len(videos),), torch.nan, dtype=torch.float64)
    for p, group in enumerate(videos):  # One at a time: all of them as floats may not fit.
        flat = group[~broken[p]].flatten(1).float() / 255
        pairs = [(i, j) for i in range(len(flat)) for j in range(i)]
        rms = [(flat[i] - flat[j]).square().mean().sqrt() for i, j in pairs]
        if rms:
            found[p] = torch.stack(rms).mean()
    return found
