"""Decode and score one rank's samples. A reward that fails gives NaN, never a number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards import Reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Rewards of one rank's samples.

    Attributes:
        values: [n, R] float32 on the CPU, NaN where a reward failed.
        first_error: Of the first failure, or empty.
        clip: [F, 3, H, W] the first sample, for people to look at.
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
    progress: Callable[[int], object] = lambda count: None,
) -> Scores:
    """Decode n latents in batches and run every reward on each batch.

    Args:
        latents: [n, C, F, H, W].
        prompts: n prompts.
        decode: Latents to pixels [B, F, 3, H, W] in [0, 1].
        rewards: R rewards. One that raises gives NaN for its batch and is logged.
        batch_size: Samples at once.
        progress: Called with the number of samples after each batch.
    """
    rows, first_error, clip = [], "", None
    for start in range(0, len(latents), batch_size):
        videos = decode(latents[start : start + batch_size])
        clip = videos[0].cpu() if clip is None else clip
        texts = list(prompts[start : start + batch_size])
        columns = []
        for reward in rewards:
            try:
                column = reward(videos, texts).float().cpu()
            except Exception as error:  # A user's reward may raise anything; the run goes on.
                problem = f"{reward.name}: {type(error).__name__}: {error}"
                logger.warning("reward failed for %d samples: %s", len(texts), problem)
                first_error = first_error or problem
                column = torch.full((len(texts),), torch.nan)
            if column.shape != (len(texts),):
                raise UserError(
                    f"reward {reward.name} returned shape {tuple(column.shape)} for {len(texts)} "
                    f"samples; it must return [{len(texts)}]"
                )
            columns.append(column)
        rows.append(torch.stack(columns, dim=1))
        progress(len(texts))
    assert clip is not None
    return Scores(torch.cat(rows), first_error, clip)
