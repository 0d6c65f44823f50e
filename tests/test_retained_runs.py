"""Runs with `loss.reuse_forwards` are those without: weights, resume, the plan, two processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_worker import one_config, whole_weights
from launching import launch
from tiny_models import CPU, tiny_config, tiny_wan
from torch.utils.flop_counter import FlopCounterMode

from dancegrpo_fast.checkpoint import weights_hash
from dancegrpo_fast.config import ParallelConfig, RunConfig, UserError
from dancegrpo_fast.losses.gate import RatioGateError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.networks import check
from dancegrpo_fast.parallel.world import World, leave
from dancegrpo_fast.planner import Hardware, Planner
from dancegrpo_fast.planner.tracing import ATTENTION_FLOPS
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories

TREE = "rollout.tree"
REUSE = {"loss.reuse_forwards": True}
ONE = {"rollout.batch_size": 1, "loss.micro_batch_size": 1}


# ---- whole iterations of the real classes --------------------------------------------------------


def iterations(config: RunConfig, count: int = 2) -> dict[str, Any]:
    """Metrics, weights, and the trained forwards that were made in the update phase."""
    torch.set_num_threads(1)
    trainer = Trainer(config, CPU)
    made: list[str] = []
    for name, module in trainer.policy.modules.items():
        module.register_forward_hook(
            lambda *_, name=name: made.append(name)
            if torch.is_grad_enabled() and trainer.current == "update" else None
        )  # fmt: skip
    metrics = [trainer.iteration() for _ in range(count)]
    return {"metrics": metrics, "weights": whole_weights(trainer), "made": made}


def assert_same_but_the_gate(
    plain: dict[str, Any], other: dict[str, Any], tolerance: float
) -> None:
    for first, second in zip(plain["metrics"], other["metrics"], strict=True):
        assert second["gate/applies"] == 0 and "gate/applies" not in first
        rest = {key: value for key, value in first.items() if not key.startswith("gate/")}
        assert rest.keys() | {"gate/applies"} == second.keys()
        for key, value in rest.items():
            assert second[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    for name, weight in plain["weights"].items():
        assert (weight - other["weights"][name]).abs().max() <= tolerance, name


RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora, kl, guidance": {
        "policy.train": "lora", "loss.kl_weight": 0.1, "model.guidance": 2.0,
        "optimizer.learning_rate": 1e-2,
    },
    "window": {f"{TREE}.kind": "window", f"{TREE}.window_size": 2},
    "branches": {f"{TREE}.kind": "branch_points", f"{TREE}.branches": 2,
                 f"{TREE}.branch_steps": [0, 1], "advantage.credit": "depth"},
    "subset": {"loss.timestep_fraction": 0.5, "advantage.best_of_n": 2},
    "drawn again": {"advantage.best_of_n": 2, "rollout.redraw": True},
    "ratio_norm, offload": {"loss.ratio_norm": True, "rollout.offload": True},
    "checkpointed": {"parallel.checkpointing": "full"},
}  # fmt: skip


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_is_bit_for_bit_the_run_with_second_forwards(tmp_path, tiny_wan_folder, changes):
    """Batches of one state: the same products, the same sums in the same order."""
    plain = iterations(tiny_config(tmp_path / "a", tiny_wan_folder, ONE | changes))
    config = tiny_config(tmp_path / "b", tiny_wan_folder, ONE | changes | REUSE)
    other = iterations(config)
    assert_same_but_the_gate(plain, other, 0.0)
    assert plain["made"]
    if "parallel.checkpointing" not in changes and "rollout.redraw" not in changes:
        assert not other["made"]


def test_in_larger_batches_they_agree_up_to_rounding(tmp_path, tiny_wan_folder):
    """A schedule's batches cross levels, a rollout's do not; SGD, so that gradients are compared.

    float32: products of other batches round by 1e-7 of gradients of some 1e-2.
    """
    found = []
    for number, more in enumerate(({}, REUSE)):
        changes = {"rollout.batch_size": 3, "loss.micro_batch_size": 3, **more}
        trainer = Trainer(tiny_config(tmp_path / str(number), tiny_wan_folder, changes), CPU)
        seen: dict[str, torch.Tensor] = {}
        trainer.engine.step = lambda name, seen=seen, trainer=trainer: seen.update(
            {k: p.grad.clone() for k, p in trainer.policy.trainable().items()}
        )
        trainer.iteration()
        found.append(seen)
    scale = max(float(value.abs().max()) for value in found[0].values())
    assert scale > 1e-3
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() <= 1e-5 * scale, name


def test_a_resumed_run_is_the_whole_run(tmp_path, tiny_wan_folder):
    changes = REUSE | {
        "checkpoint.every": 1, "policy.ema_decay": 0.9, "policy.train": "lora", "iterations": 4,
    }  # fmt: skip
    whole = tiny_config(tmp_path / "whole", tiny_wan_folder, changes)
    train(whole)
    train(tiny_config(tmp_path / "half", tiny_wan_folder, changes | {"iterations": 2}))
    parts = tiny_config(tmp_path / "half", tiny_wan_folder, changes)
    train(parts, resume=True)
    hashes, lines = set(), []
    for config in (whole, parts):
        hashes.add(weights_hash(Path(config.output) / "final"))
        lines.append((Path(config.output) / "metrics.jsonl").read_text())
    assert len(hashes) == 1 and lines[0] == lines[1]
    assert lines[0].count("\n") == 4


def test_latents_that_changed_meanwhile_stop_the_run(tmp_path, tiny_wan_folder):
    """What is left of the gate: both log-probs come from one output."""
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, REUSE), CPU)
    score = trainer.score

    def spoiled(drawn: Trajectories, prompts: Any) -> Any:
        rewards = score(drawn, prompts)
        drawn.latents[next(edge for edge in drawn.log_prob)] += 0.5
        return rewards

    trainer.score = spoiled  # type: ignore[method-assign]
    with pytest.raises(RatioGateError, match="log-probs of one forward differ"):
        trainer.iteration()


def test_weights_that_change_in_between_are_refused_by_autograd(tmp_path, tiny_wan_folder):
    """A graph of older weights has no gradient, instead of a wrong one."""
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, REUSE), CPU)
    score = trainer.score

    def moved(*arguments: Any) -> Any:
        rewards = score(*arguments)
        with torch.no_grad():
            for parameter in trainer.policy.trainable().values():
                parameter.mul_(1.01)
        return rewards

    trainer.score = moved  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trainer.iteration()


# ---- the plan ------------------------------------------------------------------------------------

PLANNED = {
    "full": {},
    "recomputed": {"parallel.checkpointing": "full", "loss.kl_weight": 0.01},
    "drawn again": {
        "policy.train": "lora", "advantage.best_of_n": 2, "rollout.redraw": True,
        "rollout.chunk": 4, "loss.timestep_fraction": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", PLANNED.values(), ids=PLANNED)
def test_products_and_graphs_are_those_that_are_counted(tmp_path, tiny_wan_folder, changes):
    """torch's counter around an iteration; and every tensor that autograd stores in the rollout."""
    changes = changes | {"rollout.batch_size": 3, "loss.micro_batch_size": 3}
    torch.set_num_threads(1)
    found = {}
    # The planner draws scores of its own; these choose the same samples.
    scores = np.random.default_rng(0).standard_normal((2, 4, 1))
    for reuse in (False, True):
        config = tiny_config(
            tmp_path / str(reuse), tiny_wan_folder, changes | {"loss.reuse_forwards": reuse}
        )
        trainer = Trainer(config, CPU)
        sizes = trainer.family.latent_shape
        score = trainer.score
        trainer.score = lambda *a, score=score: 0 * score(*a) + scores  # type: ignore
        trainer.embeddings.conditions(trainer.prompts.prompts)
        own = {
            p.untyped_storage().data_ptr()
            for p in trainer.policy.modules["transformer"].parameters()
        }
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, own: Any = own, saved: Any = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = tensor
            return tensor

        sample = trainer.sample

        def watched(*arguments: Any, sample: Any = sample, **named: Any) -> Trajectories:
            with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.detach):
                return sample(*arguments, **named)

        trainer.sample = watched  # type: ignore[method-assign]
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
        with counter:
            trainer.iteration()
        estimate = Planner(config, trainer.family).estimate(Hardware(1), cuda=False)
        flops, phases = estimate.flops, estimate.memory.phases
        assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)
        found[reuse] = flops["train"]
        held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        if not reuse:
            assert not held and "graphs" not in phases["rollout"]
            continue
        # A recomputed block stores more than its inputs while it runs, which the hooks see too.
        if "parallel.checkpointing" not in changes:
            assert phases["rollout"]["graphs"] == pytest.approx(held, rel=0.05)
        assert phases["train"]["graphs"] == phases["rollout"]["graphs"] > np.prod(sizes)
        assert ("graphs" in phases["decode"]) == (not config.rollout.redraw)
        assert "graphs" not in phases["step"]
    assert found[True] < found[False]


