"""One training iteration, stage by stage, and what each lever is worth at identical maths.

    python benchmarks/throughput.py                          small Wan and FLUX on the CPU
    python benchmarks/throughput.py --model wan --full       real sizes, random weights, one GPU
    python benchmarks/throughput.py --scaling                time against G, steps, frames, size
    ... --json PATH

The ladder begins at the call pattern of public code and adds one lever after the other; each lever
also stands alone. All rungs draw the same samples and make the same update: before any time is
printed, samples, loss and gradient norm of the first iteration are compared (1e-4). "Predicted" is
counts of network calls times the time of such a call, measured alone in the same rounds: what the
sum misses are latents, noise, losses, the optimizer and Python.

The public pattern (DanceGRPO, fastvideo/train_grpo_flux.py and train_grpo_hunyuan.py):
`sample_reference_model` walks one sample at a time through all steps (batch 1, also through the
steps that samples of a prompt share); `train_one_step` runs one forward and backward of
`grpo_one_step` per sample and trained step; blocks are recomputed in the backward
(`--gradient_checkpointing`). Its re-gathering of sharded weights and its reduction of gradients in
every micro-step are counted in benchmarks/traffic.py; they cost nothing on one process.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timing
import torch
from random_models import SIZES, random_trainer, resized
from torch import Tensor

from dancegrpo_fast import trainer as trainer_module
from dancegrpo_fast.batching import Call, Item, Update
from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models import Conditions
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.planner.network import Networks
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.tree import TreePlan

HERE = Path(__file__)
CLOSE = 1e-4  # Of samples, loss and gradient norm between rungs.


@dataclass(frozen=True)
class Rung:
    """A way to run the same iteration.

    Attributes:
        name: In the table.
        rollout: States shared in the rollout.
        training: States shared in training.
        batched: The recipe's batch sizes; else 1.
        checkpointing: `parallel.checkpointing`.
        compile: `parallel.compile`.
    """

    name: str
    rollout: bool = False
    training: bool = False
    batched: bool = False
    checkpointing: str = "full"
    compile: bool = False


PUBLIC = Rung("public pattern")
LEVERS: dict[str, dict[str, Any]] = {
    "states shared in the rollout": {"rollout": True},
    "states shared in training": {"training": True},
    "samples batched": {"batched": True},
    "no recomputation": {"checkpointing": "none"},
}


def ladder(*, compiled: bool) -> list[Rung]:
    """The public pattern, levers added up, then each lever alone."""
    levers = LEVERS | ({"blocks compiled": {"compile": True}} if compiled else {})
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
        "dtype": "bfloat16", "text": 512, "lora": True, "group_size": 12, "steps": 16, "batch": 4,
    },
    "wan": {
        "family": "wan", "size": "wan21_1_3b", "height": 480, "width": 832, "frames": 33,
        "dtype": "bfloat16", "text": 512, "lora": False, "group_size": 4, "steps": 10, "batch": 2,
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
        seconds: Of each timed iteration, by stage.
    """

    def __init__(self, name: str, rung: Rung, folder: Path, world: World, **rollout: Any) -> None:
        self.rung = rung
        self.config = recipe(name, folder, rung, rollout)
        self.trainer = random_trainer(self.config, world)
        self.calls: Counter[tuple[bool, int]] = Counter()
        self.seconds: list[dict[str, float]] = []
        self.found: dict[str, Any] = {}
        network = next(iter(self.trainer.policy.modules.values()))
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        latents = kwargs.get("hidden_states", args[0] if args else None)
        self.calls[torch.is_grad_enabled(), len(latents)] += 1

    def iteration(self) -> None:
        """One iteration; the first is compared, later ones are timed."""
        trainer, before = self.trainer, dict(self.trainer.seconds)
        self.calls.clear()
        first = "loss" not in self.found
        with as_public(trainer, self.rung, self.found), counted_syncs(first) as syncs:
            metrics = trainer.iteration()
        if first:
            self.found["syncs"] = len(syncs)
            self.found |= {"loss": metrics["policy/policy"], "norm": metrics["update/grad_norm"]}
            return
        spent = {k: v - before.get(k, 0.0) for k, v in trainer.seconds.items()}
        self.seconds.append(spent)

    def median(self, *stages: str) -> float:
        """Seconds of some stages together."""
        return float(np.median([sum(s[stage] for stage in stages) for s in self.seconds]))


