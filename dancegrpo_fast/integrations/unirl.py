"""UniRL (Tencent-Hunyuan/UniRL): its SDE step strategies, with the fused step inside.

One line of the recipe, under `pipeline: strategy:` (and wherever else it names a strategy):

    _target_: dancegrpo_fast.integrations.unirl.DanceSDEStrategy

instead of `unirl.sde.kernels.DanceSDEStrategy`; likewise `FlowSDEStrategy` and `CPSSDEStrategy`.
Nothing is patched. UniRL builds the class from this line, calls `reset`, `init_schedule` and
`denoise`, and reads `canonical_name` (the name of the matching kernel in the SGLang engine); these
four are what is here. Rollouts of SGLang and vLLM-Omni keep their own kernels: there only the
replay is ours, and the first ratio is 1 up to rounding; with the trainer as engine it is exactly 1.
`denoise(..., exact_order=True)` has the bits of UniRL's own strategy, for comparing.

Written against commit 1a7b501e (2026-06-13), torch 2.11.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    flow_table,
    pair_rows,
    per_sample,
    randn,
    rows,
    step,
)

_NO_NOISE = 1e-7  # UniRL's limit: below it a step has no log-prob.


class _Strategy:
    """`StepStrategy` without its abstract base, which lives in UniRL."""

    canonical_name: ClassVar[str]

    def __init__(self, *, config: Any = None) -> None:
        """config: UniRL's spec of the strategy, which has no fields."""

    def reset(self) -> None:
        """Stateless."""

    def init_schedule(self, sigmas: Tensor) -> None:
        """Stateless: the schedule is found through the sigmas of each step."""

    def denoise(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        sigma_max: float | Tensor = 0.99,
        step_index: int = 0,
        exact_order: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One transition: `StepStrategy.denoise`, its signature and results.

        Args:
            noise_pred: v, [B, ...], any floating dtype.
            sample: x, the same shape. x' is rounded to its dtype before the log-prob is taken.
            sigma, sigma_next: 0-d or [B]. Elements of one schedule (`schedule[i]`) cost one lookup
                in its table; others are computed anew (`pair_rows`).
            eta: Noise level; below 1e-7 the step is the ODE's.
            prev_sample: x', or None to draw it with torch's own generator, also for the ODE: the
                numbers of a seed are UniRL's.
            sigma_max: For sigma = 1 in Flow-GRPO's SDE: the second sigma of the schedule.
            step_index: For multistep solvers.
            exact_order: UniRL's own order of operations in plain torch (slow): its bits.

        Returns:
            (x', log_prob [B] or None for the ODE, mean), float32.

        Raises:
            ValueError: Shapes that do not fit; on the CPU, sigmas that rise or leave [0, 1].
        """
        if exact_order:
            return self._exact(noise_pred, sample, sigma, sigma_next, eta, prev_sample, sigma_max)
        noisy = eta >= _NO_NOISE
        kept = sample.dtype if noisy else torch.float32
        if prev_sample is not None:
            prev_sample = prev_sample.to(kept)
        out = step(
            noise_pred, sample,
            self._rows(sigma, sigma_next, sigma_max, eta if noisy else 0.0, sample),
            prev_sample=prev_sample, log_prob=noisy, x0=False, latent_dtype=kept,
        )  # fmt: skip
        assert out.mean is not None
        return out.prev_sample.float(), out.log_prob, out.mean

    def _exact(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        eta: float,
        prev_sample: Tensor | None,
        sigma_max: float | Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        v, x = noise_pred.float(), sample.float()
        here, there = (per_sample(s.float(), x) for s in (sigma, sigma_next))
        if self.canonical_name == "cps":
            moments = exact.cps(v, x, here, there, eta)
        else:
            flow = self.canonical_name == "flow"
            rate = exact.flow_rate(here, eta, sigma_max) if flow else eta
            moments = exact.reverse_sde(v, x, here, there, rate)
        stored = exact.draw(moments, randn(v)) if prev_sample is None else prev_sample
        if eta < _NO_NOISE:
            return stored.float(), None, moments.mean
        stored = stored.to(sample.dtype).float()
        if self.canonical_name == "cps":
            return stored, exact.square_log_prob(stored, moments), moments.mean
        log_prob = exact.log_prob(stored, moments, constant=0.5 * math.log(2 * math.pi))
        return stored, log_prob, moments.mean

    def _rows(
        self,
        sigma: Tensor,
        sigma_next: Tensor,
        sigma_max: float | Tensor,
        eta: float,
        sample: Tensor,
    ) -> Tensor:
        options: Any = {
            "dynamics": self.canonical_name, "level": eta, "sigma_max": sigma_max,
            "device": sample.device,
        }  # fmt: skip
        schedule, index = _place(sigma, sigma_next)
        if schedule is not None and isinstance(sigma_max, Tensor):
            if _is_element(sigma_max, schedule, 1):
                options["sigma_max"] = None  # The table's own choice.
            else:
                schedule = None
        if schedule is None:
            return pair_rows(sigma, sigma_next, batch=len(sample), **options)
        return rows(flow_table(schedule, **options), index, len(sample))


def _place(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor | None, int]:
    """(schedule, i) where sigma is `schedule[i]` and sigma_next `schedule[i + 1]`, by address.

    `schedule[i]` is a view and knows its tensor: nothing is read from a device.
    """
    schedule = sigma._base
    if schedule is None or schedule.dim() != 1 or schedule.stride(0) == 0:
        return None, 0
    index = (sigma.storage_offset() - schedule.storage_offset()) // schedule.stride(0)
    both = _is_element(sigma, schedule, index) and _is_element(sigma_next, schedule, index + 1)
    return (schedule if both else None), index


def _is_element(value: Tensor, schedule: Tensor, index: int) -> bool:
    return (
        value._base is schedule
        and value.dim() == 0
        and value.dtype == schedule.dtype
        and 0 <= index < len(schedule)
        and value.storage_offset() == schedule.storage_offset() + index * schedule.stride(0)
    )


class FlowSDEStrategy(_Strategy):
    """Flow-GRPO's SDE, arXiv 2505.05470."""

    canonical_name = "flow"


class CPSSDEStrategy(_Strategy):
    """Coefficient-preserving sampling; log_prob = -mean((x' - mean)^2)."""

    canonical_name = "cps"


class DanceSDEStrategy(_Strategy):
    """DanceGRPO's SDE, arXiv 2505.07818."""

    canonical_name = "dance"
