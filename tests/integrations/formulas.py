"""The steps of the published papers, written from the mathematics: the oracle of these tests.

Score, drift and densities are used as the papers define them; nothing of ours is imported. Use
float64 inputs. Sigmas broadcast: 0-d, or [B, 1, ...].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normals of a seed: the same numbers in every dtype, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def column(values: object, like: Tensor) -> Tensor:
    """Numbers or [B] -> float64 that broadcasts over the rows of `like`."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    return tensor.reshape(-1, *(1 for _ in like.shape[1:]))


def rate(
    dynamics: str, sigma: Tensor, level: float, sigma_max: float, sigma_min: float
) -> Tensor:
    """Diffusion coefficient g of the reverse SDE dx = (v - g^2 score / 2) dt + g dW."""
    if dynamics == "dance":
        return torch.full_like(sigma, level)
    if dynamics == "flow_wan":
        return level * (sigma_min + (sigma_max - sigma_min) * sigma)
    assert dynamics == "flow"
    at = torch.where(sigma == 1.0, torch.full_like(sigma, sigma_max), sigma)
    return level * (sigma / (1.0 - at)).sqrt()


def flow_step(
    v: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """(mean, std) of the Euler-Maruyama step of the reverse SDE."""
    noise = x + (1.0 - sigma) * v
    score = -noise / sigma
    dt = sigma_next - sigma
    return x + (v - 0.5 * g * g * score) * dt, g * (-dt).sqrt()


def cps_step(
    v: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """(mean, std): the noise after the step is sigma_next, of which a part is new."""
    clean, noise = x - sigma * v, x + (1.0 - sigma) * v
    std = sigma_next * math.sin(level * math.pi / 2.0)
    old = (sigma_next.square() - std.square()).sqrt()
    return (1.0 - sigma_next) * clean + old * noise, std


def ddim_step(
    m: Tensor, x: Tensor, alpha: Tensor, alpha_next: Tensor, eta: float, prediction: str = "epsilon"
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, x0) of DDIM, equation 12 and 16 of arXiv 2010.02502."""
    if prediction == "epsilon":
        noise = m
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    elif prediction == "sample":
        clean = m
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    else:
        clean = alpha.sqrt() * x - (1 - alpha).sqrt() * m
        noise = alpha.sqrt() * m + (1 - alpha).sqrt() * x
    std = eta * ((1 - alpha_next) / (1 - alpha)).sqrt() * (1 - alpha / alpha_next).sqrt()
    mean = alpha_next.sqrt() * clean + (1 - alpha_next - std.square()).sqrt() * noise
    return mean, std, clean


def log_density(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B]: mean over elements of log N(y; mean, std^2)."""
    return Normal(mean, std.expand_as(mean)).log_prob(y).flatten(1).mean(1)


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """[B]: PPO's pessimistic bound, as a loss: -min(rho A, clip(rho) A)."""
    limited = torch.minimum(torch.maximum(ratio, ratio.new_tensor(1 - low)), 1 + ratio * 0 + high)
    return -torch.minimum(ratio * advantage, limited * advantage)


def assert_no_worse(ours: Tensor, host: Tensor, exact: Tensor, name: str = "") -> None:
    """The error against float64 is at most twice that of the host's order of operations.

    As root mean squares: single elements are luck. One ulp of the largest value is always allowed:
    a coefficient and the result are rounded once each, and a host can be luckier than that.
    """
    exact = exact.detach()
    differences = (value.detach().double() - exact for value in (ours, host))
    error, theirs = (difference.square().mean().sqrt() for difference in differences)
    floor = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= torch.maximum(2 * theirs, floor), (name, float(error), float(theirs))
