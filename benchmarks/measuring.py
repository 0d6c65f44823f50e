"""Times, counts and products of one iteration of each rung: a row of the table each.

On a GPU one rung after the other is in memory, and scripts/gpu_models cuts a model off after ten
minutes: the rungs that say most come first, and none begins that would not end in time.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from ladder import Rung, Subject, agreement, begin
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import Conditions
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.planner.network import Networks
from dancegrpo_fast.planner.tracing import Trace


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


def flops(subject: Subject, traces: dict[str, Trace]) -> float:
    """Products of the subject's network calls, counted by the planner's traces.

    Args:
        subject: Whose calls they are.
        traces: By `parallel.checkpointing`; a new one is added, which takes long for many blocks.
    """
    kind = subject.rung.checkpointing
    if kind not in traces:
        networks = Networks(subject.config, subject.trainer.family)
        name = subject.trainer.family.grid.networks[0]
        cuda = subject.trainer.world.device.type == "cuda"
        traces[kind] = networks.call(name, 1, kind, gathered=False, cuda=cuda)
    trace = traces[kind]
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


def measure(
    name: str, rungs: Sequence[Rung], rounds: int, *, seconds: float = math.inf, **rollout: Any
) -> dict[str, Any]:
    """The table of a model; no time is in it where the rungs disagree.

    Args:
        name: Of the model.
        rungs: The first one is what the others are compared with.
        rounds: Timed iterations of each.
        seconds: On a GPU: a rung that would take as long as the longest so far, and end later than
            this, is not begun.
        rollout: Overrides of the recipe's section.

    Returns:
        `rows` in the order of the rungs; `not_run` says which of them did not fit, and why.
    """
    world, started = World.from_environment(), time.perf_counter()
    found: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    traces: dict[str, Trace] = {}
    not_run: list[tuple[str, str]] = []
    agreed: list[str] = []
    best, longest = 0.0, {False: 0.0, True: 0.0}  # By whether blocks are compiled.
    # Rungs take turns on a CPU, which has other work too; a GPU holds one network of a real size.
    cuda = world.device.type == "cuda"
    for group in [[rung] for rung in by_worth(rungs)] if cuda else [rungs]:
        begun = time.perf_counter()
        compiled = bool(group[0].compile)
        if cuda and begun - started + max(longest[False], longest[compiled]) > seconds:
            not_run.append((group[0].name, f"it might not end within {seconds:.0f} s"))
            continue
        torch._dynamo.reset()  # Graphs are kept by the blocks' class, also those of networks gone.
        subjects: list[Subject] = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                for rung in group:
                    subjects.append(Subject(name, rung, Path(folder), world, **rollout))
                _run(subjects, rounds, seconds / 5)
                best = best or peak(world.device, subjects[0].trainer.family.dtype)
                rows |= {s.rung.name: _row(s, best, traces) for s in subjects}
            except torch.cuda.OutOfMemoryError as error:
                not_run.append((group[0].name, str(error).splitlines()[0]))
            except (RuntimeError, UserError) as error:
                if not cuda:
                    raise
                not_run.append((group[0].name, f"FAILED: {error}"[:400]))
            else:
                found |= {s.rung.name: s.found for s in subjects}
                # At once: what disagrees at the first rungs must not take the time of all.
                agreed = agreement(list(found.values()), subjects[0].trainer.family.dtype)
        del subjects
        gc.collect()  # A subject and its hooks hold each other.
        if cuda:
            took = time.perf_counter() - begun
            longest[compiled] = max(longest[compiled], took)
            print(f"{name}: {group[0].name}: {took:.0f} s", flush=True)
        if rungs[0].name not in rows:
            break  # There is nothing to compare with.
    return {"model": name, "rollout": rollout, "agreement": agreed, "peak_flops": best,
            "rows": [rows[rung.name] for rung in rungs if rung.name in rows],
            "not_run": not_run}  # fmt: skip


def by_worth(rungs: Sequence[Rung]) -> list[Rung]:
    """The first, then all levers together, then the way there and each lever alone."""
    top = next((r for r in reversed(rungs) if r.name.startswith("+ ")), rungs[-1])
    rest = [rung for rung in rungs[1:] if rung is not top]
    return [rungs[0], *([top] if top is not rungs[0] else []), *rest]


def _run(subjects: Sequence[Subject], rounds: int, seconds: float) -> None:
    """The first iterations, then the timed ones by turns; once is enough after some seconds."""
    started = time.perf_counter()
    begin(subjects)
    for turn in range(rounds):
        if turn and time.perf_counter() - started > seconds:
            break
        for subject in [*subjects[turn % len(subjects) :], *subjects[: turn % len(subjects)]]:
            cuda = subject.trainer.world.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            subject.iteration()
            if cuda:
                subject.seconds[-1]["peak"] = float(torch.cuda.max_memory_allocated())


def _row(subject: Subject, best: float, traces: dict[str, Trace]) -> dict[str, Any]:
    calls, products = dict(subject.calls), flops(subject, traces)
    units = unit_costs(subject, 5)  # Makes calls of its own.
    seconds = subject.median("sample", "update")
    whole = subject.median("sample", "score", "update")
    counts, fused = subject.counts, subject.counts.fused_share
    row = {
        "rung": subject.rung.name,
        "forwards": sum(n * b for (t, b), n in calls.items() if not t),
        "trained": sum(n * b for (t, b), n in calls.items() if t),
        "calls": sum(calls.values()), "samples": subject.samples, "flops": products,
        "predicted_seconds": sum(units[kind] * count for kind, count in calls.items()),
        "seconds": seconds,
        "sample_seconds": subject.median("sample"), "update_seconds": subject.median("update"),
        "score_seconds": subject.median("score"), "step_seconds": subject.median("step"),
        "samples_per_second": subject.samples / whole,
        "share_of_peak": products / seconds / best,
        "fused_share": subject.median("fused") / whole if fused is None else fused,
        "launches": counts.launches, "values_asked_for": counts.values,
        "collectives": counts.collectives,
    }  # fmt: skip
    if "peak" in subject.seconds[0]:
        row["peak_bytes"] = max(s["peak"] for s in subject.seconds)
    return row
