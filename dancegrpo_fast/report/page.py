"""The frame of a report: one HTML file without scripts, fonts or anything beside it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from dancegrpo_fast.report.chart import number_text

PICTURE_BYTES = 11_000_000  # Of all pictures of a page, encoded; the rest of a page is below 2 MB.


def write_html(path: Path, title: str, body: Iterable[str]) -> Path:
    """Write a page whole or not at all: whoever has it open reads the old one or the new one."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An icon of its own, or browsers ask the server for one.
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


class Pictures:
    """Puts pictures into a page until it is full.

    Attributes:
        left_out: Pictures that found no room.
    """

    def __init__(self, limit: int = PICTURE_BYTES) -> None:
        self._room, self.left_out = limit, 0

    def tag(self, picture: bytes, alt: str) -> str:
        """An `<img>` of a GIF, WebP or PNG; small ones are enlarged without blur."""
        try:
            image = Image.open(io.BytesIO(picture))
        except OSError:  # Such as a copy of the folder that was cut off.
            return '<span class="none">unreadable</span>'
        encoded = base64.b64encode(picture).decode()
        if len(encoded) > self._room:
            self.left_out += 1
            return '<span class="none">no room</span>'
        self._room -= len(encoded)
        look = ' class="small"' if image.width < 160 else ""
        return (
            f'<img src="data:image/{str(image.format).lower()};base64,{encoded}"{look} '
            f'width="{image.width}" height="{image.height}" alt="{escape(alt)}">'
        )


    def told(self, where: str) -> str:
        """How many found no room, and where they are; nothing if all did."""
        if not self.left_out:
            return ""
        return (
            f'<p class="state">{self.left_out} pictures were left out to keep this page small '
            f"({PICTURE_BYTES / 1e6:.0f} MB of pictures); they are in {escape(where)}.</p>"
        )


def section(title: str, content: str, note: str = "") -> str:
    """A heading with what stands below it; nothing if there is nothing."""
    text = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{text}{content}</section>" if content else ""


def figures(charts: Iterable[str]) -> str:
    """Charts side by side as the page's width allows."""
    drawn = "".join(charts)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of text that is escaped here."""
    return raw_table(head, ([escape(cell) for cell in row] for row in rows), kind)


def raw_table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of cells that are HTML already; wide tables scroll by themselves."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def audit(findings: Sequence[Mapping[str, Any]]) -> str:
    """What an audit found, as `audit.json` holds it: `asdict` of each `audit.Finding`."""
    rows = []
    for found in findings:
        word = '<span class="flag">look at it</span>' if found["flagged"] else "quiet"
        numbers = [found[name] for name in ("base", "trained")]
        shown = ["" if number is None else number_text(number) for number in numbers]
        told = (found["threshold"], found["advice"] if found["flagged"] else "")
        texts = [f'<div class="text">{escape(text)}</div>' if text else "" for text in told]
        rows.append([escape(found["name"]), word, *shown, *texts])
    head = ("looked at", "", "before", "after", "limit", "what to try")
    return raw_table(head, rows) if rows else ""


def code(text: str) -> str:
    """Lines of code or configuration."""
    return f"<pre><code>{escape(text.strip())}</code></pre>"


def details(title: str, content: str) -> str:
    """Something that is folded away until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


_CSS = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --page: #fff; --card: #f4f6f9;
  --line: #dde2ea; --c1: #0067b8; --c2: #b8660a; --c3: #0a7d5a; --c4: #b0307a; --c5: #6a4fc4;
  --c6: #7a7f1a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --page: #11151c;
  --card: #1a202b; --line: #2c3443; --c1: #5fb0f5; --c2: #f0a347; --c3: #4fc79c; --c4: #f07fbf;
  --c5: #a996f7; --c6: #c9cf5a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .5rem; }
.lead { font-size: 1.1rem; margin: 0 0 .3rem; }
.state, section > p { color: var(--soft); margin: 0 0 .8rem; }
.figures { display: grid; gap: 1.4rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.figures.main { grid-template-columns: minmax(0, 34rem); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .9rem; line-height: 1.35; margin-bottom: .3rem; }
figcaption small { display: block; color: var(--soft); font-size: .82rem; }
figure svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line circle { stroke: none; }
.s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); }
.s7 { --c: var(--soft); } .s8 { --c: var(--ink); }
.line { stroke: var(--c); } .line circle, .fill { fill: var(--c); }
.key { white-space: nowrap; margin-left: .9em; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .3em;
  border-radius: .15em; background: var(--c); }
.spark { display: block; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.cards.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .75rem; overflow-wrap: anywhere; break-inside: avoid; }
.clips { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; margin-bottom: .5rem; }
.pairs .clips { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(4.5rem, 9rem);
  gap: .6rem; overflow-x: auto; margin: .2rem 0 1rem; break-inside: avoid; }
.clips img, .strip img { width: 100%; height: auto; display: block; border-radius: .35rem; }
.small { image-rendering: pixelated; }
.clips span, .strip span { font-size: .85rem; color: var(--soft); }
.clips b, .strip b { color: var(--ink); font-variant-numeric: tabular-nums; }
.none { display: block; border: 1px dashed var(--line); border-radius: .35rem; padding: .4rem; }
.flag { color: var(--c2); font-weight: 600; white-space: nowrap; }
.wide { overflow-x: auto; } .figures + .wide { margin-top: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); }
.numbers td { white-space: nowrap; }
.text { min-width: 13rem; }
th { color: var(--soft); font-weight: 500; font-size: .85em; }
.hash td + td { font: .8rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; margin: 0; }
details { margin-top: 1.6rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .6rem; }
@media print { main { max-width: none; padding: 0; } body { font-size: 12px; }
  .figures { grid-template-columns: 1fr 1fr; }
  .cards { grid-template-columns: repeat(3, 1fr); }
  .cards.pairs { grid-template-columns: 1fr 1fr; } th, td { padding-right: .5rem; }
  .numbers td { white-space: normal; } .wide, .strip { overflow: visible; }
  pre { white-space: pre-wrap; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
