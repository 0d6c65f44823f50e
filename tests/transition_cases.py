"""Points, noise and schedules for the tests of transitions, in float64."""

from __future__ import annotations

import math

import numpy as np

from dancegrpo_fast.schedules import Schedule, dance_schedule
from dancegrpo_fast.transitions import (
    Transition,
)

X = np.array([0.5, -1.0, 0.25, 2.0])
M = np.array([1.0, 0.5, -0.75, 0.2])
NOISE = np.array([0.3, -1.2, 0.8, 0.1])
GRID = dance_schedule(16, 3.0)
PRINTED = 1e-8  # the vectors have eight decimals


def mean_of(t: Transition, x: np.ndarray = X, m: np.ndarray = M) -> np.ndarray:
    return t.a * x + t.b * m


def log_prob_of(t: Transition, y: np.ndarray) -> float:
    return float(t.c - t.w * np.mean((y - mean_of(t)) ** 2))


def gaussian_log_prob(y: np.ndarray, mean: np.ndarray, std: float) -> float:
    return float(np.mean(-((y - mean) ** 2) / (2 * std**2) - np.log(std) - np.log(2 * np.pi) / 2))


def stable_diffusion(steps: int = 50) -> Schedule:
    """Scaled-linear betas in float64, leading spacing, offset 1, clamp at 0."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    stride = 1000 // steps
    times = [i * stride + 1 for i in reversed(range(steps))]
    points = [float(alphas[max(t, 0)]) for t in [*times, times[-1] - stride]]
    noise = tuple(math.sqrt(1 - alpha) for alpha in points)
    return Schedule(noise, tuple(map(float, times)), tuple(points), "epsilon")


def predictions(alpha: float) -> dict[str, np.ndarray]:
    """What a network with each parametrisation would say of the same noise estimate M."""
    x0 = (X - math.sqrt(1 - alpha) * M) / math.sqrt(alpha)
    v = math.sqrt(alpha) * M - math.sqrt(1 - alpha) * x0
    return {"epsilon": M, "v_prediction": v, "sample": x0}