@contextmanager
def counted_syncs(wanted: bool) -> Iterator[list[Any]]:
    """Inside, waits of the host for the GPU are collected."""
    if not wanted or not torch.cuda.is_available():
        yield []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list[Any] = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [w for w in caught if "synchroniz" in str(w.message)]


@contextmanager
def as_public(trainer: Trainer, rung: Rung, found: dict[str, Any]) -> Iterator[None]:
    """Inside, states are not shared where the rung does not share them."""
    draw, schedule = trainer_module.draw_trees, trainer.schedule_updates

    def drawn(*args: Any, owner: np.ndarray, rank: int, **settings: Any) -> Trajectories:
        if rung.rollout:
            result = draw(*args, owner=owner, rank=rank, **settings)
        else:
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
        mock.patch.object(trainer_module, "draw_trees", drawn),
        mock.patch.object(trainer, "schedule_updates", scheduled),
    ):
        yield


def unshared(update: Update, plan: TreePlan, size: int) -> Update:
    """The same update, one item for each sample and step: the loss is a sum over them."""
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


# ---------------------------------------------------------------------------- measuring


def gate(subjects: Sequence[Subject]) -> list[str]:
    """First iterations of all rungs, compared; returns what was compared."""
    for subject in subjects:
        subject.iteration()
    first, worst = subjects[0].found, 0.0
    for other in (s.found for s in subjects[1:]):
        scale = first["samples"].abs().mean()
        worst = max(worst, float((other["samples"] - first["samples"]).abs().max() / scale))
        apart = abs(other["norm"] - first["norm"]) / first["norm"]
        # With ratio 1 and normalised advantages the loss is near 0: of it the difference counts.
        worst = max(worst, apart, abs(other["loss"] - first["loss"]))
    if not worst <= CLOSE:
        raise SystemExit(f"the rungs disagree by {worst:.1e}: nothing is timed")
    return [f"samples, loss and gradient norm of all rungs agree within {worst:.1e}"]


def unit_costs(subject: Subject, rounds: int) -> dict[tuple[bool, int], float]:
    """Seconds of one network call of each kind that the subject makes."""
    trainer = subject.trainer
    family, device = trainer.family, trainer.world.device
    name, module = next(iter(trainer.policy.modules.items()))
    prompts = trainer.prompts.prompts[:1]
    row = trainer.embeddings.conditions(prompts)

    def call(trained: bool, batch: int) -> Callable[[], object]:
        latents = torch.randn(batch, *family.latent_shape, device=device)
        timesteps = torch.full((batch,), 500.0, device=device)
        conditions: Conditions = row.select([0] * batch)

        def forward() -> None:
            with torch.set_grad_enabled(trained):
                output: Tensor = family.model_output(module, latents, timesteps, conditions, name)
                if trained:
                    output.float().square().mean().backward()

        return forward

    kinds = sorted(subject.calls)
    cases = {
        f"{trained}-{batch}": timing.Case(call(trained, batch), device=device.type)
        for trained, batch in kinds
    }
    found = timing.interleaved(cases, rounds=rounds, sample_seconds=0.05)
    module.zero_grad(set_to_none=True)
    return {kind: found[f"{kind[0]}-{kind[1]}"].median for kind in kinds}


def flops(subject: Subject) -> float:
    """Products of the subject's network calls, counted by the planner's traces."""
    networks = Networks(subject.config, subject.trainer.family)
    name = subject.trainer.family.grid.networks[0]
    cuda = subject.trainer.world.device.type == "cuda"
    trace = networks.call(name, 1, subject.rung.checkpointing, gathered=False, cuda=cuda)
    return sum(
        count * batch * (trace.train_flops if trained else trace.forward_flops)
        for (trained, batch), count in subject.calls.items()
    )


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    case = timing.Case(lambda: a @ b, device=device.type)
    return 2 * n**3 / timing.interleaved({"mm": case}, rounds=7, sample_seconds=0.2)["mm"].low


