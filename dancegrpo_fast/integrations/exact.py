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
    eta: float,
    *,
    sde_solver: bool = True,
) -> Moments:
    """DanceGRPO, arXiv 2505.07818: Euler's step, then the score's pull.

    Args:
        model_output, latents: [B, ...].
        sigma, sigma_next: 0-d.
        eta: Noise level.
        sde_solver: False leaves the pull out.
    """
    dt = sigma_next - sigma
    euler, x0 = latents + dt * model_output, latents - sigma * model_output
    std = eta * math.sqrt(sigma - sigma_next)
    if not sde_solver:
        return Moments(euler, std, x0)
    score = -(latents - x0 * (1 - sigma)) / sigma**2
    return Moments(euler + (-0.5 * eta**2 * score) * dt, std, x0)


def reverse_sde(
    model_output: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor, rate: Tensor
) -> Moments:
    """Flow-GRPO, arXiv 2505.05470, equation 9: the factors of x and v first.

    Args:
        model_output, sample: [B, ...], float32.
        sigma, sigma_next: [B, 1, ...].
        rate: Diffusion coefficient, [B, 1, ...] (`flow_rate`, `wan_rate`).
    """
    dt = sigma_next - sigma
    of_x = 1 + rate**2 / (2 * sigma) * dt
    of_v = (1 + rate**2 * (1 - sigma) / (2 * sigma))
    mean = sample * of_x + model_output * of_v * dt
    return Moments(mean, rate * torch.sqrt(-1 * dt), sample - sigma * model_output)


def flow_rate(sigma: Tensor, level: float, sigma_max: float) -> Tensor:
    """a sqrt(sigma / (1 - sigma)), with sigma_max for 1 in the denominator."""
    return torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * level


def wan_rate(sigma: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Straight from sigma_min to sigma_max."""
    return sigma_min + (sigma_max - sigma_min) * sigma


def cps(
    model_output: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor, level: float
) -> Moments:
    """Coefficient-preserving sampling; arguments as `reverse_sde`."""
    std = sigma_next * math.sin(level * math.pi / 2)
    x0, x1 = sample - sigma * model_output, sample + model_output * (1 - sigma)
    mean = x0 * (1 - sigma_next) + x1 * torch.sqrt(sigma_next**2 - std**2)
    return Moments(mean, std, x0)


def ddim(
    model_output: Tensor,
    sample: Tensor,
    alpha: Tensor,
    alpha_next: Tensor,
    eta: float,
    prediction: str = "epsilon",
) -> Moments:
    """DDIM, arXiv 2010.02502, equations 12 and 16, as DDPO has it.

    Args:
        model_output, sample: [B, ...].
        alpha, alpha_next: alphas_cumprod, [B, 1, ...].
        eta: Noise level.
        prediction: "epsilon", "v_prediction" or "sample".
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
    std = eta * ((beta_next / beta) * (1 - alpha / alpha_next)) ** 0.5
    return Moments(alpha_next**0.5 * x0 + (1 - alpha_next - std**2) ** 0.5 * noise, std, x0)


def sigma_pair(sigmas: Tensor, index: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The two 0-d sigmas of a step on the device of `like`: such hosts have one step for all rows.

    Raises:
        ValueError: `index` is [B].
    """
    here, there = sigmas[index], sigmas[index + 1]
    if here.dim() > 0:
        raise ValueError("exact_order = True: the host has one index for all rows; pass it 0-d")
    return here.to(like.device), there.to(like.device)


def draw(moments: Moments, noise: Tensor) -> Tensor:
    """mean + std noise."""
    return moments.mean + moments.std * noise


def log_prob(prev_sample: Tensor, moments: Moments) -> Tensor:
    """[B]: the mean over elements of the Gaussian log-density; x' is a constant."""
    mean, std = moments.mean, moments.std
    log_std = torch.log(std) if isinstance(std, Tensor) else math.log(std)
    distance = -((prev_sample.detach() - mean) ** 2) / (2 * (std**2))
    each = distance - log_std - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    return each.mean(dim=tuple(range(1, each.ndim)))


def square_log_prob(prev_sample: Tensor, moments: Moments) -> Tensor:
    """[B]: -mean((x' - mean)^2), the log-prob published with CPS."""
    each = -((prev_sample.detach() - moments.mean) ** 2)
    return each.mean(dim=tuple(range(1, each.ndim)))
