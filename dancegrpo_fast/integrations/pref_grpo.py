"""Pref-GRPO (CodeGoat24/Pref-GRPO): `flow_grpo_step`, `dance_grpo_step` and `compute_kl_loss`.

One line, above the imports of `fastvideo.grpo` in `train_*.py`:

    import dancegrpo_fast.integrations.pref_grpo

Importing this module patches `fastvideo.grpo.steps` and `fastvideo.grpo.kl`, now or as soon as they
are imported (`patching.install`). `python -m dancegrpo_fast.integrations.run SCRIPT` does the same
with no edit, and replaces the KL that `train_wan21.py` and `train_wan22.py` define themselves.

Differences that can be seen: noise is float32, not of the dtype of the prediction; products with a
0-d sigma are float32 though the prediction is bf16 (`exact_order=True` has the original's); where
the noise is 0 and the original's log-prob infinite or NaN, it is 0.

Written against commit 3e787f6d (2026-02-10; torch 2.5.0). No code of it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    Generators,
    flow_table,
    noise_table,
    per_sample,
    randn,
    rows,
    step,
)
from dancegrpo_fast.integrations.patching import Patch, install
from dancegrpo_fast.ops import transition_log_prob, transition_mean, x0_estimate

__all__ = ["PATCHES", "compute_kl_loss", "dance_grpo_step", "flow_grpo_step"]


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Generators = None,
    return_stats: bool = False,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, ...]:
    """One step of Flow-GRPO's sampler; the host's signature and results.

    The original waits for the device for `sigmas[1].item()` in each step; this never does.

    Args:
        model_output: v, [B, ...], any floating dtype.
        latents: x, the same shape, float32.
        eta: Noise level a.
        sigmas: [T + 1], on any device.
        index: i: a number, 0-d, or [B], one step per row (which the original cannot).
        prev_sample: x', or None to draw it.
        generator: For x'.
        return_stats: Six results instead of three.
        exact_order: The original's order of operations in plain torch (slow): its bits, also those
            of the noise. Not for [B] indices.

    Returns:
        (x', x0 estimate, log_prob [B]) and, if asked for, (mean, noise_scale, dt): noise_scale is
        the std with sqrt(-dt), dt = sigma' - sigma is below 0; both 0-d, [B, 1, ...] for [B].

    Raises:
        ValueError: Arguments out of range.

    Source: Flow-GRPO, arXiv 2505.05470, equation 9.
    """
    if exact_order:
        here, there = exact.sigma_pair(sigmas, index, model_output)
        rate = exact.flow_rate(here, eta, sigmas[1].item())
        moments = exact.reverse_sde(model_output, latents, here, there, rate)
        if prev_sample is None:
            noise = randn(model_output, generator, dtype=model_output.dtype)
            prev_sample = exact.draw(moments, noise)
        log_prob = exact.log_prob(prev_sample, moments)
        return _exact(prev_sample, log_prob, moments, there - here, return_stats)
    args = (model_output, latents, eta, sigmas, index, prev_sample)
    return _step(*args, dynamics="flow", return_stats=return_stats, generator=generator)


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    return_stats: bool = False,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, ...]:
    """One step of DanceGRPO's sampler; the host's signature and results.

    Args:
        model_output, latents, sigmas, index, prev_sample: As in `flow_grpo_step`.
        eta: Noise level.
        grpo: False: no noise and no log-prob.
        sde_solver: False: Euler's step of the ODE as the mean, with the same noise.
        return_stats, exact_order: As in `flow_grpo_step`.

    Returns:
        As `flow_grpo_step`, but the last is sigma - sigma', above 0 (the host's convention: the
        signs of the two differ). Without grpo (mean, x0 estimate).

    Raises:
        ValueError: Arguments out of range.

    Source: DanceGRPO, arXiv 2505.07818.
    """
    dynamics = "dance" if sde_solver else "euler_noise"
    if exact_order:
        here, there = exact.sigma_pair(sigmas, index)
        moments = exact.dance_sde(model_output, latents, here, there, eta, sde_solver=sde_solver)
        if not grpo:
            return moments.mean, moments.x0
        if prev_sample is None:
            prev_sample = exact.draw(moments, torch.randn_like(moments.mean))
        wide = moments._replace(mean=moments.mean.float())
        log_prob = exact.log_prob(prev_sample.float(), wide)
        return _exact(prev_sample, log_prob, moments, here - there, return_stats)
    if not grpo:
        table = flow_table(sigmas, dynamics=dynamics, level=eta, device=latents.device)
        row = rows(table, index, len(latents))
        return transition_mean(model_output, latents, row), x0_estimate(model_output, latents, row)
    args = (model_output, latents, eta, sigmas, index, prev_sample)
    return _step(*args, dynamics=dynamics, return_stats=return_stats)


def compute_kl_loss(
    prev_sample_mean: Tensor, prev_sample_mean_ref: Tensor, noise_scale_ref: Tensor
) -> Tensor:
    """KL to the reference policy: mean_b mean((mean - mean_ref)^2) / (2 noise_scale^2).

    One fused pass over the latents, and one for the gradient.

    Args:
        prev_sample_mean: [B, ...], the only input that is differentiated.
        prev_sample_mean_ref: The same shape, without a gradient.
        noise_scale_ref: Std of the step with sqrt(-dt): 0-d, or B values in any shape.

    Returns:
        Scalar, the mean over the rows of this call; 2 noise_scale^2 is at least 1e-20, as there.

    Raises:
        ValueError: Shapes that do not fit; a reference that requires a gradient.
    """
    scale = noise_scale_ref.detach().reshape(-1)
    scale = scale.to(prev_sample_mean.device, torch.float32, non_blocking=True)
    weight = 1.0 / (2.0 * scale * scale).clamp(min=1e-20)
    # -log_prob of "x' = mean_ref" with a = 0, b = 1, c = 0: w mean((mean_ref - mean)^2).
    table = weight.new_zeros(len(prev_sample_mean), 8)
    table[:, 1] = 1.0
    table[:, 3] = weight
    reference = prev_sample_mean_ref
    return -transition_log_prob(prev_sample_mean, reference, reference, table).mean()


def _step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    *,
    dynamics: str,
    return_stats: bool,
    generator: Generators = None,
) -> tuple[Tensor, ...]:
    options: Any = {"dynamics": dynamics, "level": eta, "device": latents.device}
    row = rows(flow_table(sigmas, **options), index, len(latents))
    out = step(
        model_output, latents, row, prev_sample=prev_sample, generator=generator,
        mean=return_stats,
    )  # fmt: skip
    assert out.x0 is not None and out.log_prob is not None
    found = out.prev_sample, out.x0, out.log_prob
    if not return_stats:
        return found
    assert out.mean is not None
    noise = rows(noise_table(sigmas, **options), index, len(latents))
    stats = row[:, 2], noise[:, 2] if dynamics == "flow" else -noise[:, 2]
    if isinstance(index, Tensor) and index.dim() > 0:
        return (*found, out.mean, *(per_sample(column, latents) for column in stats))
    return (*found, out.mean, *(column[0] for column in stats))


def _exact(
    prev_sample: Tensor,
    log_prob: Tensor,
    moments: exact.Moments,
    dt: Tensor,
    return_stats: bool,
) -> tuple[Tensor, ...]:
    found = prev_sample, moments.x0, log_prob
    if not return_stats:
        return found
    return *found, moments.mean, torch.as_tensor(moments.std, device=log_prob.device), dt


PATCHES = (
    Patch("fastvideo.grpo.steps", "flow_grpo_step", flow_grpo_step),
    Patch("fastvideo.grpo.steps", "dance_grpo_step", dance_grpo_step),
    Patch("fastvideo.grpo.kl", "compute_kl_loss", compute_kl_loss),
    Patch(None, "compute_kl_loss", compute_kl_loss),
)
install(PATCHES)
