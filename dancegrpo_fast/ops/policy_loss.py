"""The clipped policy-gradient loss (PPO's, as GRPO uses it) over ragged transitions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.ops import reference
from dancegrpo_fast.ops.packing import Box, Packing, pack, resolve, shape_error, values_readable
from dancegrpo_fast.ops.transition import refuse_gradient

POLICY_METRICS = (
    "children",
    "weight",
    "policy",
    "kl",
    "log_prob",
    "ratio",
    "ratio_deviation",
    "ratio_deviation_square",
    "clipped_low",
    "clipped_high",
)
"""Names of `PolicyLoss.metrics`. All are sums over the children of weight > 0, so the tensors of
micro-batches and ranks are added; divide by `children` for means afterwards.

children: how many. weight: the weights. policy: the clipped objective before the divisor. kl:
weight k mean((m - m_ref)^2), 0 without a reference output. The loss is (policy + kl_weight kl) /
divisor where children of weight 0 have no advantage. log_prob. ratio: rho. ratio_deviation:
|rho - 1|, and its square. clipped_low, clipped_high: how many rho are below, above the clip range.
"""


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns.

    Attributes:
        loss: Scalar, differentiable with respect to the model output.
        log_prob: [children], detached.
        metrics: [len(POLICY_METRICS)], detached, additive.
    """

    loss: Tensor
    log_prob: Tensor
    metrics: Tensor


def policy_loss(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    coefficients: Tensor,
    advantages: Tensor,
    *,
    old_log_prob: Tensor | None = None,
    weights: Tensor | None = None,
    child_offsets: Tensor | None = None,
    reward_weights: Tensor | None = None,
    clip_range: float | tuple[float, float] = 1e-4,
    divisor: float | None = None,
    kl_weight: float = 0.0,
    reference_output: Tensor | None = None,
    old_output: Tensor | None = None,
    action_box: Box | None = None,
    implementation: str = "auto",
) -> PolicyLoss:
    """Clipped objective plus KL, summed over the children and divided once.

        loss = (sum_child [ sum_r u_r (max(-P rho, -P clip(rho)) + max(-N rho, -N clip(rho)))
                            + kl_weight weight k mean((m - m_ref)^2) ]) / divisor

    with rho = exp(log_prob - old_log_prob), P >= 0 >= N the two parts of a child's advantage for
    reward r, and u the reward weights. A child that stands for several samples carries the sum of
    their positive and of their negative advantages: the objective is linear in each of the two.
    NaN in any child makes the loss NaN, whatever its weight.

    Args:
        model_output: m, [states, ...], any floating dtype; computed with in float32 (float64 if a
            latent-sized input is float64). The only input that is differentiated.
        latents: x, the same shape.
        next_latents: x' as stored, [children, ...].
        coefficients: [children, 8]: a, b, s, w, c, k, p, q.
        advantages: [children] or [children, R] (split by sign), or [children, R, 2] (P, N).
        old_log_prob: [children]; None: on-policy, rho = exp(log_prob - log_prob.detach()).
        weights: [children] >= 0, how many samples each child stands for; they enter the default
            divisor and the KL. None: ones.
        child_offsets: int64 [states + 1]; None: one child each.
        reward_weights: u, [R]; None: ones.
        clip_range: c for [1 - c, 1 + c], or (low, high) for [1 - low, 1 + high].
        divisor: > 0; None: the sum of `weights`. Micro-batches of one update share one divisor.
        kl_weight: Factor of the KL, >= 0; needs `reference_output` if it is not 0.
        reference_output: m_ref, [states, ...]. With kl_weight = 0 it is only measured.
        old_output: m_old, [states, ...]: normalises the ratio as GRPO-Guard does,
            rho = exp((log_prob - old_log_prob + w b^2 mean((m - m_old)^2)) s). Needs old_log_prob.
        action_box: (start, stop) for each dimension of a latent. None: everything.
        implementation: "auto" or "reference".

    Returns:
        Loss, log-probs and metrics.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit; a constant that requires a gradient;
            an argument out of range; advantage parts of the wrong sign, or a child without density
            (w = 0) with an advantage or weight (values are read on the CPU only); an implementation
            that is not there.

    Source: PPO, arXiv 1707.06347, equation 7; DanceGRPO, arXiv 2505.07818; GRPO-Guard, arXiv
    2510.22319.
    """
    resolve(implementation)
    packing = pack(
        model_output, latents, coefficients, child_offsets, action_box,
        next_latents, reference_output, old_output,
    )  # fmt: skip
    refuse_gradient(
        latents=latents, next_latents=next_latents, coefficients=coefficients,
        advantages=advantages, old_log_prob=old_log_prob, weights=weights,
        reward_weights=reward_weights, reference_output=reference_output, old_output=old_output,
    )  # fmt: skip
    low, high = _clip_bounds(clip_range)
    _check_scalars(divisor, kl_weight, reference_output, old_output, old_log_prob)
    count, dtype = packing.children, packing.dtype
    packing.check("next_latents", next_latents, (count, *packing.dims))
    parts = _advantage_parts(packing, advantages)
    per_reward = _vector(packing, "reward_weights", reward_weights, parts.shape[1])
    weight = _vector(packing, "weights", weights, count)
    table = coefficients.to(dtype)
    if values_readable(table):
        _check_values(table, parts, weight, divisor)

    m = packing.rows(model_output)
    log_prob = reference.log_prob(
        packing.per_child(packing.rows(latents)),
        packing.per_child(m),
        packing.rows(next_latents),
        table,
    )
    old = log_prob.detach()
    if old_log_prob is not None:
        old = packing.check("old_log_prob", old_log_prob, (count,)).to(dtype)
    if old_output is None:
        ratio = reference.ratio(log_prob, old)
    else:
        drift = _distance(packing, m, "old_output", old_output)
        ratio = reference.normalised_ratio(log_prob, old, drift, table)
    surrogate = reference.clipped_surrogate(ratio, parts[..., 0], low, high)
    surrogate = surrogate + reference.clipped_surrogate(ratio, parts[..., 1], low, high)
    policy = (surrogate * per_reward).sum(1)
    kl = torch.zeros_like(weight)
    if reference_output is not None:
        kl = weight * table[:, 5] * _distance(packing, m, "reference_output", reference_output)
    total = policy.sum() if kl_weight == 0 else policy.sum() + kl_weight * kl.sum()
    loss = total / (weight.sum() if divisor is None else divisor)
    metrics = _metrics(weight, policy, kl, log_prob, ratio, low, high)
    return PolicyLoss(loss, log_prob.detach(), metrics)


