"""Draws the figures of docs/concepts.md from the code that they explain.

    python scripts/figures.py [FOLDER]        docs/images by default

Trees come from `tree.py`, noise levels from `transitions.py`, numbers from `ops/noise.py`, the
update schedule from `batching.py`: a change of one of them changes its figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from dancegrpo_fast import dance_schedule, normal, transition  # noqa: E402
from dancegrpo_fast.advantages import LeafAdvantages, best_and_worst  # noqa: E402
from dancegrpo_fast.batching import Item, build_updates  # noqa: E402
from dancegrpo_fast.ops.noise import NoiseKey  # noqa: E402
from dancegrpo_fast.trees import tree as trees  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TRAINED, PLAIN, DARK, OTHER = "#b5472f", "#9aa5b1", "#30363d", "#2f6f9f"
LEVELS = {"dance": 0.3, "flow": 0.7, "cps": 0.7}
COLOURS = {"dance": TRAINED, "flow": OTHER, "cps": "#4f8a4c"}


def transitions() -> Figure:
    """A step as a Gaussian of one number, and the noise of each step of a schedule."""
    schedule = dance_schedule(16, 3.0)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    x, m, step = 1.0, -0.5, 10
    grid = np.linspace(0.0, 2.0, 801)
    for name, level in LEVELS.items():
        t = transition(schedule, step, step + 1, dynamics=name, kind="sde", level=level)
        mean = t.a * x + t.b * m
        density = np.exp(-0.5 * ((grid - mean) / t.s) ** 2) / (t.s * np.sqrt(2 * np.pi))
        left.plot(grid, density, color=COLOURS[name], label=f"{name} {level}")
        noise = [
            transition(schedule, i, i + 1, dynamics=name, kind="sde", level=level).s
            for i in range(schedule.steps)
        ]
        right.plot(noise, "o-", color=COLOURS[name], markersize=3, label=f"{name} {level}")
    ode = transition(schedule, step, step + 1, dynamics="flow", kind="ode", level=0.0)
    left.axvline(ode.a * x + ode.b * m, color=DARK, linestyle=":", label="ode")
    left.set(title=f"density of x' after step {step}; x = {x:g}, m = {m:g}", xlabel="x'")
    right.set(title="s, the noise of each step", xlabel="step")
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    return figure


def tree_kinds() -> Figure:
    """The five kinds of tree with four steps, and their network evaluations."""
    schedule = dance_schedule(4, 3.0)
    kinds = {
        "shared_root": trees.shared_root(schedule, 4),
        "independent_roots": trees.independent_roots(schedule, 4),
        "window": trees.window(schedule, 4, 1, 1),
        "branch_points": trees.branch_points(schedule, [0, 1], 2),
        "trunk_with_branches": trees.trunk_with_branches(schedule, [0, 1], 2),
    }
    figure, axes = pyplot.subplots(1, 5, figsize=(12, 2.7))
    for axis, (name, plan) in zip(axes, kinds.items(), strict=True):
        _tree(axis, plan)
        cost = plan.cost()
        counts = (
            f"rollout {cost.rollout} of {cost.rollout_unshared}\n"
            f"training {cost.training} of {cost.training_unshared}"
        )
        axis.set_title(name, fontsize=9)
        axis.text(0.5, -0.04, counts, transform=axis.transAxes, ha="center", va="top", fontsize=8)
    return figure


def _tree(axis: Axes, plan: trees.TreePlan) -> None:
    height = {leaf: float(-number) for number, leaf in enumerate(plan.leaves)}
    for state in reversed(plan.states):
        if plan.children[state.index]:
            height[state.index] = float(np.mean([height[c] for c in plan.children[state.index]]))
    for state in plan.states:
        here = (state.step, height[state.index])
        if state.parent >= 0:
            there = (plan.states[state.parent].step, height[state.parent])
            axis.plot(
                [there[0], here[0]], [there[1], here[1]], zorder=1,
                color=TRAINED if state.trained else PLAIN, linewidth=2 if state.trained else 1,
                linestyle="-" if state.kind == "sde" else "--",
            )  # fmt: skip
        leaf = not plan.children[state.index]
        axis.plot(*here, "s" if leaf else "o", color=DARK, markersize=4, zorder=2)
    axis.axis("off")


def noise() -> Figure:
    """One draw as a whole, the same in two parts, and its sibling's."""
    base = NoiseKey.from_seed(0)
    key = trees.path_key(base, ((2, 1),)).fold_in(3).draw()
    sibling = trees.path_key(base, ((2, 2),)).fold_in(3).draw()
    shape = (16, 16)
    whole = normal(shape, key).numpy()
    upper = normal(shape, key, box=((0, 8), (0, 16))).numpy()
    lower = normal(shape, key, box=((8, 16), (0, 16))).numpy()
    assert np.array_equal(whole, np.concatenate([upper, lower]))
    figure, axes = pyplot.subplots(1, 4, figsize=(9, 2.6))
    pictures = {
        "drawn whole": whole,
        "rows 0 to 7 alone": np.concatenate([upper, np.full((8, 16), np.nan)]),
        "rows 8 to 15 alone": np.concatenate([np.full((8, 16), np.nan), lower]),
        "another child's": normal(shape, sibling).numpy(),
    }
    for axis, (title, values) in zip(axes, pictures.items(), strict=True):
        axis.imshow(values, cmap="RdBu", vmin=-3, vmax=3)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def update_schedule() -> Figure:
    """Micro-batches of two updates on two processes after a best-of-n selection."""
    world, updates, size = 2, 2, 2
    plan = trees.shared_root(dance_schedule(4, 3.0), 6)
    rewards = np.array([[6, 5, 1, 2, 3, 4], [9, 8, 1, 2, 4, 3], [7, 9, 4, 5, 1, 2.0]])
    values = (rewards - rewards.mean(1, keepdims=True))[..., None]
    advantages = LeafAdvantages(values, np.ones(1), np.ones(rewards.shape, dtype=bool), 0.0)
    chosen = best_and_worst(advantages, 4)
    figure, axis = pyplot.subplots(figsize=(9, 2.4))
    for rank in range(world):
        schedule = build_updates(
            plan, advantages, chosen, key=NoiseKey.from_seed(1), modules=["net"] * 4,
            rank=rank, world_size=world, updates=updates, micro_batch_size=size,
        )  # fmt: skip
        left = 0.0
        for number, update in enumerate(schedule):
            for call in update.calls:
                _micro_batch(axis, left, -rank, call.items, (TRAINED, OTHER)[number])
                left += 1.0
            if rank == 0:
                label = f"step {number + 1}, divisor {update.divisor:g}"
                axis.text(left + 0.27, 0.62, label, ha="center", va="bottom", fontsize=8)
                axis.plot([left + 0.27] * 2, [0.6, 0.5 - world], color=DARK, linewidth=1)
            left += 0.6
    axis.set(yticks=[-r for r in range(world)], yticklabels=[f"process {r}" for r in range(world)])
    axis.set(xticks=[], ylim=(0.4 - world, 1.1))
    axis.spines[["left", "bottom"]].set_visible(False)
    return figure


