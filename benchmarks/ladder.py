"""The call pattern of public code, the levers over it, and an iteration that runs as they say.

The public pattern (DanceGRPO, fastvideo/train_grpo_flux.py and train_grpo_hunyuan.py):
`sample_reference_model` walks one sample at a time through all steps (batch 1, also through the
steps that samples of a prompt share); `train_one_step` runs one forward and backward of
`grpo_one_step` per sample and trained step; blocks are recomputed in the backward
(`--gradient_checkpointing`). Its re-gathering of sharded weights and its reduction of gradients in
every micro-step are counted in benchmarks/traffic.py; they cost nothing on one process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from counted import Counts, counting, timing_fused
from random_models import SIZES, random_trainer, resized

from dancegrpo_fast.batching import Call, Item, Update
from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.sampling import drawing
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.trees.tree import TreePlan

HERE = Path(__file__)
# Of (samples, loss and gradient norm) between rungs, whose batches may round otherwise. In bfloat16
# small_flux differs from itself in float32 by 0.27 and 0.02; samples of other noise differ by 1.4.
CLOSE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.5, 0.05)}


@dataclass(frozen=True)
class Rung:
    """A way to run the same iteration.

    Attributes:
        name: In the table.
        rollout: States shared in the rollout.
        training: States shared in training.
        batched: The recipe's batch sizes; else 1.
        checkpointing: `parallel.checkpointing`.
        compile: `parallel.compile`; `graphs` is for sweep.py.
    """

    name: str
    rollout: bool = False
    training: bool = False
    batched: bool = False
    checkpointing: str = "full"
    compile: bool | str = False


PUBLIC = Rung("public pattern")
LEVERS: dict[str, dict[str, Any]] = {
    "states shared in the rollout": {"rollout": True},
    "states shared in training": {"training": True},
    "samples batched": {"batched": True},
    "no recomputation": {"checkpointing": "none"},
}

ALL = {field: value for change in LEVERS.values() for field, value in change.items()}
OURS = replace(PUBLIC, name="ours", **ALL)


def ladder(*, compiled: bool, kept: str = "none") -> list[Rung]:
    """The public pattern, levers added up, then each lever alone.

    Args:
        compiled: With one more lever.
        kept: `parallel.checkpointing` of the last lever: "selective" where all does not fit.
    """
    levers = dict(LEVERS)
    if kept != "none":
        del levers["no recomputation"]
        levers["less recomputation"] = {"checkpointing": kept}
    if compiled:
        levers["blocks compiled"] = {"compile": True}
    rungs, sum_of = [PUBLIC], PUBLIC
    for name, change in levers.items():
        sum_of = replace(sum_of, name=f"+ {name}", **change)
        rungs.append(sum_of)
    alone = [replace(PUBLIC, name=f"{n} alone", **c) for n, c in list(levers.items())[1:]]
    return [*rungs, *alone]


# ---------------------------------------------------------------------------- what is run

WINDOW = {"tree": {"kind": "window", "window_size": 2, "window_start": 4}}
TREE = {
    "tree": {"kind": "branch_points", "branch_steps": [0, 3, 6], "branches": 2}, "group_size": 8
}  # fmt: skip
SMALL_VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
MODELS: dict[str, dict[str, Any]] = {
    "small_wan": {
        "family": "wan", "size": "wan21_1_3b", "height": 128, "width": 128, "frames": 17,
        "dtype": "float32", "text": 32, "lora": False, "group_size": 12, "steps": 10, "batch": 12,
        "changes": {
            "transformer": {"num_attention_heads": 2, "ffn_dim": 1024, "num_layers": 6,
                            "text_dim": 64},
            "vae": SMALL_VAE,
        },
    },
    "small_flux": {
        "family": "flux", "size": "flux_dev", "height": 256, "width": 256, "frames": 1,
        "dtype": "float32", "text": 64, "lora": False, "group_size": 12, "steps": 10, "batch": 12,
        "changes": {
            "transformer": {"num_attention_heads": 2, "num_layers": 3, "num_single_layers": 6,
                            "joint_attention_dim": 64, "pooled_projection_dim": 32},
            "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4},
        },
    },
    "sd15": {
        "family": "sd", "size": "sd15", "height": 512, "width": 512, "frames": 1,
        "dtype": "bfloat16", "text": None, "lora": False, "group_size": 16, "steps": 20,
        "batch": 16,
    },
    "flux": {
        "family": "flux", "size": "flux_dev", "height": 720, "width": 720, "frames": 1,
        "dtype": "bfloat16", "text": 512, "lora": True, "group_size": 8, "steps": 10, "batch": 4,
    },
    "wan": {
        "family": "wan", "size": "wan21_1_3b", "height": 480, "width": 832, "frames": 33,
        "dtype": "bfloat16", "text": 512, "lora": False, "group_size": 4, "steps": 10, "batch": 2,
        "kept": "selective",  # Two states without recomputation: 135 GiB by the planner.
    },
    "hunyuan": {
        "family": "hunyuan_video", "size": "hunyuan_video", "height": 480, "width": 480,
        "frames": 53, "dtype": "bfloat16", "text": 256, "lora": True, "group_size": 4, "steps": 4,
        "batch": 1,
    },
}  # fmt: skip


def recipe(name: str, folder: Path, rung: Rung, rollout: dict[str, Any]) -> RunConfig:
    """The iteration of a model as a rung runs it."""
    model = MODELS[name]
    path = SIZES / model["size"]
    if "changes" in model:
        path = resized(model["size"], folder / name, model["changes"])
    prompts = folder / "prompts.txt"
    prompts.write_text("a prompt\n")
    noise = {"dynamics": "ddim", "noise_level": 1.0} if model["family"] == "sd" else {
        "dynamics": "flow", "noise_level": 0.7}  # fmt: skip
    one = {"batch_size": 1}
    drawn = {"group_size": model["group_size"], "steps": model["steps"], **noise}
    return RunConfig.model_validate({
        "output": str(folder / "run"), "iterations": 1,
        "model": {
            "family": model["family"], "path": str(path), "dtype": model["dtype"],
            "height": model["height"], "width": model["width"], "frames": model["frames"],
            "max_text_length": model["text"],
        },
        "data": {"prompts": str(prompts), "prompts_per_iteration": 1},
        "rollout": {
            **drawn, "batch_size": model["batch"], **rollout, **({} if rung.batched else one)
        },
        "rewards": [{"name": f"{HERE.parent / 'random_models.py'}:Contrast"}],
        "loss": {"micro_batch_size": model["batch"] if rung.batched else 1},
        "policy": {"train": "lora" if model["lora"] else "full"},
        "optimizer": {"learning_rate": 1e-6},
        "parallel": {
            "checkpointing": rung.checkpointing, "compile": rung.compile,
            "attention": model.get("attention", "default"),
        },
    })  # fmt: skip


class Subject:
    """A trainer that runs its iterations as a rung says, and counts its network's calls.

    Attributes:
        calls: (whether it is trained, states) -> calls of an iteration.
        found: Samples, loss and gradient norm of the first iteration.
        counts: Launches, waits and collectives of one iteration.
        seconds: Of each timed iteration, by stage; `step` is the optimizer's part of `update`,
            `fused` that of the fused ops in both stages (on the CPU).
    """

    def __init__(self, name: str, rung: Rung, folder: Path, world: World, **rollout: Any) -> None:
        self.rung = rung
        self.config = recipe(name, folder, rung, rollout)
        self.trainer = random_trainer(self.config, world)
        self.calls: Counter[tuple[bool, int]] = Counter()
        self.seconds: list[dict[str, float]] = []
        self.found: dict[str, Any] = {}
        self.counts = Counts()
        network = next(iter(self.trainer.policy.modules.values()))
        network.register_forward_pre_hook(self._count, with_kwargs=True)
        self._stepping = 0.0
        self.trainer.updater._step = self._timed(self.trainer.updater._step)  # type: ignore[method-assign]

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        latents = kwargs.get("hidden_states", args[0] if args else None)
        self.calls[torch.is_grad_enabled(), len(latents)] += 1

    def _timed(self, step: Callable[[Update], list[float]]) -> Callable[[Update], list[float]]:
        def call(update: Update) -> list[float]:
            wait(self.trainer.world.device)
            started = time.perf_counter()
            norms = step(update)
            wait(self.trainer.world.device)
            self._stepping += time.perf_counter() - started
            return norms

        return call

    @property
    def samples(self) -> int:
        """Of an iteration."""
        return self.trainer.owner.size

    def iteration(self, *, count: bool = False) -> None:
        """One iteration. The first is compared, one is counted, the others are timed."""
        trainer, before = self.trainer, dict(self.trainer.seconds)
        device = trainer.world.device
        self.calls.clear()
        self._stepping = 0.0
        with (
            as_public(trainer, self.rung, self.found),
            counting(device) if count else nullcontext(Counts()) as counts,
            timing_fused(device) as fused,
        ):
            metrics = trainer.iteration()
        first = "loss" not in self.found
        if first:
            self.found |= {"loss": metrics["policy/policy"], "norm": metrics["update/grad_norm"]}
        if count:
            self.counts = counts
        if not first and not count:
            spent = {k: v - before.get(k, 0.0) for k, v in trainer.seconds.items()}
            spent |= {"step": self._stepping, "fused": sum(fused.values())}
            self.seconds.append(spent)

    def median(self, *stages: str) -> float:
        """Seconds of some stages together."""
        return float(np.median([sum(s[stage] for stage in stages) for s in self.seconds]))


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def as_public(trainer: Trainer, rung: Rung, found: dict[str, Any]) -> Iterator[None]:
    """Inside, states are not shared where the rung does not share them."""
    draw, schedule = drawing.draw_trees, trainer.schedule_updates

    def drawn(*args: Any, owner: np.ndarray, rank: int, **settings: Any) -> Trajectories:
        if rung.rollout:
            result = draw(*args, owner=owner, rank=rank, **settings)
        else:
            # train_grpo_flux.py, sample_reference_model: `batch_size = 1`, and for each batch_idx
            # of batch_indices one `run_sample_step` through all steps.
            parts = []
            for leaf in np.argwhere(owner == rank):
                alone = np.full_like(owner, -1)
                alone[tuple(leaf)] = rank
                parts.append(draw(*args, owner=alone, rank=rank, **settings))
            result = parts[0]
            for part in parts[1:]:
                result.leaves += part.leaves
                result.latents |= part.latents
                result.log_prob |= part.log_prob
        found.setdefault("samples", result.samples().float().cpu())
        return result

    def scheduled(plan: TreePlan, *args: Any, **settings: Any) -> list[Update]:
        updates = schedule(plan, *args, **settings)
        if rung.training:
            return updates
        return [unshared(u, plan, trainer.config.loss.micro_batch_size) for u in updates]

    with (
        mock.patch.object(drawing, "draw_trees", drawn),
        mock.patch.object(trainer, "schedule_updates", scheduled),
    ):
        yield


def unshared(update: Update, plan: TreePlan, size: int) -> Update:
    """The same update, one item for each sample and step: the loss is a sum over them.

    train_grpo_flux.py, train_one_step: for each sample of samples_batched_list and each `_` of
    `range(train_timesteps)` one `grpo_one_step` and one `loss.backward()`.
    """
    below = Counter(state for leaf in plan.leaves for state in plan.ancestry(leaf))
    calls = []
    for name in update.modules:
        items: list[Item] = []
        for call in update.calls:
            for item in call.items if call.module == name else ():
                for k, child in enumerate(item.children):
                    n = below[child]
                    one = Item(item.prompt, item.state, (child,),
                               item.advantages[k : k + 1] / n, item.weights[k : k + 1] / n)
                    items += [one] * n  # fmt: skip
        calls += [Call(name, tuple(items[i : i + size])) for i in range(0, len(items), size)]
    return Update(tuple(calls), update.divisor, update.modules)


def begin(subjects: Sequence[Subject]) -> None:
    """First iterations, of which one is counted."""
    for subject in subjects:
        # The first one of compiled blocks also tries which kernels are fastest.
        subject.iteration(count=not subject.rung.compile)
        if subject.rung.compile:
            subject.iteration(count=True)


def agreement(found: Sequence[dict[str, Any]], dtype: torch.dtype) -> list[str]:
    """What all rungs found in their first iterations, compared; returns what was.

    Raises:
        SystemExit: They differ by more than the rounding of `dtype`.
    """
    first = found[0]
    samples, others = [0.0], [0.0]
    for other in found[1:]:
        gap = (other["samples"] - first["samples"]).norm() / first["samples"].norm()
        samples.append(float(gap))
        others.append(abs(other["norm"] - first["norm"]) / first["norm"])
        # With ratio 1 and normalised advantages the loss is near 0: of it the difference counts.
        others.append(abs(other["loss"] - first["loss"]))
    worst = float(np.max(samples)), float(np.max(others))  # NaN if any is.
    if not (worst[0] <= CLOSE[dtype][0] and worst[1] <= CLOSE[dtype][1]):
        raise SystemExit(
            f"the rungs disagree by {worst[0]:.1e} (samples) and {worst[1]:.1e} (loss, gradient "
            "norm): no time is printed"
        )
    return [
        f"samples of all rungs agree within {worst[0]:.1e}, loss and gradient norm within "
        f"{worst[1]:.1e}"
    ]
