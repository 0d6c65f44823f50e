"""The hosts' steps in plain torch, in the hosts' own order of operations: for comparing bits.

Slow: about twenty launches a step, and values of the schedule may be read back. Each function gives
the mean and standard deviation of x' from the published formulas; `draw` and `log_prob` do the
rest. Nothing is cast that the host does not cast: a 0-d sigma times a bf16 prediction stays bf16,
as DanceGRPO has it for FLUX, HunyuanVideo and Qwen-Image.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """N(mean, std^2) of x', and the x0 estimate.

    Attributes:
        mean: [B, ...].
        std: A number or a tensor that broadcasts.
        x0: [B, ...].
    """

    mean: Tensor
    std: float | Tensor
    x0: Tensor


def dance_sde(
    model_output: Tensor,
    latents: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float | Tensor,
    *,
    sde_solver: bool = True,
    tensor_std: bool = False,
) -> Moments:
    """DanceGRPO, arXiv 2505.07818: Euler's step, then the score's pull.

    Args:
        model_output, latents: [B, ...].
        sigma, sigma_next: 0-d, or with tensor_std [B, 1, ...].
        eta: Noise level; the rate of another SDE (`flow_rate`) gives that one's step.
        sde_solver: False leaves the pull out.
        tensor_std: False: std is a number of Python's, read back, as in DanceGRPO.
    """
    dt = sigma_next - sigma
    euler, x0 = latents + dt * model_output, latents - sigma * model_output
    length = sigma - sigma_next
    std = eta * (torch.sqrt(length) if tensor_std else math.sqrt(length))
    if not sde_solver:
        return Moments(euler, std, x0)
    score = -(latents - x0 * (1 - sigma)) / sigma**2
    return Moments(euler + (-0.5 * eta**2 * score) * dt, std, x0)


def reverse_sde(
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    rate: float | Tensor,
) -> Moments:
    """Flow-GRPO, arXiv 2505.05470, equation 9: the factors of x and v first.

    Args:
        model_output, sample: [B, ...], float32.
        sigma, sigma_next: 0-d or [B, 1, ...].
        rate: Diffusion coefficient, a number or like sigma (`flow_rate`, `wan_rate`).
    """
    dt = sigma_next - sigma
    of_x = 1 + rate**2 / (2 * sigma) * dt
    of_v = 1 + rate**2 * (1 - sigma) / (2 * sigma)
    mean = sample * of_x + model_output * of_v * dt
    return Moments(mean, rate * torch.sqrt(-1 * dt), sample - sigma * model_output)


def flow_rate(sigma: Tensor, level: float | Tensor, sigma_max: float | Tensor) -> Tensor:
    """a sqrt(sigma / (1 - sigma)), with sigma_max for 1 in the denominator."""
    return torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * level


def wan_rate(sigma: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Straight from sigma_min to sigma_max."""
    return sigma_min + (sigma_max - sigma_min) * sigma


def cps(
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    level: float | Tensor,
    *,
    least: float | None = None,
) -> Moments:
    """Coefficient-preserving sampling; arguments as `reverse_sde`.

    Args:
        level: A number, or [B, 1, ...], whose sine is then rounded where it lies.
        least: The square of the kept noise is at least this.
    """
    angle = level * math.pi / 2
    std = sigma_next * (torch.sin(angle) if isinstance(angle, Tensor) else math.sin(angle))
    x0, x1 = sample - sigma * model_output, sample + model_output * (1 - sigma)
    kept = sigma_next**2 - std**2
    kept = kept if least is None else kept.clamp(min=least)
    return Moments(x0 * (1 - sigma_next) + x1 * torch.sqrt(kept), std, x0)


