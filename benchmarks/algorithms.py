"""Which algorithm learns most on the demo at equal cost? One row for each (algorithm, seed).

Each algorithm is `recipes/demo.yaml` with the fields below changed, nothing tuned for it: the same
prompts, samples an iteration, steps and learning rate. A run ends when it has no budget for another
iteration. The budget is in model evaluations: a forward is 1 and a backward 2 a row, counted in the
network itself; to decode and score a sample is 2.35, as `benchmarks/search.py` measured. Judged on
the recipe's held-out prompts with the initial noise of the base, paired; standard errors are over
prompts and do not know how much another training seed would change. Seconds are CPU seconds of
one thread, without evaluation, so that other work on the machine hardly matters.

    python benchmarks/algorithms.py                     # a check: a quarter of the budget, seed 0
    python benchmarks/algorithms.py --full              # appends rows that are not there yet
    python benchmarks/algorithms.py --full --seeds 1 2 --only MixGRPO "DiffusionNFT"
    python benchmarks/algorithms.py --table             # what is there, for docs/algorithms.md
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import timing
import torch
from torch import Tensor, nn

from dancegrpo_fast.config import RewardConfig, RunConfig, load_config
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.report.evaluate import Difference, Evaluation, evaluate
from dancegrpo_fast.rewards import load_rewards
from dancegrpo_fast.rewards.moving_shape import MovingShape
from dancegrpo_fast.trainer import Trainer

RECIPE = timing.ROOT / "recipes" / "demo.yaml"
RESULTS = timing.ROOT / "benchmarks" / "results" / "algorithms_cpu.jsonl"
FULL, SHORT = 36_000, 9_000  # Model evaluations of a run, scoring included.
SCORING = 2.35  # To decode and score a sample, in model evaluations.
LOOKS = 6  # Held-out evaluations of a full run, at equal parts of its budget.
TARGET = 0.03  # Gain whose cost is reported as "seconds to".

CHAINS = "rollout.tree={kind: independent_roots}"
FLOW_GRPO = (
    "rollout.dynamics=flow", CHAINS, "rollout.final=sample", "advantage.std=biased",
    "advantage.scope=batch_std",
)  # fmt: skip
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "DanceGRPO": (
        "rollout.dynamics=dance", "rollout.noise_level=0.3", "rollout.tree={kind: shared_root}",
        "loss.timestep_fraction=0.6",
    ),
    "best-of-n": ("advantage.best_of_n=8",),
    "GDPO": (
        "rewards=[{name: benchmarks/algorithms.py:Colour}, "
        "{name: benchmarks/algorithms.py:Direction}, {name: benchmarks/algorithms.py:Shape}]",
        "advantage.batch_normalise=true",
    ),
    "Flow-GRPO": (*FLOW_GRPO, "loss.kl_weight=0.04", "loss.kl=flow_image"),
    "Flow-GRPO-Fast": (
        "rollout.dynamics=flow", "rollout.noise_level=0.8", "rollout.final=ode",
        "advantage.std=biased", "advantage.scope=batch_std",
    ),
    "Flow-CPS": (),
    "GRPO-Guard": (*FLOW_GRPO, "loss.ratio_norm=true", "loss.timestep_weights=inverse_dt"),
    "MixGRPO": (
        "rollout.dynamics=flow", "rollout.final=ode",
        "rollout.tree={kind: window, window_size: 4, window_order: progressive, "
        "window_iterations: 2}",
    ),
    "MixGRPO-Flash": (
        "rollout.dynamics=flow", "rollout.final=ode",
        "rollout.tree={kind: window, window_size: 4, window_order: progressive, "
        "window_iterations: 2, flash: 0.4}",
    ),
    "TempFlow-GRPO": (
        "rollout.dynamics=flow", "rollout.final=ode",
        "rollout.tree={kind: trunk_with_branches, trunks: 2, branches: 4, "
        "branch_steps: [0, 2, 4, 6]}",
        "advantage.std=biased", "advantage.credit=siblings", "loss.timestep_weights=std",
    ),
    "BranchGRPO": (
        "rollout.dynamics=dance", "rollout.noise_level=0.3",
        "rollout.tree={kind: branch_points, branches: 2, branch_steps: [0, 1, 2, 3, 4], "
        "noise_scale: 4.0}",
        "advantage.credit=depth",
    ),
    "DiffusionNFT": (
        "rollout.noise_level=0", CHAINS, "loss.kind=nft", "loss.timestep_fraction=0.3",
    ),
    "AWM": (
        "rollout.noise_level=0", CHAINS, "loss.kind=awm", "loss.old_weight=1.0",
        "loss.timestep_fraction=0.3",
    ),
}  # fmt: skip
HEAD = (
    "algorithm", "seeds", "gain", "s.e.", "gain / s.e.", "diversity", "iterations",
    "evaluations", "with scoring", "CPU seconds", f"seconds to {TARGET:+g}",
)  # fmt: skip


class _Part(MovingShape):
    """One part of the demo's reward, a reward of its own: GDPO normalises each by itself."""

    part: int

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        return self.parts(videos, prompts)[:, self.part]


