"""Rewards: what a sample is worth. One file per kind; your own is `path/to/file.py:ClassName`.

`interface` says what a reward is, `catalogue` which there are, `loading` builds those of a recipe,
`combine` makes rewards of rewards, `scoring` decodes and scores a rank's samples.
"""

from dancegrpo_fast.rewards.catalogue import REWARDS
from dancegrpo_fast.rewards.interface import (
    FrameReward,
    HasParts,
    PartsReward,
    Reward,
    SampleReward,
    Samples,
    Scored,
    placed,
    score,
)
from dancegrpo_fast.rewards.loading import load_rewards

__all__ = [
    "REWARDS",
    "FrameReward",
    "HasParts",
    "PartsReward",
    "Reward",
    "SampleReward",
    "Samples",
    "Scored",
    "load_rewards",
    "placed",
    "score",
]
