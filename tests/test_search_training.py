"""`rollout.tree.kind: search`: what the trainer draws, scores, counts, refuses and resumes."""
# ruff: noqa: F811 -- an imported fixture is named again by each test that uses it

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_cases import lines, recipe  # noqa: F401
from test_resume import assert_same_run, metrics_of
from tiny_models import CPU, Bright, tiny_config
from torch import Tensor

from dancegrpo_fast.advantages import leaf_advantages
from dancegrpo_fast.cli import main
from dancegrpo_fast.config import RunConfig, UserError, dump
from dancegrpo_fast.losses.gate import RatioGateError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.planner.work import work_of
from dancegrpo_fast.rollout import forwards_per_step
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trees.candidates import visited

HERE = Path(__file__)
TREE = "rollout.tree"
SEARCH = {
    "rollout.group_size": 12, f"{TREE}.kind": "search", f"{TREE}.branches": 3,
    f"{TREE}.branch_steps": [0, 2], f"{TREE}.trunks": 2, "advantage.credit": "siblings",
}  # fmt: skip


class Counting(Bright):
    """Says NaN to samples by their number; `calls` are the numbers of samples of each call."""

    name = "counting"
    failing: frozenset[int] = frozenset()
    calls: list[int] = []

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        first = sum(self.calls)
        self.calls.append(len(videos))
        values = super().__call__(videos, prompts)
        failed = [first + i in self.failing for i in range(len(videos))]
        return values.masked_fill(torch.tensor(failed), torch.nan)


class Remote(Bright):
    """A reward that says it waits for a server."""

    name, remote = "remote", True


class Compares(Bright):
    """A reward of samples among each other."""

    name, groupwise = "compares", True


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.set_num_threads(1)
    Counting.calls, Counting.failing = [], frozenset()


def made(folder: Path, model: Path, reward: str = "Counting", **changes) -> RunConfig:
    rewards = [{"name": f"{HERE}:{reward}"}]
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return tiny_config(folder, model, SEARCH | {"rewards": rewards} | changes)


def counting(trainer: Trainer) -> type[Counting]:
    """The class that the trainer loaded from this file: its own copy of `Counting`."""
    return type(trainer.rewards[0])


def sampled(trainer: Trainer):
    """(plan, conditions, trajectories, rewards) of an iteration that is not trained."""
    plan = trainer.plan(0)
    prompts = [prompt for _, prompt in trainer.draws.batch(0)]
    conditions = trainer.embeddings.conditions(prompts)
    return plan, conditions, *trainer.sample_and_score(plan, conditions, prompts)


# ------------------------------------------------------------------ what is drawn


@torch.no_grad()
def test_rewards_are_those_of_clean_estimates(tmp_path, tiny_wan_folder):
    trainer = Trainer(made(tmp_path, tiny_wan_folder), CPU)
    plan, conditions, drawn, rewards = sampled(trainer)
    family, network = trainer.family, trainer.policy.modules["transformer"]
    assert rewards.shape == (2, 12, 1) and len({*rewards.ravel().tolist()}) == 24
    groups = [[s for s in kids if plan.states[s].trained] for kids in plan.children]
    assert [len(leaves) for leaves in groups if leaves] == [3] * 4 and len(plan.leaves) == 12
    for p in range(2):
        for leaves in filter(None, groups):
            step = plan.states[leaves[0]].step
            x = drawn.stack([(p, s) for s in leaves])
            times = torch.full((3,), plan.schedule.timesteps[step])
            m = family.model_output(network, x, times, conditions.select([p] * 3), "transformer")
            videos = family.decode(x - plan.schedule.sigmas[step] * m)
            values = rewards[p, [plan.leaves.index(s) for s in leaves], 0]
            # Float32 networks in another batch; a mean of pixels.
            np.testing.assert_allclose(values, videos.mean(dim=(1, 2, 3, 4)), atol=2e-6)


