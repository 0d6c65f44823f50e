"""Flow-GRPO (yifan123/flow_grpo): both `sde_step_with_logprob`, the KL and GRPO-Guard's ratio.

One line, among the first imports of `scripts/train_*.py`:

    import dancegrpo_fast.integrations.flow_grpo

Importing this module patches `flow_grpo.diffusers_patch.sd3_sde_with_logprob` (SD3, FLUX, Kontext,
Qwen-Image) and `flow_grpo.diffusers_patch.wan_pipeline_with_logprob`: now if they are imported,
else as soon as they are (`patching.install`; it says so on stderr). Bagel has a step of its own,
which is left alone. `python -m dancegrpo_fast.integrations.run SCRIPT` does the same with no edit.

What is returned is what the scripts expect: `std_dev_t` without sqrt(-dt) for SD3 and with it for
Wan. With noise level 0, where the original's log-prob is NaN, it is 0 here.

Written against commits 54809b5f (SD3) and of the Wan pipeline that has `return_dt_and_std_dev_t`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    Generators,
    clipped_surrogate,
    flow_table,
    noise_table,
    per_sample,
    randn,
    rows,
    step,
    timestep_index,
)
from dancegrpo_fast.integrations.patching import Patch, install
from dancegrpo_fast.ops import PolicyLoss, policy_loss, transition_mean

__all__ = [
    "PATCHES",
    "fused_loss",
    "guard_loss",
    "guard_ratio",
    "kl_loss",
    "sde_step_with_logprob",
    "wan_sde_step_with_logprob",
]

_DYNAMICS = {"sde": "flow", "cps": "cps"}


def _dynamics(sde_type: str) -> str:
    if sde_type not in _DYNAMICS:
        raise ValueError(f"sde_type = {sde_type!r}: must be 'sde' or 'cps'")
    return _DYNAMICS[sde_type]


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, ...]:
    """The step of `sd3_sde_with_logprob.py`; its signature and results.

    The original waits for the device once per row to look up its timestep and once for
    `sigmas[1].item()`; this never does.

    Args:
        self: A `FlowMatchEulerDiscreteScheduler` after `set_timesteps`.
        model_output: v, [B, ...], any floating dtype.
        timestep: [B] or [1], exact members of `self.timesteps`.
        sample: x, [B, ...].
        noise_level: a.
        prev_sample: x', or None to draw it.
        generator: For x'.
        sde_type: "sde" or "cps".
        return_sqrt_dt: Adds sqrt(-dt).
        exact_order: The original's order of operations (slow): its bits.

    Returns:
        (x' [B, ...], log_prob [B], mean [B, ...], std_dev_t [len(timestep), 1, ...]) and, if asked
        for, sqrt(-dt) like std_dev_t; float32. For "sde" std_dev_t lacks sqrt(-dt).

    Raises:
        ValueError: Unknown sde_type; on the CPU, a timestep that is not in the schedule.
    """
    dynamics = _dynamics(sde_type)
    index = timestep_index(self.timesteps, timestep, second=True)
    prev_sample = None if prev_sample is None else prev_sample.float()
    options: Any = {"dynamics": dynamics, "level": noise_level, "device": sample.device}
    if exact_order:
        here, there = _sigmas(self, index, sample)
        v, x = model_output.float(), sample.float()
        if sde_type == "cps":
            moments = exact.cps(v, x, here, there, noise_level)
            std_dev_t = torch.as_tensor(moments.std)
        else:
            std_dev_t = exact.flow_rate(here, noise_level, self.sigmas[1].item())
            moments = exact.reverse_sde(v, x, here, there, std_dev_t)
        log_prob_of = exact.square_log_prob if sde_type == "cps" else exact.log_prob
        if prev_sample is None:
            prev_sample = exact.draw(moments, randn(v, generator))
        log_prob = log_prob_of(prev_sample, moments)
        more = (torch.sqrt(-1 * (there - here)),) if return_sqrt_dt else ()
        return (prev_sample, log_prob, moments.mean, std_dev_t, *more)
    row = rows(flow_table(self.sigmas, **options), index, len(sample))
    out = step(
        model_output, sample, row, prev_sample=prev_sample, generator=generator, x0=False
    )
    assert out.log_prob is not None and out.mean is not None
    noise = noise_table(self.sigmas, **options).index_select(0, _flat(index, sample))
    more = (per_sample(noise[:, 1], sample),) if return_sqrt_dt else ()
    return (out.prev_sample, out.log_prob, out.mean, per_sample(noise[:, 0], sample), *more)


def wan_sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    determistic: bool = False,
    return_pixel_log_prob: bool = False,
    return_dt_and_std_dev_t: bool = False,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, ...]:
    """The step of `wan_pipeline_with_logprob.py`; its signature and results.

    Args:
        self: The pipeline's `UniPCMultistepScheduler`, of which only the schedule is used.
        model_output: v, [B, C, F, H, W].
        timestep: [B] or [1], exact members of `self.timesteps`.
        sample: x, the same shape.
        prev_sample: x', or None to draw it.
        generator: For x'.
        determistic: x' is Euler's step of the ODE (its log-prob is still that of the SDE); nothing
            is drawn, where the original draws and drops.
        return_pixel_log_prob: The original ignores it; refused.
        return_dt_and_std_dev_t: Five results instead of four.
        exact_order: The original's order of operations (slow): its bits.

    Returns:
        (x', log_prob [B], mean, std [len(timestep), 1, 1, 1, 1] with sqrt(-dt)), or (x', log_prob,
        mean, std without sqrt(-dt), sqrt(-dt)); float32.

    Raises:
        ValueError: generator with prev_sample; return_pixel_log_prob; on the CPU, a timestep that
            is not in the schedule.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("generator and prev_sample are both given: pass one of them")
    if return_pixel_log_prob:
        raise ValueError("return_pixel_log_prob = True: there is only the mean over pixels here")
    index = timestep_index(self.timesteps, timestep, second=True)
    prev_sample = None if prev_sample is None else prev_sample.float()
    flat = _flat(index, sample)
    if exact_order:
        here, there = _sigmas(self, index, sample)
        v, x = model_output.float(), sample.float()
        rate = exact.wan_rate(here, self.sigmas[-1].item(), self.sigmas[1].item())
        moments = exact.reverse_sde(v, x, here, there, rate)
        if determistic:
            prev_sample = x + (there - here) * v
        elif prev_sample is None:
            prev_sample = exact.draw(moments, randn(v, generator))
        found = prev_sample, exact.log_prob(prev_sample, moments), moments.mean
        sqrt_dt = torch.sqrt(-1 * (there - here))
        return (*found, rate, sqrt_dt) if return_dt_and_std_dev_t else (*found, rate * sqrt_dt)
    options: Any = {"level": 1.0, "device": sample.device}
    if determistic:
        ode = flow_table(self.sigmas, dynamics="ode", device=sample.device)
        prev_sample = transition_mean(model_output, sample, rows(ode, index, len(sample)))
    table = flow_table(self.sigmas, dynamics="flow_wan", **options)
    out = step(
        model_output, sample, rows(table, index, len(sample)),
        prev_sample=prev_sample, generator=generator, x0=False,
    )  # fmt: skip
    assert out.log_prob is not None and out.mean is not None
    found = out.prev_sample, out.log_prob, out.mean
    if not return_dt_and_std_dev_t:
        return (*found, per_sample(table.index_select(0, flat)[:, 2], sample))
    noise = noise_table(self.sigmas, dynamics="flow_wan", **options).index_select(0, flat)
    return (*found, per_sample(noise[:, 0], sample), per_sample(noise[:, 1], sample))


def _flat(index: Tensor, sample: Tensor) -> Tensor:
    return index.reshape(-1).to(sample.device, non_blocking=True)


def _sigmas(scheduler: Any, index: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """sigma and sigma' of the rows, broadcasting over a latent."""
    sigmas, flat = scheduler.sigmas.to(sample.device), _flat(index, sample)
    return per_sample(sigmas[flat], sample), per_sample(sigmas[flat + 1], sample)


# ------------------------------------------------------------------ losses of the scripts


def kl_loss(
    prev_sample_mean: Tensor,
    prev_sample_mean_ref: Tensor,
    std_dev_t: Tensor,
    *,
    epsilon: float = 0.0,
) -> Tensor:
    """The scripts' KL: mean over the batch of mean((mu - mu_ref)^2) / (2 std_dev_t^2 + epsilon).

    With SD3's std_dev_t, which lacks sqrt(-dt), it is the Gaussian's KL times -dt; with Wan's it is
    the KL. `beta` is tuned for one of the two.

    Args:
        prev_sample_mean, prev_sample_mean_ref: [B, ...].
        std_dev_t: As the step returned it.
        epsilon: 1e-7 in the GRPO-Guard scripts.
    """
    difference = prev_sample_mean - prev_sample_mean_ref
    squares = (difference * difference).flatten(1).mean(1)
    return (squares / (2 * std_dev_t.reshape(-1) ** 2 + epsilon)).mean()


def guard_ratio(
    log_prob: Tensor,
    old_log_prob: Tensor,
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
) -> Tensor:
    """GRPO-Guard's normalised ratio, [B]: its mean is 1 whatever the step.

    exp((log_prob - old + mean((mu - mu_old)^2) / (2 s^2)) s) with s = std_dev_t sqrt(-dt) of each
    row; the scripts take the batch's mean of s, which is the same where a batch shares its step.

    Args:
        log_prob, old_log_prob: [B].
        prev_sample_mean, old_prev_sample_mean: [B, ...].
        std_dev_t, sqrt_dt: As SD3's step returned them.

    Source: GRPO-Guard, arXiv 2510.22319.
    """
    s = (std_dev_t * sqrt_dt).reshape(-1)
    difference = prev_sample_mean - old_prev_sample_mean
    bias = (difference * difference).flatten(1).mean(1) / (2 * s * s)
    return torch.exp((log_prob - old_log_prob + bias) * s)


def guard_loss(
    ratio: Tensor,
    advantages: Tensor,
    sqrt_dt: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float = 5.0,
) -> Tensor:
    """GRPO-Guard's policy loss: the clipped objective of its ratio divided by -dt, row by row.

    Args:
        ratio: [B], of `guard_ratio`.
        advantages: [B].
        sqrt_dt: As the step returned it.
        clip_range, adv_clip_max: `config.train`'s.
    """
    limited = advantages.clamp(-adv_clip_max, adv_clip_max) / sqrt_dt.reshape(-1) ** 2
    return clipped_surrogate(ratio, limited, clip_range)


def fused_loss(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    noise_level: float = 0.7,
    sde_type: str = "sde",
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
    beta: float = 0.0,
    reference_output: Tensor | None = None,
) -> PolicyLoss:
    """SD3's step, the clipped loss and the KL in one fused pass over the model output.

    For a script that is edited: it replaces `compute_log_prob`'s step and the loss lines. The KL is
    that of `kl_loss` with SD3's std_dev_t, from the reference's velocity instead of its mean.

    Args:
        self, model_output, timestep, sample, prev_sample, noise_level, sde_type: As
            `sde_step_with_logprob`.
        old_log_prob, advantages: [B].
        clip_range, adv_clip_max, beta: `config.train`'s.
        reference_output: v_ref, [B, ...]; needed if beta is not 0.

    Returns:
        Loss (mean over the batch), log-probs and metrics (`ops.POLICY_METRICS`).
    """
    index = timestep_index(self.timesteps, timestep, second=True)
    options: Any = {
        "dynamics": _dynamics(sde_type), "level": noise_level, "device": sample.device
    }  # fmt: skip
    row = rows(flow_table(self.sigmas, **options), index, len(sample))
    if beta:
        rate = rows(noise_table(self.sigmas, **options), index, len(sample))[:, 0]
        a, b, s, w, c, _, p, q = row.unbind(1)
        row = torch.stack((a, b, s, w, c, b * b / (2 * rate * rate), p, q), dim=1)
    return policy_loss(
        model_output, sample, prev_sample, row, advantages.clamp(-adv_clip_max, adv_clip_max),
        old_log_prob=old_log_prob, clip_range=clip_range, kl_weight=beta,
        reference_output=reference_output, divisor=len(sample),
    )  # fmt: skip


PATCHES = (
    Patch(
        "flow_grpo.diffusers_patch.sd3_sde_with_logprob",
        "sde_step_with_logprob",
        sde_step_with_logprob,
    ),
    Patch(
        "flow_grpo.diffusers_patch.wan_pipeline_with_logprob",
        "sde_step_with_logprob",
        wan_sde_step_with_logprob,
    ),
)
install(PATCHES)
