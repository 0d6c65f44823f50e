"""One self-contained HTML page on a finished run: no script, no font, no file beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image


@dataclass(frozen=True)
class Measure:
    """Something else that was measured on the held-out samples, before and after."""

    name: str
    base: float
    trained: float
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        title: Heading, such as the recipe's name.
        reward: Name of the reward.
        base: Mean held-out reward before training.
        trained: The same after training.
        standard_error: Standard error of the difference, over prompts.
        prompts: Held-out prompts.
        seeds: Samples per prompt.
        config: The whole configuration as YAML.
        hashes: What is hashed to its hash.
        measures: Further measures.
    """

    title: str
    reward: str
    base: float
    trained: float
    standard_error: float
    prompts: int
    seeds: int
    config: str
    hashes: Mapping[str, str]
    measures: Sequence[Measure] = field(default=())


@dataclass(frozen=True)
class CurvePoint:
    """Rewards after `iteration` finished iterations; None where nothing was measured."""

    iteration: int
    training: float | None = None
    held_out: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class ClipPair:
    """The same prompt and noise drawn by both models: GIF (or PNG) bytes and rewards."""

    prompt: str
    before: bytes
    after: bytes
    reward_before: float
    reward_after: float


def write_page(
    run_dir: str | Path,
    summary: Summary,
    curve: Sequence[CurvePoint],
    pairs: Sequence[ClipPair],
    stages: Mapping[str, float],
    load_lines: str,
) -> Path:
    """Writes `report.html` in the run's folder and returns its path.

    Args:
        run_dir: Folder of the run.
        summary: The result.
        curve: Rewards over the run.
        pairs: Clips shown side by side.
        stages: Stage to seconds, in order.
        load_lines: Python lines that load the trained weights.
    """
    gain = summary.trained - summary.base
    samples = f"{summary.prompts} held-out prompts x {summary.seeds} seeds"
    body = [
        f"<h1>{escape(summary.title)}</h1>",
        f'<p class="lead">Mean <b>{escape(summary.reward)}</b> on {samples}: '
        f"<b>{summary.base:.3f}</b> before, <b>{summary.trained:.3f}</b> after; gain "
        f"<b>{gain:+.3f}</b> &plusmn; {summary.standard_error:.3f}{_in_errors(gain, summary)}.</p>",
        _section("Reward", f"<figure>{reward_curve(curve)}</figure>"),
        _section("Before and after", _pairs(pairs), "The same prompt and noise, drawn by each."),
        _section("Also measured", _measures(summary.measures)) if summary.measures else "",
        _section("Load it", f"<pre><code>{escape(load_lines.strip())}</code></pre>"),
        _section("Time", _stages(stages)),
        _section("Weights", _table(("what", "SHA-256"), summary.hashes.items(), "hash")),
        "<details><summary>Configuration</summary>"
        f"<pre><code>{escape(summary.config.strip())}</code></pre></details>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(summary.title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )
    path = Path(run_dir) / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def reward_curve(curve: Sequence[CurvePoint]) -> str:
    """Returns an inline SVG: held-out means with bars of one standard error, training means."""
    training = [(p.iteration, p.training) for p in curve if p.training is not None]
    held_out = [
        (p.iteration, p.held_out, p.standard_error or 0) for p in curve if p.held_out is not None
    ]
    # Text stays text; a colour used nowhere else is replaced by the page's, light or dark.
    ink = "#010203"
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}
    style |= {"font.size": "11", "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink}
    style |= {"xtick.color": ink, "ytick.color": ink}
    with rc_context(style):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        if training:
            axes.plot(
                *zip(*training, strict=True),
                color="#8a94a6",
                lw=1.2,
                label="training",
                gid="training",
            )
        if held_out:
            x, y, error = zip(*held_out, strict=True)
            line, _caps, (bars,) = axes.errorbar(
                x, y, error, color="#2f81f7", lw=2, marker="o", ms=5, capsize=4, label="held out"
            )
            line.set_gid("held-out")
            bars.set_gid("held-out-error")
        axes.set_xlabel("iteration")
        axes.set_ylabel("mean reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        if training or held_out:
            axes.legend(frameon=False, loc="best")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(ink, "currentColor")
    return svg[svg.index("<svg") :]


def _in_errors(gain: float, summary: Summary) -> str:
    if not summary.standard_error > 0:
        return ""
    return f" ({gain / summary.standard_error:.1f} standard errors)"


def _section(title: str, content: str, note: str = "") -> str:
    text = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{text}{content}</section>"


def _pairs(pairs: Iterable[ClipPair]) -> str:
    cards = []
    for pair in pairs:
        sides = (
            ("before", pair.before, pair.reward_before),
            ("after", pair.after, pair.reward_after),
        )
        clips = "".join(
            f'<div><img {_image(clip)} alt="{name}: {escape(pair.prompt)}">'
            f"<span>{name} <b>{reward:.3f}</b></span></div>"
            for name, clip, reward in sides
        )
        cards.append(
            f'<div class="card"><div class="clips">{clips}</div>{escape(pair.prompt)}</div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _image(clip: bytes) -> str:
    """Returns an <img>'s class and source; small images are enlarged without blur."""
    image = Image.open(io.BytesIO(clip))
    look = ' class="small"' if image.width < 160 else ""
    encoded = base64.b64encode(clip).decode()
    return f'src="data:image/{str(image.format).lower()};base64,{encoded}"{look}'


def _measures(measures: Iterable[Measure]) -> str:
    rows = ((m.name, f"{m.base:.3f}", f"{m.trained:.3f}", m.note) for m in measures)
    return _table(("measure", "before", "after", ""), rows)


def _stages(stages: Mapping[str, float]) -> str:
    total = sum(stages.values())
    rows = [
        (name, f"{seconds:.1f} s", f"{seconds / total:.0%}" if total else "")
        for name, seconds in stages.items()
    ]
    return _table(("stage", "time", "share"), [*rows, ("total", f"{total:.1f} s", "")])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


_CSS = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --page: #fff; --card: #f4f6f9;
  --line: #dde2ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --page: #11151c;
  --card: #1a202b; --line: #2c3443; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.lead { font-size: 1.1rem; margin: 0; }
section > p { color: var(--soft); margin: 0 0 .8rem; }
figure { margin: 0; max-width: 40rem; }
figure svg { width: 100%; height: auto; display: block; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .75rem; overflow-wrap: anywhere; }
.clips { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin-bottom: .5rem; }
.clips img { width: 100%; display: block; border-radius: .35rem; }
.small { image-rendering: pixelated; }
.clips span { font-size: .85rem; color: var(--soft); }
.clips b { color: var(--ink); font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: .85rem; }
.hash td + td { font: .8rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; margin: 0; }
details { margin-top: 2.2rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .6rem; }
"""
