"""The plain maths of the ops, on any device. Rows are flat action boxes, [n, numel].

Sums over a latent run on a fixed grid: chunks of CHUNK elements, each halved until one number is
left, then the chunk sums likewise. Only elementwise additions take part, so a row's result is the
same bits whatever the other rows, the number of threads or the instruction set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 4096
LINK_SHIFT = 1e-10


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _halve(values: Tensor) -> Tensor:
    """Sum over the last dimension, whose size is a power of two."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


class _ChunkedSum(torch.autograd.Function):
    """[n, numel] -> [n]. Autograd through the halvings would copy the input twelve times."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        rows, numel = values.shape
        ctx.numel = numel
        # A zero adds exactly, so a latent below one chunk needs no padding to a whole one.
        width = min(CHUNK, _power_of_two(numel))
        chunks = -(-numel // width)
        padded = functional.pad(values, (0, chunks * width - numel))
        sums = _halve(padded.reshape(rows, chunks, width))
        return _halve(functional.pad(sums, (0, _power_of_two(chunks) - chunks)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[:, None].expand(-1, ctx.numel)


def mean(values: Tensor) -> Tensor:
    """[n, numel] -> [n], the mean on the fixed grid."""
    total: Tensor = _ChunkedSum.apply(values)
    return total / values.shape[1]


def mean_square(values: Tensor) -> Tensor:
    """[n, numel] -> [n], the mean of squares on the fixed grid."""
    return mean(values * values)


def center(x: Tensor, m: Tensor, table: Tensor) -> Tensor:
    """a x + b m: [n, numel] from states and model outputs [n, numel] and coefficients [n, 8]."""
    return table[:, 0:1] * x + table[:, 1:2] * m


def link(error: Tensor, power: float) -> Tensor:
    """What the log-prob takes of a mean square: itself (power 1), or a power of it.

    ((e + 1e-10)^power - (1e-10)^power) / power: AWM's Huber-like forms; the shift keeps the slope
    at e = 0 finite.
    """
    if power == 1:
        return error
    return ((error + LINK_SHIFT) ** power - LINK_SHIFT**power) / power


def log_prob(x: Tensor, m: Tensor, x_next: Tensor, table: Tensor, power: float = 1) -> Tensor:
    """-w link(mean((x' - (a x + b m))^2)) + c: [n]."""
    residual = x_next - center(x, m, table)
    return table[:, 4] - table[:, 3] * link(mean_square(residual), power)


def add_noise(center: Tensor, noise: Tensor, table: Tensor) -> Tensor:
    """center + s noise; rows with s = 0 take nothing from noise, not even its NaN."""
    s = table[:, 2:3]
    return torch.where(s > 0, center + s * noise, center)


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """The probability ratio, [n]."""
    return torch.exp(log_prob - old_log_prob)


def normalised_ratio(
    log_prob: Tensor, old_log_prob: Tensor, drift: Tensor, table: Tensor
) -> Tensor:
    """GRPO-Guard's ratio exp((dlogp + w b^2 mean((m - m_old)^2)) s), [n]; drift is that mean.

    Its exponent is mean(dmu eps): the negative bias of the plain ratio is gone.
    """
    bias = table[:, 3] * table[:, 1] * table[:, 1] * drift
    return torch.exp((log_prob - old_log_prob + bias) * table[:, 2])


def clipped_surrogate(ratio: Tensor, part: Tensor, low: float, high: float) -> Tensor:
    """max(-A rho, -A clip(rho)) for advantages of one sign, [n, R]."""
    clipped = ratio.clamp(1.0 - low, 1.0 + high)
    return torch.maximum(-part * ratio[:, None], -part * clipped[:, None])


def nft_branch(error: Tensor, minimum: float) -> tuple[Tensor, Tensor]:
    """DiffusionNFT's loss of one branch, mean(e^2) / w, and its scale w = max(mean|e|, minimum).

    Args:
        error: Predicted minus true clean latents, [n, numel].
        minimum: Lower bound of w.

    Returns:
        Loss and scale, [n] each. The scale is a constant of the gradient.
    """
    scale = mean(error.detach().abs()).clamp(min=minimum)
    return mean_square(error) / scale, scale


def nft_probability(advantages: Tensor, advantage_clip: float) -> Tensor:
    """The advantage in [-clip, clip] as the probability of being optimal, in [0, 1]."""
    return (advantages / (2 * advantage_clip) + 0.5).clamp(0, 1)
