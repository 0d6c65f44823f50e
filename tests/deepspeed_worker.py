"""A few updates under DDP and every ZeRO stage, recorded, as a process of `torchrun`.

    torchrun --nproc-per-node 2 tests/deepspeed_worker.py MODELS OUT [CASE ...]

writes OUT/CASE-RANK.pt for every case. The iterations of a case are: an update, one whose gradient
is not finite on process 1, an update, a snapshot, an update; then the last again from the snapshot.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_config

from dancegrpo_fast.checkpoint import collect
from dancegrpo_fast.config import ParallelConfig, RunConfig
from dancegrpo_fast.models import export
from dancegrpo_fast.models.family import evaluate
from dancegrpo_fast.parallel.world import World, leave
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer

LIMIT = 60.0  # A collective that another process never joins fails after this.
POISONED, SAVED, ITERATIONS = 1, 3, 4

DDP = {"parallel.engine": "ddp"}
FSDP = {"parallel.engine": "fsdp"}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """Overrides of one ZeRO stage."""
    deepspeed = {"parallel.engine": "deepspeed", "parallel.zero_stage": stage}
    return deepspeed | {f"parallel.{name}": value for name, value in more.items()}


# eps is of the size of the gradients: a step is neither SGD's, which would not show a wrong
# moment, nor Adam's first, which has the size of the learning rate whatever the gradient.
FULL = {"optimizer.eps": 1e-3, "policy.ema_decay": 0.9}
LORA = FULL | {"policy.train": "lora", "loss.kl_weight": 0.1, "model.guidance": 2.0}
# The first of two experts runs steps 0 and 1. Clipped, with the reference of a full training.
EXPERTS = {
    "optimizer.eps": 1e-3, "optimizer.max_grad_norm": 1e-3, "loss.kl_weight": 0.1,
    "rollout.tree.kind": "trunk_with_branches", "rollout.tree.branches": 3,
    "rollout.tree.branch_steps": [0, 2], "rollout.group_size": 6, "data.prompts_per_iteration": 1,
}  # fmt: skip
IDLE = {
    "rollout.tree.kind": "window", "rollout.tree.window_size": 1, "rollout.tree.window_start": 2,
}  # fmt: skip
# Three samples on process 0 and two on process 1: two calls and one at each step of the rollout;
# one process may have nothing to train.
UNEVEN = FULL | {
    "data.prompts_per_iteration": 1, "rollout.group_size": 5, "rollout.batch_size": 2,
    "advantage.best_of_n": 2,
}  # fmt: skip
BF16 = {"model.dtype": "bfloat16"}

# name -> (overrides, experts); what stands before the dot is compared with its `.ddp`
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "full.ddp": (FULL | DDP, 1),
    "full.zero1": (FULL | zero(1), 1),
    "full.zero2": (FULL | zero(2), 1),
    "full.zero3": (FULL | zero(3), 1),
    "full.offload1": (FULL | zero(1, offload_optimizer=True), 1),
    "full.offload2": (FULL | zero(2, offload_optimizer=True), 1),
    "full.offload3": (FULL | zero(3, offload_optimizer=True, checkpointing="full"), 1),
    "lora.ddp": (LORA | DDP, 1),
    "lora.zero2": (LORA | zero(2), 1),
    "lora.zero3": (LORA | zero(3, checkpointing="full"), 1),
    "experts.ddp": (EXPERTS | DDP, 2),
    "experts.zero2": (EXPERTS | zero(2), 2),
    "experts.zero3": (EXPERTS | zero(3), 2),
    "idle.ddp": (FULL | IDLE | DDP, 2),
    "idle.zero1": (FULL | IDLE | zero(1), 2),
    "idle.zero3": (FULL | IDLE | zero(3), 2),
    "uneven.ddp": (UNEVEN | DDP, 1),
    "uneven.zero2": (UNEVEN | zero(2), 1),
    "uneven.zero3": (UNEVEN | zero(3), 1),
    "bf16.ddp": (FULL | BF16 | DDP, 1),
    "bf16.zero2": (FULL | BF16 | zero(2), 1),
    "bf16.zero3": (FULL | BF16 | zero(3, offload_activations=True), 1),
}
VELOCITIES = {
    "ddp": FULL | BF16 | DDP,
    "fsdp": FULL | BF16 | FSDP,
    "zero1": FULL | BF16 | zero(1),
    "zero2": FULL | BF16 | zero(2),
    "zero3": FULL | BF16 | zero(3),
    "lora_ddp": LORA | BF16 | DDP,
    "lora_zero3": LORA | BF16 | zero(3),
}


def configure(
    name: str, overrides: dict[str, Any], experts: int, world: World, models: Path, out: Path
) -> RunConfig:
    """The recipe of a case on every process; one writes its prompt file, before others read it."""
    shared = {"loss.micro_batch_size": 3, "optimizer.learning_rate": 3e-3}
    arguments = (out / name, models / f"wan{experts}", shared | overrides)
    if world.is_main:
        tiny_config(*arguments)
    world.barrier()
    return tiny_config(*arguments)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of a snapshot, whole; a collective."""
    tensors = collect(trainer.policy, trainer.engine.optimizers)
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for key, value in tensors.items()
    }


