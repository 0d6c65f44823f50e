"""verl-omni (verl-project/verl-omni): its scheduler's step, and its clipped loss.

One line of the configuration; each worker that resolves the model's adapter then imports this:

    actor_rollout_ref.model.external_lib=dancegrpo_fast.integrations.verl_omni

or in a script `import dancegrpo_fast.integrations.verl_omni`. Importing this module

- patches `FlowMatchSDEDiscreteScheduler.sample_previous_step` (`patching.install`), which `step`
  (rollout) and the training adapters call;
- patches the clipped objective of the losses registered as `flow_grpo` and `dance_grpo`. A loss of
  another name could be registered, but not chosen: `DiffusionLossConfig` has a fixed list of names.

A rollout engine process that does not import the model's adapter keeps verl-omni's step. The ratio
of the first update is then 1 up to rounding; exactly 1 needs the import there too.

Where verl-omni looks timesteps up one by one (a wait for the device each), nothing is read here;
the metrics of the loss are tensors on the device, which verl's `Metric` takes and reads itself.
With noise level 0, where the original's log-prob is NaN, it is 0.

Written against commit a1139baf (2026-08-22), diffusers >= 0.37.1, torch 2.10 in its NPU images.
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
    pair_rows,
    per_sample,
    randn,
    rows,
    step,
    timestep_index,
)
from dancegrpo_fast.integrations.patching import Patch, install

_DYNAMICS = {"sde": "flow", "cps": "cps", "dance_sde": "dance"}


def sample_previous_step(
    self: Any,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor | None = None,
    generator: Generators = None,
    per_token_timesteps: Tensor | None = None,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
    *,
    exact_order: bool = False,
) -> tuple[Any, ...]:
    """`FlowMatchSDEDiscreteScheduler.sample_previous_step`; its signature and results.

    Args:
        self: The scheduler.
        sample: x, [B, ...]. The original insists on float32; here any floating dtype will do.
        model_output: v, the same shape.
        timestep: [B], exact members of `self.timesteps`. None: the scheduler's own step index.
        generator: For x'.
        per_token_timesteps: Not supported by the original either.
        noise_level: A number, or a tensor with one element for each row (requests with different
            SDE windows), for which coefficients are computed anew (`pair_rows`).
        prev_sample: x', or None to draw it.
        sde_type: "sde" (Flow-GRPO), "cps" or "dance_sde".
        return_logprobs: False: None in place of the log-prob.
        return_sqrt_dt: Adds sqrt(-dt), [B].
        include_logprob_normalizer: False drops -log s - log(2 pi) / 2.
        exact_order: The original's order of operations (slow): its bits.

    Returns:
        (x', log_prob [B] or None, mean, std_dev_t) and, if asked for, sqrt(-dt); float32. std_dev_t
        is 0-d without `timestep` and [B, 1, ...] with it. For "sde" it lacks sqrt(-dt); for "cps"
        and "dance_sde" it is the standard deviation of x'.

    Raises:
        ValueError: Unknown sde_type; on the CPU, a timestep that is not in the schedule.
        NotImplementedError: per_token_timesteps.
    """
    if sde_type not in _DYNAMICS:
        raise ValueError(f"sde_type = {sde_type!r}: must be one of {', '.join(_DYNAMICS)}")
    if per_token_timesteps is not None:
        raise NotImplementedError("per_token_timesteps is not supported: pass timestep")
    index = self.step_index if timestep is None else timestep_index(
        self.timesteps, timestep, second=True
    )  # fmt: skip
    if exact_order:
        found = _exact_step(
            self, index, model_output, sample, prev_sample, generator, noise_level, sde_type,
            include_logprob_normalizer,
        )  # fmt: skip
    else:
        row, *more = _coefficients(
            self.sigmas, index, sample, _DYNAMICS[sde_type], noise_level, include_logprob_normalizer
        )
        out = step(
            model_output, sample, row, prev_sample=prev_sample, generator=generator,
            log_prob=return_logprobs, x0=False,
        )  # fmt: skip
        found = (out.prev_sample, out.log_prob, out.mean, *more)
    stored, log_prob, mean, std_dev_t, sqrt_dt = found
    result = stored, (log_prob if return_logprobs else None), mean, std_dev_t
    if return_sqrt_dt:
        return (*result, sqrt_dt.reshape(-1).expand(len(sample)).clone())
    return result


def _coefficients(
    sigmas: Tensor,
    index: int | Tensor,
    sample: Tensor,
    dynamics: str,
    level: float | Tensor,
    normaliser: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [B, 8], std_dev_t as the original has it, sqrt(-dt) with 1 or B elements)."""
    options: Any = {"dynamics": dynamics, "device": sample.device}
    batch = len(sample)
    if isinstance(level, Tensor):
        ends = flow_table(sigmas, **(options | {"dynamics": "ode"}), dtype=torch.float64)
        own = rows(ends, index, batch if isinstance(index, Tensor) else 1)
        sigma, sqrt_dt = -own[:, 7], torch.sqrt(-own[:, 1])
        row = pair_rows(
            sigma, sigma + own[:, 1], level=level, sigma_max=sigmas[1], batch=batch,
            normaliser=normaliser, **options,
        )  # fmt: skip
        std = row[:, 2] / sqrt_dt if dynamics == "flow" else row[:, 2]
        return row, per_sample(std.float(), sample), sqrt_dt.float()
    table = flow_table(sigmas, level=level, normaliser=normaliser, **options)
    noise = noise_table(sigmas, level=level, **options)
    row = rows(table, index, batch)
    at = rows(noise, index, batch)
    std = at[:, 0] if dynamics == "flow" else row[:, 2]
    if isinstance(index, Tensor):
        return row, per_sample(std, sample), at[:, 1]
    return row, std[0].clone(), at[0, 1]  # The table is kept, and callers may write.


def _exact_step(
    self: Any,
    index: int | Tensor,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None,
    generator: Generators,
    level: float | Tensor,
    sde_type: str,
    normaliser: bool,
) -> tuple[Any, ...]:
    """As `sample_previous_step` returns it, with sqrt(-dt), in the original's order."""
    if isinstance(level, Tensor):
        raise ValueError("exact_order = True: noise_level must be a number")
    sigmas = self.sigmas.to(sample.device)
    here, there = sigmas[index], sigmas[index + 1]
    if isinstance(index, Tensor):
        here, there = per_sample(here, sample), per_sample(there, sample)
    args = model_output, sample, here, there
    if sde_type == "sde":
        std_dev_t = exact.flow_rate(here, level, sigmas[1])
        moments = exact.reverse_sde(*args, std_dev_t)
    else:
        cps = sde_type == "cps"
        moments = exact.cps(*args, level) if cps else exact.dance_sde(*args, level, tensor_std=True)
        std_dev_t = torch.as_tensor(moments.std)
    if prev_sample is None:
        prev_sample = exact.draw(moments, randn(model_output, generator))
    if sde_type == "cps":
        log_prob = exact.square_log_prob(prev_sample, moments)
    else:
        log_prob = exact.log_prob(prev_sample, moments, normaliser=normaliser)
    return prev_sample, log_prob, moments.mean, std_dev_t, torch.sqrt(-1 * (there - here))


# ------------------------------------------------------------------ the loss


def compute_loss(
    cls: Any,
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`FlowGRPOLoss.compute_loss`: the clipped objective; its signature and results.

    The caller divides by the accumulation and multiplies by the sequence-parallel size, as before.

    Args:
        cls: The loss class.
        old_log_prob, log_prob, advantages: [B].
        config: `config.diffusion_loss.{adv_clip_max, clip_ratio}` are read.
        rollout_is_weights: [B] >= 0, factors of the rows before the mean.

    Returns:
        The loss, and verl-omni's metrics: 0-d tensors on the device.
    """
    settings = config.diffusion_loss
    limited = advantages.clamp(-settings.adv_clip_max, settings.adv_clip_max)
    if rollout_is_weights is not None:  # >= 0: a factor of the advantage is one of the objective.
        limited = limited * rollout_is_weights.detach()
    difference = log_prob - old_log_prob
    ratio = torch.exp(difference)
    loss = clipped_surrogate(ratio, limited, settings.clip_ratio)
    with torch.no_grad():
        above = ratio - 1.0 > settings.clip_ratio
        below = 1.0 - ratio > settings.clip_ratio
        columns = torch.stack((-difference, ratio, above.to(ratio.dtype), below.to(ratio.dtype)))
        kl, mean, high, low = columns.mean(1).unbind()
        # torch.std reads a value back on the CPU.
        deviation = torch.linalg.vector_norm(ratio - mean) / (len(ratio) - 1) ** 0.5
    return loss, {
        "actor/ppo_kl": kl,
        "actor/pg_clipfrac": high + low,
        "actor/pg_clipfrac_higher": high,
        "actor/pg_clipfrac_lower": low,
        "actor/ratio_mean": mean,
        "actor/ratio_std": deviation,
    }


_compute_loss: Any = classmethod(compute_loss)
PATCHES = (
    Patch(
        "verl_omni.pipelines.schedulers.flow_match_sde",
        "FlowMatchSDEDiscreteScheduler.sample_previous_step",
        sample_previous_step,
    ),
    Patch(
        "verl_omni.trainer.diffusion.diffusion_algos", "FlowGRPOLoss.compute_loss", _compute_loss
    ),
)
install(PATCHES)
