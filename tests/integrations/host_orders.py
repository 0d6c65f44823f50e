"""The steps of the hosts in their own orders of operations: the other side of `exact_order=True`.

Written from the published formulas and the order in which each host evaluates them; nothing of ours
is imported but a schedule. A host is (m, x, x' or None) -> its results; without x' it draws as the
host does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from formulas import column
from torch import Tensor

from dancegrpo_fast import dance_schedule

SIGMAS = torch.tensor(dance_schedule(8, 3.0).sigmas, dtype=torch.float32)
TIMES = SIGMAS * 1000
SHAPE = (3, 4, 6, 5)
MIXED = torch.tensor([0, 6, 3])  # sigma = 1 among them
ENDS = torch.tensor([0, 7, 3])  # and the step to sigma = 0
Found = tuple[Tensor | None, ...]
Host = Callable[[Tensor, Tensor, Tensor | None], Found]


def at(values: Tensor, index: Tensor | int) -> Tensor:
    """[B, 1, 1, 1] of the dtype that the values have."""
    return column(values[index], torch.empty(SHAPE)).to(values.dtype)


def draw(mean: Tensor, std: Any, like: Tensor, y: Tensor | None) -> Tensor:
    return mean + std * torch.randn(SHAPE, dtype=like.dtype) if y is None else y


def average(each: Tensor) -> Tensor:
    return each.mean(dim=(1, 2, 3))


def square(y: Tensor, mean: Tensor, std: Any) -> Tensor:
    return -((y.detach() - mean) ** 2) / (2 * std**2)


def gauss(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    root = torch.sqrt(2 * torch.as_tensor(math.pi))
    return average(square(y, mean, std) - torch.log(std) - torch.log(root))


def flow_rate(s: Tensor, level: Any, high: Any) -> Tensor:
    return torch.sqrt(s / (1 - torch.where(s == 1, high, s))) * level


def factored(m: Tensor, x: Tensor, s: Tensor, dt: Tensor, g: Any) -> Tensor:
    """Flow-GRPO's: the factors of x and v, then the sum."""
    return x * (1 + g**2 / (2 * s) * dt) + m * (1 + g**2 * (1 - s) / (2 * s)) * dt