def measure(name: str, rungs: Sequence[Rung], rounds: int, **rollout: Any) -> dict[str, Any]:
    """The table of a model."""
    world = World.from_environment()
    device = world.device
    with tempfile.TemporaryDirectory() as folder:
        subjects = [Subject(name, rung, Path(folder), world, **rollout) for rung in rungs]
        agreed = gate(subjects)
        for turn in range(rounds):
            for subject in subjects[turn % len(subjects) :] + subjects[: turn % len(subjects)]:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                subject.iteration()
                if device.type == "cuda":
                    subject.seconds[-1]["peak"] = float(torch.cuda.max_memory_allocated())
        best = peak(device, subjects[0].trainer.family.dtype)
        rows = [_row(subject, best) for subject in subjects]
    return {"model": name, "rollout": rollout, "agreement": agreed, "peak_flops": best,
            "rows": rows}  # fmt: skip


def _row(subject: Subject, best: float) -> dict[str, Any]:
    calls, products = dict(subject.calls), flops(subject)
    units = unit_costs(subject, 5)  # Makes calls of its own.
    seconds = subject.median("sample", "update")
    predicted = sum(units[kind] * count for kind, count in calls.items())
    row = {
        "rung": subject.rung.name,
        "forwards": sum(n * b for (t, b), n in calls.items() if not t),
        "trained": sum(n * b for (t, b), n in calls.items() if t),
        "calls": sum(calls.values()),
        "predicted_seconds": predicted, "seconds": seconds,
        "sample_seconds": subject.median("sample"), "update_seconds": subject.median("update"),
        "score_seconds": subject.median("score"),
        "share_of_peak": products / seconds / best,
    }  # fmt: skip
    if subject.seconds and "peak" in subject.seconds[0]:
        row["peak_bytes"] = max(s["peak"] for s in subject.seconds)
        row["host_syncs"] = subject.found["syncs"]
    return row


def show(result: dict[str, Any]) -> None:
    """Print a model's table."""
    rows = result["rows"]
    first = rows[0]
    print(f"\n{result['model']} {result['rollout'] or ''}: {result['agreement'][0]}")
    timing.print_table(
        ("", "states drawn", "trained", "calls", "predicted", "measured", "s", "of peak"),
        [
            (
                row["rung"], row["forwards"], row["trained"], row["calls"],
                f"{first['predicted_seconds'] / row['predicted_seconds']:.2f}x",
                f"{first['seconds'] / row['seconds']:.2f}x",
                f"{row['seconds']:.2f}", f"{row['share_of_peak']:.0%}",
            )
            for row in rows
        ],
    )  # fmt: skip


def scaling(name: str, rounds: int) -> dict[str, Any]:
    """Seconds and products against G, steps, frames and size, one changed at a time."""
    ours = replace(PUBLIC, name="ours", **{k: v for c in LEVERS.values() for k, v in c.items()})
    base = MODELS[name]
    axes = {"group_size": (4, 8, 12), "steps": (5, 10, 15), "height": (64, 128, 192),
            "frames": (1, 9, 17)}  # fmt: skip
    points = []
    for axis, values in axes.items():
        for value in values:
            on_model = axis in ("height", "frames")
            if on_model and base["frames"] == 1 and axis == "frames":
                continue
            change = {axis: value} | ({"width": value} if axis == "height" else {})
            with mock.patch.dict(MODELS, {name: base | change}):
                rollout = {} if on_model else change
                (row,) = measure(name, [ours], rounds, **rollout)["rows"]
                points.append({"axis": axis, "value": value, **row})
            print(f"{axis} = {value}: {points[-1]['seconds']:.2f} s")
    return {"model": name, "points": points}


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tree", action="store_true", help="only the branching tree")
    parser.add_argument("--scaling", action="store_true", help="time against G, steps, sizes")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    names = args.model or (["sd15", "flux", "wan", "hunyuan"] if cuda else
                           ["small_wan", "small_flux"])  # fmt: skip
    environment = timing.environment(args.device)
    print(timing.headline(environment))
    results: list[dict[str, Any]] = []
    for name in names:
        if args.scaling:
            results.append(scaling(name, args.rounds))
            continue
        started = time.perf_counter()
        window = {} if name == "hunyuan" else WINDOW
        if not args.tree:
            rungs = ladder(compiled=cuda and args.full)
            results.append(measure(name, rungs, args.rounds, **window))
            show(results[-1])
        if not cuda:
            rungs = ladder(compiled=False)
            tree = [PUBLIC, rungs[2], rungs[len(LEVERS)]]
            results.append(measure(name, tree, args.rounds, **TREE))
            show(results[-1])
        print(f"{time.perf_counter() - started:.0f} s")
    timing.write_json(args.json, {"environment": environment, "results": results})


if __name__ == "__main__":
    main()