def _distance(packing: Packing, m: Tensor, name: str, other: Tensor) -> Tensor:
    """mean((m - other)^2) per child; m is [states, numel]."""
    packing.check(name, other, (packing.states, *packing.dims))
    return packing.per_child(reference.mean_square(m - packing.rows(other)))


def _vector(packing: Packing, name: str, values: Tensor | None, count: int) -> Tensor:
    if values is None:
        return torch.ones(count, dtype=packing.dtype, device=packing.device)
    return packing.check(name, values, (count,)).to(packing.dtype)


def _advantage_parts(packing: Packing, advantages: Tensor) -> Tensor:
    """[children, R, 2]: the positive and the negative part."""
    shape = tuple(advantages.shape)
    if len(shape) not in (1, 2, 3) or shape[0] != packing.children or shape[2:] not in ((), (2,)):
        n = packing.children
        raise shape_error("advantages", advantages, f"[{n}], [{n}, rewards] or [{n}, rewards, 2]")
    values = packing.check("advantages", advantages, shape).to(packing.dtype)
    if len(shape) == 3:
        return values
    values = values.reshape(packing.children, -1) if len(shape) == 2 else values[:, None]
    return torch.stack((values.clamp(min=0), values.clamp(max=0)), dim=-1)


def _clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 <= low <= 1 and 0 <= high < math.inf):
        raise ValueError(
            f"clip_range = {clip_range}: must be c or (low, high) with 0 <= low <= 1 and 0 <= high"
        )
    return low, high


def _check_scalars(
    divisor: float | None,
    kl_weight: float,
    reference_output: Tensor | None,
    old_output: Tensor | None,
    old_log_prob: Tensor | None,
) -> None:
    if divisor is not None and not 0 < divisor < math.inf:
        raise ValueError(f"divisor = {divisor}: must be a positive number")
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight = {kl_weight}: must be a finite number, at least 0")
    if kl_weight > 0 and reference_output is None:
        raise ValueError(
            f"kl_weight = {kl_weight} without reference_output: pass the reference model's output, "
            "or kl_weight = 0"
        )
    if old_output is not None and old_log_prob is None:
        raise ValueError(
            "old_output without old_log_prob: ratio normalisation compares with the policy that "
            "made old_output; pass its log-probs too"
        )


def _check_values(table: Tensor, parts: Tensor, weight: Tensor, divisor: float | None) -> None:
    if bool((parts[..., 0] < 0).any()) or bool((parts[..., 1] > 0).any()):
        raise ValueError(
            "advantages[..., 0] must be >= 0 and advantages[..., 1] <= 0: they are the sums of the "
            "positive and of the negative advantages; pass [children, rewards] to have them split"
        )
    if bool((weight < 0).any()):
        raise ValueError(f"weights has the minimum {float(weight.min())}: must be at least 0")
    if divisor is None and not bool(weight.sum() > 0):
        raise ValueError("weights sum to 0 and divisor is None: pass the divisor of the update")
    used = (weight != 0) | (parts != 0).any(-1).any(-1)
    without = (table[:, 3] == 0) & used
    if bool(without.any()):
        raise ValueError(
            f"coefficients[{int(without.nonzero()[0])}] has w = 0 (no density: an ODE step) but an "
            "advantage or weight: a deterministic step has no ratio; set both to 0 or leave it out"
        )


def _metrics(
    weight: Tensor,
    policy: Tensor,
    kl: Tensor,
    log_prob: Tensor,
    ratio: Tensor,
    low: float,
    high: float,
) -> Tensor:
    active = weight > 0
    deviation = ratio.detach() - 1.0
    per_child = (
        torch.ones_like(weight),
        weight,
        policy.detach(),
        kl.detach(),
        log_prob.detach(),
        ratio.detach(),
        deviation.abs(),
        deviation * deviation,
        (ratio < 1.0 - low).to(weight.dtype),
        (ratio > 1.0 + high).to(weight.dtype),
    )
    return torch.where(active, torch.stack(per_child), 0.0).sum(1)
