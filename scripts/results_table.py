"""The README's table "Measured": what each file of benchmarks/results/ says in a cell."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class Measured:
    """A row of "Measured".

    Attributes:
        what: Its first cell.
        file: Of the results folder; None: nothing measures it yet.
        result: Its second cell, from the file's contents.
        timed: It is a time, which other work on the machine makes longer.
    """

    what: str
    file: str | None = None
    result: Callable[[Any], str] = str
    timed: bool = False


def short(value: float, digits: int = 3) -> str:
    """.653, not 0.653."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def spread(values: Sequence[float]) -> str:
    """From the smallest to the largest, rounded."""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def _seeds(demo: Any) -> list[Any]:
    return [run for name, run in demo["runs"].items() if name.startswith("seed ")]


def demo_reward(demo: Any) -> str:
    rewards = [run["reward"] for run in _seeds(demo)]
    gains = ", ".join(short(r["gain"]) for r in rewards)
    errors = ", ".join(f"{r['gain'] / r['standard_error']:.1f}" for r in rewards)
    trained = ", ".join(short(r["trained"]) for r in rewards)
    base = short(rewards[0]["base"])
    return f"{trained} (base {base}): gains of {gains} ({errors} standard errors)"


def demo_diversity(demo: Any) -> str:
    return ", ".join(short(run["diversity"]["ratio"], 2) for run in _seeds(demo))


def demo_controls(demo: Any) -> str:
    shuffled = demo["runs"]["rewards shuffled within groups"]["reward"]
    negated = demo["runs"]["negated reward"]["reward"]  # Its measure is negated too.
    return f"gain {short(shuffled['gain'])}; gain {short(-negated['gain'])}"


def demo_time(demo: Any) -> str:
    return f"{spread([run['wall_seconds'] for run in _seeds(demo)])} s a run"


def loss_speed(ours: str, timed: str) -> Callable[[Any], str]:
    """Of a provider of benchmarks/kernels.py against the others, in one way of timing."""

    def result(kernels: Any) -> str:
        (task,) = (t for t in kernels["tasks"] if t["task"] == "policy loss, 4 x 1M, K = 1")
        rows = {row["provider"]: row for row in task["rows"] if row["timing"] == timed}
        mine = rows[ours]["seconds"]["median"]
        names = {"public, eager": "the public eager formula", "clean, eager": "the clean one",
                 "clean, compiled": "the compiled one"}  # fmt: skip
        times = ", ".join(
            f"{_two(rows[name]['seconds']['median'] / mine)} times as fast as {title}"
            for name, title in names.items()
            if name in rows
        )
        share = rows[ours]["share_of_copy"]
        return f"{mine * 1e3:.3g} ms, {share:.2f} of the copy bandwidth; {times}"

    return result


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def noise_speed(*providers: str) -> Callable[[Any], str]:
    """Values a second of providers of benchmarks/noise.py, 64M float32 values."""

    def result(noise: Any) -> str:
        rates = {
            row["provider"]: row["elements_per_second"]
            for row in noise["results"]
            if (row["size"], row["dtype"]) == ("64M elements", "float32")
        }
        return "; ".join(f"{name}: {rates[name] / 1e6:.0f}M values/s" for name in providers)

    return result


def traffic(counted: Any) -> str:
    def received(pattern: str, stage: str, *places: str) -> str:
        found = counted["patterns"][pattern]["received"].items()
        ways = [(way.split("/"), number) for way, number in found]
        total = sum(n for (of, _, place), n in ways if of == stage and place in places)
        return f"{total / 1e6:.2f} MB"

    rollout = [received(who, "rollout", "between", "inside") for who in ("public", "ours")]
    update = [received(who, "update", "between") for who in ("public", "ours")]
    return f"rollout {', '.join(rollout)}; update phase, between machines {', '.join(update)}"


def op_share(shares: Any) -> str:
    (every,) = (op for op in shares["ops"] if op["op"] == "all of them")
    return f"{every['share']:.2%}"


def search(found: Any) -> str:
    runs = found["results"]
    rewards = {name: statistics.mean(run["reward"]) for name, run in runs.items()}
    budget = [name for name, run in runs.items() if run["budget"] == 80]
    told = ["plain sample", "best of 8", max(budget, key=rewards.__getitem__)]
    return "; ".join(
        f"{name}: {short(rewards[name])} ({runs[name]['evaluations']:.0f} evaluations, "
        f"{runs[name]['reward_calls']:.0f} scored)"
        for name in told
    )


def scoring(rewards: Any) -> str:
    rows = {row["reward"]: row for row in rewards["results"]}
    told = [rows[name] for name in ("clip_score", "imagereward", "hpsv2") if name in rows]
    return "; ".join(
        f"{row['reward']} {row['one_s']:.2f} s alone, {row['batch_s']:.2f} s in a batch of "
        f"{row['batch']}"
        for row in told
    )


def throughput(timed: Any) -> str:
    told = []
    for result in timed["results"]:
        ladder = [r for r in result.get("rows", ()) if r["rung"].startswith("+")]
        if ladder:
            times = result["rows"][0]["seconds"] / ladder[-1]["seconds"]
            tree = result["rollout"].get("tree", {"kind": "shared_root"})["kind"]
            told.append(f"{result['model']}, {tree}: {times:.1f} times")
    return "; ".join(told)


