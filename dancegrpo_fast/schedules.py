"""Sigma grids: the points a sampler visits and what the network is told at each.

Three ways to a `Schedule`: `from_scheduler` asks a diffusers scheduler object, so the grid is the
one its pipeline would use; `dance_schedule` is DanceGRPO's own grid; `from_sigmas` takes any
descending list. Nothing here imports diffusers.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PREDICTIONS = ("flow_prediction", "epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """The points of a trajectory, from noise to data.

    Attributes:
        sigmas: T+1 noise levels, not increasing, in [0, 1]. Flow models: x = (1 - sigma) x0 +
            sigma eps. DDIM models: sqrt(1 - alphas_cumprod), for reading only.
        timesteps: T values: what the network is given at points 0 .. T-1.
        alphas_cumprod: T+1 signal variances aligned with the points (DDIM models), else None.
        prediction: What the network's output means: "flow_prediction" (eps - x0), "epsilon",
            "v_prediction" or "sample".

    Raises:
        ValueError: Lengths that do not fit, values out of range or order, unknown prediction.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    alphas_cumprod: tuple[float, ...] | None = None
    prediction: str = "flow_prediction"

    def __post_init__(self) -> None:
        points = len(self.timesteps) + 1
        if points < 2:
            raise ValueError("timesteps = (): a schedule needs at least one step")
        if len(self.sigmas) != points:
            raise ValueError(
                f"sigmas has {len(self.sigmas)} values for {points - 1} timesteps; it needs "
                f"{points}, the last being where the trajectory ends"
            )
        _check_monotone("sigmas", self.sigmas, falling=True)
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {self.prediction!r}: must be one of {PREDICTIONS}")
        if (self.alphas_cumprod is None) != (self.prediction == "flow_prediction"):
            raise ValueError(
                f"prediction = {self.prediction!r} with alphas_cumprod "
                f"{'absent' if self.alphas_cumprod is None else 'given'}: flow models have none, "
                "all others need them"
            )
        if self.alphas_cumprod is not None:
            if len(self.alphas_cumprod) != points:
                raise ValueError(
                    f"alphas_cumprod has {len(self.alphas_cumprod)} values for {points - 1} "
                    f"timesteps; it needs {points}, one for each point"
                )
            _check_monotone("alphas_cumprod", self.alphas_cumprod, falling=False)

    @property
    def steps(self) -> int:
        """T, the number of steps (points minus one)."""
        return len(self.timesteps)


def _check_monotone(name: str, values: Sequence[float], *, falling: bool) -> None:
    for index, value in enumerate(values):
        if not 0.0 <= value <= 1.0:  # also catches NaN
            raise ValueError(f"{name}[{index}] = {value}: must be in [0, 1]")
        if index and (value > values[index - 1] if falling else value < values[index - 1]):
            raise ValueError(
                f"{name}[{index}] = {value} after {values[index - 1]}: a trajectory goes from "
                f"noise to data, so {name} must not {'rise' if falling else 'fall'}"
            )


def from_sigmas(sigmas: Sequence[float], *, num_train_timesteps: int = 1000) -> Schedule:
    """A flow schedule through given points; timesteps are sigma * num_train_timesteps.

    Args:
        sigmas: T+1 values in [0, 1], not increasing, the end point (usually 0) included.
        num_train_timesteps: Scale of the timesteps that the network was trained with.

    Raises:
        ValueError: Values out of range or order.
    """
    points = tuple(float(sigma) for sigma in sigmas)
    return Schedule(points, tuple(sigma * num_train_timesteps for sigma in points[:-1]))


