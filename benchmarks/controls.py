"""Rewards that must not work: the negative controls of `benchmarks/demo.py`."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from dancegrpo_fast.ops.noise import NoiseKey, permutation
from dancegrpo_fast.rewards.moving_shape import MovingShape


class ShuffledMovingShape:
    """`moving_shape` with the scores of one prompt's samples exchanged among them.

    The scores keep their distribution within each group of a batch and lose their meaning. Training
    on them must gain nothing. Needs `rollout.batch_size` to be a multiple of `rollout.group_size`,
    so that a group is scored in one batch.
    """

    name = "shuffled_moving_shape"

    def __init__(self) -> None:
        self._reward = MovingShape()

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        scores = self._reward(videos, prompts)
        shuffled = torch.empty_like(scores)
        for prompt in dict.fromkeys(prompts):
            rows = torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
            # The order comes from the scores themselves: a new one every time, no hidden state.
            seed = zlib.crc32(scores[rows].cpu().numpy().tobytes())
            order = permutation(len(rows), NoiseKey.from_seed(seed).draw())
            shuffled[rows] = scores[rows[torch.from_numpy(order)]]
        return shuffled
