"""Losses of the forward process: no trajectory, only clean samples, noised again at any time.

Flow convention: x_t = (1 - t) x0 + t eps with t = sigma, velocity v = eps - x0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.ops import autograd, native, reference, registered
from dancegrpo_fast.ops.packing import (
    Box,
    Packing,
    explain,
    pack,
    refuse_gradient,
    resolve,
    values_readable,
)
from dancegrpo_fast.ops.policy_loss import (
    PolicyLoss,
    check_scalars,
    check_weights,
    clip_bounds,
    clipped_loss,
)

NFT_METRICS = (
    "samples",
    "weight",
    "policy",
    "kl",
    "positive",
    "negative",
    "positive_scale",
    "negative_scale",
    "probability",
)
"""Names of `ForwardLoss.metrics`. All are sums over the samples of weight > 0: the tensors of
micro-batches and ranks are added; divide by `samples` for means afterwards.

samples: how many. weight: the weights. policy: weight advantage_clip (p L+ + (1 - p) L-) / beta.
kl: weight mean((v - v_ref)^2), 0 without a reference output. positive, negative: L+ and L-.
positive_scale, negative_scale: w+ and w-, what L+ and L- were divided by. probability: p.
"""

# Form of AWM's log-prob -> (power of `reference.link`, factor of the weight).
_AWM_FORMS = {"linear": (1.0, 1.0), "huber": (0.5, 0.5), "ghuber": (0.25, 1.0)}
_NFT_NAMES = {"latents": "noised_latents", "next_latents": "clean_latents"}
_AWM_NAMES = {
    "latents": "clean_latents",
    "next_latents": "noise",
    "coefficients": "weighting",
    "old_output": "ema_output",
}


class ForwardLoss(NamedTuple):
    """What `nft_loss` returns.

    Attributes:
        loss: Scalar, differentiable with respect to the model output.
        metrics: [len(NFT_METRICS)], detached, additive.
    """

    loss: Tensor
    metrics: Tensor


def nft_loss(
    model_output: Tensor,
    noised_latents: Tensor,
    clean_latents: Tensor,
    sigmas: Tensor,
    advantages: Tensor,
    *,
    old_output: Tensor,
    beta: float = 1.0,
    advantage_clip: float = 5.0,
    weights: Tensor | None = None,
    divisor: float | None = None,
    kl_weight: float = 0.0,
    reference_output: Tensor | None = None,
    action_box: Box | None = None,
    minimum: float = 1e-5,
    implementation: str = "auto",
) -> ForwardLoss:
    """DiffusionNFT's loss: pull towards good samples and push away from bad ones, per sample.

        v+ = beta v + (1 - beta) v_old          v- = (1 + beta) v_old - beta v
        L+- = mean((x_t - sigma v+- - x0)^2) / w+-,   w+- = max(mean|x_t - sigma v+- - x0|, minimum)
        p = clip(A / (2 advantage_clip) + 1/2, 0, 1)
        loss = sum_i weight_i (advantage_clip (p L+ + (1 - p) L-) / beta
                               + kl_weight mean((v - v_ref)^2)) / divisor

    w+- are constants of the gradient. With the default divisor this is the loss of the public
    training script (NVlabs/DiffusionNFT, train_nft_sd3.py) for one timestep of one batch, before
    its division by accumulation steps; there w+- is a float64 mean, here one in the compute dtype.
    NaN in any sample makes the loss NaN, whatever its weight.

    Args:
        model_output: v, [batch, ...], any floating dtype; computed with in float32 (float64 if a
            latent-sized input is float64). The only input that is differentiated.
        noised_latents: x_t, the same shape.
        clean_latents: x0, the same shape.
        sigmas: [batch], the noise level t of each sample, 0 to 1.
        advantages: A, [batch]; clipping them to +-advantage_clip before changes nothing.
        old_output: v_old, the velocity of the policy that drew the samples.
        beta: > 0, how far v+ lies from v_old towards v (1: v+ = v). Published: 1 or 0.1.
        advantage_clip: > 0. Published: 5.
        weights: [batch] >= 0. None: ones.
        divisor: > 0; None: the sum of `weights`. Micro-batches of one update share one divisor.
        kl_weight: >= 0. Published: 1e-4; the default is 0 because it needs `reference_output`,
            one more forward, which a loss should not demand unasked.
        reference_output: v_ref. With kl_weight = 0 it is only measured.
        action_box: (start, stop) for each dimension of a latent. None: everything.
        minimum: >= 0, lower bound of w+-.
        implementation: "auto", "native", "triton" or "reference" (`ops.selected`).

    Returns:
        Loss and metrics.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit; a constant that requires a gradient;
            an argument out of range (values are read on the CPU only); an implementation that
            cannot run.

    Source: DiffusionNFT, arXiv 2509.16117, equation 5, with its adaptive weighting.
    """
    args = (
        noised_latents, clean_latents, sigmas, advantages, weights, reference_output, old_output,
        beta, advantage_clip, divisor, kl_weight, minimum, action_box,
    )  # fmt: skip
    tensors = (model_output, *args[:7])
    if torch.is_grad_enabled():
        refuse_gradient(
            noised_latents=noised_latents, clean_latents=clean_latents, sigmas=sigmas,
            advantages=advantages, weights=weights, reference_output=reference_output,
            old_output=old_output,
        )  # fmt: skip
    latents = (model_output, noised_latents, clean_latents, reference_output, old_output)
    name = resolve(implementation, *latents)
    if name == "native" and not torch.compiler.is_compiling():
        try:
            return ForwardLoss(*autograd.nft_loss(name, model_output, args))
        except native.module().Refused as error:
            refused = error
        explain(refused, lambda: _check_nft(model_output, args), *tensors)
    packing = _check_nft(model_output, args)
    if name == "reference":
        return _nft_reference(packing, model_output, args)
    if torch.compiler.is_compiling():
        *head, divisor, kl_weight, minimum, box = args
        tail = (registered.scalar(divisor), kl_weight, minimum, registered.flat(box))
        loss, metrics, _ = registered.nft_loss(model_output, *head, *tail)
        return ForwardLoss(loss, metrics)
    return ForwardLoss(*autograd.nft_loss(name, model_output, args))


def _check_nft(m: Tensor, args: tuple[Any, ...]) -> Packing:
    (x, y, sigmas, advantages, weights, ref, old, beta, advantage_clip, divisor, kl_weight,
     minimum, box) = args  # fmt: skip
    for name, value in (("beta", beta), ("advantage_clip", advantage_clip)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value}: must be a positive number")
    if not 0 <= minimum < math.inf:
        raise ValueError(f"minimum = {minimum}: must be a finite number, at least 0")
    packing = pack(m, x, None, None, box, y, ref, old, _NFT_NAMES)
    check_scalars(divisor, kl_weight, ref)
    count = (packing.states,)
    packing.check("sigmas", sigmas, count)
    packing.check("advantages", advantages, count)
    packing.check("weights", weights, count)
    if values_readable(m):
        check_weights(packing.vector(weights, packing.states), divisor)
    return packing


def _nft_reference(packing: Packing, model_output: Tensor, args: tuple[Any, ...]) -> ForwardLoss:
    (x, y, sigmas, advantages, weights, ref, old, beta, advantage_clip, divisor, kl_weight,
     minimum, _) = args  # fmt: skip
    v = packing.rows(model_output)
    weight = packing.vector(weights, packing.states)
    sigma = packing.vector(sigmas, packing.states)[:, None]
    error = packing.rows(x) + (-sigma) * v - packing.rows(y)
    step = v - packing.rows(old)
    plus, plus_scale = reference.nft_branch(error + sigma * (1 - beta) * step, minimum)
    minus, minus_scale = reference.nft_branch(error + sigma * (1 + beta) * step, minimum)
    p = reference.nft_probability(packing.vector(advantages, packing.states), advantage_clip)
    policy = weight * (advantage_clip * (p * plus + (1 - p) * minus) / beta)
    kl = torch.zeros_like(weight)
    if ref is not None:
        kl = weight * reference.mean_square(v - packing.rows(ref))
    # A weight of 0 only measures: NaN stays out of the loss.
    total = policy.sum() if kl_weight == 0 else policy.sum() + kl_weight * kl.sum()
    loss = total / (weight.sum() if divisor is None else divisor)
    per_sample = (
        torch.ones_like(weight), weight, policy, kl, plus, minus, plus_scale, minus_scale, p,
    )  # fmt: skip
    metrics = torch.stack([values.detach() for values in per_sample])
    return ForwardLoss(loss, torch.where(weight > 0, metrics, 0.0).sum(1))


def awm_weighting(times: Tensor, kind: str) -> Tensor:
    """AWM's schedule weight of each sample.

    Args:
        times: t, [batch], 0 to 1.
        kind: "uniform" (1), "t" or "t^2".

    Returns:
        [batch], like `times`.

    Raises:
        ValueError: Unknown kind.
    """
    if kind == "uniform":
        return torch.ones_like(times)
    if kind == "t":
        return times.clone()
    if kind == "t^2":
        return times * times
    raise ValueError(f"kind = {kind!r}: must be 'uniform', 't' or 't^2'")


def awm_loss(
    model_output: Tensor,
    clean_latents: Tensor,
    noise: Tensor,
    advantages: Tensor,
    *,
    weighting: Tensor,
    form: str = "linear",
    old_log_prob: Tensor | None = None,
    weights: Tensor | None = None,
    reward_weights: Tensor | None = None,
    clip_range: float | tuple[float, float] = 1.0,
    divisor: float | None = None,
    kl_weight: float = 0.0,
    reference_output: Tensor | None = None,
    ema_weight: float = 0.0,
    ema_output: Tensor | None = None,
    action_box: Box | None = None,
    implementation: str = "auto",
) -> PolicyLoss:
    """Advantage-weighted matching: the clipped objective on minus the velocity's squared error.

        e = mean((v - (eps - x0))^2)
        log_prob = -weighting e                                          (linear)
                 = -weighting (sqrt(e + 1e-10) - 1e-5)                   (huber)
                 = -weighting ((e + 1e-10)^(1/4) - (1e-10)^(1/4)) / 0.25 (ghuber)
        loss = sum (clipped objective(exp(log_prob - old_log_prob), A)
                    + kl_weight weight mean((v - v_ref)^2)
                    + ema_weight weight mean((v - v_ema)^2)) / divisor

    It is `policy_loss` with other coefficients, and the old log-probs must be of the same times and
    noise. One row is one (sample, time). With all times of a batch as rows, advantages clamped to
    +-5 and divided by 5, and the default divisor, this is the loss of the public training script
    (scxue/advantage_weighted_matching, train_sd3_awm.py) with loss_type exp_first and Uniform KL
    weights; it has huber and ghuber with weighting = t only, and computes e in float64.

    Args:
        model_output: v, [batch, ...], any floating dtype; computed with in float32 (float64 if a
            latent-sized input is float64). The only input that is differentiated.
        clean_latents: x0, the same shape.
        noise: eps, the same shape: what x0 was mixed with to get the network's input.
        advantages: [batch], [batch, R] or [batch, R, 2], as in `policy_loss`.
        weighting: [batch], > 0 (0 only without advantage and weight): see `awm_weighting`.
        form: "linear", "huber" or "ghuber".
        old_log_prob: [batch]; None: on-policy.
        weights: [batch] >= 0; they enter the default divisor and the two distances. None: ones.
        reward_weights: [R]; None: ones.
        clip_range: As in `policy_loss`; the public default 1 clips at ratios 0 and 2: off in
            practice. With several updates per rollout, do not have ema_weight = 0 as well.
        divisor: > 0; None: the sum of `weights`.
        kl_weight: >= 0; needs `reference_output` if it is not 0. Published: 1e-4 to 3e-3.
        reference_output: v_ref. With kl_weight = 0 it is only measured.
        ema_weight: >= 0; needs `ema_output` if it is not 0. Published: 1.
        ema_output: v_ema, of a slow average of the policy. With ema_weight = 0 only measured.
        action_box: (start, stop) for each dimension of a latent. None: everything.
        implementation: "auto", "native", "triton" or "reference" (`ops.selected`).

    Returns:
        As `policy_loss`; the metric old_distance is that to `ema_output`.

    Raises:
        ValueError: As `policy_loss`; an unknown form; ema_weight without ema_output.

    Source: Advantage Weighted Matching, arXiv 2509.25050; forms from its public code.
    """
    if form not in _AWM_FORMS:
        raise ValueError(f"form = {form!r}: must be one of {', '.join(map(repr, _AWM_FORMS))}")
    if not 0 <= ema_weight < math.inf:
        raise ValueError(f"ema_weight = {ema_weight}: must be a finite number, at least 0")
    if ema_weight > 0 and ema_output is None:
        raise ValueError(
            f"ema_weight = {ema_weight} without ema_output: pass the averaged model's output, or "
            "ema_weight = 0"
        )
    if weighting.shape != model_output.shape[:1]:
        raise ValueError(
            f"weighting has shape {list(weighting.shape)}: must be {list(model_output.shape[:1])}, "
            "one weight per sample"
        )
    power, factor = _AWM_FORMS[form]
    one, zero = torch.ones_like(weighting), torch.zeros_like(weighting)
    table = torch.stack((one, one, zero, factor * weighting, zero, one, zero, zero), dim=1)
    low, high = clip_bounds(clip_range)
    args = (
        clean_latents, noise, table, advantages, old_log_prob, weights, None, reward_weights,
        reference_output, ema_output, low, high, divisor, kl_weight, action_box, power,
        None if ema_output is None else float(ema_weight),
    )  # fmt: skip
    return clipped_loss(model_output, args, implementation, _AWM_NAMES)