def dance_schedule(steps: int, shift: float) -> Schedule:
    """DanceGRPO's grid: sigma = shift u / (1 + (shift - 1) u), u = 1 .. 0 in equal steps.

    Sigmas are float64. Timesteps are integers, int(1000 sigma). The published code truncates a
    float32 product, and where 1000 sigma is a whole number the last bit decides: so the same
    float32 operations are done here (at 12 steps and shift 3, for example, they give 599, not 600),
    with torch.linspace as on processors with fused multiply-add.

    Args:
        steps: T >= 1.
        shift: Time shift > 0 (FLUX 3, HunyuanVideo 5, SkyReels 7).

    Raises:
        ValueError: `steps` or `shift` out of range.

    Source: DanceGRPO `fastvideo/train_grpo_flux.py`.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: must be at least 1")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift = {shift}: must be a positive number")
    line = [(steps - i) / steps for i in range(steps + 1)]
    sigmas = tuple(shift * u / (1 + (shift - 1) * u) for u in line)

    # torch.linspace(1, 0, T+1) in float32: each half is counted from its own end, with one rounding
    # for product and sum (both are exact in float64).
    f32 = np.float32
    step, index = f32(-1) / f32(steps), np.arange(steps + 1)
    upper = (1.0 + np.float64(step) * index).astype(f32)
    lower = -step * (steps - index).astype(f32)
    single = np.where(index < (steps + 1) // 2, upper, lower)
    shifted = (f32(shift) * single) / (f32(1) + f32(shift - 1) * single)
    return Schedule(sigmas, tuple(float(int(s * f32(1000))) for s in shifted[:-1]))


def from_scheduler(
    scheduler: Any,
    steps: int,
    mu: float | None = None,
    *,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The grid of a diffusers scheduler, exactly: its float32 values widened to float64.

    A copy of `scheduler` has `set_timesteps` called as the model's pipeline calls it; `scheduler`
    itself is left as it is, and only its grid is used. Flow schedulers
    (`FlowMatchEulerDiscreteScheduler`, or any with prediction_type "flow_prediction") give sigmas;
    all others give alphas_cumprod at their integer timesteps, with the end point at max(last
    timestep - stride, 0). That clamp is DDPO's and DanceGRPO's: it keeps the noise of the last step
    above zero.

    Two things make the stock DDIM step another than ours: a scheduler that clips its x0 estimate
    (clip_sample, the default of `DDIMScheduler`, or thresholding) has no affine step; and a step of
    ours goes to the next timestep of the list, the stock one to t - N // T, which differs where the
    list is not spaced so evenly ("linspace"; "trailing" where T does not divide N).

    Args:
        scheduler: A diffusers scheduler object (any with set_timesteps, timesteps and sigmas or
            alphas_cumprod).
        steps: T >= 1.
        mu: Resolution-dependent shift, for schedulers with dynamic shifting.
        sigmas: T unshifted sigmas for pipelines that pass their own (FLUX and Qwen-Image:
            linspace(1, 1/T, T)). None: the scheduler's own.

    Raises:
        ValueError: `steps` out of range, an argument that the scheduler does not take, or a
            scheduler that does not visit exactly T descending points.
    """
    name = type(scheduler).__name__
    if steps < 1:
        raise ValueError(f"steps = {steps}: must be at least 1")
    if sigmas is not None and len(sigmas) != steps:
        raise ValueError(f"sigmas has {len(sigmas)} values: must have steps = {steps}")
    arguments: dict[str, Any] = (
        {"num_inference_steps": steps} if sigmas is None else {"sigmas": list(sigmas)}
    )
    if mu is not None:
        arguments["mu"] = mu
    unknown = arguments.keys() - inspect.signature(scheduler.set_timesteps).parameters.keys()
    if unknown:
        raise ValueError(
            f"{name}.set_timesteps takes no {', '.join(sorted(unknown))}; leave it out"
        )

    grid = copy.deepcopy(scheduler)
    grid.set_timesteps(**arguments)
    timesteps = tuple(float(t) for t in grid.timesteps.tolist())
    prediction = getattr(grid.config, "prediction_type", "flow_prediction")
    if len(timesteps) != steps:
        flow = prediction == "flow_prediction"
        other = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
        raise ValueError(
            f"{name} makes {len(timesteps)} timesteps for steps = {steps}; use a scheduler with "
            f"one evaluation per step, for example {other}.from_config(scheduler.config)"
        )
    if prediction == "flow_prediction":
        return Schedule(tuple(float(sigma) for sigma in grid.sigmas.tolist()), timesteps)
    return _from_alphas(name, grid.alphas_cumprod.tolist(), timesteps, prediction)


def _from_alphas(
    name: str, table: Sequence[float], timesteps: tuple[float, ...], prediction: str
) -> Schedule:
    """A schedule from alphas_cumprod of all training timesteps; `name` is the scheduler's."""
    if not all(t.is_integer() for t in timesteps):
        raise ValueError(
            f"{name} makes fractional timesteps ({timesteps[0]}, ...), which have no "
            "alphas_cumprod; use DDIMScheduler.from_config(scheduler.config)"
        )
    end = max(int(timesteps[-1]) - len(table) // len(timesteps), 0)
    alphas = tuple(float(table[int(t)]) for t in (*timesteps, end))
    return Schedule(tuple(math.sqrt(1 - alpha) for alpha in alphas), timesteps, alphas, prediction)