@torch.no_grad()
def test_the_next_searched_state_is_the_best_candidate(tmp_path, tiny_wan_folder):
    changes = {f"{TREE}.branch_steps": [0, 1], f"{TREE}.trunks": 1, "rollout.group_size": 6}
    trainer = Trainer(made(tmp_path, tiny_wan_folder, **changes), CPU)
    chosen = set()
    for iteration in range(3):
        trainer.done = iteration  # Other noise.
        plan, _, drawn, rewards = sampled(trainer)
        first = [s for s in plan.children[0] if plan.states[s].trained]
        (onward,) = [s for s in plan.children[0] if not plan.states[s].trained]
        for p in range(2):
            best = int(rewards[p, :3, 0].argmax())
            assert [plan.leaves.index(s) for s in first] == [0, 1, 2]
            assert torch.equal(drawn.latents[p, onward], drawn.latents[p, first[best]])
            chosen.add(best)
    assert len(chosen) > 1


def test_trunks_begin_at_initial_noise_of_their_own(tmp_path, tiny_wan_folder):
    """The noise of a trunk's root is that of the same trunk in a tree without a search."""
    trainer = Trainer(made(tmp_path / "search", tiny_wan_folder), CPU)
    _, _, drawn, _ = sampled(trainer)
    plain = {f"{TREE}.kind": "trunk_with_branches"}
    other = Trainer(made(tmp_path / "plain", tiny_wan_folder, **plain), CPU)
    _, _, trunks, _ = sampled(other)
    for p in range(2):
        for root in (0, 1):
            assert torch.equal(drawn.latents[p, root], trunks.latents[p, root])
        assert not torch.equal(drawn.latents[p, 0], drawn.latents[p, 1])


