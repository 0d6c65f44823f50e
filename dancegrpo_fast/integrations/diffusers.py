"""diffusers: `step_with_log_prob` for `FlowMatchEulerDiscreteScheduler` and `DDIMScheduler`.

A trainer built on a stock pipeline has no log-prob. One line gives its scheduler the method:

    add_step_with_log_prob(pipeline.scheduler)      # an object, or a class

or a class of your own takes it: `class Scheduler(FlowStep, FlowMatchEulerDiscreteScheduler)`. The
method has no state: neither `step_index` nor the scheduler's own `step` is touched, and the same
call serves rollout (`prev_sample=None`) and training. diffusers itself is not imported here.

diffusers has no log-prob to compare bits with: `exact_order=True` has the mean in the order of the
scheduler's own `step`, which without noise are its bits (before it rounds x' to the dtype of the
prediction), and for DDIM with noise too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.integrations import exact
from dancegrpo_fast.integrations.common import (
    Generators,
    Step,
    check_source,
    ddim_table,
    flow_table,
    randn,
    rows,
    step,
    timestep_index,
)
from dancegrpo_fast.ops.noise import DrawKey, normal_batch

_Keys = Tensor | Sequence[DrawKey] | None


class FlowStep:
    """For a scheduler that has `sigmas` [T + 1] and `timesteps` [T], and whose models predict v."""

    def step_with_log_prob(
        self: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        noise_level: float,
        dynamics: str = "flow",
        prev_sample: Tensor | None = None,
        generator: Generators = None,
        key: _Keys = None,
        exact_order: bool = False,
    ) -> Step:
        """Draws x' or takes it as given, with its log-prob, mean and x0 estimate.

        Args:
            model_output: v, [B, ...], after guidance.
            timestep: A member of `timesteps`: a number, 0-d or [B], one per row.
            sample: x, [B, ...].
            noise_level: 0 is the ODE, which draws nothing and has log-prob 0.
            dynamics: "flow" (Flow-GRPO), "dance" (DanceGRPO) or "cps".
            prev_sample: x', or None to draw it.
            generator: For x': None, one, or one per row.
            key: A noise key of ours for each row instead.
            exact_order: Plain torch in diffusers' order of operations (slow): Euler's step, to
                which the pull of the SDE is added. Not for [B] timesteps.

        Returns:
            (prev_sample, log_prob [B], mean, x0), float32.

        Raises:
            ValueError: An unknown dynamics; on the CPU, a timestep that is not in the schedule.
        """
        # diffusers' rule for a timestep that stands there twice.
        index = timestep_index(self.timesteps, timestep, second=True)
        if exact_order:
            pair = exact.sigma_pair(self.sigmas, index)
            moments = _flow_moments(
                model_output, sample.float(), *pair, noise_level, dynamics, self.sigmas[1]
            )
            return _exact(
                moments, sample.float(), prev_sample, generator, key, still=noise_level == 0,
                published=dynamics == "cps",
            )  # fmt: skip
        table = flow_table(
            self.sigmas, dynamics=dynamics, level=noise_level, device=sample.device
        )
        return step(
            model_output, sample, rows(table, index, len(sample)), prev_sample=prev_sample,
            generator=generator, key=key, deterministic=prev_sample is None and noise_level == 0,
        )  # fmt: skip


class DDIMStep:
    """For a scheduler that has `alphas_cumprod` and DDIM's timesteps."""

    def step_with_log_prob(
        self: Any,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        generator: Generators = None,
        key: _Keys = None,
        exact_order: bool = False,
    ) -> Step:
        """Draws x' or takes it as given, with its log-prob, mean and x0 estimate.

        The last step goes to timestep 0, as DDPO's: with `set_alpha_to_one=False` (Stable
        Diffusion) that is the scheduler's own rule, without it the scheduler would end at no noise.

        Args:
            model_output: [B, ...], as the scheduler's prediction_type says, after guidance.
            timestep: Training timesteps: a number, 0-d or [B], one per row.
            sample: x, [B, ...].
            eta: 0 (the ODE, which draws nothing and has log-prob 0) to 1.
            prev_sample, generator, key: As in `FlowStep`.
            exact_order: Plain torch in diffusers' order of operations (slow), its noise drawn as
                there. Not for [B] timesteps.

        Returns:
            (prev_sample, log_prob [B], mean, x0), float32.

        Raises:
            ValueError: No `set_timesteps` yet; a scheduler that clips its x0 estimate.
        """
        check_affine(self)
        stride = self.config.num_train_timesteps // self.num_inference_steps
        prediction = self.config.prediction_type
        if exact_order:
            pair = exact.alpha_pair(self.alphas_cumprod, timestep, stride)
            moments = exact.ddim(model_output, sample, *pair, eta, prediction)
            return _exact(moments, model_output, prev_sample, generator, key, still=eta == 0)
        table = ddim_table(
            self.alphas_cumprod, stride=stride, eta=eta, prediction=prediction,
            device=sample.device,
        )  # fmt: skip
        return step(
            model_output, sample, rows(table, timestep, len(sample)), prev_sample=prev_sample,
            generator=generator, key=key, deterministic=prev_sample is None and eta == 0,
        )  # fmt: skip


