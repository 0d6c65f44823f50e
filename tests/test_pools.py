"""Samples in parts: drawn again for training, scored while the next are drawn, planned."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool_worker import AGAIN, CASES, POOL
from test_planner import Measured, live_storages
from tiny_models import CPU, tiny_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast import pool
from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.config import RolloutConfig, RunConfig, UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.planner import Hardware, Planner
from dancegrpo_fast.planner.tracing import ATTENTION_FLOPS
from dancegrpo_fast.rewards.combine import Threshold, WinRate
from dancegrpo_fast.rewards.scoring import Scoring, score_latents, waits
from dancegrpo_fast.trainer import Trainer

TREE = "rollout.tree"


# ---- which samples in which part -----------------------------------------------------------------


def rollout(**changes: Any) -> RolloutConfig:
    return RolloutConfig(group_size=6, steps=3, noise_level=0.3, batch_size=4, **changes)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_parts_hold_every_sample_once_and_something_of_every_rank(ranks, size, spread):
    owner = leaf_owners(3, 6, ranks, spread=spread)
    parts = pool.chunks(rollout(chunk=size, redraw=True), owner, waiting=False)
    first = np.full(owner.shape, -1)
    for number, part in enumerate(parts):
        assert set(np.unique(part[part >= 0])) == set(range(ranks))
        new = (part >= 0) & (first < 0)
        assert (part[new] == owner[new]).all()
        first[new] = number
        for rank in range(ranks):
            assert ((part == rank) & new).sum() <= size
    assert (first >= 0).all()
    for rank in range(ranks):  # In canonical order: subtrees stay together.
        assert (np.diff(first[owner == rank]) >= 0).all()
    scorer = pool.scorers_of(parts, owner, 2)
    assert (scorer // 2 == owner).all()


def test_kept_trees_are_cut_between_prompts_only():
    owner = leaf_owners(5, 6, 2)  # Rank 0 has 15: prompts 0, 1 and half of 2.
    parts = pool.chunks(rollout(chunk=12), owner, waiting=True)
    held = [sorted(set(np.argwhere(part == 0)[:, 0].tolist())) for part in parts]
    assert held == [[0, 1], [2]]
    assert [int((part == 1).sum()) for part in parts] == [9, 6]
    # Prompts larger than asked for stay whole; without a number it is the batch size that is asked.
    for given in ({"chunk": 1}, {}):
        parts = pool.chunks(rollout(**given), leaf_owners(3, 6, 1), waiting=True)
        assert [int((part == 0).sum()) for part in parts] == [6, 6, 6]
    assert len(pool.chunks(rollout(), owner, waiting=False)) == 1


def test_a_number_without_effect_is_refused():
    with pytest.raises(UserError, match=r"rollout.chunk = 3: has no effect .* rollout.redraw"):
        pool.chunks(rollout(chunk=3), leaf_owners(2, 6, 1), waiting=False)


def test_redraw_needs_best_of_n(tmp_path):
    with pytest.raises(ValueError, match="rollout.redraw = true: needs advantage.best_of_n"):
        tiny_config(tmp_path, tmp_path, {"rollout.redraw": True})


def test_a_rank_without_chosen_samples_draws_a_valid_one():
    owner = np.array([[0, 0, 0, 1, 1, 1]])
    chosen = np.array([[True, True, False, False, False, False]])
    valid = np.array([[True, True, True, False, True, True]])
    assert pool.redrawn(owner, chosen, valid).tolist() == [[0, 0, -1, -1, 1, -1]]
    none = np.zeros((1, 6), bool)
    assert pool.redrawn(owner, none, none).tolist() == [[0, -1, -1, 1, -1, -1]]


# ---- drawn again ---------------------------------------------------------------------------------


def iterations(config: RunConfig, count: int = 2) -> dict[str, Any]:
    """What some iterations drew, trained and left."""
    torch.set_num_threads(1)
    trainer = Trainer(config, CPU)
    seen: dict[str, Any] = {"trained": [], "rewards": [], "parts": []}
    score, update = trainer.score, trainer.update

    def scored(*arguments: Any) -> np.ndarray:
        seen["rewards"].append(score(*arguments))
        return seen["rewards"][-1]

    def updated(updates: Any, drawn: Any, *arguments: Any) -> dict[str, float]:
        items = [item for u in updates for call in u.calls for item in call.items]
        places = {(i.prompt, s) for i in items for s in (i.state, *i.children)}
        log_probs = {(i.prompt, child) for i in items for child in i.children}
        seen["trained"].append({place: drawn.latents[place].clone() for place in sorted(places)})
        seen["trained"].append({place: drawn.log_prob[place].clone() for place in log_probs})
        seen["stored"] = len(drawn.latents)
        return update(updates, drawn, *arguments)

    trainer.score, trainer.update = scored, updated  # type: ignore[method-assign]
    seen["metrics"] = [trainer.iteration() for _ in range(count)]
    seen["weights"] = {k: p.detach().clone() for k, p in trainer.policy.trainable().items()}
    seen["parts"] = len(trainer.chunks)
    return seen


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bit for bit."""
    for a, b in zip(first["rewards"], second["rewards"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert first["metrics"] == second["metrics"]
    for a, b in zip(first["trained"], second["trained"], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[place], b[place]) for place in a)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


TREES: dict[str, dict[str, Any]] = {
    "shared_root": {},
    "window": {f"{TREE}.kind": "window", f"{TREE}.window_size": 1, f"{TREE}.window_start": 1,
               "rollout.steps": 4},
    "flash, ratio_norm": {
        f"{TREE}.kind": "window", f"{TREE}.window_size": 1, f"{TREE}.window_start": 0,
        f"{TREE}.flash": 0.7, "rollout.steps": 4, "loss.ratio_norm": True,
        "loss.old_log_prob": "rollout", "loss.updates": 2,
    },
    "branch_points": {f"{TREE}.kind": "branch_points", f"{TREE}.branches": 2,
                      f"{TREE}.branch_steps": [0, 1], "rollout.group_size": 4,
                      "advantage.credit": "depth"},
    "trunk_with_branches": {f"{TREE}.kind": "trunk_with_branches", f"{TREE}.branches": 3,
                            f"{TREE}.branch_steps": [0, 1], "advantage.credit": "siblings"},
}  # fmt: skip


@pytest.mark.parametrize("changes", TREES.values(), ids=TREES)
def test_samples_that_are_drawn_again_are_the_same(tmp_path, tiny_wan_folder, changes):
    """Two iterations: rewards, choice, samples, log-probs, weights. Three samples a part cut trees.

    Batches of one: with larger ones a matrix product may round differently in another batch, and
    the samples agree up to that (the next test).
    """
    kept = iterations(tiny_config(tmp_path / "a", tiny_wan_folder, POOL | changes))
    again = AGAIN | {"rollout.chunk": 3}
    redrawn = iterations(tiny_config(tmp_path / "b", tiny_wan_folder, POOL | changes | again))
    assert kept["parts"] == 1 and redrawn["parts"] > 2
    assert redrawn["stored"] < kept["stored"]
    assert_same(kept, redrawn)


def test_forwards_are_remembered_as_they_were_made(tmp_path, tiny_wan_folder):
    """The ratio gate repeats one of them; prompts that were drawn apart never shared one."""
    config = tiny_config(tmp_path, tiny_wan_folder, {"rollout.batch_size": 8})
    trainer = Trainer(config, CPU)
    plan, conditions = trainer.plan(0), trainer.embeddings.conditions(trainer.prompts.prompts[:2])
    apart = [np.where(np.arange(2)[:, None] == p, trainer.owner, -1) for p in range(2)]
    first, second = (trainer.sample(plan, conditions, owner) for owner in apart)
    drawn = first.joined(second)
    inner = {(p, s.index) for p in range(2) for s in plan.states if plan.children[s.index]}
    assert sorted(place for batch in drawn.batches for place in batch) == sorted(inner)
    assert all(len({p for p, _ in batch}) == 1 for batch in drawn.batches)
    whole = trainer.sample(plan, conditions)
    assert any(len({p for p, _ in batch}) == 2 for batch in whole.batches)


def test_in_larger_batches_they_agree_up_to_rounding(tmp_path, tiny_wan_folder):
    """float32 through 3 steps of a tiny network: latents of size 1 within 1e-5."""
    changes = POOL | {"rollout.batch_size": 4}
    kept = iterations(tiny_config(tmp_path / "a", tiny_wan_folder, changes), 1)
    redrawn = iterations(tiny_config(tmp_path / "b", tiny_wan_folder, changes | AGAIN), 1)
    assert kept["trained"][0].keys() == redrawn["trained"][0].keys()
    for place, latents in kept["trained"][0].items():
        assert (latents - redrawn["trained"][0][place]).abs().max() < 1e-5
    assert redrawn["metrics"][0]["gate/max_gap"] < 1e-5


def test_only_one_part_is_alive(tmp_path, tiny_wan_folder):
    """While a part is drawn nothing of the one before is left but its rewards."""
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, POOL | AGAIN), CPU)
    parts: list[weakref.ref] = []
    stored: list[int] = []
    sample = trainer.sample

    def watched(*arguments: Any, **named: Any) -> Any:
        gc.collect()
        assert not [part for part in parts if part() is not None]
        drawn = sample(*arguments, **named)
        parts.append(weakref.ref(drawn))
        stored.append(len(drawn.latents))
        return drawn

    trainer.sample = watched  # type: ignore[method-assign]
    trainer.iteration()
    # Two samples in each of six parts; then of 2 prompts x 2 samples a root and two trained steps.
    assert stored == [2] * 6 + [2 * (1 + 2 * 2)]


