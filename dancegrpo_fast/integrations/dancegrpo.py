"""DanceGRPO (XueZeyue/DanceGRPO): `flux_step`, `ddim_step_with_logprob` and its inline losses.

Each `fastvideo/train_grpo_*.py` defines its own `flux_step` and runs as `__main__`. One line, just
above `if __name__ == "__main__":`, rebinds it for rollout and training:

    from dancegrpo_fast.integrations.dancegrpo import flux_step

`train_grpo_sd.py` and its pipeline import `ddim_step_with_logprob` by name; its line, anywhere at
the top, is

    from dancegrpo_fast.integrations import dancegrpo; dancegrpo.install(dancegrpo.PATCHES)

or, with no edit, `torchrun ... -m dancegrpo_fast.integrations.run fastvideo/train_grpo_flux.py ...`
for any of them. The losses replace the lines from `advantages = torch.clamp(` to `loss = ...`;
`fused_loss` replaces these and the call of `flux_step` in `grpo_one_step`.

Written against commit 15cc71d5 (2025-10-16; torch 2.5.0).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    Generators,
    clipped_loss,
    ddim_table,
    flow_table,
    randn,
    rows,
    step,
)
from dancegrpo_fast.integrations.diffusers import check_affine
from dancegrpo_fast.integrations.patching import Patch, install
from dancegrpo_fast.ops import PolicyLoss, policy_loss, transition_mean, x0_estimate

__all__ = [
    "PATCHES",
    "ScriptLoss",
    "ddim_step_with_logprob",
    "flux_step",
    "fused_loss",
    "grpo_loss",
    "install",
    "video_grpo_loss",
]


def flux_step(
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
    """One step of DanceGRPO's sampler; the script's signature and results.

    The script waits for the device at each step if `index` lies there, and computes in bf16 what a
    0-d sigma is multiplied with; this does neither. `index` may also be [B], one step per row.

    Args:
        model_output: v, [B, ...]: [B, L, 64] packed, or [B, C, F, H, W].
        latents: x, the same shape.
        eta: Noise level, > 0 with grpo.
        sigmas: [T + 1].
        index: i: a number, 0-d or [B].
        prev_sample: x', or None to draw it with torch's own generator.
        grpo: False: no noise and no log-prob.
        sde_solver: False: Euler's step as the mean.
        exact_order: The script's own order of operations (slow): its bits.

    Returns:
        (x', x0 estimate, log_prob [B]), or without grpo (mean, x0 estimate); float32.

    Raises:
        ValueError: As `common.step`.
    """
    if exact_order:
        return _exact_flux_step(
            model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver
        )
    dynamics = "dance" if sde_solver else "euler_noise"
    table = flow_table(sigmas, dynamics=dynamics, level=eta, device=latents.device)
    row = rows(table, index, len(latents))
    if not grpo:
        args = (model_output, latents, row)
        return transition_mean(*args), x0_estimate(*args)
    out = step(model_output, latents, row, prev_sample=prev_sample, mean=False)
    assert out.log_prob is not None and out.x0 is not None
    return out.prev_sample, out.x0, out.log_prob


def _exact_flux_step(
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
        prev_sample = exact.draw(moments, torch.randn_like(moments.mean))
    wide = moments._replace(mean=moments.mean.float())
    return prev_sample, moments.x0, exact.log_prob(prev_sample.float(), wide)


def ddim_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators = None,
    prev_sample: Tensor | None = None,
    *,
    exact_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """DDPO's DDIM step as DanceGRPO has it for Stable Diffusion; its signature and results.

    The last step goes to timestep 0, where the noise is not zero yet. With eta = 0, where the
    original gives NaN, the log-prob is 0. A drawn x' is rounded to the dtype of `sample` before its
    log-prob is taken; noise is float32, where the original draws in the dtype of the prediction.

    Args:
        self: A `DDIMScheduler` after `set_timesteps`.
        model_output: [B, ...], as the scheduler's prediction_type says.
        timestep: Training timesteps: a number, 0-d or [B].
        sample: x, the same shape.
        eta: 0 to 1.
        use_clipped_model_output: Changes nothing but the bits of exact_order, for clipping is
            refused.
        generator: For x'.
        prev_sample: x', or None to draw it.
        exact_order: The original's order of operations (slow): its bits.

    Returns:
        (x' in the dtype of `sample`, log_prob [B] float32).

    Raises:
        ValueError: Both generator and prev_sample; a scheduler that clips its x0 estimate, whose
            step is not affine; no set_timesteps yet.
    """
    check_affine(self)
    if generator is not None and prev_sample is not None:
        raise ValueError("generator and prev_sample are both given: pass one of them")
    stride = self.config.num_train_timesteps // self.num_inference_steps
    prediction = self.config.prediction_type
    if exact_order:
        here, there = exact.alpha_pair(self.alphas_cumprod, timestep, stride, sample)
        moments = exact.ddim(
            model_output, sample, here, there, eta, prediction, from_x0=use_clipped_model_output
        )
        if prev_sample is None:
            noise = randn(model_output, generator, dtype=model_output.dtype)
            prev_sample = exact.draw(moments, noise)
        return prev_sample.to(sample.dtype), exact.log_prob(prev_sample, moments)
    table = ddim_table(
        self.alphas_cumprod, stride=stride, eta=eta, prediction=prediction, device=sample.device
    )
    row = rows(table, timestep, len(sample))
    out = step(
        model_output, sample, row, prev_sample=prev_sample, generator=generator, mean=False,
        x0=False, latent_dtype=sample.dtype,
    )  # fmt: skip
    assert out.log_prob is not None
    return out.prev_sample.to(sample.dtype), out.log_prob


class ScriptLoss(NamedTuple):
    """What the two losses return.

    Attributes:
        loss: Scalar, to be differentiated.
        ratio: [B], detached.
        per_reward: The loss of each reward before its coefficient, detached.
    """

    loss: Tensor
    ratio: Tensor
    per_reward: tuple[Tensor, ...]


def grpo_loss(
    new_log_probs: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
    gradient_accumulation_steps: int,
    train_timesteps: int,
) -> ScriptLoss:
    """The clipped loss that the image scripts have inline in `train_one_step`.

    Args:
        new_log_probs: [B], of `grpo_one_step`.
        log_probs: [B], `sample["log_probs"][:, _]`.
        advantages: [B], `sample["advantages"]`.
        clip_range, adv_clip_max, gradient_accumulation_steps, train_timesteps: The script's.
    """
    scale = 1.0 / (gradient_accumulation_steps * train_timesteps)
    loss, ratio = clipped_loss(
        new_log_probs, log_probs, advantages, clip_range,
        advantage_clip=adv_clip_max, loss_scale=scale,
    )  # fmt: skip
    return ScriptLoss(loss, ratio, (loss.detach(),))


def video_grpo_loss(
    new_log_probs: Tensor,
    log_probs: Tensor,
    vq_advantages: Tensor,
    mq_advantages: Tensor,
    *,
    vq_coef: float,
    mq_coef: float,
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
    gradient_accumulation_steps: int,
    train_timesteps: int,
) -> ScriptLoss:
    """HunyuanVideo's loss: visual and motion quality clipped separately, then added.

    Arguments as `grpo_loss`, with the advantages of the two rewards and their coefficients.
    `per_reward` is (vq_loss, mq_loss).
    """
    scale = 1.0 / (gradient_accumulation_steps * train_timesteps)
    vq, mq = (
        clipped_loss(
            new_log_probs, log_probs, advantages, clip_range,
            advantage_clip=adv_clip_max, loss_scale=scale,
        )
        for advantages in (vq_advantages, mq_advantages)
    )  # fmt: skip
    loss = vq_coef * vq.loss + mq_coef * mq.loss
    return ScriptLoss(loss, vq.ratio, (vq.loss.detach(), mq.loss.detach()))


def fused_loss(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
    gradient_accumulation_steps: int,
    train_timesteps: int,
    reward_weights: Tensor | None = None,
) -> PolicyLoss:
    """`flux_step` and the clipped loss in one fused pass over the model output.

    Args:
        model_output, latents, eta, sigmas, index, prev_sample: As `flux_step`.
        log_probs: [B], of the rollout.
        advantages: [B], or [B, R] for rewards that are clipped separately.
        clip_range, adv_clip_max, gradient_accumulation_steps, train_timesteps: The script's.
        reward_weights: [R], `torch.tensor([vq_coef, mq_coef])`. None: ones.

    Returns:
        Loss, log-probs and metrics (`ops.POLICY_METRICS`).
    """
    table = flow_table(sigmas, dynamics="dance", level=eta, device=latents.device)
    return policy_loss(
        model_output, latents, prev_sample, rows(table, index, len(latents)),
        advantages.clamp(-adv_clip_max, adv_clip_max),
        old_log_prob=log_probs, clip_range=clip_range, reward_weights=reward_weights,
        divisor=len(latents) * gradient_accumulation_steps * train_timesteps,
    )  # fmt: skip


PATCHES = (
    Patch(None, "flux_step", flux_step),
    Patch(
        "fastvideo.models.stable_diffusion.ddim_with_logprob",
        "ddim_step_with_logprob",
        ddim_step_with_logprob,
    ),
)
