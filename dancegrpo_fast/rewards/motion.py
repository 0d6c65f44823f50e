"""Rewards computed from how pixels change over time. Each alone has a trivial optimum: combine.

Brightness is BT.601 luma. Amplitude and smoothness look at it with each frame's mean taken out, so
that a flash is no motion; flicker looks at the means alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dancegrpo_fast.rewards.interface import SampleReward, Samples, Scored, checked_pixels
from dancegrpo_fast.rewards.pixels import unit_pixels


class _MotionReward(SampleReward):
    differentiable = True
    frames_needed = 3

    @abstractmethod
    def measure(self, videos: Tensor) -> Tensor:
        """[N] of videos [N, F, 3, H, W] float in [0, 1]."""

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        videos, errors = checked_pixels(self._checked(samples))
        values = [self.measure(unit_pixels(video[None])) for video in videos]
        return Scored.of(torch.cat(values) if values else torch.zeros(0), errors)

    def gradient_scores(self, samples: Samples) -> Tensor:
        """See `SampleReward.gradient_scores`."""
        return self.measure(self._checked(samples).float())

    def _checked(self, samples: Samples) -> Tensor:
        have = samples.videos.shape[1]
        if have < self.frames_needed:
            raise ValueError(f"{self.name} needs {self.frames_needed} frames, not {have}")
        return samples.videos


def luma(videos: Tensor) -> Tensor:
    """[N, F, H, W] of [N, F, 3, H, W]."""
    weights = videos.new_tensor([0.299, 0.587, 0.114])
    return torch.einsum("nfchw,c->nfhw", videos, weights)


def _moving(videos: Tensor) -> Tensor:
    light = luma(videos)
    return light - light.mean(dim=(2, 3), keepdim=True)


class MotionSmoothness(_MotionReward):
    """Minus the mean absolute second difference of the brightness over time; 0 is best."""

    name = "motion_smoothness"

    def measure(self, videos: Tensor) -> Tensor:
        """See `_MotionReward.measure`."""
        light = _moving(videos)
        change = light[:, 2:] - 2 * light[:, 1:-1] + light[:, :-2]
        return -change.abs().mean(dim=(1, 2, 3))


class MotionAmplitude(_MotionReward):
    """Mean absolute difference of the brightness of neighbouring frames, at most `cap`.

    Args:
        cap: More than this is worth no more (fast cuts and noise would win otherwise).
    """

    name = "motion_amplitude"
    frames_needed = 2

    def __init__(self, *, cap: Annotated[float, Field(gt=0)] = 0.1) -> None:
        self.cap = cap

    def measure(self, videos: Tensor) -> Tensor:
        """See `_MotionReward.measure`."""
        return _moving(videos).diff(dim=1).abs().mean(dim=(1, 2, 3)).clamp(max=self.cap)


class Flicker(_MotionReward):
    """Minus the mean absolute second difference of the frames' mean colours; a fade is free."""

    name = "flicker"

    def measure(self, videos: Tensor) -> Tensor:
        """See `_MotionReward.measure`."""
        means = videos.mean(dim=(3, 4))
        return -(means[:, 2:] - 2 * means[:, 1:-1] + means[:, :-2]).abs().mean(dim=(1, 2))
