"""Three rewards that need no weights, for recipes whose own need some."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Red:
    """The mean of one channel."""

    name = "red"
    channel = 0

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos[:, :, self.channel].mean(dim=(1, 2, 3))


class Green(Red):
    """The mean of another."""

    name = "green"
    channel = 1


class Blue(Red):
    """The mean of the last."""

    name = "blue"
    channel = 2