def test_the_plan_knows_which_engine_it_takes(tmp_path, tiny_wan_folder):
    changes = REUSE | {"parallel.engine": "ddp"}
    config = tiny_config(tmp_path, tiny_wan_folder, changes)
    planner = Planner(config, open_family(config.model))
    best = planner.recommend(Hardware(2))
    assert best is not None and best[0].config.parallel.engine == "ddp"
    with pytest.raises(UserError, match="parallel.engine = 'fsdp': on several GPUs"):
        planner.estimate(Hardware(2), ParallelConfig())


# ---- two processes -------------------------------------------------------------------------------

DDP = ONE | {"parallel.engine": "ddp"}
# 5 samples of one prompt over 2 processes; and a pair that process 0 holds alone.
CASES: dict[str, tuple[dict[str, Any], int, list[list[float]] | None]] = {
    "full": (DDP, 1, None),
    "uneven lora": (
        DDP | {"policy.train": "lora", "data.prompts_per_iteration": 1, "rollout.group_size": 5},
        1, None,
    ),
    "all of one process": (
        DDP | {"data.prompts_per_iteration": 1, "advantage.best_of_n": 2}, 1,
        [[3.0, -3.0, 0.5, 0.25]],
    ),
    "experts": (
        DDP | {"data.prompts_per_iteration": 1, "rollout.group_size": 6,
               f"{TREE}.kind": "trunk_with_branches", f"{TREE}.branches": 3,
               f"{TREE}.branch_steps": [0, 2]},
        2, None,
    ),
}  # fmt: skip
# Process 1 has one sample that failed beside a trained one, and evaluates the trained rows again.
FAILED = "a failed row"
FAILURE: tuple[dict[str, Any], int, list[list[float]]] = (
    {"parallel.engine": "ddp", "data.prompts_per_iteration": 1, "rollout.batch_size": 2,
     "loss.micro_batch_size": 2},
    1, [[3.0, -3.0, float("nan"), 0.25]],
)  # fmt: skip


