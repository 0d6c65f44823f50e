"""What a finished run amounts to: `summary.json` for programs, `report.html` for people."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dancegrpo_fast.config import RunConfig, dump
from dancegrpo_fast.report.evaluate import Difference, Evaluation
from dancegrpo_fast.report.metrics import gif_bytes, read_metrics
from dancegrpo_fast.report.page import ClipPair, CurvePoint, Measure, Summary, write_page
from dancegrpo_fast.report.picture import write_picture

SHOWN = 12  # Before/after pairs on the page, spread over the held-out prompts.


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        config: Its recipe.
        prompts: Held-out prompts.
        base: The untrained model on them.
        trained: The exported weights on them.
        hashes: Of the base and of the exported weights.
        seconds: Per stage.
        load_lines: Python that loads the result.
    """

    config: RunConfig
    prompts: tuple[str, ...]
    base: Evaluation
    trained: Evaluation
    hashes: dict[str, str]
    seconds: dict[str, float]
    load_lines: str

    def difference(self) -> Difference:
        """Of the weighted reward."""
        weights = [reward.weight for reward in self.config.rewards]
        return Difference.of(self.base.total(weights), self.trained.total(weights))

    def measures(self) -> dict[str, Difference]:
        """Every reward and every part of one, by name."""
        pairs = {
            name: (self.base.scores[..., i], self.trained.scores[..., i])
            for i, name in enumerate(self.base.names)
        } | {
            name: (self.base.parts[..., i], self.trained.parts[..., i])
            for i, name in enumerate(self.base.part_names)
        }
        return {name: Difference.of(*pair) for name, pair in pairs.items()}


def write_summary(outcome: Outcome, folder: Path) -> Path:
    """Write `summary.json`: base, trained, standard errors, n, hashes, seconds per stage."""
    total = outcome.difference()
    base_distance, distance = outcome.base.distances.mean(), outcome.trained.distances.mean()
    values = {
        "seed": outcome.config.seed,
        "iterations": outcome.config.iterations,
        "reward": {**asdict(total), "gain": total.gain},
        "prompts": len(outcome.prompts),
        "seeds_per_prompt": outcome.config.evaluation.seeds,
        "measures": {
            name: {**asdict(found), "gain": found.gain}
            for name, found in outcome.measures().items()
        },
        "diversity": {
            "base": float(base_distance),
            "trained": float(distance),
            "ratio": float(distance / base_distance),
        },
        "weights_sha256": outcome.hashes,
        "seconds": {name: round(seconds, 2) for name, seconds in outcome.seconds.items()},
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else platform.machine(),
        },
    }
    path = folder / "summary.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def write_report(outcome: Outcome, folder: Path) -> Path:
    """Write the page: curve, clips side by side, times, hashes, and how to load the result."""
    total = outcome.difference()
    names = [reward.name for reward in outcome.config.rewards if reward.weight]
    measures = [
        Measure(name, found.base, found.trained, f"difference +- {found.standard_error:.3f}")
        for name, found in outcome.measures().items()
    ]
    measures.append(
        Measure(
            "diversity",
            float(outcome.base.distances.mean()),
            float(outcome.trained.distances.mean()),
            "RMS pixel distance between the clips of two seeds",
        )
    )
    summary = Summary(
        title=f"{Path(outcome.config.output).name}: GRPO on {outcome.config.model.path}",
        reward=" + ".join(names),
        base=total.base,
        trained=total.trained,
        standard_error=total.standard_error,
        prompts=len(outcome.prompts),
        seeds=outcome.config.evaluation.seeds,
        config=dump(outcome.config),
        hashes=outcome.hashes,
        measures=measures,
    )
    curve = _curve(read_metrics(folder / "metrics.jsonl"))
    few = _spread(len(outcome.prompts), 4)
    prompts = [outcome.prompts[p] for p in few]
    clips = outcome.base.clips[few], outcome.trained.clips[few]
    write_picture(folder / "report.png", curve, prompts, *clips)
    return write_page(
        folder, summary, curve, _pairs(outcome), outcome.seconds, outcome.load_lines
    )


def _curve(lines: list[dict[str, float | None]]) -> list[CurvePoint]:
    return [
        CurvePoint(
            int(line["iteration"] or 0),
            line.get("reward/mean"),
            line.get("evaluation/reward"),
            line.get("evaluation/standard_error"),
        )
        for line in lines
    ]


def _pairs(outcome: Outcome) -> list[ClipPair]:
    weights = [reward.weight for reward in outcome.config.rewards]
    scores = [side.total(weights)[:, 0] for side in (outcome.base, outcome.trained)]
    return [
        ClipPair(
            outcome.prompts[p],
            gif_bytes(torch.from_numpy(outcome.base.clips[p]) / 255),
            gif_bytes(torch.from_numpy(outcome.trained.clips[p]) / 255),
            float(scores[0][p]),
            float(scores[1][p]),
        )
        for p in _spread(len(outcome.prompts), SHOWN)
    ]


def _spread(total: int, count: int) -> np.ndarray:
    """Up to `count` positions spread evenly over 0 .. total-1."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int))
