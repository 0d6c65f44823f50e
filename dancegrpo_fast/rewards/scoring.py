"""Decode and score one rank's samples. A reward that fails gives NaN, never a number."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards.interface import Reward, Samples, Scored, placed, score

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Rewards of one rank's samples.

    Attributes:
        values: [n, R] float32 on the CPU, NaN where a reward failed.
        first_error: Of the first failure, or empty.
        clip: [F, 3, H, W] the first sample, for people to look at; empty without samples.
    """

    values: Tensor
    first_error: str
    clip: Tensor


@torch.no_grad()
def score_latents(
    latents: Tensor,
    prompts: Sequence[str],
    decode: Callable[[Tensor], Tensor],
    rewards: Sequence[Reward],
    *,
    batch_size: int,
    groups: Sequence[int] = (),
    metadata: Sequence[Mapping[str, Any]] = (),
    fps: float | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Scores:
    """Decode n latents in batches and run every reward on each batch.

    Rewards that compare the samples of a prompt run once, after the last batch, on 8-bit pixels in
    CPU memory.

    Args:
        latents: [n, C, F, H, W].
        prompts: n prompts.
        decode: Latents to pixels [B, F, 3, H, W] in [0, 1].
        rewards: R rewards. One that raises gives NaN for its batch and is logged.
        batch_size: Samples at once.
        groups: n numbers, equal for the samples of one prompt; empty goes by the prompts.
        metadata: n mappings from the prompts' file, or empty.
        fps: Frames per second of the videos, where known.
        progress: Called with the number of samples after each batch.
    """
    nothing = torch.zeros(len(prompts), 1, 3, 1, 1)
    everything = Samples(nothing, prompts, fps, metadata, groups)
    values = torch.full((len(prompts), len(rewards)), torch.nan)
    first_error, clip, kept, finite = "", torch.zeros(0), list[Tensor](), list[int]()
    together = [bool(getattr(reward, "groupwise", False)) for reward in rewards]
    with placed(rewards, latents.device):
        for start in range(0, len(latents), batch_size):
            videos = decode(latents[start : start + batch_size])
            clip = clip if start else videos[0].cpu()
            rows = range(start, start + len(videos))
            samples = replace(everything.of(rows), videos=videos)
            for column, reward in enumerate(rewards):
                if not together[column]:
                    scored = attempt(reward, samples)
                    values[start : rows.stop, column] = scored.values
                    first_error = first_error or _first_error(reward, scored)
            if any(together):
                # 8 bits have no NaN: a broken sample must not turn into a black one.
                fine = videos.isfinite().flatten(1).all(dim=1).nonzero().flatten().tolist()
                finite += [start + row for row in fine]
                kept.append((videos * 255).round().clamp(0, 255).to("cpu", torch.uint8))
            progress(len(videos))
        if any(together) and len(finite) < len(prompts):
            first_error = first_error or "a pixel is not finite"
        for column, reward in enumerate(rewards):
            if together[column] and finite:
                videos = torch.cat(kept)[finite]
                scored = attempt(reward, replace(everything.of(finite), videos=videos))
                values[finite, column] = scored.values
                first_error = first_error or _first_error(reward, scored)
    return Scores(values, first_error, clip)


def check_whole_groups(rewards: Sequence[Reward], owner: np.ndarray) -> None:
    """Refuse rewards that compare the samples of a prompt where ranks share its samples.

    Args:
        rewards: R rewards.
        owner: [P, G] rank that scores each sample.

    Raises:
        UserError: The first such reward, by its place in the recipe.
    """
    for index, reward in enumerate(rewards):
        if getattr(reward, "groupwise", False) and (owner != owner[:, :1]).any():
            raise UserError(
                f"rewards.{index}.name = {reward.name!r}: compares all samples of a prompt, but "
                f"{owner.shape[0]} prompts over {owner.max() + 1} processes split some; make "
                "data.prompts_per_iteration a multiple of the processes, with parallel.sp = 1 and "
                "parallel.groups = together"
            )


def _first_error(reward: Reward, scored: Scored) -> str:
    return next((f"{reward.name}: {why}" for why in scored.errors if why), "")


def attempt(reward: Reward, samples: Samples) -> Scored:
    """Scores of a reward that may raise anything: NaN with the reason, and a line in the log.

    Raises:
        UserError: It returned another number of scores.
    """
    try:
        scored = score(reward, samples)
    except Exception as error:  # A user's reward may raise anything; the run goes on.
        reason = f"{type(error).__name__}: {error}"
        scored = Scored(torch.full((len(samples),), torch.nan), (reason,) * len(samples))
    if scored.values.shape != (len(samples),):
        raise UserError(
            f"reward {reward.name} returned shape {tuple(scored.values.shape)} for {len(samples)} "
            f"samples; it must return [{len(samples)}]"
        )
    reasons = Counter(why for why in scored.errors if why)
    for why, count in reasons.items():
        logger.warning("reward failed for %d samples: %s: %s", count, reward.name, why)
    return scored
