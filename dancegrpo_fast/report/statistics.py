"""Statistics of an iteration's rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dancegrpo_fast.advantages import LeafAdvantages


def reward_metrics(
    rewards: np.ndarray,
    weights: np.ndarray,
    names: Sequence[str],
    advantages: LeafAdvantages,
) -> dict[str, float]:
    """Metrics of the rewards; failed samples enter none.

    Args:
        rewards: [P, G, R], NaN where a reward failed.
        weights: [R].
        names: [R].
        advantages: Of the same samples.
    """
    used = weights != 0
    total = (rewards[..., used] @ weights[used])[advantages.valid]
    groups = [rewards[p, v][:, used] for p, v in enumerate(advantages.valid) if v.any()]
    spreads = [float((group @ weights[used]).std()) for group in groups]
    metrics = {
        "reward/mean": float(total.mean()) if total.size else float("nan"),
        "reward/std_in_group": float(np.mean(spreads)) if spreads else float("nan"),
        "reward/failed": float(np.isnan(rewards).any(axis=-1).mean()),
        "reward/zero_variance": advantages.zero_variance,
    }
    for column, name in enumerate(names):
        scores = rewards[..., column]
        if np.isfinite(scores).any():
            metrics[f"reward/{name}"] = float(np.nanmean(scores))
    return metrics | advantage_metrics(advantages)


def advantage_metrics(advantages: LeafAdvantages) -> dict[str, float]:
    """Size and extremes of the samples' advantages, those of separate losses summed by weight."""
    values = (advantages.values @ advantages.weights)[advantages.valid]
    if not values.size:
        return {}
    return {
        "advantage/mean_size": float(np.abs(values).mean()),
        "advantage/min": float(values.min()),
        "advantage/max": float(values.max()),
    }