def run_case(config: RunConfig, world: World) -> dict[str, Any]:
    """What the iterations of a case left behind."""
    trainer = Trainer(config, world)
    found: dict[str, Any] = {"metrics": [], "start": state(trainer)}
    backward = trainer.engine.backward
    for iteration in range(ITERATIONS):
        if iteration == POISONED and world.rank == 1:
            trainer.engine.backward = lambda name, loss: backward(name, loss * float("nan"))
        if iteration == SAVED:
            trainer.save()
            trainer.saver.finish()
        found["metrics"].append(trainer.iteration())
        found[f"after{iteration}"] = state(trainer)
        trainer.engine.backward = backward
    again = Trainer(config, world)
    assert again.resume() and again.done == SAVED
    found["resumed"] = state(again)
    again.iteration()
    found["again"] = state(again)
    found["training"] = any(module.training for module in again.policy.modules.values())
    # Exported is the average of the state after the last iteration.
    export(trainer.family, trainer.policy, Path(config.output) / "final", main=world.is_main)
    found["untouched"] = state(trainer)
    return found


def velocities(config: RunConfig, world: World) -> dict[str, list[torch.Tensor]]:
    """The network's output at every step of the grid, as rollout and as training see it."""
    trainer = Trainer(config, world)
    plan = trainer.plan(0)
    prompts = [prompt for _, prompt in trainer.prompts.batch(0, config.seed, 2)]
    conditions = trainer.embeddings.conditions(prompts)
    draw = torch.Generator().manual_seed(1)
    shape = (2, *trainer.family.latent_shape)
    found: dict[str, list[torch.Tensor]] = {"rollout": [], "training": []}
    # One state of each step: a sample of the first prompt and its neighbour of the second.
    states = {plan.states[state].step: state for state in range(len(plan.states))}
    points = [(states[step], torch.randn(shape, generator=draw)) for step in range(4)]
    names = trainer.family.grid.module_names(plan.schedule)

    def output(network, state, latents):
        places = [(0, state), (1, state)]
        return evaluate(trainer.family, network, plan, conditions, places, latents).detach()

    with trainer.engine.gathered() as networks, torch.no_grad():
        for state, latents in points:
            found["rollout"].append(output(networks[names[0]], state, latents).clone())
    for state, latents in points:
        with trainer.engine.call(names[0], True) as network:
            found["training"].append(output(network, state, latents).clone())
    return found


def whole_run(world: World, models: Path, out: Path, **more: Any) -> RunConfig:
    """A recipe with all that stands around the iterations; its evaluation gathers weights."""
    around = {
        "iterations": 2, "checkpoint.every": 1, "evaluation.seeds": 1,
        "evaluation.prompts": str(out / "whole" / "prompts.txt"),
    }  # fmt: skip
    return configure("whole", LORA | zero(3) | around | more, 1, world, models, out)


def main(models: Path, out: Path, names: list[str]) -> None:
    """Run the cases named, or all of them."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*Mismatch dtype.*")
    world = World.from_environment(ParallelConfig(timeout_seconds=LIMIT))
    for name, (overrides, experts) in CASES.items():
        if not names or name in names:
            config = configure(name, overrides, experts, world, models, out)
            torch.save(run_case(config, world), out / f"{name}-{world.rank}.pt")
    if names:
        return world.close()
    for name, overrides in VELOCITIES.items():
        config = configure(f"velocity_{name}", overrides, 1, world, models, out)
        torch.save(velocities(config, world), out / f"velocity_{name}-{world.rank}.pt")
    train(whole_run(world, models, out))  # leaves the group


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    leave(0)
