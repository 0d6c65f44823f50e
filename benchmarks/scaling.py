"""Time of an iteration against group size, steps, size and frames, and what products predict."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ladder import MODELS, OURS, recipe
from measuring import measure

from dancegrpo_fast.models import open_family
from dancegrpo_fast.planner import Hardware, Planner

# What stays while one number changes: small enough that all points take some minutes.
BASE = {"group_size": 6, "steps": 6, "height": 96, "width": 96, "batch": 6}
AXES: dict[str, Sequence[int]] = {
    "group_size": (3, 6, 12), "steps": (3, 6, 12), "height": (64, 96, 128, 192),
    "frames": (1, 9, 17, 33),
}  # fmt: skip
NAMES = {"group_size": "samples of a prompt", "steps": "steps", "height": "height and width",
         "frames": "frames"}  # fmt: skip


def scaling(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of rollout and training against one number at a time, and the planner's products."""
    video, points = MODELS[name]["frames"] > 1, []
    base = MODELS[name] | BASE | ({"frames": 9} if video else {})
    for axis, values in AXES.items():
        if axis == "frames" and not video:
            continue
        for value in values:
            change = {axis: value} | ({"width": value} if axis == "height" else {})
            with mock.patch.dict(MODELS, {name: base | change}):
                (row,) = measure(name, [OURS], rounds)["rows"]
                points.append({"axis": axis, "value": value, **row, "planned_flops": planned(name)})
            print(f"{axis} = {value}: {points[-1]['seconds']:.2f} s, "
                  f"{points[-1]['planned_flops'] / 1e12:.3f} TFLOP planned")  # fmt: skip
    rate, error = fit(points)
    print(f"{name}: seconds = planned products / {rate / 1e9:.1f} GFLOP/s within {error:.0%}")
    return {"model": name, "points": points, "rate": rate, "largest_error": error}


def planned(name: str) -> float:
    """Products of rollout and training, by the planner."""
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(name, Path(folder), OURS, {})
        flops = Planner(config, open_family(config.model)).estimate(Hardware(1), cuda=False).flops
    return flops["rollout"] + flops["train"]


def fit(points: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """FLOP/s that brings the planned products nearest to the seconds; the largest relative error.

    The geometric mean of the points' own rates.
    """
    rates = [point["planned_flops"] / point["seconds"] for point in points]
    rate = float(np.exp(np.mean(np.log(rates))))
    return rate, max(abs(own / rate - 1) for own in rates)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel an axis: what was measured, and the planner's products at one rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # The same file from the same numbers.
    figure, panels = pyplot.subplots(1, len(AXES), figsize=(11, 3), layout="constrained")
    for number, result in enumerate(results):
        colour = f"C{number}"
        for axis, panel in zip(AXES, panels, strict=True):
            points = [point for point in result["points"] if point["axis"] == axis]
            if not points:
                continue
            values = [point["value"] for point in points]
            model = [point["planned_flops"] / result["rate"] for point in points]
            panel.plot(values, model, color=colour, linewidth=1)
            panel.plot(values, [point["seconds"] for point in points], "o", color=colour,
                       markersize=5, label=result["model"].replace("_", " "))  # fmt: skip
    for axis, panel in zip(AXES, panels, strict=True):
        panel.set(xlabel=NAMES[axis], ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("s: rollout and training")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("points: measured; lines: the planner's products at one rate", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
