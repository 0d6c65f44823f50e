"""MixGRPO (Tencent-Hunyuan/MixGRPO): `flow_grpo_step` and `dance_grpo_step`.

One line, above the script's import of `fastvideo.utils.sampling_utils` in `train_grpo_flux.py`:

    import dancegrpo_fast.integrations.mixgrpo

Importing this module patches `fastvideo.utils.sampling_utils`, now or as soon as it is imported
(`patching.install`): `run_sample_step` looks the steps up there, and the script takes them by name.
`python -m dancegrpo_fast.integrations.run SCRIPT` does the same with no edit. `dpm_step`, for the
Flash variants, is left alone: it has no `prev_sample`, so what it returns in training is the
log-prob of a new draw.

Differences that can be seen: noise is float32, not of the dtype of the prediction; a deterministic
step draws none; products with a 0-d sigma are float32 though the prediction is bf16
(`exact_order=True` has the original's); where the noise is 0 and the original's log-prob infinite
or NaN, it is 0.

Written against commit e5cdd6a4 (2025-08-08; torch 2.5.0). No code of it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    Generators,
    flow_table,
    per_sample,
    randn,
    rows,
    step,
)
from dancegrpo_fast.integrations.patching import Patch, install
from dancegrpo_fast.ops import transition_mean, x0_estimate

__all__ = ["PATCHES", "dance_grpo_step", "flow_grpo_step"]


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Generators = None,
    determistic: bool = False,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of Flow-GRPO's sampler; the host's signature, spelling and results.

    The original waits for the device for `sigmas[1].item()` in each step; this never does.

    Args:
        model_output: v, [B, ...], any floating dtype.
        latents: x, the same shape, float32.
        eta: Noise level a.
        sigmas: [T + 1], on any device.
        index: i: a number, 0-d, or [B], one step per row (which the original cannot).
        prev_sample: x', or None to draw it.
        generator: For x'.
        determistic: x' is Euler's step of the ODE, even if `prev_sample` is given; its log-prob is
            still that under the SDE.
        exact_order: The original's order of operations in plain torch (slow): its bits, also those
            of the noise. Not for [B] indices.

    Returns:
        (x', x0 estimate, log_prob [B], mean, std with sqrt(-dt): 0-d, or [B, 1, ...] for [B]).

    Raises:
        ValueError: Both prev_sample and generator; arguments out of range.

    Source: Flow-GRPO, arXiv 2505.05470, equation 9; MixGRPO, arXiv 2507.21802.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator and prev_sample are both given: pass one of them")
    if exact_order:
        here, there = exact.sigma_pair(sigmas, index, model_output)
        rate = exact.flow_rate(here, eta, sigmas[1].item())
        moments = exact.reverse_sde(model_output, latents, here, there, rate)
        if prev_sample is None:
            noise = randn(model_output, generator, dtype=model_output.dtype)
            prev_sample = exact.draw(moments, noise)
        if determistic:
            prev_sample = latents + (there - here) * model_output
        log_prob = exact.log_prob(prev_sample, moments)
        assert isinstance(moments.std, Tensor)
        return prev_sample, moments.x0, log_prob, moments.mean, moments.std
    row = _rows(sigmas, index, latents, "flow", eta)
    if determistic:
        prev_sample = transition_mean(model_output, latents, _rows(sigmas, index, latents, "ode"))
    out = step(model_output, latents, row, prev_sample=prev_sample, generator=generator)
    assert out.x0 is not None and out.log_prob is not None and out.mean is not None
    per_row = isinstance(index, Tensor) and index.dim() > 0
    std = per_sample(row[:, 2], latents) if per_row else row[0, 2]
    return out.prev_sample, out.x0, out.log_prob, out.mean, std


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, ...]:
    """One step of DanceGRPO's sampler as MixGRPO has it; the host's signature and results.

    Unlike DanceGRPO's own, a step without the SDE solver draws no noise, and the log-prob lacks its
    normaliser: it is -mean((x' - mean)^2) / (2 s^2).

    Args:
        model_output, latents, sigmas, index, prev_sample: As in `flow_grpo_step`.
        eta: Noise level.
        grpo: False: no noise and no log-prob.
        sde_solver: False: Euler's step of the ODE as the mean, and as x' unless that is given.
        exact_order: As in `flow_grpo_step`.

    Returns:
        (x', x0 estimate, log_prob [B]), or without grpo (mean, x0 estimate).

    Raises:
        ValueError: Arguments out of range.

    Source: DanceGRPO, arXiv 2505.07818.
    """
    if exact_order:
        return _exact_dance_step(
            model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver
        )
    still = grpo and prev_sample is None and not sde_solver
    dynamics = "ode" if still else "dance" if sde_solver else "euler_noise"
    row = _rows(sigmas, index, latents, dynamics, 0.0 if still else eta)
    if not grpo:
        args = (model_output, latents, row)
        return transition_mean(*args), x0_estimate(*args)
    out = step(
        model_output, latents, row, prev_sample=prev_sample, deterministic=still, mean=False
    )
    assert out.x0 is not None and out.log_prob is not None
    return out.prev_sample, out.x0, out.log_prob


def _exact_dance_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    here, there = exact.sigma_pair(sigmas, index)
    moments = exact.dance_sde(model_output, latents, here, there, eta, sde_solver=sde_solver)
    if not grpo:
        return moments.mean, moments.x0
    if prev_sample is None:
        prev_sample = moments.mean
        if sde_solver:
            prev_sample = exact.draw(moments, torch.randn_like(prev_sample))
    wide = moments._replace(mean=moments.mean.float())
    log_prob = exact.log_prob(prev_sample.float(), wide, normaliser=False)
    return prev_sample, moments.x0, log_prob


def _rows(
    sigmas: Tensor, index: int | Tensor, latents: Tensor, dynamics: str, level: float = 0.0
) -> Tensor:
    """[B, 8]; MixGRPO's Dance log-prob has no normaliser."""
    table = flow_table(
        sigmas, dynamics=dynamics, level=level, normaliser=dynamics == "flow",
        device=latents.device,
    )  # fmt: skip
    return rows(table, index, len(latents))


_MODULE = "fastvideo.utils.sampling_utils"
PATCHES = (
    Patch(_MODULE, "flow_grpo_step", flow_grpo_step),
    Patch(_MODULE, "dance_grpo_step", dance_grpo_step),
)
install(PATCHES)
