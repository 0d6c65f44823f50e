"""The clipped policy-gradient loss (PPO's, as GRPO uses it) over ragged transitions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.ops import autograd, native, reference, registered
from dancegrpo_fast.ops.packing import (
    Box,
    Packing,
    check_divisor,
    explain,
    pack,
    refuse_gradient,
    resolve,
    savable,
    shape_error,
    values_readable,
)

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
    "old_distance",
)
"""Names of `PolicyLoss.metrics`. All are sums over the children of weight > 0, so the tensors of
micro-batches and ranks are added; divide by `children` for means afterwards.

children: how many. weight: the weights. policy: the clipped objective before the divisor. kl:
weight k mean((m - m_ref)^2), 0 without a reference output. The loss is (policy + kl_weight kl) /
divisor where children of weight 0 have no advantage. log_prob. ratio: rho. ratio_deviation:
|rho - 1|, and its square. clipped_low, clipped_high: how many rho are below, above the clip range.
old_distance: weight mean((m - m_old)^2), 0 without an old output.
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
    NaN in any child makes the loss NaN, whatever its weight; an infinite ratio makes it NaN or
    infinite. An infinite latent or model output makes the log-prob -inf: on-policy the loss is NaN,
    otherwise the ratio is 0, and only the metric log_prob tells.

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
        clip_range: c for [1 - c, 1 + c], or (low, high) for [1 - low, 1 + high], low at most 1;
            (1.0, 1e9) does not clip.
        divisor: > 0; None: the sum of `weights`. Micro-batches of one update share one divisor.
        kl_weight: Factor of the KL, >= 0; needs `reference_output` if it is not 0.
        reference_output: m_ref, [states, ...]. With kl_weight = 0 it is only measured.
        old_output: m_old, [states, ...]: normalises the ratio as GRPO-Guard does,
            rho = exp((log_prob - old_log_prob + w b^2 mean((m - m_old)^2)) s). Needs old_log_prob.
        action_box: (start, stop) for each dimension of a latent. None: everything.
        implementation: "auto", "native", "triton" or "reference" (`ops.selected`).

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
    low, high = clip_bounds(clip_range)
    args = (
        latents, next_latents, coefficients, advantages, old_log_prob, weights, child_offsets,
        reward_weights, reference_output, old_output, low, high, divisor, kl_weight, action_box,
        1.0, None,
    )  # fmt: skip
    return clipped_loss(model_output, args, implementation)


def clipped_loss(
    m: Tensor,
    args: tuple[Any, ...],
    implementation: str,
    names: Mapping[str, str] | None = None,
) -> PolicyLoss:
    """The core that `policy_loss` and `awm_loss` share: they differ in coefficients only.

    Args:
        m: The model output.
        args: x, y, table, advantages, old_log_prob, weights, offsets, reward_weights, ref, old,
            low, high, divisor, kl_weight, box, power, old_penalty: what the kernels take. power is
            that of `reference.link`; old_penalty None: `old` normalises the ratio, else it is the
            factor of the penalty weight mean((m - old)^2).
        implementation: As in `policy_loss`.
        names: What the caller's public arguments are called, for errors.
    """
    tensors = (m, *args[:10])
    if torch.is_grad_enabled():
        for constant in tensors[1:]:
            if constant is not None and constant.requires_grad:
                _refuse_gradients(args, names or {})
    name = resolve(implementation, m, args[0], args[1], args[8], args[9])
    if name == "native" and not torch.compiler.is_compiling():
        try:
            return PolicyLoss(*autograd.policy_loss(name, m, args))
        except native.module().Refused as error:
            refused = error
        explain(refused, lambda: _check(m, args, names), *tensors)
    packing = _check(m, args, names)
    if name == "reference":
        return _reference(packing, m, args)
    if torch.compiler.is_compiling():
        *head, divisor, kl_weight, box, power, old_penalty = args
        tail = (registered.scalar(divisor), kl_weight, registered.flat(box), power, old_penalty)
        loss, log_prob, metrics, _ = registered.policy_loss(m, *head, *tail)
        return PolicyLoss(loss, log_prob, metrics)
    return PolicyLoss(*autograd.policy_loss(name, m, args))


def _refuse_gradients(args: tuple[Any, ...], names: Mapping[str, str]) -> None:
    own = (
        "latents", "next_latents", "coefficients", "advantages", "old_log_prob", "weights",
        "child_offsets", "reward_weights", "reference_output", "old_output",
    )  # fmt: skip
    refuse_gradient(**{names.get(n, n): t for n, t in zip(own, args, strict=False)})


def _check(m: Tensor, args: tuple[Any, ...], names: Mapping[str, str] | None) -> Packing:
    """Everything that can be said without computing; values on the CPU only."""
    (x, y, table, advantages, old_log_prob, weights, offsets, reward_weights, ref, old,
     _, _, divisor, kl_weight, box, _, old_penalty) = args  # fmt: skip
    packing = pack(m, x, table, offsets, box, y, ref, old, names)
    check_scalars(divisor, kl_weight, ref)
    if old is not None and old_log_prob is None and old_penalty is None:
        raise ValueError(
            "old_output without old_log_prob: ratio normalisation compares with the policy that "
            "made old_output; pass its log-probs too"
        )
    n, shape = packing.children, tuple(advantages.shape)
    if len(shape) not in (1, 2, 3) or shape[0] != n or shape[2:] not in ((), (2,)):
        raise shape_error("advantages", advantages, f"[{n}], [{n}, rewards] or [{n}, rewards, 2]")
    packing.check("advantages", advantages, shape)
    packing.check("reward_weights", reward_weights, shape[1:2] or (1,))
    packing.check("weights", weights, (n,))
    packing.check("old_log_prob", old_log_prob, (n,))
    if values_readable(table):
        parts = _advantage_parts(packing, advantages)
        _check_values(packing, table, parts, packing.vector(weights, n), divisor)
    return packing


