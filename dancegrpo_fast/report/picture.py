"""One still picture of a finished run: the reward curve, and frames before and after."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dancegrpo_fast.report.chart import Point

FRAMES = 5  # Shown of each clip, evenly spaced.


def write_picture(
    path: Path,
    training: Sequence[Point],
    held_out: Sequence[Point],
    errors: Sequence[float],
    prompts: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
) -> Path:
    """Write a PNG.

    Args:
        path: The file.
        training: (iteration, mean reward).
        held_out: The same of the evaluations.
        errors: Standard error at each of these.
        prompts: A few prompts.
        before: [n, F, 3, H, W] uint8 clips of the base, one per prompt.
        after: The same of the trained model.
    """
    figure = Figure(figsize=(11, 0.9 * len(prompts) + 1.0), dpi=110, layout="constrained")
    grid = figure.add_gridspec(len(prompts), 3, width_ratios=(1.15, 1, 1))
    axes = figure.add_subplot(grid[:, 0])
    axes.plot(*zip(*training, strict=True), color="#8a94a6", lw=1.2, label="training")
    if held_out:  # None where no evaluation had a score.
        x, y = zip(*held_out, strict=True)
        axes.errorbar(x, y, errors, color="#2f81f7", lw=2, marker="o", capsize=4, label="held out")
    axes.set(xlabel="iteration", ylabel="mean reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="lower right")
    for row, prompt in enumerate(prompts):
        for column, clips in ((1, before), (2, after)):
            cell = figure.add_subplot(grid[row, column])
            cell.imshow(_strip(clips[row]), interpolation="nearest")
            cell.set_axis_off()
            title = ("before", "after")[column - 1] if row == 0 else ""
            told = f"{title}\n{' '.join(prompt.split())[:100]}" if column == 1 else title
            # A prompt with dollar signs is no formula.
            cell.set_title(told, fontsize=8, loc="left", parse_math=False)
    with warnings.catch_warnings():  # Its font has no Chinese: boxes, and no line for each.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path)
    return path


def _strip(clip: np.ndarray) -> np.ndarray:
    """Some frames of [F, 3, H, W] side by side: [H, n W, 3]."""
    shown = np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int))
    return np.concatenate([clip[i].transpose(1, 2, 0) for i in shown], axis=1)