def _micro_batch(
    axis: Axes, left: float, row: int, items: tuple[Item, ...], colour: str
) -> None:
    idle = not any(item.weights.any() for item in items)
    axis.barh(
        row, 0.94, left=left, height=0.86, color="white" if idle else colour,
        edgecolor=PLAIN, hatch="///" if idle else None, alpha=0.9,
    )  # fmt: skip
    lines = [f"p{item.prompt} s{item.state} x{len(item.children)}" for item in items]
    axis.text(
        left + 0.47, row, "weight 0" if idle else "\n".join(lines), ha="center", va="center",
        fontsize=7, color=DARK if idle else "white",
    )  # fmt: skip


FIGURES = {
    "concept_transitions.svg": transitions,
    "concept_trees.svg": tree_kinds,
    "concept_noise.svg": noise,
    "concept_schedule.svg": update_schedule,
}


def draw(folder: Path) -> None:
    """Write all figures; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "dancegrpo_fast", "font.size": 9,
                "font.family": "sans-serif", "axes.titlesize": 9}  # fmt: skip
    with pyplot.rc_context(settings):
        for name, make in FIGURES.items():
            figure = make()
            for axis in figure.axes:
                axis.spines[["top", "right"]].set_visible(False)
            figure.tight_layout()
            figure.savefig(folder / name, metadata={"Date": None}, facecolor="white")
            pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    folder = ROOT / "docs" / "images"
    parser.add_argument(
        "folder", nargs="?", type=Path, default=folder, help="where they go (default: docs/images)"
    )
    draw(parser.parse_args().folder)
