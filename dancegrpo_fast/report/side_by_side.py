"""An evaluation as one HTML page: numbers, audit, and samples of the same noise side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dancegrpo_fast.report.audit import Finding
from dancegrpo_fast.report.comparison import Results
from dancegrpo_fast.report.metrics import gif_bytes

SHOWN = 24  # Prompts with samples: those that gained most, those that lost most, some between.
_SIDES, _FRAMES = (384, 256), 16  # Most pixels of an image and of a video; frames of a video.

Videos = Callable[[int, Sequence[tuple[int, int]]], Tensor]


def write_page(results: Results, videos: Videos, path: Path) -> Path:
    """Write the page; one file, nothing beside it, no script.

    Args:
        results: What was found.
        videos: (position of a model, (prompt, seed) pairs) -> [n, F, 3, H, W] uint8.
        path: The file.
    """
    first, *others = results.models
    title = f"{', '.join(others)} against {first}" if others else first
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(results.note)}, {results.scores.shape[2]} seeds each. Intervals are 95%, over "
        "prompts; a win is a pair of samples of the same noise.</p>",
        _comparisons(results),
        _curves(results),
        *[_audit(name, found) for name, found in results.findings.items()],
        _samples(results, videos),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def _comparisons(results: Results) -> str:
    rows: list[tuple[str, ...]] = [
        (
            escape(model), f"&emsp;{escape(group)}" if group else escape(reward), f"{t.base:.4g}",
            f"{t.trained:.4g}", f"{t.difference:+.4g}", f"{t.low:+.4g} to {t.high:+.4g}",
            f"{t.win_rate:.2f} ({t.win_low:.2f} to {t.win_high:.2f})", str(t.prompts),
            str(t.missing), "" if group else t.verdict,
        )
        for model, reward, group, t in results.pairs()
    ]  # fmt: skip
    head: tuple[str, ...] = (
        "model", "reward", results.models[0], "model", "difference", "interval", "win rate",
        "prompts", "pairs without score", "",
    )  # fmt: skip
    if not rows:
        head = ("model", "reward", "mean")
        rows = [(escape(m), escape(r), f"{mean:.4g}") for m, r, mean in results.means()]
    return _table("Rewards", head, rows)


def _curves(results: Results) -> str:
    if not results.counts:
        return ""
    rows = [
        (escape(model), escape(reward), *(f"{p.mean:.4g} ({p.standard_error:.2g})" for p in curve))
        for model, reward, curve in results.curves()
    ]
    title = f"Best of n by {escape(results.rewards[0])} (standard error)"
    return _table(title, ("model", "measured", *(f"n = {n}" for n in results.counts)), rows)


def _audit(name: str, findings: Sequence[Finding]) -> str:
    rows = [
        (
            '<b class="flag">flagged</b>' if f.flagged else "ok", escape(f.name), f"{f.base:.4g}",
            f"{f.trained:.4g}", escape(f.threshold),
            f'<p class="advice">{escape(f.advice)}</p>' if f.flagged else "",
        )
        for f in findings
    ]  # fmt: skip
    head = ("", "check", "base", "trained", "flagged if", "what to try")
    return _table(f"Audit of {escape(name)}", head, rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>\n" for row in rows)
    return f'<h2>{title}</h2><div class="wide"><table><tr>{heads}</tr>\n{body}</table></div>'


def _samples(results: Results, videos: Videos) -> str:
    chosen = shown(results)
    cards = []
    for p in chosen:
        figures = []
        for m, model in enumerate(results.models):
            scores = ", ".join(
                f"{reward} {score:.4g}"
                for reward, score in zip(results.rewards, results.scores[m, p, 0], strict=True)
            )
            source = _picture(videos(m, [(p, 0)])[0])
            text = f"{model}: {scores}"
            figures.append(
                f'<figure><img src="{source}" alt="{escape(model)}">'
                f"<figcaption>{escape(text)}</figcaption></figure>"
            )
        prompt = escape(results.prompts[p])
        cards.append(f'<section><p>{prompt}</p><div class="row">{"".join(figures)}</div></section>')
    left = len(results.prompts) - len(chosen)
    told = "First seed, by change of the first reward."
    if left:
        told += f" {left} more prompts are not shown; their samples lie in samples/."
    return f"<h2>Samples</h2><p>{told}</p>{''.join(cards)}"


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


def _picture(video: Tensor) -> str:
    """A data address of [F, 3, H, W] uint8."""
    scale = _SIDES[len(video) > 1] / max(video.shape[-2:])
    pixels = video[:: -(-len(video) // _FRAMES)].float() / 255
    if scale < 1:
        size = [max(1, round(side * scale)) for side in video.shape[-2:]]
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    if len(pixels) > 1:
        return f"data:image/gif;base64,{base64.b64encode(gif_bytes(pixels)).decode()}"
    buffer = io.BytesIO()
    levels = (pixels[0].clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_CSS = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:0}
main{max-width:70rem;margin:auto;padding:1rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;border-bottom:1px solid #8884;text-align:left;vertical-align:top}
.wide td{white-space:nowrap}
.advice{white-space:normal;min-width:20rem;margin:0}
.flag{color:#c22}
section{break-inside:avoid;border-top:1px solid #8884;padding:.5rem 0}
section p{margin:.2rem 0}
.row{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0;max-width:100%}
img{width:16rem;max-width:100%;image-rendering:pixelated}
figcaption{font-size:.8rem;max-width:16rem}
"""