def ddim(
    model_output: Tensor,
    sample: Tensor,
    alpha: Tensor,
    alpha_next: Tensor,
    eta: float,
    prediction: str = "epsilon",
    *,
    from_x0: bool = False,
) -> Moments:
    """DDIM, arXiv 2010.02502, equations 12 and 16, as diffusers and DDPO have it.

    Args:
        model_output, sample: [B, ...].
        alpha, alpha_next: alphas_cumprod, 0-d or [B, 1, ...] (`alpha_pair`).
        eta: Noise level.
        prediction: "epsilon", "v_prediction" or "sample".
        from_x0: The noise estimate is derived from the x0 estimate (`use_clipped_model_output`).

    Raises:
        ValueError: Another prediction.
    """
    beta, beta_next = 1 - alpha, 1 - alpha_next
    if prediction == "epsilon":
        x0, noise = (sample - beta**0.5 * model_output) / alpha**0.5, model_output
    elif prediction == "sample":
        x0 = model_output
        noise = (sample - alpha**0.5 * x0) / beta**0.5
    elif prediction == "v_prediction":
        x0 = (alpha**0.5) * sample - (beta**0.5) * model_output
        noise = (alpha**0.5) * model_output + (beta**0.5) * sample
    else:
        raise ValueError(
            f"prediction = {prediction!r}: must be 'epsilon', 'sample' or 'v_prediction'"
        )
    if from_x0:
        noise = (sample - alpha**0.5 * x0) / beta**0.5
    std = eta * ((beta_next / beta) * (1 - alpha / alpha_next)) ** 0.5
    return Moments(alpha_next**0.5 * x0 + (1 - alpha_next - std**2) ** 0.5 * noise, std, x0)


def one_for_all(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The two, if they are 0-d.

    Raises:
        ValueError: They are not.
    """
    if here.dim() > 0:
        raise ValueError("exact_order = True: the host has one index for all rows; pass it 0-d")
    return here, there


def sigma_pair(
    sigmas: Tensor, index: int | Tensor, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two 0-d sigmas of a step, for hosts that have one step for all rows.

    Args:
        sigmas: [T + 1].
        index: i, a number or 0-d.
        like: They are moved to its device. None: they stay where they lie, as in some hosts: a
            kernel on a GPU takes a number of the CPU unrounded, and rounds one of the GPU to bf16.

    Raises:
        ValueError: `index` is [B].
    """
    here, there = one_for_all(sigmas[index], sigmas[index + 1])
    return (here, there) if like is None else (here.to(like.device), there.to(like.device))


def alpha_pair(
    alphas_cumprod: Tensor, timestep: int | Tensor, stride: int, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """alphas_cumprod at the two ends of a DDIM step, the last of which goes to timestep 0.

    Args:
        alphas_cumprod: [N], all training timesteps.
        timestep: A number, 0-d or [B].
        stride: N // number of inference steps.
        like: They are [B or 1, 1, ...] on the device of this (DDPO). None: 0-d, where they lie
            (diffusers).

    Raises:
        ValueError: `timestep` is [B] without `like`.
    """
    here = torch.as_tensor(timestep, device=alphas_cumprod.device)
    pair = alphas_cumprod[here], alphas_cumprod[(here - stride).clamp(min=0)]
    if like is None:
        return one_for_all(*pair)
    column = (-1, *(1 for _ in like.shape[1:]))
    return pair[0].reshape(column).to(like.device), pair[1].reshape(column).to(like.device)


def draw(moments: Moments, noise: Tensor) -> Tensor:
    """mean + std noise."""
    return moments.mean + moments.std * noise


def log_prob(
    prev_sample: Tensor,
    moments: Moments,
    *,
    normaliser: bool = True,
    constant: float | None = None,
) -> Tensor:
    """[B]: the mean over elements of the Gaussian log-density; x' is a constant.

    Args:
        prev_sample: x', [B, ...].
        moments: Of x'.
        normaliser: False leaves -log s - log(2 pi) / 2 out, as some hosts do.
        constant: log(2 pi) / 2 as a host has it; None: the logarithm of a float32 root.
    """
    mean, std = moments.mean, moments.std
    each = -((prev_sample.detach() - mean) ** 2) / (2 * (std**2))
    if normaliser:
        log_std = torch.log(std) if isinstance(std, Tensor) else math.log(std)
        root = torch.sqrt(2 * torch.as_tensor(math.pi))
        each = each - log_std - (torch.log(root) if constant is None else constant)
    return each.mean(dim=tuple(range(1, each.ndim)))


def square_log_prob(prev_sample: Tensor, moments: Moments) -> Tensor:
    """[B]: -mean((x' - mean)^2), the log-prob published with CPS."""
    each = -((prev_sample.detach() - moments.mean) ** 2)
    return each.mean(dim=tuple(range(1, each.ndim)))