def _reference(packing: Packing, m: Tensor, args: tuple[Any, ...]) -> PolicyLoss:
    (x, y, table, advantages, old_log_prob, weights, _, reward_weights, ref, old,
     low, high, divisor, kl_weight, _, power, old_penalty) = args  # fmt: skip
    table, m = savable(table).to(packing.dtype), packing.rows(m)
    parts = _advantage_parts(packing, advantages)
    per_reward = packing.vector(reward_weights, parts.shape[1])
    weight = packing.vector(weights, packing.children)
    log_prob = reference.log_prob(
        packing.per_child(packing.rows(x)), packing.per_child(m), packing.rows(y), table, power
    )
    old_lp = log_prob.detach()
    if old_log_prob is not None:
        old_lp = packing.vector(old_log_prob, packing.children)
    kl = old_distance = torch.zeros_like(weight)
    if ref is not None:
        kl = weight * table[:, 5] * _distance(packing, m, ref)
    ratio = reference.ratio(log_prob, old_lp)
    if old is not None:
        drift = _distance(packing, m, old)
        old_distance = weight * drift
        if old_penalty is None:
            ratio = reference.normalised_ratio(log_prob, old_lp, drift, table)
    surrogate = reference.clipped_surrogate(ratio, parts[..., 0], low, high)
    surrogate = surrogate + reference.clipped_surrogate(ratio, parts[..., 1], low, high)
    policy = (surrogate * per_reward).sum(1)
    total = policy.sum()
    # A weight of 0 only measures: NaN stays out of the loss.
    if kl_weight != 0:
        total = total + kl_weight * kl.sum()
    if old_penalty is not None and old_penalty != 0:
        total = total + old_penalty * old_distance.sum()
    loss = total / (weight.sum() if divisor is None else divisor)
    metrics = _metrics(weight, policy, kl, old_distance, log_prob, ratio, low, high)
    return PolicyLoss(loss, log_prob.detach(), metrics)


def _distance(packing: Packing, m: Tensor, other: Tensor) -> Tensor:
    """mean((m - other)^2) per child; m is [states, numel]."""
    return packing.per_child(reference.mean_square(m - packing.rows(other)))


def _advantage_parts(packing: Packing, advantages: Tensor) -> Tensor:
    """[children, R, 2]: the positive and the negative part."""
    values = savable(advantages).to(packing.dtype)
    if values.dim() == 3:
        return values
    values = values[:, None] if values.dim() == 1 else values
    return torch.stack((values.clamp(min=0), values.clamp(max=0)), dim=-1)


def clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of the clip range [1 - low, 1 + high]."""
    # Not tuple | list: torch 2.5 cannot compile that.
    low, high = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if not (0 <= low <= 1 and 0 <= high < math.inf):
        raise ValueError(
            f"clip_range = {clip_range}: must be c or (low, high) with 0 <= low <= 1 and 0 <= "
            "high, finite; (1.0, 1e9) does not clip"
        )
    return low, high


def check_scalars(
    divisor: float | None, kl_weight: float, reference_output: Tensor | None
) -> None:
    """Refuses a divisor or KL weight out of range."""
    if not torch.compiler.is_compiling():
        check_divisor(divisor)
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight = {kl_weight}: must be a finite number, at least 0")
    if kl_weight > 0 and reference_output is None:
        raise ValueError(
            f"kl_weight = {kl_weight} without reference_output: pass the reference model's output, "
            "or kl_weight = 0"
        )


def check_weights(weight: Tensor, divisor: float | None) -> None:
    """Refuses weights below 0, and a sum of 0 that would have to divide; reads values."""
    if bool((weight < 0).any()):
        raise ValueError(f"weights has the minimum {float(weight.min())}: must be at least 0")
    if divisor is None and not bool(weight.sum() > 0):
        raise ValueError("weights sum to 0 and divisor is None: pass the divisor of the update")


def _check_values(
    packing: Packing, table: Tensor, parts: Tensor, weight: Tensor, divisor: float | None
) -> None:
    if bool((parts[..., 0] < 0).any()) or bool((parts[..., 1] > 0).any()):
        raise ValueError(
            "advantages[..., 0] must be >= 0 and advantages[..., 1] <= 0: they are the sums of the "
            "positive and of the negative advantages; pass [children, rewards] to have them split"
        )
    check_weights(weight, divisor)
    used = (weight != 0) | (parts != 0).any(-1).any(-1)
    without = (table[:, 3] == 0) & used
    if bool(without.any()):
        name = packing.names.get("coefficients", "coefficients")
        raise ValueError(
            f"{name}[{int(without.nonzero()[0])}] has w = 0 (no density: an ODE step) but an "
            "advantage or weight: a deterministic step has no ratio; set both to 0 or leave it out"
        )


def _metrics(
    weight: Tensor,
    policy: Tensor,
    kl: Tensor,
    old_distance: Tensor,
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
        old_distance.detach(),
    )
    return torch.where(active, torch.stack(per_child), 0.0).sum(1)
