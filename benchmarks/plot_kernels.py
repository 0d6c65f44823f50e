"""Draws the result of `benchmarks/kernels.py`: each provider's share of the copy bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], path: Path) -> None:
    """One panel per task; bars are medians, whiskers the 20% and 80% quantiles.

    Args:
        result: What `--json` writes.
        path: The picture, .png or .svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = result["tasks"]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 2.1 * lines + 0.3), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        rows = [r for r in task["rows"] if r["provider"] != "copy"]
        last = rows[-1]["timing"]  # all threads; on a GPU the graph replay
        rows = [r for r in rows if r["timing"] == last][::-1]
        shares = [r["share_of_copy"] for r in rows]
        median, slow, fast = ([r["seconds"][k] for r in rows] for k in ("median", "q80", "q20"))
        spread = [
            [s * (1 - a / b) for s, a, b in zip(shares, median, slow, strict=True)],
            [s * (a / b - 1) for s, a, b in zip(shares, median, fast, strict=True)],
        ]
        ours = [r["provider"] in ("native", "triton") for r in rows]
        colors = ["#b5472f" if mine else "#9aa5b1" for mine in ours]
        axis.barh([r["provider"] for r in rows], shares, xerr=spread, color=colors, ecolor="#444")
        axis.axvline(1.0, color="#444", linewidth=0.8, linestyle=":")
        detail = "" if last == "wall" else f" ({last})"
        axis.set_title(task["task"].replace(" 1 x ", " ") + detail, fontsize=8)
        axis.tick_params(labelsize=8)
    figure.supxlabel("share of the copy bandwidth, higher is better", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