class Colour(_Part):
    name, part = "colour", 0


class Direction(_Part):
    name, part = "direction", 1


class Shape(_Part):
    name, part = "shape", 2


class Meter:
    """Model evaluations of a network: rows of its forwards, each three times if one is trained."""

    def __init__(self, module: nn.Module) -> None:
        self.evaluations = 0
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        rows = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.evaluations += len(rows) * (3 if torch.is_grad_enabled() else 1)


class Run:
    """One algorithm from one seed.

    Attributes:
        seconds: CPU seconds of its iterations so far.
    """

    def __init__(self, config: RunConfig) -> None:
        self.trainer = Trainer(config, World(0, 1, torch.device("cpu")))
        networks = (*self.trainer.engine.modules.values(), *self.trainer.policy.frozen.values())
        self.meters = [Meter(network) for network in networks]
        self.judge = load_rewards([RewardConfig(name="moving_shape")], torch.device("cpu"))
        self.seconds = 0.0

    @property
    def cost(self) -> float:
        """Model evaluations so far, decoding and scoring included."""
        return sum(meter.evaluations for meter in self.meters) + SCORING * self.scored

    @property
    def scored(self) -> int:
        """Samples decoded and scored so far."""
        config = self.trainer.config
        samples = config.data.prompts_per_iteration * config.rollout.group_size
        return self.trainer.done * samples

    def iterations(self, budget: float) -> Iterator[int]:
        """Train until another iteration would go beyond the budget; yields how many were done.

        The first always runs. The dearest one so far stands for the next.
        """
        dearest = 0.0
        while not self.trainer.done or self.cost + dearest <= budget:
            before, started = self.cost, time.process_time()
            self.trainer.iteration()
            self.seconds += time.process_time() - started
            dearest = max(dearest, self.cost - before)
            yield self.trainer.done

    def held_out(self) -> Evaluation:
        """The weights there are, or their average, on the held-out prompts; not counted."""
        trainer, config = self.trainer, self.trainer.config
        counted = [meter.evaluations for meter in self.meters]
        with (
            trainer.policy.averaged(), trainer.engine.gathered() as modules, trainer.family.vae(),
        ):  # fmt: skip
            found = evaluate(
                lambda prompts, latents: trainer.draw(modules, prompts, latents),
                PromptSet.load(config.evaluation.prompts or "", field="evaluation.prompts").prompts,
                self.judge,
                config.evaluation,
                latent_shape=trainer.family.latent_shape,
                sample_shape=(config.model.frames, 3, config.model.height, config.model.width),
                world=trainer.world,
            )
        for meter, count in zip(self.meters, counted, strict=True):
            meter.evaluations = count
        return found


def recipe(name: str, seed: int, output: str) -> RunConfig:
    """The demo's recipe with an algorithm's fields; `output` is scratch."""
    return load_config(RECIPE, [*ALGORITHMS[name], f"seed={seed}", f"output={output}"])