def recorded(folder: Path, models: Path, world: World, name: str, more: dict[str, Any]) -> Any:
    """Metrics and weights of an iteration, as one process of two, and what it asked the other."""
    changes, experts, rewards = CASES[name] if name in CASES else FAILURE
    trainer = Trainer(one_config(folder, models / f"wan{experts}", changes | more, world), world)
    score, asked = trainer.score, []
    if rewards is not None:
        given = np.array(rewards, np.float32)[..., None]
        trainer.score = lambda *a: 0 * score(*a) + given  # type: ignore[method-assign]
    if name == FAILED:
        sample = trainer.sample
        trainer.sample = lambda *a, **named: with_failed_row(sample(*a, **named))  # type: ignore
    ask = trainer.stopping.ask
    trainer.stopping.ask = lambda **named: (asked.append(1), ask(**named))[1]  # type: ignore
    metrics = trainer.iteration()
    return {"metrics": [metrics], "weights": whole_weights(trainer), "asked": len(asked)}


def with_failed_row(drawn: Trajectories) -> Trajectories:
    """The third sample's own outputs are NaN."""
    failed = {(0, s) for s in drawn.plan.ancestry(drawn.plan.leaves[2])[1:]}
    for number, (places, output) in enumerate(drawn.graphs):
        broken = torch.ones(len(places), 1, 1, 1, 1)
        broken[[place in failed for place in places]] = torch.nan
        drawn.graphs[number] = (places, output * broken)
    return drawn


def main(models: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = World.from_environment(ParallelConfig(timeout_seconds=60.0))
    found: dict[str, Any] = {}
    for name in (*CASES, FAILED):
        found[name] = [
            recorded(out / f"{name}-{number}", models, world, name, more)
            for number, more in enumerate(({}, REUSE))
        ]
    try:
        Trainer(one_config(out / "fsdp", models / "wan1", ONE | REUSE, world), world)
    except UserError as error:
        found["fsdp"] = str(error)
    torch.save(found, out / f"{world.rank}.pt")
    world.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes recorded: one launch."""
    out = tmp_path_factory.mktemp("two")
    for experts in (1, 2):
        tiny_wan(out / f"wan{experts}", experts=experts)
    assert not launch(Path(__file__), out, out).returncode
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_same_update(two, name):
    """Sums of two processes' sums: bit for bit DDP's, whose buckets add the same two numbers."""
    for found in two:
        plain, other = found[name]
        assert_same_but_the_gate(plain, other, 0.0)
        assert plain["asked"] == other["asked"] == two[0][name][0]["asked"]
    for key, weight in two[0][name][1]["weights"].items():
        assert torch.equal(weight, two[1][name][1]["weights"][key])


def test_forwards_that_one_process_alone_makes_again_ask_the_other_nothing(two):
    """DDP would send its tables round in a forward. Batches cross levels in the plain run only:
    sums of other orders round by some 1e-6."""
    norms = [[run["metrics"][0]["update/grad_norm"] for run in found[FAILED]] for found in two]
    assert norms[0] == norms[1]
    assert norms[0][1] == pytest.approx(norms[0][0], rel=1e-4)
    for key, weight in two[0][FAILED][1]["weights"].items():
        assert torch.equal(weight, two[1][FAILED][1]["weights"][key])


def test_an_engine_is_refused_before_anything_is_loaded(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, REUSE)
    family = open_family(config.model)
    check(config, family, CPU)
    with pytest.raises(UserError, match="not with fsdp on 2 processes"):
        check(config, family, World(0, 2, torch.device("cpu")))


def test_engines_that_were_not_verified_are_refused(two):
    for found in two:
        assert "not with fsdp on 2 processes" in found["fsdp"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
