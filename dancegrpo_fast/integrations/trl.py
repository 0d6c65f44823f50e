"""TRL (huggingface/trl) of before 2025-09-15, when its DDPO trainer was removed: `scheduler_step`.

One line, before `from trl import DDPOTrainer`:

    import dancegrpo_fast.integrations.trl

Importing this module patches `trl.models.modeling_sd_base.scheduler_step` (`patching.install`),
which the rollout (`pipeline_step`), the loss (`DDPOTrainer.calculate_loss`) and AlignProp
(`pipeline_step_with_grad`) look up at each call.

What is other than in the original: the timesteps are not copied to the CPU, for which the original
waits six times a step; a drawn x' is rounded to the dtype of `sample` before its log-prob is taken,
so the ratio of the first update is exactly 1 in half precision too; with eta = 0 the log-prob is 0
instead of NaN; noise is drawn in float32. `exact_order=True` has the original's bits.

Written against commit bc13ae6d (2025; it names no torch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import Generators, ddim_table, randn, rows, step
from dancegrpo_fast.integrations.diffusers import check_affine
from dancegrpo_fast.integrations.patching import Patch, install


@dataclass
class DDPOSchedulerOutput:
    """TRL's result under TRL's names.

    Attributes:
        latents: x', [B, ...] in the dtype of `sample`.
        log_probs: [B], float32 (float64 for float64 inputs).
    """

    latents: Tensor
    log_probs: Tensor


def scheduler_step(
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
) -> DDPOSchedulerOutput:
    """TRL's DDIM step; its signature and results.

    The last step goes to timestep 0, where the noise is not zero yet.

    Args:
        self: A `DDIMScheduler` after `set_timesteps`.
        model_output: [B, ...], as the scheduler's prediction_type says.
        timestep: Training timesteps: a number, 0-d or [B].
        sample: x, the same shape. If it requires a gradient (AlignProp), everything has one.
        eta: 0 to 1.
        use_clipped_model_output: Changes nothing but the bits of exact_order, for clipping is
            refused.
        generator: For x'.
        prev_sample: x', or None to draw it.
        exact_order: The original's order of operations in plain torch (slow): its bits, also those
            of the noise.

    Raises:
        ValueError: Both generator and prev_sample; a scheduler that clips its x0 estimate, whose
            step is not affine; no set_timesteps yet; a timestep out of range.

    Source: DDIM, arXiv 2010.02502, equations 12 and 16; DDPO, arXiv 2305.13301.
    """
    check_affine(self)
    if generator is not None and prev_sample is not None:
        raise ValueError("generator and prev_sample are both given: pass one of them")
    stride = self.config.num_train_timesteps // self.num_inference_steps
    prediction = self.config.prediction_type
    if exact_order:
        pair = exact.alpha_pair(self.alphas_cumprod, timestep, stride, sample)
        moments = exact.ddim(
            model_output, sample, *pair, eta, prediction, from_x0=use_clipped_model_output
        )
        if prev_sample is None:
            noise = randn(model_output, generator, dtype=model_output.dtype)
            prev_sample = exact.draw(moments, noise)
        log_prob = exact.log_prob(prev_sample, moments)
        return DDPOSchedulerOutput(prev_sample.to(sample.dtype), log_prob)
    table = ddim_table(
        self.alphas_cumprod, stride=stride, eta=eta, prediction=prediction, device=sample.device,
        dtype=torch.float64 if sample.dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    row = rows(table, timestep, len(sample))
    through = sample.requires_grad and torch.is_grad_enabled()
    out = step(
        model_output, sample, row, prev_sample=prev_sample, generator=generator, mean=through,
        x0=False, log_prob=not through, latent_dtype=sample.dtype,
    )  # fmt: skip
    found = out.log_prob
    if found is None:  # The fused log-prob has no gradient for x.
        assert out.mean is not None
        residual = (out.prev_sample.detach() - out.mean).flatten(1)
        found = row[:, 4] - row[:, 3] * residual.square().mean(1)
    return DDPOSchedulerOutput(out.prev_sample.to(sample.dtype), found)


PATCHES = (Patch("trl.models.modeling_sd_base", "scheduler_step", scheduler_step),)
install(PATCHES)
