"""The ratio by step: which denoising steps move away from the old policy, and are clipped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dancegrpo_fast.batching import Call
from dancegrpo_fast.trajectories import Trajectories


class StepRatios:
    """Sums over the trained transitions of an iteration, by the step they leave.

    Args:
        steps: Of the schedule.
        clip_range: Ratios outside 1 +- this are counted as clipped.
        device: Of the log-probs.
    """

    def __init__(self, steps: int, clip_range: float, device: torch.device) -> None:
        self._clip_range = clip_range
        # Transitions, |ratio - 1|, clipped ones.
        self._sums = torch.zeros(3, steps, dtype=torch.float64, device=device)

    def record(
        self, call: Call, drawn: Trajectories, log_prob: Tensor, old_log_prob: Tensor | None
    ) -> None:
        """Add the transitions of one call; log-probs [children], old None where it is the new."""
        old = log_prob if old_log_prob is None else old_log_prob
        deviation = (torch.exp((log_prob - old).double()) - 1).abs()
        # Work of zero weight trains nothing.
        weights = [float(weight) for item in call.items for weight in item.weights]
        counted = (torch.tensor(weights, device=deviation.device) > 0).double()
        clipped = (deviation > self._clip_range).double()
        rows = torch.stack([torch.ones_like(deviation), deviation, clipped])
        steps = torch.tensor(
            [drawn.plan.states[item.state].step for item in call.items for _ in item.children],
            device=deviation.device,
        )
        # Not a product: 0 times the ratio of an untrained transition may be NaN.
        self._sums.index_add_(1, steps, torch.where(counted > 0, rows, 0.0))

    def metrics(self, all_reduce: Callable[[Tensor, str], None]) -> dict[str, float]:
        """Means over all ranks of the steps that were trained."""
        all_reduce(self._sums, "sum")
        found = {}
        for step, (count, deviation, clipped) in enumerate(self._sums.T.tolist()):
            if count:
                found[f"steps/ratio_deviation/{step:02d}"] = deviation / count
                found[f"steps/clipped/{step:02d}"] = clipped / count
        return found
