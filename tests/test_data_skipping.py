"""`data.skip_zero_variance` in runs: what is left out, and that a resumed run knows of it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CPU, tiny_config
from torch import Tensor

from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer

PROMPTS = [f"a {word} square" for word in ("red", "plain", "blue", "plain green", "failing")]


class Bright:
    """The mean pixel; the same for every sample of a plain prompt; none for a failing one."""

    name = "bright"

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        scores = videos.mean(dim=(1, 2, 3, 4))
        scores[[i for i, prompt in enumerate(prompts) if "plain" in prompt]] = 0.5
        scores[[i for i, prompt in enumerate(prompts) if "failing" in prompt]] = torch.nan
        return scores


class Levels:
    """The number of the call: equal for the candidates of a state, another at each step."""

    name = "levels"
    calls = 0

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        type(self).calls += 1
        return torch.full((len(videos),), float(self.calls))


def config(folder, model, **changes):
    run = tiny_config(folder, model, {
        "data.skip_zero_variance": 1, "data.prompts_per_iteration": 1, "iterations": 9,
        "rewards": [{"name": f"{__file__}:Bright"}], "checkpoint.every": 1, "checkpoint.keep": 9,
        "policy.train": "lora", **changes,
    })  # fmt: skip
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:4]))
    return run


def drawn_by(trainer: Trainer, count: int) -> list[int]:
    """Indices of the prompts of each of `count` iterations."""
    found = []
    for _ in range(count):
        (index, _), = trainer.draws.batch(trainer.done)
        trainer.iteration()
        found.append(index)
    return found


def test_plain_prompts_are_left_out_for_an_epoch(tmp_path, tiny_wan_folder):
    """Epoch 0 draws all 4, epoch 1 the two others, epoch 2 all again."""
    torch.set_num_threads(1)
    found = drawn_by(Trainer(config(tmp_path, tiny_wan_folder), CPU), 10)
    assert [sorted(found[:4]), sorted(found[4:6]), sorted(found[6:])] == [
        [0, 1, 2, 3], [0, 2], [0, 1, 2, 3],
    ]  # fmt: skip


def test_a_resumed_run_skips_as_the_uninterrupted_one(tmp_path, tiny_wan_folder):
    """Snapshots after 5 iterations, inside the epoch that leaves prompts out."""
    torch.set_num_threads(1)
    whole = config(tmp_path, tiny_wan_folder, iterations=5)
    train(whole)
    resumed = Trainer(config(tmp_path, tiny_wan_folder), CPU)
    assert resumed.resume() and resumed.done == 5
    assert resumed.draws.until == {1: 2, 3: 2}
    other = Trainer(config(tmp_path / "other", tiny_wan_folder), CPU)
    drawn_by(other, 5)
    assert other.draws.state == resumed.draws.state
    assert drawn_by(other, 3) == drawn_by(resumed, 3)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_failed_groups_and_other_scopes(tmp_path, tiny_wan_folder, scope, monkeypatch):
    """A group whose scores failed says nothing of its prompt; one that is judged against the batch
    teaches although its own scores are equal."""
    torch.set_num_threads(1)
    changes = {"data.prompts_per_iteration": 3, "advantage.scope": scope}
    run = config(tmp_path, tiny_wan_folder, **changes)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[2:]))  # blue, plain green, failing
    trainer = Trainer(run, CPU)
    trainer.iteration()
    place = PROMPTS[2:].index("a plain green square")
    assert trainer.draws.until == ({place: 2} if scope == "group" else {})


def test_candidates_of_a_search_are_compared_with_their_own_state(tmp_path, tiny_wan_folder):
    """Previews of other steps differ, and yet nothing is learned."""
    torch.set_num_threads(1)
    changes = {
        "rewards": [{"name": f"{__file__}:Levels"}], "rollout.group_size": 6,
        "rollout.tree": {"kind": "search", "branches": 3, "branch_steps": [0, 2]},
        "advantage.credit": "siblings",
    }  # fmt: skip
    trainer = Trainer(config(tmp_path, tiny_wan_folder, **changes), CPU)
    metrics = trainer.iteration()
    assert metrics["reward/zero_variance"] == 1.0 and len(trainer.draws.until) == 1
