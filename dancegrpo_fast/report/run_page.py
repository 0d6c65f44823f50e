"""A run's page, made from the files in its folder alone: while it runs, after it, or after a kill.

Read are `recipe.yaml`, `metrics.jsonl`, `times.jsonl`, `evaluations/`, `clips/`, `audit.json` (what
an audit found, if there was one) and `summary.json` (if the run came to its end).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from dancegrpo_fast.config import RunConfig, UserError, load_config
from dancegrpo_fast.report import cards, curves, page
from dancegrpo_fast.report.metrics import read_metrics
from dancegrpo_fast.report.record import Record, read_records

Lines = list[dict[str, float | None]]


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder says.

    Attributes:
        folder: The folder.
        config: The recipe.
        recipe: Its text.
        lines: Of `metrics.jsonl`.
        times: Of `times.jsonl`.
        records: Evaluations that can be compared with the last one.
        findings: Of an audit: name, base, trained, threshold, flagged, advice.
        summary: Of a finished run, or None.
    """

    folder: Path
    config: RunConfig
    recipe: str
    lines: Lines
    times: Lines
    records: list[Record]
    findings: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def done(self) -> int:
        """Finished iterations."""
        return max((int(line["iteration"] or 0) for line in self.lines), default=0)

    @property
    def pair(self) -> tuple[Record, Record] | None:
        """The evaluations of the untrained and of the newest weights."""
        if len(self.records) > 1 and self.records[0].iteration == 0:
            return self.records[0], self.records[-1]
        return None

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read a run's folder.

        Raises:
            UserError: It holds no run, or a file of it is damaged.
        """
        recipe = folder / "recipe.yaml"
        if not recipe.is_file():
            raise UserError(
                f"run = {str(folder)!r}: holds no recipe.yaml; give the folder of a run"
            )
        config = load_config(recipe)
        lines, times = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "times"))
        summary = _json(folder / "summary.json", dict, "iterations")
        done = max((int(line["iteration"] or 0) for line in lines), default=0)
        findings = _json(folder / "audit.json", list) or []
        if summary is not None and not summary["iterations"] == config.iterations == done:
            # Of the end that a run had before it was resumed to go further.
            summary, findings = None, []
        return cls(
            folder, config, recipe.read_text(encoding="utf-8"), lines, times,
            _comparable(read_records(folder), done), findings, summary,
        )  # fmt: skip


def write_page(folder: Path, path: Path | None = None) -> Path:
    """Write the page of a run's folder; returns where it is.

    Args:
        folder: The run's.
        path: The file; None is `report.html` in the folder.
    """
    run = RunFiles.read(folder)
    title = f"{folder.resolve().name}: {run.config.model.path}"
    # The order in which pictures are asked for is the order in which they find room.
    pictures = page.Pictures()
    samples = cards.extremes(*run.pair, pictures) if run.pair else ""
    strips = cards.over_time(run.records, pictures) if run.records else ""
    drawn = "" if run.records else cards.training_samples(folder, run.done, pictures)
    body = [
        f"<h1>{escape(title)}</h1>",
        _lead(run),
        _state(run),
        page.section("Reward", _reward(run)),
        page.section("Samples", samples, "Held-out prompts, the same noise before and after."),
        page.section(
            "Over time", strips, "Fixed prompts and noise; below each the iteration and the reward."
        ),
        page.section("Training samples", drawn, "By iteration: prompt."),
        pictures.told("evaluations/ and clips/"),
        page.section("Audit", page.audit(run.findings)),
        page.section("Update", _update(run)),
        page.section("Time", _time(run)),
        page.section("Also measured", _measures(run)),
        _result(run.summary),
        page.details("All metrics", curves.every_metric(run.lines)) if run.lines else "",
        page.details("Configuration", page.code(run.recipe)),
    ]
    return page.write_html(path or folder / "report.html", title, body)


def _lead(run: RunFiles) -> str:
    """What the run has gained so far, or what is trained on."""
    # A reward of the user's own is given by file and class.
    names = [r.name.rpartition(":")[2] for r in run.config.rewards if r.weight]
    rewards = f"<b>{escape(' + '.join(names))}</b>"
    found = [line for line in run.lines if line.get("evaluation/reward") is not None]
    if len(found) < 2 or found[0]["iteration"] != 0:
        return f'<p class="lead">Trained on {rewards}.</p>'
    base, trained = found[0]["evaluation/reward"] or 0.0, found[-1]["evaluation/reward"] or 0.0
    error, gain = found[-1].get("evaluation/standard_error"), trained - base
    shown = f"&plusmn; {error:.3f}" if error is not None else ""
    if error:
        shown += f" ({gain / error:.1f} standard errors)"
    measured = "held-out prompts"
    if run.records:
        prompts, seeds = run.records[-1].scores.shape[:2]
        measured = f"{prompts} held-out prompts x {seeds} seeds"
    return (
        f'<p class="lead">Mean {rewards} on {measured}: <b>{base:.3f}</b> before, '
        f"<b>{trained:.3f}</b> after; gain <b>{gain:+.3f}</b> {shown}.</p>"
    )


def _state(run: RunFiles) -> str:
    state = f"{run.done} of {run.config.iterations} iterations"
    if run.summary is None:
        state += "; the run goes on or was interrupted"
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f'<p class="state">{state}. Written {now}.</p>'


def _reward(run: RunFiles) -> str:
    whole = curves.reward_chart(run.lines)
    main = f'<div class="figures main">{whole}</div><br>' if whole else ""
    trained = [line for line in run.lines if "reward/zero_variance" in line]
    if trained and not any(x["reward/zero_variance"] or x["reward/failed"] for x in trained):
        main = f"<p>Every group had a spread, and no sample failed.</p>{main}"
    return main + page.figures(curves.reward_charts(run.lines))


def _update(run: RunFiles) -> str:
    notes = []
    ratios = [x["policy/ratio_deviation"] for x in run.lines if "policy/ratio_deviation" in x]
    if ratios and not any(ratios):
        notes.append("Every ratio was exactly 1: nothing was clipped.")
    elif run.config.loss.ratio_norm:
        notes.append("Ratios by step are not kept with loss.ratio_norm.")
    skipped = next((x["update/skipped_total"] for x in reversed(run.lines)
                    if x.get("update/skipped_total") is not None), None)  # fmt: skip
    if skipped:
        notes.append(f"Updates skipped for want of a finite gradient: {skipped:.0f}.")
    charts = page.figures(curves.update_charts(run.lines))
    return f"<p>{' '.join(notes)}</p>{charts}" if charts and notes else charts


def _time(run: RunFiles) -> str:
    charts = page.figures(curves.time_charts(run.times))
    if run.summary is not None:
        seconds = dict(run.summary["seconds"])
    else:
        seconds = {}
        for line in run.times:
            for name, value in line.items():
                if name.startswith("time/"):
                    stage = name.removeprefix("time/")
                    seconds[stage] = seconds.get(stage, 0.0) + (value or 0.0)
    total = sum(seconds.values())
    if not total:
        return charts
    rows = [(name, _duration(took), f"{took / total:.0%}") for name, took in seconds.items()]
    return charts + page.table(("stage", "time", "share"), [*rows, ("all", _duration(total), "")])


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6 * 3600 else f"{seconds / 3600:.1f} h"


def _measures(run: RunFiles) -> str:
    if run.pair is None:
        return ""
    base, last = run.pair
    rows = [
        (name, f"{found.base:.3f}", f"{found.trained:.3f}",
         f"{found.gain:+.3f} +- {found.standard_error:.3f}")
        for name, found in last.differences(base).items()
    ]  # fmt: skip
    return page.table(("held out", "before", "after", "difference, standard error"), rows)


def _result(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return ""
    hashes = page.table(("weights", "SHA-256"), summary["weights_sha256"].items(), "hash")
    load = page.code(summary["load"]) if "load" in summary else ""  # Runs of 0.1.0 do not say.
    return page.section("Load it", load) + page.section("Weights", hashes)


def _comparable(records: list[Record], done: int) -> list[Record]:
    """Those the log has, measured like the newest: a resumed run may have changed its prompts."""
    seen = [record for record in records if record.iteration <= done]
    return [record for record in seen if record.comparable(seen[-1])]


def _lines(path: Path) -> Lines:
    return read_metrics(path) if path.is_file() else []


def _json(path: Path, kind: type[Any], *keys: str) -> Any:
    """What a file holds, None if it is not there."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: is no JSON; write it again or remove it") from None
    if not isinstance(value, kind) or any(key not in value for key in keys):
        raise UserError(f"{path}: is not what a run writes; write it again or remove it")
    return value
