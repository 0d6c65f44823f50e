"""The charts of a run, from the lines of `metrics.jsonl` and `times.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from dancegrpo_fast.report.chart import (
    Point,
    Series,
    heat_map,
    line_chart,
    number_text,
    sparkline,
    stacked_chart,
)
from dancegrpo_fast.report.page import raw_table

Line = Mapping[str, float | None]


def reward_chart(lines: Sequence[Line]) -> str:
    """Training and held-out reward."""
    held_out = [line for line in lines if line.get("evaluation/reward") is not None]
    errors = [line.get("evaluation/standard_error") or 0.0 for line in held_out]
    return line_chart(
        "Mean reward",
        [
            Series("held out", points(held_out, "evaluation/reward"), errors),
            Series("training", points(lines, "reward/mean")),
        ],
        note="Bars: one standard error of the difference to the untrained model."
        if held_out
        else "",
    )


def reward_charts(lines: Sequence[Line]) -> list[str]:
    """Each reward by itself where there are several, and how unlike the samples of a prompt are."""
    statistics = {f"reward/{name}" for name in ("mean", "std_in_group", "failed", "zero_variance")}
    names = [name for name in _names(lines, "reward/") if name not in statistics]
    held_out = _names(lines, "evaluation/reward/")
    each = [
        line_chart(
            name.removeprefix("reward/"),
            [
                Series("held out", points(lines, f"evaluation/{name}")),
                Series("training", points(lines, name)),
            ],
        )
        for name in names
        if len(names) > 1 or len(held_out) > 1
    ]
    return [
        *each,
        line_chart(
            "Diversity of held-out samples",
            [Series("distance", points(lines, "evaluation/diversity"))],
            note="Pixel distance between two seeds of a prompt.",
        ),
        line_chart(
            "Spread inside a group",
            [Series("spread", points(lines, "reward/std_in_group"))],
            note="Standard deviation of the reward over a prompt's samples: what can be learned.",
        ),
        line_chart(
            "Groups without a signal",
            _series(lines, {"zero variance": "reward/zero_variance", "failed": "reward/failed"}),
            note="Share of groups whose rewards are all equal, and of samples that failed.",
        )
        if any(line.get("reward/zero_variance") or line.get("reward/failed") for line in lines)
        else "",
    ]


def update_charts(lines: Sequence[Line]) -> list[str]:
    """Advantages, ratios, clipping, KL, gradient."""
    ratio = {"mean": "policy/ratio_deviation"}
    moved = any(line.get("policy/ratio_deviation") for line in lines)
    clipped = {"below": "policy/clipped_low", "above": "policy/clipped_high"}
    kl = {"KL": "policy/kl"} if any(line.get("policy/kl") for line in lines) else {}
    drawn = [
        line_chart(
            "Advantages of the samples",
            _series(
                lines,
                {
                    "largest": "advantage/max",
                    "mean size": "advantage/mean_size",
                    "smallest": "advantage/min",
                },
            ),
        ),
        line_chart("Gradient norm", _series(lines, {"norm": "update/grad_norm"}), log=True),
        line_chart("KL to the untrained model", _series(lines, kl)),
        line_chart(
            "Rollout against training",
            _series(lines, {"largest": "gate/max_gap", "mean": "gate/mean_gap"}),
            log=True,
            note="The ratio gate: difference of the two log-probs before the first step.",
        ),
    ]
    for name in (n for kind in ("nft/", "awm/", "refl/", "draft/") for n in _names(lines, kind)):
        drawn.append(line_chart(name, [Series(name, points(lines, name))]))
    if moved:
        drawn += [
            line_chart("Ratio: mean distance from 1", _series(lines, ratio), log=True),
            line_chart("Share of clipped transitions", _series(lines, clipped)),
            heat_map("Ratio by step", _cells(lines, "steps/ratio_deviation/")),
            heat_map("Clipped by step", _cells(lines, "steps/clipped/")),
        ]
    return drawn


def time_charts(times: Sequence[Line]) -> list[str]:
    """Throughput, seconds of each stage, memory."""
    stages = _names(times, "time/")
    # A stage that was not run in an iteration took no time in it.
    seconds = {s.removeprefix("time/"): [line.get(s) or 0.0 for line in times] for s in stages}
    iterations = [int(line["iteration"] or 0) for line in times]
    speed = {"samples": "speed/samples_per_second"}
    return [
        stacked_chart("Seconds of an iteration", seconds, iterations),
        line_chart("Samples per second", _series(times, speed)),
        line_chart("GPU memory at most, GiB", _series(times, {"peak": "memory/peak_gib"})),
    ]


def every_metric(lines: Sequence[Line]) -> str:
    """A table of all metrics: first, last and the way between."""
    rows = []
    for name in _names(lines, ""):
        values = [value for _, value in points(lines, name)]
        if values and name != "iteration":
            ends = number_text(values[0]), number_text(values[-1])
            rows.append((f"<code>{escape(name)}</code>", *ends, sparkline(values)))
    return raw_table(("metric", "first", "last", ""), rows) if rows else ""


def points(lines: Sequence[Line], name: str) -> list[Point]:
    """(iteration, value) of a metric wherever it was a number."""
    return [
        (line["iteration"] or 0, value) for line in lines if (value := line.get(name)) is not None
    ]


def _series(lines: Sequence[Line], names: Mapping[str, str]) -> list[Series]:
    return [Series(shown, points(lines, name)) for shown, name in names.items()]


def _names(lines: Sequence[Line], prefix: str) -> list[str]:
    """Metrics that begin with a prefix, in order of appearance."""
    return list(dict.fromkeys(n for line in lines for n in line if n.startswith(prefix)))


def _cells(lines: Sequence[Line], prefix: str) -> dict[tuple[int, int], float]:
    return {
        (int(iteration), int(name.removeprefix(prefix))): value
        for name in _names(lines, prefix)
        for iteration, value in points(lines, name)
    }
