"""What the hosts' files share: the fused step and a clipped loss; the tables are in `tables.py`.

A host hands over its sigmas (on the CPU or on a device), a step index in whatever form it has, and
tensors. After the first call nothing here reads a value back from a device.

    table = flow_table(sigmas, dynamics="dance", level=0.3, device=latents.device)
    out = step(model_output, latents, rows(table, index, len(latents)), prev_sample=prev)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.integrations.pairs import pair_rows
from dancegrpo_fast.integrations.tables import (
    FLOW_DYNAMICS,
    ddim_table,
    flow_table,
    noise_table,
    per_sample,
    rows,
    timestep_index,
)
from dancegrpo_fast.ops import (
    sample_transition,
    transition_log_prob,
    transition_mean,
    x0_estimate,
)
from dancegrpo_fast.ops.noise import DrawKey

__all__ = [
    "FLOW_DYNAMICS",
    "Generators",
    "RATIO_METRICS",
    "ClippedLoss",
    "Step",
    "check_source",
    "clipped_loss",
    "clipped_surrogate",
    "ddim_table",
    "flow_table",
    "noise_table",
    "pair_rows",
    "per_sample",
    "randn",
    "ratio_metrics",
    "rows",
    "step",
    "timestep_index",
]

Generators = torch.Generator | Sequence[torch.Generator] | None

# ------------------------------------------------------------------ the step


class Step(NamedTuple):
    """What `step` returns; what was not asked for is None.

    Attributes:
        prev_sample: [B, ...] x', drawn or as it was given.
        log_prob: [B], of `prev_sample`.
        mean: [B, ...], a x + b m.
        x0: [B, ...], p x + q m.
    """

    prev_sample: Tensor
    log_prob: Tensor | None
    mean: Tensor | None
    x0: Tensor | None


def step(
    model_output: Tensor,
    sample: Tensor,
    rows: Tensor,
    *,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    key: Tensor | Sequence[DrawKey] | None = None,
    deterministic: bool = False,
    log_prob: bool = True,
    mean: bool = True,
    x0: bool = True,
    latent_dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> Step:
    """One sampler step: draws x' or takes it as given, with its log-prob, mean and x0 estimate.

    Drawn and given x' with the same model output have bit-equal log-probs. The log-prob is
    differentiable with respect to `model_output`; mean, x0 and a drawn x' to `sample` too. In the
    log-prob x' is a constant, as in every host. Everything is computed in float32.

    Args:
        model_output: m, [B, ...], any floating dtype.
        sample: x, the same shape.
        rows: [B, 8] (`rows`), on the same device. Where w = 0 (no noise) the log-prob is 0.
        prev_sample: x', the same shape: nothing is drawn.
        generator: For x' where it is drawn: None is torch's own, a list has one generator per row,
            and each draws where it lives. The numbers are those of torch.randn in float32.
        key: Noise keys of ours instead, one per row: int64 [B, 2] or `DrawKey` objects.
        deterministic: All rows have s = 0: no numbers are drawn.
        log_prob, mean, x0: What is wanted.
        latent_dtype: What a drawn x' is stored in; it is rounded before its log-prob is taken.
            None: float32 (float64 for float64 inputs).
        implementation: As in `ops.policy_loss`.

    Raises:
        ValueError: As the ops; generator with key; a list of the wrong length; `sample` requires a
            gradient and the log-prob is wanted.
    """
    drawn = None
    if prev_sample is None:
        check_source(generator, key, deterministic)
        noise = randn(sample, generator) if key is None and not deterministic else None
        drawn = sample_transition(
            model_output, sample, rows, keys=key, noise=noise,
            latent_dtype=latent_dtype or _wide(model_output, sample),
            implementation=implementation,
        )  # fmt: skip
    stored = drawn.next_latents if drawn is not None else prev_sample
    assert stored is not None
    wants_gradient = torch.is_grad_enabled() and (
        model_output.requires_grad or sample.requires_grad
    )
    found = drawn.log_prob if drawn is not None and not wants_gradient else None
    if log_prob and found is None:
        found = transition_log_prob(
            model_output, sample, stored.detach(), rows, implementation=implementation
        )
    center = None
    if mean or (drawn is not None and wants_gradient):
        center = transition_mean(model_output, sample, rows)
        if drawn is not None and wants_gradient:
            stored = _Moved.apply(center, stored)
    return Step(
        stored,
        found if log_prob else None,
        center if mean else None,
        x0_estimate(model_output, sample, rows) if x0 else None,
    )


def check_source(
    generator: Generators, key: Tensor | Sequence[DrawKey] | None, deterministic: bool
) -> None:
    """Where the noise of a step comes from.

    Raises:
        ValueError: Both; or one of them for a step that draws nothing.
    """
    if deterministic and (generator is not None or key is not None):
        raise ValueError("deterministic = True draws nothing: pass no generator and no key")
    if generator is not None and key is not None:
        raise ValueError("generator and key are both given: pass one of them")


class _Moved(torch.autograd.Function):
    """A drawn x' = mean + s eps, with the gradient of its mean."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, drawn: Tensor) -> Tensor:
        return drawn.view_as(drawn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _wide(*tensors: Tensor) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def randn(
    like: Tensor, generator: Generators = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normals, shaped and placed like a tensor.

    Args:
        like: [B, ...].
        generator: None, one, or one per row. Each draws on its own device, row by row for a list:
            the numbers that diffusers' pipelines get.
        dtype: Of the result, and drawn in.

    Raises:
        ValueError: A list that has not B generators.
    """
    if generator is None or isinstance(generator, torch.Generator):
        where = like.device if generator is None else generator.device
        drawn = torch.randn(like.shape, generator=generator, device=where, dtype=dtype)
        return drawn.to(like.device, non_blocking=True)
    if len(generator) != len(like):
        raise ValueError(
            f"generator has {len(generator)} entries: must be one, or one for each of the "
            f"{len(like)} rows"
        )
    shape = (1, *like.shape[1:])
    each = [torch.randn(shape, generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.cat([row.to(like.device, non_blocking=True) for row in each])


# ------------------------------------------------------------------ losses on log-probs

RATIO_METRICS = (
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clipped_low",
    "clipped_high",
    "approximate_kl",
    "log_prob_gap",
)
"""Names of what `ratio_metrics` returns: statistics of rho = exp(log_prob - old); the shares of rho
below and above the clip range; mean((log_prob - old)^2) / 2; max |log_prob - old|."""


class ClippedLoss(NamedTuple):
    """What `clipped_loss` returns.

    Attributes:
        loss: Scalar, differentiable with respect to log_prob.
        ratio: [B], detached.
    """

    loss: Tensor
    ratio: Tensor


def clipped_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float | tuple[float, float],
    *,
    advantage_clip: float | None = None,
    reward_weights: Sequence[float] | None = None,
    loss_scale: float = 1.0,
) -> ClippedLoss:
    """The clipped objective, for a host whose loss sees log-probs only.

        loss = loss_scale mean_b sum_r u_r max(-A_br rho_b, -A_br clip(rho_b))

    A host that has the model output there uses `ops.policy_loss`, which is one fused pass.

    Args:
        log_prob: [B].
        old_log_prob: [B].
        advantages: [B], or [B, R] for R separately clipped rewards.
        clip_range: c for [1 - c, 1 + c], or (low, high), at least 0.
        advantage_clip: Clamps the advantages to +-this. None: as they are.
        reward_weights: u, R numbers; None: ones.
        loss_scale: All that the host divides or multiplies by (accumulation, timesteps): the mean
            is over the rows of this call only, never over ranks.

    Returns:
        Loss and ratios; nothing is read back (`ratio_metrics` has numbers for a log).

    Raises:
        ValueError: Shapes that do not fit; a clip range below 0.

    Source: PPO, arXiv 1707.06347, equation 7.
    """
    if not log_prob.shape == old_log_prob.shape == advantages.shape[:1]:
        shapes = [list(t.shape) for t in (log_prob, old_log_prob, advantages)]
        raise ValueError(
            f"log_prob, old_log_prob, advantages = {shapes}: must be [B], [B], [B] or [B, R]"
        )
    ratio = torch.exp(log_prob - old_log_prob)
    loss = clipped_surrogate(ratio, advantages, clip_range, advantage_clip, reward_weights)
    return ClippedLoss(loss if loss_scale == 1.0 else loss * loss_scale, ratio.detach())


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_range: float | tuple[float, float],
    advantage_clip: float | None = None,
    reward_weights: Sequence[float] | None = None,
) -> Tensor:
    """mean_b sum_r u_r max(-A_br rho_b, -A_br clip(rho_b)); arguments as `clipped_loss`."""
    low, high = _clip_bounds(clip_range)
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    clipped = ratio.clamp(1.0 - low, 1.0 + high)
    columns = advantages.unbind(1) if advantages.dim() == 2 else (advantages,)
    weights = (1.0,) * len(columns) if reward_weights is None else tuple(reward_weights)
    if len(weights) != len(columns):
        raise ValueError(f"reward_weights = {weights}: must have one for each of {len(columns)}")
    total = None
    for weight, column in zip(weights, columns, strict=True):
        column = -column
        term = torch.maximum(column * ratio, column * clipped)
        term = term if weight == 1.0 else weight * term  # outside: it may be negative
        total = term if total is None else total + term
    assert total is not None
    return total.mean()


def _clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high); unlike `ops.policy_loss` low may be above 1, as in the hosts."""
    low, high = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if not (low >= 0 and high >= 0):
        raise ValueError(f"clip_range = {clip_range}: must be c or (low, high), at least 0")
    return low, high


def ratio_metrics(
    log_prob: Tensor, old_log_prob: Tensor, clip_range: float | tuple[float, float]
) -> Tensor:
    """[len(RATIO_METRICS)] on the device of the log-probs [B]: copy it once, when it is logged."""
    low, high = _clip_bounds(clip_range)
    difference = (log_prob - old_log_prob).detach()
    ratio = torch.exp(difference)
    values = (
        ratio.mean(),
        ratio.min(),
        ratio.max(),
        (ratio < 1.0 - low).to(ratio.dtype).mean(),
        (ratio > 1.0 + high).to(ratio.dtype).mean(),
        0.5 * (difference * difference).mean(),
        difference.abs().max(),
    )
    return torch.stack(values)