def sharing(timed: Any) -> str:
    """Of one lever: a multiple of all of them would say nothing on a CPU."""
    told = []
    for result in timed["results"]:
        seconds = {row["rung"]: row["seconds"] for row in result["rows"]}
        names = {"the public pattern": "public pattern", "sharing in the rollout only":
                 "+ states shared in the rollout"}  # fmt: skip
        shared = seconds["+ states shared in training"]
        times = [f"{seconds[n] / shared:.2f} times {k}" for k, n in names.items() if n in seconds]
        told.append(f"{result['rollout']['tree']['kind']}: {', '.join(times)}")
    return "; ".join(told)


def scaling(timed: Any) -> str:
    return "; ".join(
        f"{result['model']}, {len(result['points'])} points: {result['largest_error']:.0%}"
        for result in timed["results"]
    )


SPEED = "an iteration at identical maths, all levers, against the public call pattern"
GPU_MODELS = {
    "sd15": "Stable Diffusion 1.5", "flux": "FLUX.1-dev, LoRA", "wan": "Wan2.1 1.3B",
    "hunyuan": "HunyuanVideo, LoRA",
}  # fmt: skip
ROWS = (
    Measured(
        "the demo's held-out reward (64 prompts x 2 seeds, drawn by the stock pipeline from the "
        "exported weights when measured), training seeds 0, 1, 2", "demo_cpu.json", demo_reward,
    ),
    Measured(
        "its diversity (distance between the clips of two seeds, share of the base's)",
        "demo_cpu.json", demo_diversity,
    ),
    Measured(
        "its controls: rewards shuffled within groups; negated reward", "demo_cpu.json",
        demo_controls,
    ),
    Measured(
        "its time on 2 CPU cores, loading and evaluations with it", "demo_cpu.json", demo_time,
        timed=True,
    ),
    Measured(
        "our loss, forward and backward, 4 x 1M elements on 2 CPU threads "
        "([docs/kernels.md](docs/kernels.md))", "kernels_cpu.json",
        loss_speed("native", "wall, 2 threads"), timed=True,
    ),
    Measured(
        "exact noise on the CPU, one thread and two, and torch's", "noise_cpu.json",
        noise_speed("native, 1", "native, 2", "torch normal_, 1"), timed=True,
    ),
    Measured(
        "bytes a process receives in an iteration on 4 processes standing for 2 machines, "
        "counted: public call pattern, ours "
        "([docs/distributed.md](docs/distributed.md#counted))", "traffic_cpu.json", traffic,
    ),
    Measured("share of the fused ops in an iteration of the demo", "iteration_share_cpu.json",
             op_share, timed=True),
    Measured(
        "search on the demo's base model, no training: mean reward", "search_cpu.json", search
    ),
    Measured(
        "scoring a sample on the CPU, random weights of real size", "rewards_cpu.json", scoring,
        timed=True,
    ),
    *(
        Measured(f"speed of rollout and training with states shared, small {title} on the CPU",
                 name, sharing, timed=True)
        for title, name in (("Wan", "throughput_cpu.json"), ("FLUX", "throughput_flux_cpu.json"))
    ),
    Measured(
        "seconds of rollout and training against samples, steps, size and frames, on the CPU: the "
        "planner's products at one rate, largest error", "scaling_cpu.json", scaling, timed=True,
    ),
    Measured("our loss on a GPU", "kernels_gpu.json", loss_speed("triton", "graph"), timed=True),
    Measured("exact noise on a GPU, and torch's", "noise_gpu.json",
             noise_speed("CUDA, graph", "torch normal_, graph"), timed=True),
    *(
        Measured(
            f"{SPEED}: {title} on a GPU", f"throughput_{model}_gpu.json", throughput, timed=True
        )
        for model, title in GPU_MODELS.items()
    ),
    Measured("against other trainers"),
)  # fmt: skip


def measured(root: Path) -> str:
    """The table of results."""
    rows = []
    for row in ROWS:
        path = root / RESULTS / row.file if row.file else None
        if path is None or not path.is_file():
            rows.append((row.what, "not measured", ""))
            continue
        contents = json.loads(path.read_text(encoding="utf-8"))
        try:
            rows.append((row.what, row.result(contents), _at(contents, timed=row.timed)))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path.name}: not as its benchmark writes it ({error!r}); run the benchmark again"
            ) from error
    return table(("what", "result", "measured at"), rows)


def _at(contents: Any, *, timed: bool) -> str:
    where = contents.get("environment", contents)
    commit, changes, _ = where["commit"].partition("+")
    changed = " with changes" if changes else ""
    load = where.get("load")
    # More than two threads waited for each core: times of such a run say little.
    crowded = timed and load is not None and load > 2 * where["cores"]
    busy = f"; load {load:.0f} on {where['cores']} cores" if crowded else ""
    return f"{commit[:7]}{changed}, {where['date'][:10]}{busy}"