# ---- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tiny_wan_folder, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes recorded: one launch."""
    out, here = tmp_path_factory.mktemp("pools"), Path(__file__).parent
    paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(here / "pool_worker.py"), str(tiny_wan_folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_in_parts_what_they_do_at_once(two_processes, name):
    for found in two_processes:
        kept, again = found[name]
        assert kept["parts"] == 1 and again["parts"] >= 2
        np.testing.assert_array_equal(kept["rewards"], again["rewards"])
        assert kept["planned"] == again["planned"]
        for ours, theirs in zip(kept["metrics"], again["metrics"], strict=True):
            assert ours.keys() == theirs.keys()
            np.testing.assert_array_equal([*ours.values()], [*theirs.values()])
        for key, weight in kept["weights"].items():
            assert torch.equal(weight, again["weights"][key]), f"{name}: {key}"
    if name in ("idle", "gathering"):
        assert [found[name][1]["trains"] for found in two_processes] == [True, False]


def test_beyond_a_share_of_failures_all_processes_save_and_stop(two_processes):
    """4 of 8 samples, all of them process 1's, where .4 is allowed."""
    first, second = (found["failing"] for found in two_processes)
    assert first == second
    assert "4 of 8 (max_failed = 0.4) samples of iteration 0 failed" in first
    assert "fails_on_fail: it returned nan" in first, "the other process's reason"
    assert first.endswith("[1]"), "a snapshot"


def test_a_signal_between_parts_stops_both_at_one_place(two_processes):
    first, second = (found["stopped"] for found in two_processes)
    assert first == second
    assert first[0] == "sample" and 2 <= first[1] < 5


# ---- scored in parts, while the next is drawn ----------------------------------------------------


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
    entered, leave = threading.Event(), threading.Event()

    class Slow(Mean):
        def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
            entered.set()
            assert leave.wait(60)
            return super().__call__(videos, prompts)

    reward = Slow(remote=True)
    with pytest.raises(RuntimeError, match="a signal"):
        with Scoring(PROMPTS, decode, [reward], **OPTIONS) as scoring:
            scoring.add(clips())
            assert entered.wait(60)
            threading.Timer(0.05, leave.set).start()
            raise RuntimeError("a signal")
    assert len(reward.calls) == 1, "three batches waited"
    assert "rewards" not in {thread.name for thread in threading.enumerate()}


def test_pixels_of_two_parts_wait_at_most():
    entered, leave = threading.Event(), threading.Event()

    class Slow(Mean):
        def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
            entered.set()
            assert leave.wait(60)
            return super().__call__(videos, prompts)

    reward = Slow(remote=True)
    with Scoring(PROMPTS, decode, [reward], **OPTIONS) as scoring:
        parts = torch.tensor_split(clips(), (1, 2))
        scoring.add(parts[0])
        scoring.add(parts[1])
        assert entered.wait(60) and not reward.calls
        threading.Timer(0.05, leave.set).start()
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


def test_some_failures_are_allowed(tmp_path, tiny_wan_folder):
    """Exactly the allowed share goes on; 1.0 stops only where all fail."""
    reward = {"name": f"{Path(__file__).parent / 'tiny_models.py'}:FailsOnFail"}
    for share, prompts in ((0.5, "a red square\na fail"), (1.0, "a fail\na red square")):
        folder = tmp_path / str(share)
        folder.mkdir()
        (folder / "prompts.txt").write_text(prompts)
        changes = {"rewards": [reward | {"max_failed": share}], "iterations": 1}
        trainer = Trainer(tiny_config(folder, tiny_wan_folder, changes), CPU)
        assert trainer.iteration()["reward/failed"] == 0.5


# ---- planned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [{}, AGAIN], ids=["kept", "again"])
def test_products_of_a_pool_are_those_that_are_counted(tmp_path, tiny_wan_folder, again):
    """Parts draw the root's state again, and training's samples are drawn twice: all counted."""
    tree = {f"{TREE}.kind": "window", f"{TREE}.window_size": 1, f"{TREE}.window_start": 1}
    changes = POOL | tree | again | {"rollout.batch_size": 2}
    config = tiny_config(tmp_path, tiny_wan_folder, changes)
    trainer = Trainer(config, CPU)
    trainer.embeddings.conditions(trainer.prompts.prompts)
    drawing, sample = 0, trainer.sample

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal drawing
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            drawn = sample(*arguments, **named)
        drawing += counter.get_total_flops()
        return drawn

    trainer.sample = counted  # type: ignore[method-assign]
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        trainer.iteration()
    planned = Planner(config, open_family(config.model)).estimate(Hardware(1), cuda=False).flops
    assert planned["rollout"] == pytest.approx(drawing, rel=0.02)
    assert sum(planned.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


# Latents of 49 kB beside a network of 0.1 MB: what is stored is what counts.
LARGE = {
    "model.height": 128, "model.width": 128, "data.prompts_per_iteration": 1,
    "rollout.group_size": 24, "rollout.steps": 4, "rollout.batch_size": 4,
    "advantage.best_of_n": 8, "loss.micro_batch_size": 1,
}  # fmt: skip
STORED: dict[str, dict[str, Any]] = {
    "kept": {},
    "again": {"rollout.redraw": True, "rollout.chunk": 8},
    "kept, ratio_norm": {"loss.ratio_norm": True, "loss.old_log_prob": "rollout"},
    "again, ratio_norm": {
        "rollout.redraw": True, "rollout.chunk": 8, "loss.ratio_norm": True, "loss.updates": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", STORED.values(), ids=STORED)
def test_memory_of_a_pool_is_what_is_measured(tmp_path, tiny_wan_folder, changes):
    """Of drawing and of training, 4 to 8 MB in the second iteration; within 7%, 6.1% was found.

    The plan has all stored latents beside a forward's activations; the last ones come after it.
    """
    torch.set_num_threads(1)
    config = tiny_config(tmp_path, tiny_wan_folder, LARGE | changes)
    gc.collect()
    others = set(live_storages())
    trainer = Trainer(config, CPU)
    trainer.iteration()
    measured = Measured(trainer, others)
    trainer.iteration()
    memory = Planner(config, open_family(config.model)).estimate(Hardware(1), cuda=False).memory
    assert memory.total("rollout") == pytest.approx(measured.peak["sample"], rel=0.07)
    training = max(memory.total("train"), memory.total("step"))
    assert training == pytest.approx(measured.peak["update"], rel=0.07)
