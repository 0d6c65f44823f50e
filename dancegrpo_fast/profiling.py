"""Where one iteration's time goes: a trace for a viewer, and a page that says the main things.

`dancegrpo-fast train RECIPE --profile N` writes `profile/` in the run's folder: `trace.json.gz`
(Perfetto or chrome://tracing), `summary.md`, and on a GPU `memory.pickle` (pytorch.org/memory_viz).
The main process is profiled; it is slower meanwhile, so times of stages are shares, not speeds.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

_OPERATORS = 20
_SYNCS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize",
          "cudaEventSynchronize")  # fmt: skip
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
             "cudaGraphLaunch")  # The third and fourth are Triton's.
_COLLECTIVES = ("nccl:", "gloo:", "c10d::")
# Frames and ranges, which are no operators.
_PYTHON = re.compile(r"\.py\(|^<|^nn\.Module: |^dancegrpo_fast\.")


class Profile:
    """Profiles one iteration of a run.

    Attributes:
        folder: Where the files go.
        number: Which iteration, counted from 1; None profiles nothing.
    """

    def __init__(self, folder: Path, number: int | None, device: torch.device) -> None:
        self.folder, self.number, self.device = folder, number, device

    @contextmanager
    def of(self, iteration: int, seconds: Mapping[str, float]) -> Iterator[None]:
        """Around an iteration; profiles it if it is the one.

        Args:
            iteration: Counted from 1.
            seconds: The run's seconds by stage, read before and after.
        """
        if iteration != self.number:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        cuda, before = self.device.type == "cuda", dict(seconds)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        if cuda:
            torch.cuda.memory._record_memory_history()
        # Without it events do not say which line called.
        verbose = torch._C._profiler._ExperimentalConfig(verbose=True)
        with _code_kept():
            with profile(
                activities=activities, with_stack=True, experimental_config=verbose
            ) as found:
                yield
            if cuda:
                torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            found.export_chrome_trace(str(self.folder / "trace.json.gz"))
            spent = {name: value - before.get(name, 0.0) for name, value in seconds.items()}
            page = summary(found, spent, iteration, cuda=cuda)
        (self.folder / "summary.md").write_text(page, encoding="utf-8")
        logger.info("profile of iteration %d: %s", iteration, self.folder / "summary.md")


@dataclass(frozen=True)
class Tally:
    """What a profile counts.

    Attributes:
        launches: Of kernels and graphs.
        values: How often the host asked for a tensor's value.
        collectives: Name -> times.
    """

    launches: int
    values: int
    collectives: dict[str, int]


@contextmanager
def _code_kept() -> Iterator[None]:
    """Inside, code that is executed from text or imported stays alive.

    torch keeps the names of Python frames as pointers into their code objects and reads them at the
    end. A module's code is gone once it is imported, in whichever thread (a snapshot's first write
    imports some), and bytes that are no text any more would end the run.
    """
    kept: list[object] = []
    inside = [True]

    def keep(event: str, arguments: tuple[object, ...]) -> None:
        if inside and event == "exec":
            kept.append(arguments[0])

    sys.addaudithook(keep)  # For good: afterwards it only looks at an empty list.
    try:
        yield
    finally:
        inside.clear()
        kept.clear()


def tally(counted: Counter[str]) -> Tally:
    """From the names of a profile's events."""
    collectives = {n: c for n, c in counted.items() if n.startswith(_COLLECTIVES)}
    return Tally(sum(counted[name] for name in _LAUNCHES), counted[_SYNCS[0]], collectives)


def summary(found: profile, spent: Mapping[str, float], iteration: int, *, cuda: bool) -> str:
    """One page of Markdown."""
    events = list(found.events())
    counted = Counter(event.name for event in events)
    told = tally(counted)
    stages = {name: value for name, value in spent.items() if value > 0}
    parts = [
        f"# Iteration {iteration}, profiled (slower than unprofiled: read shares)",
        _table(("stage", "s", "share"), [
            (name, f"{value:.3f}", f"{value / sum(stages.values()):.0%}")
            for name, value in stages.items()
        ]),
        f"Kernel launches: {told.launches}." if cuda else "No GPU: launches are not counted.",
        "## Operators", _operators(found, cuda=cuda),
        "## Waits for values (host syncs)", _waits(events, counted),
        "## Collectives",
        _table(("call", "times"), sorted(told.collectives.items())) if told.collectives
        else "None.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _operators(found: profile, *, cuda: bool) -> str:
    """Those that take longest by themselves."""
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages: list[Any] = [a for a in found.key_averages() if not _PYTHON.search(a.key)]
    averages.sort(key=lambda average: -getattr(average, attribute))
    total = sum(getattr(average, attribute) for average in averages) or 1.0
    rows = [
        (a.key, a.count, f"{own / 1e3:.1f}", f"{own / total:.1%}")
        for a in averages[:_OPERATORS]
        for own in [getattr(a, attribute)]
    ]
    return _table(("operator", "calls", "ms", "share"), rows)


def _waits(events: Sequence[Any], counted: Counter[str]) -> str:
    """How often the host waited for a value, and which lines of ours asked."""
    lines: Counter[str] = Counter()
    for event in events:
        if event.name == _SYNCS[0]:
            frames = [frame for frame in event.stack or () if ".py(" in frame]
            lines[frames[0] if frames else "unknown"] += 1
    kinds = _table(("kind", "times"), [(name, counted[name]) for name in _SYNCS if counted[name]])
    asked = _table(("asked by", "times"), lines.most_common(20))
    return f"{kinds}\n\n{asked}" if lines else kinds


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)
