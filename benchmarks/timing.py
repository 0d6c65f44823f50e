"""How the benchmarks measure: interleaved samples, quantiles, a record of the machine, a table.

Times are compared only within one run. Every round takes one sample of every case, in an order that
turns by one place a round: a slow spell of the machine hits all cases alike. A sample repeats its
case until it has lasted `sample_seconds`. A GPU is timed twice: as it appears to a trainer (wall
time of calls that end in one synchronisation), and by replaying a CUDA graph of several calls
between two events, where Python and launches cost nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
_GRAPH_TURNS = 10


@dataclass(frozen=True)
class Times:
    """Seconds per call over all samples: the median and the 20% and 80% quantiles."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """From the samples, in seconds per call."""
        low, median, high = np.quantile(np.asarray(seconds), (0.2, 0.5, 0.8)).tolist()
        return cls(median, low, high, len(seconds))

    def milliseconds(self) -> str:
        """`median (low to high)` in milliseconds."""
        return f"{1e3 * self.median:.3g} ({1e3 * self.low:.3g} to {1e3 * self.high:.3g})"

    def record(self) -> dict[str, float]:
        """For the JSON file; seconds."""
        return {"median": self.median, "q20": self.low, "q80": self.high, "samples": self.samples}


@dataclass(frozen=True)
class Case:
    """Something to be timed.

    Attributes:
        call: Does the work `calls` times; on a GPU it need not wait for it.
        calls: How often one `call()` does the work.
        device: "cpu": wall time. "cuda": wall time to the end of a synchronisation.
        events: Time between two CUDA events instead of wall time.
        threads: `torch.set_num_threads` during its samples; None leaves the present number.
    """

    call: Callable[[], object]
    calls: int = 1
    device: str = "cpu"
    events: bool = False
    threads: int | None = None


def graph_case(*calls: Callable[[], object], turns: int = _GRAPH_TURNS) -> Case:
    """The GPU time alone: replays of a CUDA graph between two events.

    Args:
        calls: The work. Several do the same on other memory, in turn, so that it is read from
            memory and not from a cache.
        turns: How often the graph runs through `calls`.

    Raises:
        RuntimeError: The work cannot be captured (it synchronises, or copies from the host).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compilation, lazy loading and first allocations stay outside the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    return Case(graph.replay, calls=turns * len(calls), device="cuda", events=True)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Sets torch's number of CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def _sample(case: Case, repeats: int) -> float:
    """Seconds of one unit of work, over `repeats` calls."""
    if case.events:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            case.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats / case.calls
    started = time.perf_counter()
    for _ in range(repeats):
        case.call()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats / case.calls


def _repeats(case: Case, sample_seconds: float) -> int:
    """How many calls fill a sample; also the warm-up (first touch, thread teams, clocks)."""
    case.call()
    repeats = 1
    while True:
        seconds = _sample(case, repeats) * repeats * case.calls
        if seconds >= sample_seconds or repeats >= 1 << 20:
            return repeats
        wanted = 1.2 * sample_seconds / max(seconds, 1e-9)
        repeats = min(1 << 20, repeats * max(2, min(100, int(wanted) + 1)))


def interleaved(
    cases: Mapping[str, Case], *, rounds: int = 15, sample_seconds: float = 0.02
) -> dict[str, Times]:
    """Times all cases, one sample of each per round.

    Args:
        cases: Name -> what to time.
        rounds: Samples of each case.
        sample_seconds: The least length of one sample.

    Returns:
        Name -> its times, in the order of `cases`.
    """
    repeats: dict[str, int] = {}
    for name, case in cases.items():
        with threads(case.threads):
            repeats[name] = _repeats(case, sample_seconds)
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            with threads(cases[name].threads):
                seconds[name].append(_sample(cases[name], repeats[name]))
    return {name: Times.of(values) for name, values in seconds.items()}


def copy_call(elements: int, device: str | torch.device) -> tuple[Callable[[], object], int]:
    """A float32 `copy_` between two buffers, and the bytes it moves (read and written)."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8 * elements


# ---------------------------------------------------------------------------- the record


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Date, commit, versions and hardware: what a result must carry to be worth anything."""
    from dancegrpo_fast.ops import native, noise_cuda

    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": (_output("git", "rev-parse", "HEAD") or "unknown") + ("+changes" * bool(changed)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": _version("triton"),
        "native": native.why_not() or native.module().build(),
        "cuda_noise": noise_cuda.build() or "not compiled in",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        record |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "driver": _output(*query) or "unknown",
            "torch_cuda": torch.version.cuda,
        }
    return record


def headline(record: Mapping[str, Any]) -> str:
    """One line for above the table."""
    where = record.get("gpu", f"{record['cpu']}, {record['cores']} cores")
    driver = f", driver {record['driver']}" if "driver" in record else ""
    commit, plus, _ = record["commit"].partition("+")
    at = f"commit {commit[:12]}{' with changes' * bool(plus)}"
    return f"{where}{driver}; torch {record['torch']}; {record['date']}; {at}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table, its columns aligned."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the published table")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes the results, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
