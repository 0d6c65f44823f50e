"""One iteration of some tiny runs, recorded; alone, or as a process of `torchrun`.

    torchrun --nproc-per-node 2 tests/distributed_worker.py MODELS OUT

writes OUT/CASE-RANK.pt for every case. `test_distributed` runs the same cases on one process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from tiny_models import tiny_config
from torch.distributed.tensor import DTensor

from dancegrpo_fast import rollout
from dancegrpo_fast.config import ParallelConfig, RunConfig
from dancegrpo_fast.losses.gate import RatioGateError
from dancegrpo_fast.parallel.world import World, leave
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer

LIMIT = 60.0  # A collective that another process never joins fails after this.
TREE = "rollout.tree"


@dataclass(frozen=True)
class Case:
    """A recipe, and rewards [P][G] that replace what the samples earned (the gather still runs)."""

    overrides: dict[str, Any] = field(default_factory=dict)
    experts: int = 1
    rewards: list[list[float]] | None = None
    prompts: str | None = None
    rate: float = 0.1  # Large enough that a wrong gradient shows in the weights.


ONE_PROMPT = {"data.prompts_per_iteration": 1}
CASES = {
    "plain": Case(),
    "lora_kl": Case(
        {"policy.train": "lora", "loss.kl_weight": 0.1, "model.guidance": 2.0}, rate=1.0
    ),
    # 5 leaves of one tree over 2 processes: 3 and 2
    "uneven_tree": Case(ONE_PROMPT | {"rollout.group_size": 5, "loss.micro_batch_size": 2}),
    "subsets": Case(
        {"loss.timestep_fraction": 0.67, "loss.updates": 2, "loss.micro_batch_size": 3}
    ),
    # the second prompt, all that process 1 has, scores NaN
    "nan_prompt": Case(
        {"rewards": [{"name": f"{Path(__file__).parent / 'tiny_models.py'}:FailsOnFail"}]},
        prompts="a red square\na fail",
    ),
    # the best and the worst are both samples of process 0
    "best_of_n": Case(
        ONE_PROMPT | {"advantage.best_of_n": 2, "loss.micro_batch_size": 1},
        rewards=[[3.0, -3.0, 0.5, 0.25]],
    ),
    "siblings": Case(
        ONE_PROMPT
        | {"rollout.group_size": 6, f"{TREE}.kind": "trunk_with_branches", f"{TREE}.branches": 3,
           f"{TREE}.branch_steps": [0, 2], "advantage.credit": "siblings"}
    ),
    "depth": Case(
        ONE_PROMPT
        | {f"{TREE}.kind": "branch_points", f"{TREE}.branches": 2, f"{TREE}.branch_steps": [0, 2],
           "advantage.credit": "depth"}
    ),
    # the first expert runs steps 0 and 1; only step 2 is trained
    "idle_expert": Case(
        {f"{TREE}.kind": "window", f"{TREE}.window_size": 1, f"{TREE}.window_start": 2}, experts=2
    ),
    # process 0 holds the branches of step 0 (first expert), process 1 those of step 2 (second)
    "split_experts": Case(
        ONE_PROMPT
        | {"rollout.group_size": 6, f"{TREE}.kind": "trunk_with_branches", f"{TREE}.branches": 3,
           f"{TREE}.branch_steps": [0, 2]},
        experts=2,
    ),
}  # fmt: skip
CHAINS = {f"{TREE}.kind": "independent_roots", "rollout.noise_level": 0}
CASES |= {
    # 5 samples over 2 processes, of which three points each are trained, in two updates
    "nft": Case(
        CHAINS | ONE_PROMPT
        | {"loss.kind": "nft", "loss.kl_weight": 0.1, "policy.train": "lora", "loss.updates": 2,
           "rollout.group_size": 5, "loss.timestep_fraction": 0.75, "loss.micro_batch_size": 2},
        rate=1.0,
    ),
    # weights are gathered in every forward, and the old policy's put in place between forwards
    "old_policy_gathering": Case(
        CHAINS | {"loss.kind": "nft", "parallel.gather_rollout": False, "loss.updates": 2},
    ),
    "awm": Case(
        CHAINS | {"loss.kind": "awm", "loss.old_weight": 1.0, "loss.clip_range": 0.5},
        experts=2, rate=1.0,
    ),
    # all steps, of two experts, and calls of zero weight at each
    "draft": Case(
        CHAINS | ONE_PROMPT
        | {"loss.kind": "draft", "loss.gradient_from": [0, 1], "rollout.group_size": 5,
           "loss.micro_batch_size": 2, "rewards": [{"name": "colourfulness"}]},
        experts=2,
    ),
}  # fmt: skip
DDP = {"parallel.engine": "ddp"}
CASES |= {
    f"{name}_ddp": replace(CASES[name], overrides=CASES[name].overrides | DDP)
    for name in ("plain", "lora_kl", "subsets", "split_experts", "nft", "draft")
}
# Whole gradients exchanged once; every forward of the rollout gathers; groups over all processes.
CASES["deferred"] = Case({"parallel.defer_reduction": True, "loss.micro_batch_size": 3})
CASES["gathering_rollout"] = Case(
    ONE_PROMPT | {"parallel.gather_rollout": False, "rollout.group_size": 5,
                  "rollout.batch_size": 2}
)  # fmt: skip
# The second update alone trains the second expert, whose old log-probs come before the first one's
# step; every forward of theirs gathers weights, and the average takes slices.
LATER_EXPERT = ONE_PROMPT | {
    f"{TREE}.kind": "independent_roots", "rollout.group_size": 2, "loss.updates": 2,
    "loss.timestep_fraction": 0.34, "policy.ema_decay": 0.9, "parallel.gather_rollout": False,
}  # fmt: skip
CASES["later_expert"] = Case(LATER_EXPERT, experts=2)
CASES["later_expert_awm"] = Case(LATER_EXPERT | CHAINS | {"loss.kind": "awm"}, experts=2)
CASES["spread"] = Case({"parallel.groups": "spread", "loss.micro_batch_size": 3})
CASES["checkpointed"] = Case(
    {"parallel.checkpointing": "full", "parallel.offload_activations": True}
)
CASES["selective"] = Case({"parallel.checkpointing": "selective"})
# A run with all that stands around the iterations. AdamW's first steps have the size of the
# learning rate whatever the gradient's: a larger eps keeps rounding from becoming a step.
WHOLE_RUN = {
    "iterations": 2, "checkpoint.every": 1, "policy.train": "lora", "policy.ema_decay": 0.9,
    "advantage.scope": "running", "optimizer.eps": 1e-4,
}  # fmt: skip


@contextmanager
def recorded_collectives(names: list[str]) -> Iterator[None]:
    """Appends every collective this process issues, with the size it exchanges."""

    def recording(name, original):
        def call(*arguments, **options):
            values = arguments[-1] if name == "all_gather" else (*arguments, None)[0]
            names.append(f"{name} {getattr(values, 'numel', lambda: 0)()}")
            return original(*arguments, **options)

        return call

    patches = [
        mock.patch.object(dist, name, recording(name, getattr(dist, name)))
        for name in ("all_reduce", "all_gather", "broadcast", "barrier")
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def one_config(
    folder: Path, model: Path, overrides: dict, world: World, prompts: str | None = None
) -> RunConfig:
    """The recipe on every process; its prompt file is written by one, before the others read."""
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if prompts:
            (folder / "prompts.txt").write_text(prompts)
        tiny_config(folder, model, overrides)
    world.barrier()
    return tiny_config(folder, model, overrides)


def run_case(name: str, world: World, models: Path, folder: Path) -> dict[str, Any]:
    """One iteration with plain SGD, so that a weight's change is its gradient; what it did."""
    case = CASES[name]
    # No clipping: it would hide a gradient that is twice what it should be.
    overrides = {"optimizer.max_grad_norm": 1e6} | case.overrides
    config = one_config(folder, models / f"wan{case.experts}", overrides, world, case.prompts)
    trainer = Trainer(config, world)
    trainer.engine.optimizers = {
        key: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=case.rate)
        for key, module in trainer.policy.modules.items()
    }
    before = whole_weights(trainer)
    found: dict[str, Any] = {"keys": [], "calls": [], "collectives": []}
    _record(trainer, found)
    if case.rewards:
        score = trainer.score
        trainer.score = lambda *a: 0 * score(*a) + np.array(case.rewards, np.float32)[..., None]
    noise_key = rollout.noise_key

    def recorded_key(base, state, step):
        key = noise_key(base, state, step)
        found["keys"].append(f"{state.index} {step} {key}")
        return key

    with mock.patch.object(rollout, "noise_key", recorded_key):
        with recorded_collectives(found["collectives"]):
            found["metrics"] = trainer.iteration()
    return found | {"before": before, "after": whole_weights(trainer)}


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Trained parameters, gathered from their slices; a collective."""
    return {
        key: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for key, p in trainer.policy.trainable().items()
    }


def _record(trainer: Trainer, found: dict[str, Any]) -> None:
    sample, schedule, batch = trainer.sample, trainer.schedule_updates, trainer.prompts.batch

    def recorded_batch(*arguments):
        rows = batch(*arguments)
        found["prompts"] = [(index, prompt.text) for index, prompt in rows]
        return rows

    def recorded_sample(plan, conditions, *rest):
        drawn = sample(plan, conditions, *rest)
        found["plan"] = repr(plan.states)
        found["roots"] = [state.index for state in plan.states if state.parent < 0]
        found["latents"] = dict(drawn.latents)
        found["leaves"] = [(p, plan.leaves[g]) for p, g in drawn.leaves]
        return drawn

    def recorded_updates(plan, rewards, *rest):
        updates = schedule(plan, rewards, *rest)
        found["rewards"] = rewards.tolist()
        found["divisors"] = [update.divisor for update in updates]
        found["modules"] = [update.modules for update in updates]
        found["planned"] = [call.module for update in updates for call in update.calls]
        found["trained"] = [
            {
                (item.prompt, child): (item.weights[k].item(), item.advantages[k].tolist())
                for call in update.calls
                for item in call.items
                for k, child in enumerate(item.children)
                if item.weights[k]
            }
            for update in updates
        ]
        return updates

    object.__setattr__(trainer.prompts, "batch", recorded_batch)  # a frozen dataclass
    trainer.sample, trainer.schedule_updates = recorded_sample, recorded_updates
    for name, module in trainer.policy.modules.items():
        module.register_forward_hook(
            lambda *_, name=name: found["calls"].append(name) if torch.is_grad_enabled() else None
        )


def whole_run(folder: Path, models: Path, world: World, **overrides: Any) -> RunConfig:
    """The recipe of `WHOLE_RUN`, evaluated on its own training prompts."""
    held_out = {"evaluation.prompts": str(folder / "prompts.txt"), "evaluation.seeds": 1}
    return one_config(folder, models / "wan1", WHOLE_RUN | held_out | overrides, world)


def gate_message(world: World, models: Path, folder: Path) -> str:
    """What the ratio gate says on each process when the last one's adapter is perturbed."""
    # DDP: with slices, a perturbed one would be every process's.
    overrides = {"policy.train": "lora", "parallel.engine": "ddp"}
    config = one_config(folder, models / "wan1", overrides, world)
    trainer = Trainer(config, world)
    score = trainer.score

    def perturbed(*arguments):
        rewards = score(*arguments)
        for name, parameter in trainer.policy.trainable().items():
            if world.rank == world.size - 1 and "lora_B" in name:
                parameter.data += 0.02
        return rewards

    trainer.score = perturbed
    try:
        trainer.iteration()
    except RatioGateError as error:
        return str(error)
    return "passed"


def main(models: Path, out: Path) -> None:
    """Run every case, then a whole run, as one process of several."""
    torch.set_num_threads(1)
    world = World.from_environment(ParallelConfig(timeout_seconds=LIMIT))
    for name in CASES:
        found = run_case(name, world, models, out / name)
        torch.save(found, out / f"{name}-{world.rank}.pt")
    torch.save(gate_message(world, models, out / "gate"), out / f"gate-{world.rank}.pt")
    # Three prompts, one at a time: two draws here and one there, and two experts to gather in each.
    experts = {"model.path": str(models / "wan2"), "evaluation.batch_size": 1, "iterations": 1}
    train(whole_run(out / "experts", models, world, **experts))
    world = World.from_environment(ParallelConfig(timeout_seconds=LIMIT))
    config = whole_run(out / "whole", models, world)
    train(config)  # leaves the group


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
