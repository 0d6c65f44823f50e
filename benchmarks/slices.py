"""A whole iteration composed from a slice of it: four samples, four steps.

A slice gives seconds per state drawn, per state trained, per sample scored and per optimizer step;
the tree of the whole says how many of each there are. What is composed is headed "extrapolated".
Where the whole can be run (small models), it is, and the composition's error is printed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import timing
from ladder import MODELS, OURS, PUBLIC, Rung, recipe
from measuring import measure

from dancegrpo_fast.models import open_family
from dancegrpo_fast.rollout import plan_iteration

SLICE = {"group_size": 4, "steps": 4}
# Of models whose published iteration is too long to run: that one.
WHOLE = {"hunyuan": {"group_size": 24, "steps": 16}}
STAGES = ("sample", "score", "update")


def compared(name: str, rounds: int) -> dict[str, Any]:
    """The slice of a model and the whole composed from it; the whole measured, if it can be run."""
    model = MODELS[name]
    whole = WHOLE.get(name) or {key: model[key] for key in SLICE}
    rungs = [PUBLIC, replace(OURS, checkpointing="full")]
    # The same calls in both: a batch of the whole would be larger than the slice has samples.
    batch = min(model["batch"], SLICE["group_size"])
    with mock.patch.dict(MODELS, {name: model | {"batch": batch}}):
        part = measure(name, rungs, rounds, **SLICE)
        run = [] if name in WHOLE else measure(name, rungs, rounds, **whole)["rows"]
    return composed(name, rungs, part, whole, run)


def composed(
    name: str, rungs: Sequence[Rung], part: Mapping[str, Any], whole: Mapping[str, Any],
    measured: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:  # fmt: skip
    """A whole by rung, from what `measure` found of its slice; it may leave out rungs."""
    parts, wholes = ({row["rung"]: row for row in found} for found in (part["rows"], measured))
    rows = [
        {"rung": rung.name, **composition(parts[rung.name], counts(name, rung, whole))}
        for rung in rungs
        if rung.name in parts
    ]
    for row in rows:
        if run := wholes.get(row["rung"]):
            row["measured"] = {stage: run[f"{stage}_seconds"] for stage in STAGES}
    found = {"model": name, "slice": SLICE, "whole": dict(whole), "agreement": part["agreement"],
             "extrapolated": rows}  # fmt: skip
    show(found)
    return found


def counts(name: str, rung: Rung, rollout: Mapping[str, Any]) -> dict[str, int]:
    """States drawn and trained, and samples, of an iteration that need not be run."""
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(name, Path(folder), rung, dict(rollout))
        cost = plan_iteration(config, open_family(config.model).grid, 0).cost()
    return {
        "drawn": cost.rollout if rung.rollout else cost.rollout_unshared,
        "trained": cost.training if rung.training else cost.training_unshared,
        "samples": config.rollout.group_size,
    }


def composition(part: Mapping[str, Any], count: Mapping[str, int]) -> dict[str, Any]:
    """Seconds of a whole by stage, from a row of its slice and the whole's counts."""
    step = part["step_seconds"]
    seconds = {
        "sample": part["sample_seconds"] / part["forwards"] * count["drawn"],
        "score": part["score_seconds"] / part["samples"] * count["samples"],
        "update": (part["update_seconds"] - step) / part["trained"] * count["trained"] + step,
    }
    return {"counts": dict(count), "seconds": seconds}


def show(found: Mapping[str, Any]) -> None:
    """Print it, and how far it is from what was measured."""
    rows = found["extrapolated"]
    if not rows:
        return
    first = sum(rows[0]["seconds"].values())

    def error(row: Mapping[str, Any], *stages: str) -> str:
        if "measured" not in row:
            return "not run"
        run = sum(row["measured"][stage] for stage in stages)
        return f"{sum(row['seconds'][stage] for stage in stages) / run - 1:+.1%}"

    sizes = ", ".join(f"{key} {value}" for key, value in found["whole"].items())
    print(f"\n{found['model']}, {sizes}: EXTRAPOLATED from four samples of four steps")
    timing.print_table(
        ("", "states drawn", "trained", "s, composed", "", "error against the whole, measured",
         *STAGES),
        [
            (
                row["rung"], row["counts"]["drawn"], row["counts"]["trained"],
                f"{sum(row['seconds'].values()):.2f}",
                f"{first / sum(row['seconds'].values()):.2f}x", error(row, *STAGES),
                *(error(row, stage) for stage in STAGES),
            )
            for row in rows
        ],
    )  # fmt: skip
