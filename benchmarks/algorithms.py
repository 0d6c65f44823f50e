"""Which algorithm learns most on the demo at equal cost? One row for each (algorithm, seed).

Each algorithm is a recipe with a few fields changed (`algorithm_groups.py`), nothing tuned for it.
A run ends when it has no budget for another iteration. The budget is in model evaluations: a
forward is 1 and a backward 2 a row, counted in the network itself; what a sample costs outside it
was measured (`algorithm_prices.py`). Judged on the recipe's held-out prompts with the initial noise
of the base, paired; standard errors of one seed are over prompts and do not know how much another
training seed would change. Seconds are CPU seconds of one thread, without evaluation, so that other
work on the machine hardly matters.

Rows of an uncommitted state are run again, and --full appends none of them: commit first (results
may be uncommitted).

    python benchmarks/algorithms.py                     # a check: a small budget, seed 0
    python benchmarks/algorithms.py --full              # appends rows that are not there yet
    python benchmarks/algorithms.py --full --seeds 1 2 --only MixGRPO "DiffusionNFT"
    python benchmarks/algorithms.py --table             # what is there, for docs/algorithms.md
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import timing
import torch
from algorithm_groups import GROUPS, TARGET, Group, group_of
from torch import Tensor, nn

from dancegrpo_fast.config import RewardConfig
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.report.evaluate import Difference, Evaluation, evaluate
from dancegrpo_fast.rewards import load_rewards
from dancegrpo_fast.rewards.moving_shape import MovingShape
from dancegrpo_fast.trainer import Trainer

RESULTS = timing.ROOT / "benchmarks" / "results" / "algorithms_cpu.jsonl"
LOOKS = 6  # Held-out evaluations of a full run, at equal parts of its budget.

HEAD = (
    "algorithm", "seeds", "reward", "gain", "s.e.", "of each seed", "diversity", "iterations",
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

    def __init__(self, group: Group, name: str, seed: int, scratch: str) -> None:
        config = group.config(name, seed, scratch)
        self.price = group.price(config)
        self.trainer = Trainer(config, World(0, 1, torch.device("cpu")))
        networks = (*self.trainer.engine.modules.values(), *self.trainer.policy.frozen.values())
        self.meters = [Meter(network) for network in networks]
        self.judge = load_rewards([RewardConfig(name=group.judge)], torch.device("cpu"))
        self.seconds = 0.0

    @property
    def cost(self) -> float:
        """Model evaluations so far, decoding and scoring included."""
        return sum(meter.evaluations for meter in self.meters) + self.price * self.scored

    @property
    def scored(self) -> int:
        """Samples decoded and scored so far; of a search its previews, and what it found."""
        config = self.trainer.config
        rollout = config.rollout
        found = rollout.tree.trunks if rollout.tree.kind == "search" else 0
        samples = config.data.prompts_per_iteration * (rollout.group_size + found)
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


def commit() -> str:
    """The commit that is measured, "+changes" if files differ from it; results may."""
    name = timing.environment()["commit"].partition("+")[0]
    status = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".")
    done = subprocess.run(
        (*status, ":!benchmarks/results"), cwd=timing.ROOT, capture_output=True, text=True
    )
    return name + "+changes" * (done.returncode != 0 or bool(done.stdout.strip()))


def measure(group: Group, name: str, seed: int, *, full: bool, scratch: str) -> dict[str, Any]:
    """One run from base to budget; returns its row."""
    budget, looks = (group.budget[0], LOOKS) if full else (group.budget[1], 1)
    run = Run(group, name, seed, scratch)
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
    config = run.trainer.config
    return {
        "algorithm": name,
        "seed": seed,
        "model": config.model.path,
        "rewards": [reward.name for reward in config.rewards],
        "judge": group.judge,
        "budget": budget,
        "recipe": group.hash(name, budget),
        "changed": list(group.algorithms[name]),
        "base": found.base,
        "trained": found.trained,
        "gain": found.gain,
        "standard_error": found.standard_error,
        "diversity": float(last.distances.mean() / base.distances.mean()),
        "iterations": run.trainer.done,
        "model_evaluations": sum(meter.evaluations for meter in run.meters),
        "scored": run.scored,
        "price_of_a_sample": run.price,
        "cpu_seconds": run.seconds,
        "seconds_to_target": next((s for _, s, gain in curve if gain >= TARGET), None),
        "curve": curve,
        **{key: record[key] for key in ("date", "torch", "native", "cpu")},
        "commit": commit(),
    }


def table(rows: Sequence[Mapping[str, Any]], group: Group, *, full: bool = True) -> list[list[str]]:
    """A line for each algorithm of a group, the best first; means over the seeds there are.

    Of two rows of one recipe and seed the later one counts. The standard error of several seeds is
    the mean of theirs, since they are judged on the same prompts; the seeds' own, where larger.
    """
    lines, missing = [], []
    for name in group.algorithms:
        config, recipe = group.config(name, 0, "scratch"), group.hash(name, group.budget[not full])
        seeds = {row["seed"]: row for row in rows if row["recipe"] == recipe}
        own = [row for _, row in sorted(seeds.items())]
        if not own:
            missing.append([name, "not run", *[""] * (len(HEAD) - 2)])
            continue
        keys = (
            "trained", "gain", "diversity", "iterations", "model_evaluations", "scored",
            "cpu_seconds",
        )  # fmt: skip
        mean = {key: float(np.mean([row[key] for row in own])) for key in keys}
        cost = mean["model_evaluations"] + group.price(config) * mean["scored"]
        gains = [row["gain"] for row in own]
        error = float(np.mean([row["standard_error"] for row in own]))
        if len(own) > 1:
            error = max(error, float(np.std(gains, ddof=1)) / len(own) ** 0.5)
        reached = [row["seconds_to_target"] for row in own if row["seconds_to_target"] is not None]
        to_target = f"{np.mean(reached):.0f}" if len(reached) == len(own) else "not reached"
        line = [
            name, ", ".join(map(str, sorted(seeds))), f"{mean['trained']:.3f}",
            f"{mean['gain']:+.3f}", f"{error:.3f}", " ".join(f"{gain:+.3f}" for gain in gains),
            f"{mean['diversity']:.2f}", f"{mean['iterations']:.0f}",
            f"{mean['model_evaluations']:.0f}", f"{cost:.0f}", f"{mean['cpu_seconds']:.0f}",
            to_target,
        ]  # fmt: skip
        lines.append((mean["gain"], line))
    return [line for _, line in sorted(lines, reverse=True)] + missing


def print_tables(rows: Sequence[Mapping[str, Any]], *, full: bool) -> None:
    """One table for each group."""
    for group in GROUPS:
        price = f"a scored sample being {group.scoring:g} of them"
        if group.gradient:
            price += f", and {group.gradient:g} more where the reward is differentiated"
        print(f"\n{group.title}; {group.budget[not full]} model evaluations a run, {price}\n")
        timing.print_table(HEAD, table(rows, group, full=full))


def main() -> int:
    """Fill rows, or run the short check; print the tables."""
    names = [name for group in GROUPS for name in group.algorithms]
    parser = timing.arguments(__doc__)
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="ALGORITHM",
        help="of the tables' first column; default: all",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    args = parser.parse_args()
    full = args.full or args.table
    path = args.json or (RESULTS if full else None)
    if args.full and path == RESULTS and commit().endswith("+changes"):
        print("rows carry a commit, and files differ from it: commit first", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    if full and path.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    torch.set_num_threads(1)
    there = {(r["recipe"], r["seed"]) for r in rows if not r["commit"].endswith("+changes")}
    with tempfile.TemporaryDirectory() as scratch:
        for seed, name in () if args.table else itertools.product(args.seeds, args.only):
            group = group_of(name)
            if (group.hash(name, group.budget[not full]), seed) in there:
                continue
            changed = " ".join(group.algorithms[name]) or "the recipe"
            print(f"{name}, seed {seed}: {changed}", flush=True)
            row = measure(group, name, seed, full=full, scratch=f"{scratch}/{group.recipe.stem}")
            print(f"  {row['gain']:+.4f} +- {row['standard_error']:.4f}", flush=True)
            rows.append(row)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print_tables(rows, full=full)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
