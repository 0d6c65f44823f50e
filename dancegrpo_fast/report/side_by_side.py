"""An evaluation as one HTML page: numbers, audit, and samples of the same noise side by side."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
from torch import Tensor

from dancegrpo_fast.report import page
from dancegrpo_fast.report.comparison import Results
from dancegrpo_fast.report.metrics import plain
from dancegrpo_fast.report.record import LONGEST_SIDE, save_small

SHOWN = 24  # Prompts with samples: those that gained most, those that lost most, some between.
_IMAGE_SIDE = 384  # Most pixels of an image; a video is as small as in a run's report.

Videos = Callable[[int, Sequence[tuple[int, int]]], Tensor]


def write_page(results: Results, videos: Videos, path: Path, *, fps: Sequence[float]) -> Path:
    """Write the page; one file, nothing beside it, no script.

    Args:
        results: What was found.
        videos: (position of a model, (prompt, seed) pairs) -> [n, F, 3, H, W] uint8.
        path: The file.
        fps: Frames per second of each model's videos.
    """
    first, *others = results.models
    title = f"{', '.join(others)} against {first}" if others else first
    pictures = page.Pictures()
    samples = _samples(results, videos, pictures, fps)
    told = (
        f"{results.note}, {results.scores.shape[2]} seeds each. Intervals are 95%, over prompts; a "
        "win is a pair of samples of the same noise."
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="state">{escape(told)}</p>',
        page.section("Rewards", _comparisons(results)),
        page.section(f"Best of n by {results.rewards[0]} (standard error)", _curves(results)),
        *[
            page.section(f"Audit of {name}", page.audit([plain(asdict(f)) for f in found]))
            for name, found in results.findings.items()
        ],
        page.section("Samples", samples, _which(results)),
        pictures.told("samples/"),
    ]
    return page.write_html(path, title, body)


def _comparisons(results: Results) -> str:
    rows: list[Sequence[str]] = [
        (
            escape(model), f"&emsp;{escape(group)}" if group else escape(reward),
            "" if group else t.verdict, f"{t.base:.4g}", f"{t.trained:.4g}",
            f"{t.difference:+.4g}", f"{t.low:+.4g} to {t.high:+.4g}",
            f"{t.win_rate:.2f} ({t.win_low:.2f} to {t.win_high:.2f})", str(t.prompts),
            str(t.missing),
        )
        for model, reward, group, t in results.pairs()
    ]  # fmt: skip
    head = (
        "model", "reward", "", results.models[0], "this model", "difference", "interval",
        "win rate", "prompts", "pairs without score",
    )  # fmt: skip
    if not rows:
        means = [(model, reward, f"{mean:.4g}") for model, reward, mean in results.means()]
        return page.table(("model", "reward", "mean"), means)
    return page.raw_table(head, rows, "numbers")


def _curves(results: Results) -> str:
    rows = [
        (model, reward, *(f"{p.mean:.4g} ({p.standard_error:.2g})" for p in curve))
        for model, reward, curve in results.curves()
    ]
    head = ("model", "measured", *(f"n = {n}" for n in results.counts))
    return page.table(head, rows, "numbers") if rows else ""


def _which(results: Results) -> str:
    told = "First seed, by change of the first reward."
    if left := len(results.prompts) - len(shown(results)):
        told += f" {left} more prompts are not shown; their samples lie in samples/."
    return told


def _samples(
    results: Results, videos: Videos, pictures: page.Pictures, fps: Sequence[float]
) -> str:
    cards = []
    for p in shown(results):
        clips = []
        for m, model in enumerate(results.models):
            scores = (f"{x:.4g}" for x in results.scores[m, p, 0])
            told = ", ".join(map(" ".join, zip(results.rewards, scores, strict=True)))
            picture = pictures.tag(_small(videos(m, [(p, 0)])[0], fps[m]), model)
            clips.append(f"<div>{picture}<span><b>{escape(model)}</b> {escape(told)}</span></div>")
        prompt = escape(results.prompts[p])
        cards.append(f'<div class="card"><div class="clips">{"".join(clips)}</div>{prompt}</div>')
    return f'<div class="cards pairs">{"".join(cards)}</div>'


def _small(video: Tensor, fps: float) -> bytes:
    """[F, 3, H, W] uint8 as a WebP."""
    buffer, longest = io.BytesIO(), LONGEST_SIDE if len(video) > 1 else _IMAGE_SIDE
    save_small(buffer, video.numpy(), fps=fps, longest=longest)
    return buffer.getvalue()


def shown(results: Results) -> list[int]:
    """Prompts whose samples stand on the page, those that gained most first."""
    scores = results.scores[:, :, 0, 0]
    change = np.nan_to_num(scores[-1] - scores[0])
    order = np.argsort(-change, kind="stable")
    third = SHOWN // 3
    if len(order) <= SHOWN:
        return [int(p) for p in order]
    middle = order[third:-third]
    spread = middle[np.linspace(0, len(middle) - 1, third).round().astype(int)]
    return [int(p) for p in (*order[:third], *spread, *order[-third:])]
