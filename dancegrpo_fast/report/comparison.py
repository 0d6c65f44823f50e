"""What an evaluation found: arrays of scores, and the table and JSON made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dancegrpo_fast.report.audit import Finding
from dancegrpo_fast.report.compare import BestOf, Paired, best_of, paired
from dancegrpo_fast.report.metrics import plain


@dataclass(frozen=True)
class Results:
    """Models by the same prompts, seeds and rewards.

    Attributes:
        note: What the prompts are.
        prompts: P texts.
        groups: P names of groups, or empty.
        models: M names; the first is what the others are compared with.
        rewards: R names; best-of-n chooses by the first.
        scores: [M, P, S, R], NaN where a reward failed.
        counts: Values of n for best-of-n; empty for none.
        findings: By model but the first: what the audit says; empty without an audit.
        settings: What else stands in the JSON.
    """

    note: str
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    models: tuple[str, ...]
    rewards: tuple[str, ...]
    scores: np.ndarray
    counts: tuple[int, ...]
    findings: dict[str, list[Finding]]
    settings: dict[str, Any]

    def pairs(self) -> list[tuple[str, str, str, Paired]]:
        """(model, reward, group, comparison with the first model); group "" is all prompts."""
        found = []
        names = list(dict.fromkeys(("", *self.groups)))  # A prompt may be of no group.
        for m, model in enumerate(self.models[1:], 1):
            for r, reward in enumerate(self.rewards):
                for group in names:
                    rows = self._rows(group)
                    told = paired(self.scores[0, rows, :, r], self.scores[m, rows, :, r])
                    found.append((model, reward, group, told))
        return found

    def curves(self) -> list[tuple[str, str, list[BestOf]]]:
        """(model, measured reward, curve of the best by the first reward)."""
        if not self.counts:
            return []
        return [
            (model, reward, best_of(self.scores[m, ..., 0], self.scores[m, ..., r], self.counts))
            for m, model in enumerate(self.models)
            for r, reward in enumerate(self.rewards)
        ]

    def means(self) -> list[tuple[str, str, float]]:
        """(model, reward, mean over prompts of what has a score)."""
        found = []
        for m, model in enumerate(self.models):
            for r, reward in enumerate(self.rewards):
                values = self.scores[m, ..., r]
                found.append((model, reward, paired(values, values).base))
        return found

    def _rows(self, group: str) -> list[int]:
        every = range(len(self.prompts))
        return [p for p in every if not group or self.groups[p] == group]


def table(results: Results) -> str:
    """The results for a terminal."""
    wide = max(map(len, ("reward", *results.rewards, *results.groups))) + 4
    lines = [f"{results.note}, {results.scores.shape[2]} seeds each; 95% intervals over prompts"]
    model = ""
    if len(results.models) == 1:
        lines += [f"  {reward:<{wide}}{mean:>10.4g}" for _, reward, mean in results.means()]
    for name, reward, group, told in results.pairs():
        if name != model:
            lines += ["", f"{results.models[0]} -> {name}"]
            head = f"{'base':>10}{'trained':>10}{'difference':>12}{'interval':>22}{'win rate':>10}"
            lines.append(f"  {'reward':<{wide}}{head}{'interval':>16}  prompts")
            model = name
        label = f"  {group}" if group else reward
        interval = f"[{told.low:+.4g}, {told.high:+.4g}]"
        wins = f"[{told.win_low:.2f}, {told.win_high:.2f}]"
        numbers = f"{told.base:>10.4g}{told.trained:>10.4g}{told.difference:>+12.4g}{interval:>22}"
        missing = f" ({told.missing} pairs without a score)" if told.missing else ""
        lines.append(
            f"  {label:<{wide}}{numbers}{told.win_rate:>10.2f}{wins:>16}  {told.prompts}"
            f"{'' if group else ' ' + told.verdict}{missing}"
        )
    if results.counts:
        lines += ["", f"best of n by {results.rewards[0]}, expected value over all choices of n"]
        heads = "".join(f"{f'n = {n}':>12}" for n in results.counts)
        names = max(map(len, results.models)) + 2
        lines.append(f"  {'':<{names}}{'measured':<{wide}}{heads}")
        for name, reward, curve in results.curves():
            numbers = "".join(f"{point.mean:>12.4g}" for point in curve)
            lines.append(f"  {name:<{names}}{reward:<{wide}}{numbers}")
    for name, found in results.findings.items():
        lines += ["", f"audit of {name} against {results.models[0]}", *audit_lines(found)]
    return "\n".join(lines)


def audit_lines(findings: Sequence[Finding]) -> list[str]:
    """One line a check, and what to try under those that are flagged."""
    lines = []
    for f in findings:
        mark = "FLAG" if f.flagged else "ok"
        lines.append(f"  {mark:<5}{f.name}: {f.base:.4g} -> {f.trained:.4g}; flagged {f.threshold}")
        if f.flagged:
            lines.append(f"       {f.advice}")
    return lines


def write_json(results: Results, path: Path) -> None:
    """Write everything, scores included; what is no number is null."""
    values = {
        "prompts": results.note,
        **results.settings,
        "models": list(results.models),
        "rewards": list(results.rewards),
        "comparisons": [
            {"model": m, "reward": r, "group": g or None, **asdict(told), "verdict": told.verdict}
            for m, r, g, told in results.pairs()
        ],
        "means": [{"model": m, "reward": r, "mean": mean} for m, r, mean in results.means()],
        "best_of_n": [
            {"model": m, "chosen_by": results.rewards[0], "measured": r, **asdict(point)}
            for m, r, curve in results.curves()
            for point in curve
        ],
        "audit": {m: [asdict(f) for f in found] for m, found in results.findings.items()},
        "scores": [
            {"prompt": text, "group": results.groups[p] if results.groups else None}
            | {model: results.scores[m, p].tolist() for m, model in enumerate(results.models)}
            for p, text in enumerate(results.prompts)
        ],
    }
    text = json.dumps(plain(values), indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