# ------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("final", ["x0", "ode"])
def test_calls_are_those_that_are_planned(tmp_path, tiny_wan_folder, capsys, final):
    config = made(tmp_path, tiny_wan_folder, rollout__final=final, rollout__batch_size=5)
    trainer = Trainer(config, CPU)
    drawn: list[int] = []
    trained: list[int] = []

    def seen(module, args, kwargs) -> None:
        rows = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        (trained if torch.is_grad_enabled() else drawn).append(len(rows))

    trainer.policy.modules["transformer"].register_forward_pre_hook(seen, with_kwargs=True)
    metrics = trainer.iteration()
    # A search: N + S (K - 1) = 4 + 2 x 2 evaluations, S K = 6 previews; two trunks of two prompts.
    assert sum(drawn) == 4 * 8 == metrics["search/evaluations"]
    assert metrics["search/previews"] == 4 * 6 and metrics["search/scored"] == 4 * 7
    assert sum(counting(trainer).calls) == 4 * 7
    assert sum(trained) == 4 * 2
    work = work_of(config, trainer.family, 1)
    assert work.rollout["transformer"] == drawn and work.samples == 4 * 7
    assert [size for update in work.training for size in update["transformer"]] == trained
    plan = visited(config.rollout, trainer.plan(0).schedule)
    assert plan.cost().rollout == 2 * 8 and len(plan.leaves) == 2 * 7
    (tmp_path / "r.yaml").write_text(dump(config))
    assert main(["plan", str(tmp_path / "r.yaml")]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "shared (what runs) 32 8" in said and "rollout shared only 32 24" in said
    assert any("24 previews, which are trained on, and 4 finished samples" in x for x in said)


@pytest.mark.parametrize("steps", [[0, 2], [1, 2]])
def test_latents_that_wait_are_those_that_are_planned(tmp_path, tiny_wan_folder, steps):
    """Searched states and candidates; previews are gone. One that went on is one of these."""
    config = made(tmp_path, tiny_wan_folder, **{f"{TREE}.branch_steps": steps})
    trainer = Trainer(config, CPU)
    _, _, drawn, _ = sampled(trainer)
    work = work_of(config, trainer.family, 1)
    assert work.stored == len({latents.data_ptr() for latents in drawn.latents.values()})
    # While it is drawn all of them are on the device, where they wait for training or not.
    assert work.level == work.stored + work.passing


def test_calls_that_other_processes_need_are_made(tmp_path, tiny_wan_folder, monkeypatch):
    plain = sampled(Trainer(made(tmp_path, tiny_wan_folder), CPU))[3]
    trainer = Trainer(made(tmp_path, tiny_wan_folder), CPU)
    monkeypatch.setattr(type(trainer.engine), "rollout_calls_agree", True)
    needed: list[list[int]] = []

    def one_more(*arguments) -> list[int]:
        needed.append(forwards_per_step(*arguments))
        return [count + 1 for count in needed[-1]]

    monkeypatch.setattr("dancegrpo_fast.sampling.drawing.forwards_per_step", one_more)
    forwards: list[None] = []
    network = trainer.policy.modules["transformer"]
    network.register_forward_pre_hook(lambda *_: forwards.append(None))
    np.testing.assert_array_equal(sampled(trainer)[3], plain)
    # Batches of 8: 4 trees of 1, 3, 1 and 3 states.
    assert needed == [[1, 2, 1, 2]] and len(forwards) == 6 + 4


def test_the_time_of_scores_is_not_that_of_sampling(tmp_path, tiny_wan_folder):
    trainer = Trainer(made(tmp_path, tiny_wan_folder), CPU)
    sampled(trainer)
    assert trainer.searching is not None
    seconds = {"sample": 5.0}
    trainer.searching._seconds = 2.0
    trainer.searching.book(seconds)
    assert seconds == {"sample": 3.0, "score": 2.0}
    assert trainer.seconds["sample"] > 0 and trainer.seconds["score"] > 0


def test_metrics_tell_previews_from_what_was_found(tmp_path, tiny_wan_folder):
    trainer = Trainer(made(tmp_path, tiny_wan_folder), CPU)
    _, _, _, rewards = sampled(trainer)
    assert trainer.searching is not None
    metrics = trainer.searching.metrics()
    assert metrics["reward/mean"] == pytest.approx(rewards.mean())
    # Leaf (s K + k) T + j: the candidates of one state.
    groups = [rewards[p, [(s * 3 + k) * 2 + j for k in range(3)], 0]
              for p in range(2) for s in range(2) for j in range(2)]  # fmt: skip
    assert metrics["reward/std_in_group"] == pytest.approx(np.mean([g.std() for g in groups]))
    assert metrics["searched/mean"] == metrics["searched/counting"]
    finished = trainer.searching._finished
    assert finished.shape == (2, 2, 1)
    assert metrics["searched/mean"] == pytest.approx(finished.mean())
    # The clip to look at is a finished sample, of the first prompt here.
    assert trainer.clip is not None
    assert float(trainer.clip[1].mean()) == pytest.approx(finished[0, 0, 0], abs=1e-6)


# ------------------------------------------------------------------ scores that fail


def failing(trainer: Trainer, numbers: Sequence[int]) -> None:
    counting(trainer).failing = frozenset(numbers)


def trained_edges(trainer: Trainer, rewards: np.ndarray) -> set[tuple[int, int]]:
    """(prompt, leaf position) of what an iteration with these rewards trains."""
    plan = trainer.plan(0)
    advantages = leaf_advantages(rewards, trainer.reward_weights, trainer.config.advantage)
    updates = trainer.schedule_updates(plan, rewards, advantages, [0, 0])
    return {
        (item.prompt, plan.leaves.index(child))
        for update in updates for call in update.calls for item in call.items
        for child, weight in zip(item.children, item.weights, strict=True) if weight
    }  # fmt: skip


def test_a_failed_candidate_is_neither_chosen_nor_trained(tmp_path, tiny_wan_folder):
    changes = {f"{TREE}.branch_steps": [0, 1], f"{TREE}.trunks": 1, "rollout.group_size": 6}
    config = made(tmp_path, tiny_wan_folder, **changes)
    trainer = Trainer(config, CPU)
    _, _, drawn, rewards = sampled(trainer)
    best = int(rewards[0, :3, 0].argmax())
    again = Trainer(replace_output(config, tmp_path / "again"), CPU)
    failing(again, [best])  # The first samples that are scored are prompt 0's candidates.
    plan, _, other, found = sampled(again)
    assert np.isnan(found[0, best, 0]) and np.isfinite(np.delete(found[0, :3, 0], best)).all()
    second = int(np.nanargmax(found[0, :3, 0]))
    (onward,) = [s for s in plan.children[0] if not plan.states[s].trained]
    assert torch.equal(other.latents[0, onward], other.latents[0, plan.leaves[second]])
    assert not torch.equal(other.latents[0, onward], drawn.latents[0, onward])
    everything = {(p, g) for p in range(2) for g in range(6)}
    assert trained_edges(again, found) == everything - {(0, best)}
    metrics = again.iteration()
    assert np.isfinite(metrics["update/grad_norm"]) and metrics["update/skipped"] == 0


def replace_output(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"output": str(folder)})


