"""Rewards that are scored in parts, while the next part is drawn."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from pool_cases import iterations
from tiny_models import CPU, tiny_config
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards.combine import Threshold, WinRate
from dancegrpo_fast.rewards.scoring import Scoring, score_latents, waits
from dancegrpo_fast.sampling import pool
from dancegrpo_fast.trainer import Trainer


class Mean:
    """Mean pixel; `remote` runs in the thread. Notes who calls it and how many at once."""

    def __init__(self, name: str = "mean", remote: bool = False, groupwise: bool = False) -> None:
        self.name, self.remote, self.groupwise = name, remote, groupwise
        self.calls: list[tuple[str, int]] = []
        self.inside = self.most = 0

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.calls.append((threading.current_thread().name, len(prompts)))
        assert not torch.is_grad_enabled()
        values = videos.mean(dim=(1, 2, 3, 4))
        self.inside -= 1
        return values - values.mean() if self.groupwise else values


class Slow(Mean):
    """Returns when it is let."""

    def __init__(self, remote: bool) -> None:
        super().__init__(remote=remote)
        self.entered, self.leave = threading.Event(), threading.Event()

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        self.entered.set()
        assert self.leave.wait(60)
        return super().__call__(videos, prompts)


def decode(latents: Tensor) -> Tensor:
    return latents.transpose(1, 2).expand(-1, -1, 3, -1, -1).contiguous()


PROMPTS = ["a", "a", "a", "b", "b", "b", "c"]
OPTIONS: dict[str, Any] = {"batch_size": 2, "groups": [0, 0, 0, 1, 1, 1, 2]}


def clips() -> Tensor:
    latents = torch.rand(7, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[4, 0, 0, 0, 0] = torch.nan
    return latents


def in_parts(rewards: list[Any], cuts: tuple[int, ...]) -> Any:
    with Scoring(PROMPTS, decode, rewards, **OPTIONS) as scoring:
        for part in torch.tensor_split(clips(), cuts):
            scoring.add(part)
        return scoring.finish()


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("cuts", [(), (2, 4), (1, 2, 5), (0, 7)])
def test_scores_in_parts_are_those_of_all_at_once(cuts, remote):
    """Also of a group that comes in two parts, and next to a broken sample."""
    whole = score_latents(
        clips(), PROMPTS, decode, [Mean(), Mean("a"), Mean("group", groupwise=True)], **OPTIONS
    )
    rewards = [Mean(), Mean("a", remote), Mean("group", remote, groupwise=True)]
    found = in_parts(rewards, cuts)
    assert whole.values[:, 0].isnan().tolist() == [False] * 4 + [True] + [False] * 2
    # A batch of other samples gives each the same mean: they do not touch.
    np.testing.assert_array_equal(found.values[:, :2], whole.values[:, :2])
    assert found.reasons == whole.reasons
    assert found.reasons[1:] == ("a: it returned nan", "group: a pixel is not finite")
    assert torch.equal(found.clip, whole.clip)
    threads = {name for reward in rewards[1:] for name, _ in reward.calls}
    assert threads == ({"rewards"} if remote else {"MainThread"})
    assert {name for name, _ in rewards[0].calls} == {"MainThread"}
    assert max(reward.most for reward in rewards) == 1
    # Groups are scored whole, as soon as they are there.
    sizes = [count for _, count in rewards[2].calls]
    assert sizes == ([3, 3] if cuts in ((2, 4), (1, 2, 5)) else [6])


def test_a_group_gets_the_same_scores_whichever_part_completes_it():
    """The mean over its own prompt alone: win rates need no other prompt."""
    whole = in_parts([WinRate(Mean())], ())
    parts = in_parts([WinRate(Mean(remote=True))], (1, 2, 5))
    np.testing.assert_array_equal(whole.values, parts.values)


def test_errors_of_the_thread_are_those_of_the_run():
    class Raises(Mean):
        def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
            raise OSError("no route")

    class Wrong(Mean):
        def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
            return torch.zeros(1 + len(prompts))

    found = in_parts([Raises("r", remote=True), Mean()], (3,))
    assert found.values[:, 0].isnan().all() and found.reasons[0] == "r: OSError: no route"
    assert found.first_error == "r: OSError: no route"
    with pytest.raises(UserError, match="reward w returned shape"):
        in_parts([Wrong("w", remote=True)], (3,))


def test_leaving_early_joins_the_thread_and_drops_what_waits():
    reward = Slow(remote=True)
    with pytest.raises(RuntimeError, match="a signal"):
        with Scoring(PROMPTS, decode, [reward], **OPTIONS) as scoring:
            scoring.add(clips())
            assert reward.entered.wait(60)
            threading.Timer(0.05, reward.leave.set).start()
            raise RuntimeError("a signal")
    assert len(reward.calls) == 1, "three batches waited"
    assert "rewards" not in {thread.name for thread in threading.enumerate()}


def test_pixels_of_two_parts_wait_at_most():
    reward = Slow(remote=True)
    with Scoring(PROMPTS, decode, [reward], **OPTIONS) as scoring:
        parts = torch.tensor_split(clips(), (1, 2))
        scoring.add(parts[0])
        scoring.add(parts[1])
        assert reward.entered.wait(60) and not reward.calls
        threading.Timer(0.05, reward.leave.set).start()
        scoring.add(parts[2])  # Waits for the first.
        assert reward.calls
        scoring.finish()


def test_what_waits():
    plain, remote = Mean(), Mean(remote=True)
    assert [waits(r) for r in (plain, remote)] == [False, True]
    assert waits(Threshold(WinRate(remote), 0.5)) and not waits(Threshold(plain, 0.5))


def test_the_next_part_is_drawn_while_one_is_scored(tmp_path, tiny_wan_folder):
    """The first score does not return before the second part's draw has begun."""
    begun = threading.Event()

    class Waits(Mean):
        met = True

        def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
            self.met = self.met and begun.wait(60)
            return super().__call__(videos, prompts)

    config = tiny_config(tmp_path / "a", tiny_wan_folder, {"rollout.batch_size": 1})
    plain = iterations(config, 1)
    trainer = Trainer(tiny_config(tmp_path / "b", tiny_wan_folder, {"rollout.batch_size": 1}), CPU)
    reward = Waits("bright", remote=True)
    trainer.rewards = [reward]
    trainer.chunks = pool.chunks(config.rollout, trainer.owner, waiting=True)
    assert len(trainer.chunks) == 2
    sample, calls = trainer.sample, 0

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            begun.set()
        return sample(*arguments, **named)

    trainer.sample = watched  # type: ignore[method-assign]
    assert trainer.iteration() == plain["metrics"][0]
    assert calls == 2 and reward.met and reward.most == 1
    for name, parameter in trainer.policy.trainable().items():
        assert torch.equal(parameter, plain["weights"][name])