def indexed_host(kind: str, i: int, normaliser: bool = False) -> Host:
    """0-d sigmas: what they multiply stays bf16."""
    s, t = SIGMAS[i], SIGMAS[i + 1]

    def flow(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        g = flow_rate(s, 0.7, SIGMAS[1].item())
        mean, std = factored(m, x, s, t - s, g), g * torch.sqrt(s - t)
        y = draw(mean, std, m, y)
        return y, x - s * m, gauss(y, mean, std)

    def dance(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        x0, std = x - s * m, 0.3 * math.sqrt(s - t)
        pull = -0.5 * 0.3**2 * (-(x - x0 * (1 - s)) / s**2)
        mean = x + (t - s) * m
        mean = mean + pull * (t - s)
        y = draw(mean, std, mean, y)
        each = square(y.float(), mean.float(), std)
        if normaliser:
            each = each - math.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
        return y, x0, average(each)

    def ddim(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        x0, here, there = x - s * m, s.double(), t.double()
        new = torch.sqrt(1.0 - there**2 * (1 - here) ** 2 / (here**2 * (1 - there) ** 2))
        std = 0.6 * there * new
        x1 = (x - (1 - here) * x0) / here
        mean = (1 - there) * x0 + torch.sqrt(there**2 - std**2) * x1
        y = draw(mean, std, x0, y)
        return y, x0, gauss(y, mean, std)

    return {"flow": flow, "dance": dance, "ddim": ddim}[kind]


def cps(
    m: Tensor, x: Tensor, s: Tensor, t: Tensor, sine: Any, least: float | None = None
) -> tuple[Tensor, Tensor]:
    std = t * sine
    kept = t**2 - std**2
    kept = kept if least is None else torch.clamp(kept, min=least)
    return (x - s * m) * (1 - t) + (x + m * (1 - s)) * torch.sqrt(kept), std


def factory_host(kind: str, level: float | Tensor) -> Host:
    """[B] numbers in float32, x' rounded to the storage dtype."""
    s, t = at(TIMES / 1000, MIXED), at(TIMES / 1000, MIXED + 1)
    a, dt = torch.as_tensor(level).reshape(-1, 1, 1, 1).expand(3, 1, 1, 1), t - s

    def step(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        stored, m, x = x.dtype, m.float(), x.float()
        std = a * torch.sqrt(-dt)
        if kind == "CPS":
            mean, std = cps(m, x, s, t, torch.sin(a * torch.pi / 2))
            shown = std
        elif kind == "Dance-SDE":
            x0, shown = x - s * m, a
            mean = x + (m + 0.5 * a**2 * (x - x0 * (1 - s)) / s**2) * dt
        elif kind == "Flow-SDE":
            shown = flow_rate(s, a, SIGMAS[1])
            mean, std = factored(m, x, s, dt, shown), shown * torch.sqrt(-dt)
        else:
            mean = x + m * dt
            y = mean if y is None else y.float()
            return y, mean, m, torch.zeros(3), torch.zeros(3, 1, 1, 1), dt
        y = (y if y is not None else draw(mean, std, m, None).to(stored)).float()
        log_prob = average(-((y.detach() - mean) ** 2)) if kind == "CPS" else gauss(y, mean, std)
        return y, mean, m, log_prob, shown, dt

    return step


def batched_host(kind: str) -> Host:
    """flow_grpo and verl-omni: everything in float32, [B, 1, ...] sigmas, no rounding of x'."""
    s, t = at(SIGMAS, MIXED), at(SIGMAS, MIXED + 1)

    def step(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        m, x = m.float(), x.float()
        y = None if y is None else y.float()
        if kind == "cps":
            mean, std = cps(m, x, s, t, math.sin(0.8 * math.pi / 2))
            y = draw(mean, std, m, y)
            return y, average(-((y.detach() - mean) ** 2)), mean, std
        if kind == "dance":
            score = -(x - (x - s * m) * (1 - s)) / s**2
            mean = (x + (t - s) * m) + (-0.5 * 0.3**2 * score) * (t - s)
            std = 0.3 * torch.sqrt(s - t)
        else:
            high = SIGMAS[1].item()
            g = flow_rate(s, 0.7, high) if kind == "sde" else high * s
            mean, std = factored(m, x, s, t - s, g), g * torch.sqrt(s - t)
        y = draw(mean, std, m, y)
        return y, gauss(y, mean, std), mean, g if kind == "sde" else std

    return step


def unirl_host(kind: str, eta: float) -> Host:
    s, t = at(SIGMAS, MIXED), at(SIGMAS, MIXED + 1)

    def step(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        stored, m, x = x.dtype, m.float(), x.float()
        if kind == "cps":
            mean, std = cps(m, x, s, t, math.sin(eta * math.pi / 2))
        else:
            g = eta if kind == "dance" else flow_rate(s, eta, SIGMAS[1])
            mean, std = factored(m, x, s, t - s, g), g * torch.sqrt(s - t)
        y = draw(mean, std, m, y).to(stored).float()
        if kind == "cps":
            return y, average(-((y.detach() - mean) ** 2)), mean
        each = square(y, mean, std) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return y, average(each), mean

    return step


def miles_host(kind: str) -> Host:
    def step(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        assert y is not None
        m, x, y = m.float(), x.float(), y.float()
        if kind == "sde":
            s, t = at(SIGMAS, ENDS), at(SIGMAS, ENDS + 1)
            g = flow_rate(s, 0.7, SIGMAS[1].item())
            mean = factored(m, x, s, t - s, g)
            return y, gauss(y, mean, g * torch.sqrt(s - t)), mean, g
        s, t = at(TIMES / 1000.0, ENDS), at(TIMES / 1000.0, ENDS + 1)
        mean, std = cps(m, x, s, t, math.sin(0.8 * math.pi / 2), 1e-12)
        return y, average(-((y.detach() - mean) ** 2)), mean, std

    return step


ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
T = torch.tensor([981, 1, 501])


def trl_host(prediction: str, rederived: bool) -> Host:
    a, b = at(ALPHAS, T), at(ALPHAS, (T - 20).clamp(min=0))

    def step(m: Tensor, x: Tensor, y: Tensor | None) -> Found:
        stored = x.dtype
        if prediction == "epsilon":
            x0, noise = (x - (1 - a) ** 0.5 * m) / a**0.5, m
        elif prediction == "sample":
            x0, noise = m, (x - a**0.5 * m) / (1 - a) ** 0.5
        else:
            x0 = a**0.5 * x - (1 - a) ** 0.5 * m
            noise = a**0.5 * m + (1 - a) ** 0.5 * x
        if rederived:
            noise = (x - a**0.5 * x0) / (1 - a) ** 0.5
        std = 0.9 * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        mean = b**0.5 * x0 + (1 - b - std**2) ** 0.5 * noise
        y = draw(mean, std, m, y)
        return y.to(stored), gauss(y, mean, std)

    return step
