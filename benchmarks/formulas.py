"""What the kernels are compared with: the loss and the step as others write them, in plain torch.

`public_*` follow the operations of DanceGRPO's `flux_step` and the loss in its training loop: a
0-d sigma on the CPU times a bf16 model output stays in bf16, the density is written out term by
term, the mean over the latent comes last. `clean_*` are the shortest correct form: the affine
coefficients of one step, float32, the normaliser in a constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def public_log_prob(m: Tensor, x: Tensor, y: Tensor | None, sigmas: Tensor, step: int, eta: float):
    """(x', log-prob) of DanceGRPO's SDE step; draws x' if y is None. m, x, y: [B, ...]."""
    sigma, following = sigmas[step], sigmas[step + 1]
    dsigma = following - sigma
    mean = x + dsigma * m
    clean = x - sigma * m
    delta = sigma - following
    std = eta * math.sqrt(delta)
    score = -(x - clean * (1 - sigma)) / sigma**2
    mean = mean + (-0.5 * eta**2 * score) * dsigma
    if y is None:
        y = mean + torch.randn_like(mean) * std
    density = -((y.detach().float() - mean.float()) ** 2) / (2 * std**2)
    density = density - math.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    return y, density.mean(dim=tuple(range(1, density.ndim)))


def public_loss(m, x, y, advantages, old, clip, sigmas, step, eta) -> Tensor:
    """The clipped loss of its training loop over that log-prob, one child per row."""
    _, log_prob = public_log_prob(m, x, y, sigmas, step, eta)
    ratio = torch.exp(log_prob - old)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    return torch.mean(torch.maximum(unclipped, clipped))


def clean_loss(m, x, y, rows, advantages, old, clip) -> Tensor:
    """The same loss from affine coefficients [B, 8], one child per row."""
    a, b, _, w, c = (column.view(-1, *[1] * (m.ndim - 1)) for column in rows[:, :5].unbind(1))
    residual = y - (a * x + b * m.float())
    square = (residual * residual).mean(dim=tuple(range(1, m.ndim)))
    ratio = torch.exp(c.flatten() - w.flatten() * square - old)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def clean_loss_broadcast(m, x, y, rows, advantages, old, clip) -> Tensor:
    """The same for K children of each state: y [S, K, ...], rows [S * K, 8]; m, x [S, ...]."""
    states, children = y.shape[:2]
    shape = (states, children, *[1] * (m.ndim - 1))
    a, b, _, w, c = (column.view(shape) for column in rows[:, :5].unbind(1))
    residual = y - (a * x.unsqueeze(1) + b * m.float().unsqueeze(1))
    square = (residual * residual).mean(dim=tuple(range(2, y.ndim)))
    ratio = torch.exp(c.reshape(states, -1) - w.reshape(states, -1) * square - old.view_as(square))
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    kept = advantages.view_as(square)
    return torch.maximum(-kept * ratio, -kept * clipped).mean()


def clean_step(m, x, rows, eps) -> tuple[Tensor, Tensor]:
    """(x', log-prob) from affine coefficients and given noise, one child per row."""
    a, b, s, w, c = (column.view(-1, *[1] * (m.ndim - 1)) for column in rows[:, :5].unbind(1))
    mean = a * x + b * m.float()
    y = mean + s * eps
    residual = y - mean
    square = (residual * residual).mean(dim=tuple(range(1, m.ndim)))
    return y, c.flatten() - w.flatten() * square


def public_nft_loss(m, noised, clean, old, sigmas, advantages, beta, advantage_clip) -> Tensor:
    """DiffusionNFT's two-branch loss; the adaptive weight is a float64 mean, as published."""
    sigma = sigmas.view(-1, *[1] * (m.ndim - 1))
    dims = tuple(range(1, m.ndim))
    positive = beta * m + (1 - beta) * old.detach()
    negative = (1.0 + beta) * old.detach() - beta * m
    terms = []
    for velocity in (positive, negative):
        prediction = noised - sigma * velocity
        with torch.no_grad():
            weight = (prediction.double() - clean.double()).abs().mean(dim=dims, keepdim=True)
            weight = weight.clip(min=1e-5)
        terms.append(((prediction - clean) ** 2 / weight).mean(dim=dims))
    share = (advantages / advantage_clip / 2.0 + 0.5).clip(0, 1)
    loss = share * terms[0] / beta + (1.0 - share) * terms[1] / beta
    return (loss * advantage_clip).mean()


def clean_nft_loss(m, noised, clean, old, sigmas, advantages, beta, advantage_clip) -> Tensor:
    """The same loss in float32 from one residual and one difference."""
    sigma = sigmas.view(-1, *[1] * (m.ndim - 1))
    dims = tuple(range(1, m.ndim))
    v, v_old = m.float(), old.float()
    residual = noised - sigma * v - clean
    difference = sigma * (v - v_old)
    share = (advantages / (2 * advantage_clip) + 0.5).clamp(0, 1)
    loss = torch.zeros_like(share)
    for weight, error in (
        (share, residual + (1 - beta) * difference),
        (1 - share, residual + (1 + beta) * difference),
    ):
        scale = error.detach().abs().mean(dim=dims).clamp(min=1e-5)
        loss = loss + weight * (error * error).mean(dim=dims) / scale
    return (loss * (advantage_clip / beta)).mean()
