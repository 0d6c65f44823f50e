"""Two processes: judges that fail on one of them leave the same samples out on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from dancegrpo_fast.advantages import leaf_advantages
from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.config import AdvantageConfig
from dancegrpo_fast.parallel.world import World, leave
from dancegrpo_fast.rewards import Samples
from dancegrpo_fast.rewards.combine import Threshold, WinRate
from dancegrpo_fast.rewards.scoring import score_latents

PROMPTS, GROUP = 4, 5
ROOT = Path(__file__).resolve().parents[2]


class Judge:
    """Compares brightness; has no answer for very dark pictures and crashes on very bright ones."""

    name = "judge"

    def compare(self, first: Samples, second: Samples) -> torch.Tensor:
        a, b = (s.videos.float().mean(dim=(1, 2, 3, 4)) for s in (first, second))
        if max(a.max(), b.max()) > 250:
            raise TimeoutError("no answer")
        return torch.where((a < 20) | (b < 20), torch.nan, (a > b).float())


class Bright:
    """Brightness; NaN for dark pictures."""

    name = "bright"

    def __call__(self, videos: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        means = videos.mean(dim=(1, 2, 3, 4))
        return means.masked_fill(means < 0.1, torch.nan)


def scored(world: World) -> tuple[np.ndarray, np.ndarray]:
    """The rewards and advantages that a process of the world ends with."""
    worth = torch.rand(PROMPTS * GROUP, generator=torch.Generator().manual_seed(3))
    worth[1], worth[7], worth[12] = 0.02, 0.05, 0.999  # Two failures on rank 0, a crash on rank 1.
    owner = leaf_owners(PROMPTS, GROUP, world.size)
    own = np.flatnonzero(owner.ravel() == world.rank).tolist()
    rewards = [WinRate(Judge()), Threshold(Bright(), 0.5)]
    found = score_latents(
        worth[own].view(-1, 1, 1, 1, 1).expand(-1, 3, 1, 4, 4),
        [f"prompt {i // GROUP}" for i in own],
        lambda latents: latents.transpose(1, 2),
        rewards,
        batch_size=3,
        groups=[i // GROUP for i in own],
    )
    gathered = world.gather_rewards(found.values, owner)
    advantages = leaf_advantages(gathered, np.ones(2), AdvantageConfig(combine="loss"))
    return gathered, advantages.values


def test_masks_agree(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    rewards, advantages = scored(World(0, 1, torch.device("cpu")))
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_array_equal(found["rewards"], rewards)
        np.testing.assert_array_equal(found["advantages"], advantages)
    assert np.isnan(rewards[..., 0]).any() and np.isnan(rewards[..., 1]).any()
    failed = np.isnan(rewards).any(axis=-1)
    assert not advantages[failed].any()
    # The crash cost its own prompt, dark pictures themselves, the last prompt nothing.
    assert failed[2].all() and not failed[3].any()
    assert failed[:2].any(axis=1).all() and not failed[:2].all(axis=1).any()


if __name__ == "__main__":
    world = World.from_environment()
    rewards, advantages = scored(world)
    np.savez(Path(sys.argv[1]) / f"{world.rank}.npz", rewards=rewards, advantages=advantages)
    world.close()
    leave(0)
