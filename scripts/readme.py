"""Writes the README's tables "What is verified" and "Measured" from benchmarks/results/.

    python scripts/readme.py            after scripts/test --record, scripts/gpu or a benchmark
    python scripts/readme.py --check    exit code 1 if the README is not what it would write

A row without its file says "not measured"; one without a recorded run says "never run".
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dancegrpo_fast.report.verification import (
    CPU,
    FILE,
    PASSED,
    REAL,
    ROOT,
    STOCK,
    TWIN,
    Key,
    Row,
    content_hash,
    newest_rows,
    when,
)

RESULTS = Path("benchmarks/results")

# Name in the recipes, and of the test file; what a reader calls it.
FAMILIES = {
    "sd": "Stable Diffusion 1.4, 1.5",
    "sd3": "Stable Diffusion 3, 3.5",
    "flux": "FLUX.1",
    "qwen_image": "Qwen-Image",
    "qwen_image_edit": "Qwen-Image-Edit",
    "hunyuan_video": "HunyuanVideo, videos and images",
    "skyreels_i2v": "SkyReels-V1 image-to-video",
    "wan": "Wan2.1, Wan2.2 (two experts), TI2V-5B text-to-video",
    "wan_i2v": "Wan2.1, Wan2.2, TI2V-5B image-to-video",
    "custom_family": "your own ([LTX-Video 0.9.0](examples/custom_family.py))",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---------------------------------------------------------------------------- what is verified


def verified(root: Path) -> str:
    """The table of families, and what has run on a GPU."""
    rows = newest_rows(root / FILE)
    recipes: dict[str, list[Path]] = {}
    for path in sorted((root / "recipes").glob("*.yaml")):
        named = re.search(r"^  family: (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        recipes.setdefault(named[1] if named else "", []).append(path)
    lines = []
    for family, title in FAMILIES.items():
        subject = f"family:{family}"
        ours = recipes.get(family, [])
        subjects = {subject, *(f"recipe:{path.stem}" for path in ours)}
        about = [row for key, row in rows.items() if key[0] in subjects]
        lines.append(
            (
                title,
                f"[{_tests(rows.get((subject, TWIN, CPU)))}](tests/families/test_{family}.py)",
                _tests(rows.get((subject, STOCK, CPU))),
                _recipes(ours, rows) if ours else "none",
                _elsewhere(row for row in about if row["what"] == REAL),
                _elsewhere(row for row in about if row["hardware"] != CPU),
            )
        )
    head = ("family", "its tests", "as the stock pipeline", "recipes", "real weights", "GPU")
    return f"{table(head, lines)}\n\n{_provenance(rows.values())}\n\n{_gpu(rows)}"


def _tests(row: Row | None) -> str:
    if row is None:
        return "no record"
    count = row["tests"]
    if row["result"] != PASSED:
        return f"**{count['failed']} failed**"
    skipped = f", {count['skipped']} skipped" if "skipped" in count else ""
    return f"{count['passed']} passed{skipped}"


def _recipes(paths: Sequence[Path], rows: dict[Key, Row]) -> str:
    """How many trained their twin as they stand now."""
    good = 0
    for path in paths:
        row = rows.get((f"recipe:{path.stem}", TWIN, CPU))
        good += row is not None and (row["result"], row["content"]) == (PASSED, content_hash(path))
    return f"{good} of {len(paths)}"


def _elsewhere(rows: Iterable[Row]) -> str:
    said = [f"{row['result']}, {row['hardware']} ({when(row)})" for row in rows]
    return "; ".join(said) or "never run"


def _provenance(rows: Iterable[Row]) -> str:
    places = sorted({(row["date"], when(row)) for row in rows if row["hardware"] == CPU})
    if not places:
        return "Nothing is recorded yet (`scripts/test --record`)."
    return f"Recorded by `scripts/test --record` on a CPU: {'; '.join(w for _, w in places)}."


def _gpu(rows: dict[Key, Row]) -> str:
    steps = [row for (subject, _, _), row in rows.items() if subject == "scripts/gpu"]
    if not steps:
        return "**No part has run on a GPU** (`scripts/gpu` runs what needs one)."
    head = ("step of `scripts/gpu`", "GPU", "result", "at")
    cells = [(row["what"], row["hardware"], row["result"], when(row)) for row in steps]
    return table(head, cells)


# ---------------------------------------------------------------------------- measured


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
        told.append(f"{result['model']}, {result['rollout']['tree']['kind']}: {', '.join(times)}")
    return "; ".join(told)


SPEED = "an iteration at identical maths, all levers, against the public call pattern"
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
    Measured("speed of rollout and training with states shared, small models on the CPU",
             "throughput_cpu.json", sharing, timed=True),
    Measured("our loss on a GPU", "kernels_gpu.json", loss_speed("triton", "graph"), timed=True),
    Measured("exact noise on a GPU, and torch's", "noise_gpu.json",
             noise_speed("CUDA, graph", "torch normal_, graph"), timed=True),
    Measured(f"{SPEED}, real sizes on a GPU", "throughput_gpu.json", throughput, timed=True),
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


# ---------------------------------------------------------------------------- the page

PARTS: dict[str, Callable[[Path], str]] = {"verified": verified, "measured": measured}


def page(root: Path) -> str:
    """The text of the README with both tables written anew.

    Raises:
        ValueError: Of a file that cannot be read.
    """
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, write in PARTS.items():
        pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md: must hold one part from <!-- {name}: ... --> to its end")
        made = write(root)
        text = pattern.sub(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
    return text


def write(root: Path) -> None:
    """Write the README with both tables written anew."""
    made = page(root)
    (root / "README.md").write_text(made, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args(arguments)
    try:
        if not args.check:
            write(args.root)
        elif page(args.root) != (args.root / "README.md").read_text(encoding="utf-8"):
            print("README.md is stale: run python scripts/readme.py", file=sys.stderr)
            return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