def test_a_group_that_failed_does_not_end_the_run(tmp_path, tiny_wan_folder):
    """Candidates of prompt 0's first trunk at step 0: its next group is trained all the same."""
    trainer = Trainer(made(tmp_path, tiny_wan_folder), CPU)
    failing(trainer, [0, 1, 2])
    _, _, _, rewards = sampled(trainer)
    failed = {(0, 0), (0, 2), (0, 4)}  # Candidate k at step 0 of trunk 0: leaf k T.
    assert {(p, g) for p, g, _ in np.argwhere(np.isnan(rewards)).tolist()} == failed
    assert trained_edges(trainer, rewards) == {(p, g) for p in range(2) for g in range(12)} - failed
    counting(trainer).calls.clear()
    metrics = trainer.iteration()
    assert metrics["reward/failed"] == pytest.approx(3 / 24)
    assert metrics["update/grad_norm"] > 0 and metrics["update/skipped"] == 0


def test_a_prompt_that_failed_does_not_end_the_run(tmp_path, tiny_wan_folder):
    changes = {"rewards": [{"name": f"{HERE.with_name('tiny_models.py')}:FailsOnFail"}]}
    config = made(tmp_path, tiny_wan_folder, **changes)
    Path(config.data.prompts).write_text("a red square\na fail")
    metrics = Trainer(config, CPU).iteration()
    assert metrics["reward/failed"] == 0.5 and metrics["update/grad_norm"] > 0
    assert np.isfinite(metrics["searched/mean"])


def test_a_reward_that_always_fails_ends_it_with_its_reason(tmp_path, tiny_wan_folder):
    changes = {"rewards": [{"name": f"{HERE.with_name('tiny_models.py')}:AlwaysFails"}]}
    trainer = Trainer(made(tmp_path, tiny_wan_folder, **changes), CPU)
    with pytest.raises(UserError, match=r"all 24 samples of iteration 0 failed \(.*judge is out"):
        trainer.iteration()


def test_a_reward_that_waits_is_asked_between_the_steps(tmp_path, tiny_wan_folder):
    plain = Trainer(made(tmp_path / "here", tiny_wan_folder, "Counting"), CPU)
    waiting = Trainer(made(tmp_path / "there", tiny_wan_folder, "Remote"), CPU)
    np.testing.assert_array_equal(sampled(plain)[3], sampled(waiting)[3])


# ------------------------------------------------------------------ the run


@pytest.mark.parametrize("source", ["recompute", "rollout"])
def test_a_resumed_run_is_the_whole_run(tmp_path, tiny_wan_folder, source):
    changes = {
        "checkpoint.every": 1, "policy.ema_decay": 0.9, "loss.updates": 2, "iterations": 3,
        "loss.old_log_prob": source, "loss.kl_weight": 0.01, "policy.train": "lora",
        "data.prompts_per_iteration": 1, "rollout.offload": True, "loss.clip_range": 0.5,
    }  # fmt: skip
    whole = made(tmp_path / "whole", tiny_wan_folder, **changes)
    train(whole)
    train(made(tmp_path / "half", tiny_wan_folder, **changes | {"iterations": 1}))
    parts = made(tmp_path / "half", tiny_wan_folder, **changes)
    train(parts, resume=True)
    assert_same_run(whole, parts)
    told = metrics_of(whole)
    assert all(line["gate/max_gap"] < 1e-4 and line["update/grad_norm"] > 0 for line in told)


