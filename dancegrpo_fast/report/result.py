"""What a finished run amounts to: `summary.json` for programs, `report.png` to look at."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.report.audit import Finding, audit
from dancegrpo_fast.report.curves import points
from dancegrpo_fast.report.evaluate import Difference, Evaluation
from dancegrpo_fast.report.metrics import plain, read_metrics
from dancegrpo_fast.report.picture import write_picture
from dancegrpo_fast.report.record import spread


@dataclass(frozen=True)
class HeldOutResult:
    """The held-out prompts before and after a run.

    Attributes:
        prompts: Held-out prompts.
        base: The untrained model on them.
        trained: The exported weights on them.
        weights: Of the rewards.
    """

    prompts: tuple[str, ...]
    base: Evaluation
    trained: Evaluation
    weights: tuple[float, ...]

    def difference(self) -> Difference:
        """Of the weighted reward."""
        return Difference.of(self.base.total(self.weights), self.trained.total(self.weights))

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

    def summary(self) -> dict[str, Any]:
        """Its part of `summary.json`."""
        total = self.difference()
        base, trained = self.base.diversity, self.trained.diversity
        return {
            "reward": {**asdict(total), "gain": total.gain},
            "prompts": len(self.prompts),
            "seeds_per_prompt": self.base.scores.shape[1],
            "measures": {
                name: {**asdict(found), "gain": found.gain}
                for name, found in self.measures().items()
            },
            "diversity": {
                "base": base,
                "trained": trained,
                "ratio": trained / base if base else math.nan,
            },
        }


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        config: Its recipe.
        hashes: Of the base and of the exported weights.
        seconds: Per stage.
        load_lines: Python that loads the result.
        held_out: What was measured, if there were held-out prompts.
    """

    config: RunConfig
    hashes: dict[str, str]
    seconds: dict[str, float]
    load_lines: str
    held_out: HeldOutResult | None


def write_summary(outcome: Outcome, folder: Path) -> Path:
    """Write `summary.json`: base, trained, standard errors, n, hashes, seconds per stage."""
    values = {
        "seed": outcome.config.seed,
        "iterations": outcome.config.iterations,
        **(outcome.held_out.summary() if outcome.held_out else {}),
        "weights_sha256": outcome.hashes,
        "load": outcome.load_lines,
        "seconds": {name: round(seconds, 2) for name, seconds in outcome.seconds.items()},
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else platform.machine(),
        },
    }
    path = folder / "summary.json"
    partial = path.with_suffix(".partial")
    text = json.dumps(plain(values), indent=2, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def write_audit(result: HeldOutResult, folder: Path) -> list[Finding]:
    """Write `audit.json`: what an audit finds on the first seed's samples."""
    names = result.base.names
    found = audit(
        torch.from_numpy(result.base.clips)[:, None],
        torch.from_numpy(result.trained.clips)[:, None],
        scores={
            name: (result.base.scores[:, :1, i], result.trained.scores[:, :1, i])
            for i, name in enumerate(names)
        },
        trained_on=[n for n, weight in zip(names, result.weights, strict=True) if weight],
    )
    text = json.dumps(plain([asdict(finding) for finding in found]), indent=2, allow_nan=False)
    (folder / "audit.json").write_text(text + "\n", encoding="utf-8")
    return found


def write_still(result: HeldOutResult, folder: Path) -> Path:
    """Write `report.png`: the reward curve, and a few frames before and after."""
    lines = read_metrics(folder / "metrics.jsonl")
    few = spread(len(result.prompts), 4)
    return write_picture(
        folder / "report.png",
        points(lines, "reward/mean"),
        points(lines, "evaluation/reward"),
        [line.get("evaluation/standard_error") or 0.0
         for line in lines if line.get("evaluation/reward") is not None],
        [result.prompts[p] for p in few],
        result.base.clips[few],
        result.trained.clips[few],
    )  # fmt: skip