def recipe_hash(name: str, budget: float) -> str:
    """Of all that a row depends on but its seed: fields that are given, not defaults of others."""
    given = recipe(name, 0, "scratch").model_dump(mode="json", exclude_unset=True)
    text = json.dumps([given, budget, SCORING], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measure(name: str, seed: int, budget: float, looks: int, scratch: str) -> dict[str, Any]:
    """One run from base to budget; returns its row."""
    run = Run(recipe(name, seed, scratch))
    base = run.held_out()
    curve: list[tuple[int, float, float]] = []

    def look() -> tuple[Evaluation, Difference]:
        last = run.held_out()
        found = Difference.of(base.scores[..., 0], last.scores[..., 0])
        curve.append((round(run.cost), round(run.seconds, 1), round(found.gain, 4)))
        return last, found

    for _ in run.iterations(budget):
        if run.cost >= budget * (len(curve) + 1) / looks:
            last, found = look()
    if not curve or curve[-1][0] != round(run.cost):
        last, found = look()
    record = timing.environment()
    return {
        "algorithm": name,
        "seed": seed,
        "budget": budget,
        "recipe": recipe_hash(name, budget),
        "changed": list(ALGORITHMS[name]),
        "base": found.base,
        "trained": found.trained,
        "gain": found.gain,
        "standard_error": found.standard_error,
        "diversity": float(last.distances.mean() / base.distances.mean()),
        "iterations": run.trainer.done,
        "model_evaluations": sum(meter.evaluations for meter in run.meters),
        "scored": run.scored,
        "cpu_seconds": run.seconds,
        "seconds_to_target": next((s for _, s, gain in curve if gain >= TARGET), None),
        "curve": curve,
        **{key: record[key] for key in ("date", "commit", "torch", "native", "cpu")},
    }


def table(rows: Sequence[Mapping[str, Any]], budget: float) -> list[list[str]]:
    """A line for each algorithm, the best first; means over the seeds there are.

    The standard error of several seeds is that of the mean of independent runs on the same prompts.
    """
    lines, missing = [], []
    for name in ALGORITHMS:
        own = [row for row in rows if row["recipe"] == recipe_hash(name, budget)]
        if not own:
            missing.append([name, "not run", *[""] * (len(HEAD) - 2)])
            continue
        keys = (
            "gain", "diversity", "iterations", "model_evaluations", "scored", "cpu_seconds"
        )  # fmt: skip
        mean = {key: float(np.mean([row[key] for row in own])) for key in keys}
        cost = mean["model_evaluations"] + SCORING * mean["scored"]
        error = float(np.sqrt(np.sum([row["standard_error"] ** 2 for row in own]))) / len(own)
        reached = [row["seconds_to_target"] for row in own if row["seconds_to_target"] is not None]
        to_target = f"{np.mean(reached):.0f}" if len(reached) == len(own) else "not reached"
        seeds = ", ".join(str(row["seed"]) for row in sorted(own, key=lambda row: row["seed"]))
        line = [
            name, seeds, f"{mean['gain']:+.3f}", f"{error:.4f}", f"{mean['gain'] / error:+.1f}",
            f"{mean['diversity']:.2f}", f"{mean['iterations']:.0f}",
            f"{mean['model_evaluations']:.0f}", f"{cost:.0f}", f"{mean['cpu_seconds']:.0f}",
            to_target,
        ]  # fmt: skip
        lines.append((mean["gain"], line))
    return [line for _, line in sorted(lines, reverse=True)] + missing


def main() -> int:
    """Fill rows, or run the short check; print the table."""
    parser = timing.arguments(__doc__)
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    stored = args.full or args.table
    budget, path = (FULL, args.json or RESULTS) if stored else (SHORT, args.json)
    rows: list[dict[str, Any]] = []
    if stored and path.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    torch.set_num_threads(1)
    there = {(row["recipe"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in () if args.table else args.seeds:
            for name in args.only:
                if (recipe_hash(name, budget), seed) in there:
                    continue
                changed = " ".join(ALGORITHMS[name]) or "the recipe"
                print(f"{name}, seed {seed}: {changed}", flush=True)
                row = measure(name, seed, budget, LOOKS if args.full else 1, scratch)
                print(f"  {row['gain']:+.4f} +- {row['standard_error']:.4f}", flush=True)
                rows.append(row)
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(f"{budget} model evaluations a run, a scored sample being {SCORING} of them")
    timing.print_table(HEAD, table(rows, budget))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