def _flow_moments(
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    level: float,
    dynamics: str,
    sigma_max: Tensor,
) -> exact.Moments:
    args = model_output, sample, sigma, sigma_next
    if dynamics not in ("flow", "dance", "cps"):
        raise ValueError(f"dynamics = {dynamics!r}: must be 'flow', 'dance' or 'cps'")
    if level == 0:
        return exact.dance_sde(*args, 0.0, sde_solver=False)
    if dynamics == "cps":
        return exact.cps(*args, level)
    rate = exact.flow_rate(sigma, level, sigma_max) if dynamics == "flow" else level
    return exact.dance_sde(*args, rate)


def _exact(
    moments: exact.Moments,
    like: Tensor,
    prev_sample: Tensor | None,
    generator: Generators,
    key: _Keys,
    *,
    still: bool,
    published: bool = False,
) -> Step:
    """x' and its log-prob. still: no noise, log-prob 0; published: CPS' log-prob.

    A generator draws noise like a tensor.
    """
    mean, x0 = moments.mean.float(), moments.x0.float()
    if prev_sample is None:
        check_source(generator, key, still)
        prev_sample = mean
        if key is not None:
            noise = normal_batch(like.shape[1:], key, device=like.device)
            prev_sample = exact.draw(moments, noise).float()
        elif not still:
            prev_sample = exact.draw(moments, randn(like, generator, like.dtype)).float()
    if still:
        return Step(prev_sample, torch.zeros(len(mean), device=mean.device), mean, x0)
    density = exact.square_log_prob if published else exact.log_prob
    log_prob = density(prev_sample.float(), moments._replace(mean=mean))
    return Step(prev_sample, log_prob, mean, x0)


def check_affine(scheduler: Any) -> None:
    """Refuses a DDIM scheduler whose step is not affine in the prediction, or not set up.

    Raises:
        ValueError: clip_sample or thresholding; no `set_timesteps` yet.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("num_inference_steps = None: call set_timesteps first")
    for name in ("clip_sample", "thresholding"):
        if getattr(scheduler.config, name, False):
            raise ValueError(
                f"{name} = True: the step is then not affine in the prediction; make the scheduler "
                f"with {name}=False, as Stable Diffusion has it"
            )


def add_step_with_log_prob(scheduler: Any) -> Any:
    """Gives a scheduler, or a class of schedulers, the method `step_with_log_prob`.

    Args:
        scheduler: A `FlowMatchEulerDiscreteScheduler` or `DDIMScheduler`, object or class, or one
            derived from them.

    Returns:
        `scheduler`.

    Raises:
        ValueError: Any other scheduler: multistep solvers have no density of one step.
    """
    kind = scheduler if isinstance(scheduler, type) else type(scheduler)
    names = {base.__name__ for base in kind.__mro__}
    mixins: dict[str, Any] = {
        "FlowMatchEulerDiscreteScheduler": FlowStep,
        "DDIMScheduler": DDIMStep,
    }
    found = [mixin for name, mixin in mixins.items() if name in names]
    if not found:
        raise ValueError(
            f"scheduler = {kind.__name__}: must be a {' or '.join(mixins)}; others are made into "
            "one by FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)"
        )
    function = found[0].step_with_log_prob
    if not isinstance(scheduler, type):
        function = function.__get__(scheduler)
    setattr(scheduler, function.__name__, function)
    return scheduler