def test_the_ratio_gate_explains_a_gap_in_a_search(tmp_path, tiny_wan_folder):
    trainer = Trainer(made(tmp_path, tiny_wan_folder, policy__train="lora"), CPU)
    score = trainer.score

    def perturbed(*arguments):
        for name, parameter in trainer.policy.trainable().items():
            parameter.data += 0.05 * ("lora_B" in name)
        return score(*arguments)

    trainer.score = perturbed
    with pytest.raises(RatioGateError, match="the batch shape does not explain it"):
        trainer.iteration()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["advantage.credit=leaf"], "advantage.credit = 'leaf': not with rollout.tree.kind = "
         "search: candidates of one state are compared with each other; use siblings"),
        (["rollout.group_size=11"], "rollout.group_size = 11: must be 12, the leaves of this tree "
         "(trunks * steps * branches = 1 * 3 * 4)"),
        (["rollout.tree.branches=2", "rollout.group_size=6"], "advantage.credit = 'siblings': "
         "needs rollout.tree.branches of 3 or more, here 2"),
        (["rollout.tree.branch_steps=[0, 4, 9]"], "rollout.tree.branch_steps = [0, 4, 9]: must "
         "ascend from 0 to at most 8"),
        (["rollout.noise_level=0"], "rollout.noise_level = 0: a policy gradient needs noise"),
        (["rollout.final=sample"], "rollout.final = 'sample': not with rollout.tree.kind = search, "
         "which ends without noise; use x0"),
        (["advantage.best_of_n=4"], "advantage.best_of_n = 4: not with rollout.tree.kind = search: "
         "samples would be previews of different steps; use null"),
        (["rollout.redraw=true"], "rollout.redraw = true: not with rollout.tree.kind = search: "
         "which candidate goes on is known only by its rewards; use false"),
        (["rollout.chunk=4"], "rollout.chunk = 4: not with rollout.tree.kind = search: scores its "
         "candidates between the steps; use null"),
        (["parallel.groups=spread"], "parallel.groups = 'spread': not with rollout.tree.kind = "
         "search: each process searches whole trees; use 'together'"),
        (["loss.reuse_forwards=true"], "loss.reuse_forwards = true: not with rollout.tree.kind = "
         "search: candidates are drawn from evaluations without gradients; use false"),
        (["loss.ratio_norm=true", "loss.old_log_prob=rollout"], "loss.old_log_prob = 'rollout': "
         "ratio_norm needs the rollout's outputs, which a search does not keep; use recompute, or "
         "ratio_norm = false"),
        (["loss.timesteps=[0]"], "loss.timesteps = [0]: kind search trains the steps of "
         "rollout.tree.branch_steps; use that"),
        (["loss.timestep_fraction=0.5"], "loss.timestep_fraction = 0.5: of kind search each "
         "sample has one trained step; use 1, or loss.timestep_scope = group"),
        (["advantage.scope=batch"], "advantage.scope = 'batch': credit siblings normalises inside"),
        (["rollout.tree.noise_scale=2"], "rollout.tree.noise_scale = 2: has no effect with"),
        (["loss.kind=nft"], "rollout.tree.kind = 'search': loss.kind nft draws single chains"),
    ],
)  # fmt: skip
def test_what_a_search_cannot_do_is_refused_before_anything_loads(recipe, changes, message):
    tree = ["rollout.tree={kind: search, branches: 4, branch_steps: [0, 4, 8]}",
            "advantage.credit=siblings"]  # fmt: skip
    found = lines(recipe, tree + changes)
    assert any(message in line for line in found), found


def test_what_only_the_run_knows_is_refused(tmp_path, tiny_wan_folder, monkeypatch):
    def loaded(*_: object) -> None:
        raise AssertionError("networks were loaded first")

    monkeypatch.setattr("dancegrpo_fast.trainer.assemble", loaded)
    config = made(tmp_path, tiny_wan_folder, data__prompts_per_iteration=3)
    with pytest.raises(UserError, match="prompts_per_iteration = 3: .*must be a multiple of 2"):
        Trainer(config, World(0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="must be a multiple of 2"):
        work_of(config, open_family(config.model), 2)
    with pytest.raises(UserError, match="'compares': compares the samples of a prompt"):
        Trainer(made(tmp_path, tiny_wan_folder, "Compares"), CPU)
    rewards = [{"name": f"{HERE}:Counting", "win_rate": "both"}]
    with pytest.raises(UserError, match="compares the samples of a prompt"):
        Trainer(made(tmp_path, tiny_wan_folder, rewards=rewards), CPU)
