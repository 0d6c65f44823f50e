"""Times, counts and products of one iteration of each rung: a row of the table each."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
from ladder import Rung, Subject, agreement, begin
from torch import Tensor

from dancegrpo_fast.models import Conditions
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.planner.network import Networks


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
    """The table of a model; no time is in it where the rungs disagree."""
    world = World.from_environment()
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    best, dtype = 0.0, torch.float32
    # Rungs take turns on a CPU, which has other work too; a GPU holds one network of a real size.
    groups = [[rung] for rung in rungs] if world.device.type == "cuda" else [rungs]
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            subjects = [Subject(name, rung, Path(folder), world, **rollout) for rung in group]
            _run(subjects, rounds)
            dtype = subjects[0].trainer.family.dtype
            best = best or peak(world.device, dtype)
            rows += [_row(subject, best) for subject in subjects]
            found += [subject.found for subject in subjects]
            del subjects
            gc.collect()  # A subject and its hooks hold each other.
    agreed = agreement(found, dtype)
    return {"model": name, "rollout": rollout, "agreement": agreed, "peak_flops": best,
            "rows": rows}  # fmt: skip


def _run(subjects: Sequence[Subject], rounds: int) -> None:
    """The first iterations, then the timed ones by turns."""
    begin(subjects)
    for turn in range(rounds):
        for subject in [*subjects[turn % len(subjects) :], *subjects[: turn % len(subjects)]]:
            cuda = subject.trainer.world.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            subject.iteration()
            if cuda:
                subject.seconds[-1]["peak"] = float(torch.cuda.max_memory_allocated())


def _row(subject: Subject, best: float) -> dict[str, Any]:
    calls, products = dict(subject.calls), flops(subject)
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
