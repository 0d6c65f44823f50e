"""The pictures of a run's page: extreme samples, one prompt over time, training samples."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from dancegrpo_fast.report.page import Pictures
from dancegrpo_fast.report.record import Record, save_small, spread

SHOWN = 3  # Prompts of each kind: best, worst, most changed.
ROWS, COLUMNS = 4, 6  # Prompts over time, and evaluations of each.


def extremes(base: Record, last: Record, pictures: Pictures) -> str:
    """Best, worst and most changed samples of the last evaluation, beside the base's."""
    before, after = (record.totals[:, 0] for record in (base, last))
    kept = [p for p in last.clips if p in base.clips and np.isfinite(before[p] + after[p])]
    count = min(SHOWN, max(1, len(kept) // 3))
    by_score = sorted(kept, key=lambda p: after[p])
    by_change = sorted(kept, key=lambda p: abs(after[p] - before[p]))
    parts = []
    for title, chosen in (
        ("Highest reward", by_score[::-1][:count]),
        ("Lowest reward", by_score[:count]),
        ("Most changed", by_change[::-1][:count]),
    ):
        cards = [
            _card(last.prompts[p], pictures, [
                ("before", base.clips[p], before[p]), ("after", last.clips[p], after[p])
            ])
            for p in chosen
        ]  # fmt: skip
        if cards:
            parts.append(f'<h3>{title}</h3><div class="cards">{"".join(cards)}</div>')
    return "".join(parts)


def over_time(records: Sequence[Record], pictures: Pictures) -> str:
    """A few prompts, each with its clip after every evaluation, or after some of many."""
    columns = [records[n] for n in spread(len(records), COLUMNS)]
    kept = [p for p in columns[-1].clips if all(p in record.clips for record in columns)]
    rows = []
    for p in [kept[n] for n in spread(len(kept), ROWS)]:
        cells = []
        for record in columns:
            alt = f"iteration {record.iteration}: {record.prompts[p]}"
            picture = pictures.tag(record.clips[p].read_bytes(), alt)
            reward = _score(record.totals[p, 0])
            cells.append(f"<div>{picture}<span>{record.iteration}: <b>{reward}</b></span></div>")
        rows.append(
            f"<h3>{escape(columns[-1].prompts[p])}</h3>"
            f'<div class="strip">{"".join(cells)}</div>'
        )
    return "".join(rows)


def training_samples(folder: Path, last: int, pictures: Pictures) -> str:
    """Some of the clips that a run saved, for a run that evaluates nothing."""
    found = []
    for path in folder.glob("clips/*.gif"):
        parts = re.fullmatch(r"(.*)_(\d{6,})", path.stem)
        if parts and int(parts[2]) <= last:
            found.append((int(parts[2]), parts[1].replace("_", " "), path))
    found.sort()
    cards = []
    for iteration, name, path in [found[n] for n in spread(len(found), 2 * COLUMNS)]:
        picture = pictures.tag(_small(path), name)
        cards.append(
            f'<div class="card"><div class="clips"><div>{picture}</div></div>'
            f"{iteration}: {escape(name)}</div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(prompt: str, pictures: Pictures, sides: Sequence[tuple[str, Path, float]]) -> str:
    clips = "".join(
        f"<div>{pictures.tag(clip.read_bytes(), f'{name}: {prompt}')}"
        f"<span>{name} <b>{_score(reward)}</b></span></div>"
        for name, clip, reward in sides
    )
    return f'<div class="card"><div class="clips">{clips}</div>{escape(prompt)}</div>'


def _score(reward: float) -> str:
    return f"{reward:.3f}" if np.isfinite(reward) else "failed"


def _small(path: Path) -> bytes:
    """A GIF as it goes into the page: a large one is re-encoded small."""
    if path.stat().st_size < 60_000:
        return path.read_bytes()
    image = Image.open(path)
    frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    clip = np.stack(frames).transpose(0, 3, 1, 2)
    buffer = io.BytesIO()
    save_small(buffer, clip, fps=1000 / max(image.info.get("duration", 125), 10))
    return buffer.getvalue()
