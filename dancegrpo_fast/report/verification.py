"""What was run, on what, with which result: the rows of benchmarks/results/verification.jsonl.

`scripts/test --record` and `scripts/gpu` append rows (`scripts/record.py`); nothing else does, and
no label is written by hand. `train` and the tables of the README read them. A wheel holds neither
our recipes nor the rows: outside a checkout there is no label.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = Path("benchmarks/results/verification.jsonl")  # Below the root of a checkout.

TWIN, STOCK, REAL = "tiny twin", "stock pipeline", "real weights"
CPU, PASSED = "CPU", "passed"
_WITH = {TWIN: "a tiny twin", REAL: "real weights"}

Row = dict[str, Any]
Key = tuple[str, str, str]


def newest_rows(file: Path) -> dict[Key, Row]:
    """The last row of each (subject, what, hardware); none if there is no file.

    Raises:
        ValueError: A line is no row.
    """
    rows: dict[Key, Row] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["subject"], row["what"], row["hardware"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file.name}, line {number} = {line[:60]!r}: must be a row of scripts/record.py "
                f"({type(error).__name__}); delete the line"
            ) from None
    return rows


def content_hash(recipe: Path) -> str:
    """Of the values that a recipe's text gives: comments, quotes and the order of keys are free."""
    import yaml  # Here: scripts/gpu needs torch and NumPy only.

    values = yaml.load(recipe.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def when(row: Row) -> str:
    """Commit and day of a row."""
    return f"commit {row['commit'][:7]}, {row['date']}"


def recipe_label(recipe: Path, root: Path = ROOT, *, overridden: bool = False) -> str | None:
    """What is known of one of our recipes, in one line; None for a recipe that is not ours.

    Args:
        recipe: Its file.
        root: The checkout.
        overridden: It runs with overrides, and they are not what the rows are about.
    """
    if recipe.resolve().parent != root.resolve() / "recipes":
        return None
    name = f"recipes/{recipe.name}"
    try:
        found = newest_rows(root / FILE)
    except ValueError as error:  # A damaged file of labels is no reason not to train.
        return f"{name}: not known whether it ever ran: {error}"
    rows = [row for (subject, _, _), row in found.items() if subject == f"recipe:{recipe.stem}"]
    if not rows:
        return f"{name}: never run"
    content = content_hash(recipe)
    parts = [_part(row, changed=row.get("content") != content) for row in rows]
    never = []
    if not any(row["what"] == REAL for row in rows):
        never.append("never run with real weights")
    if all(row["hardware"] == CPU for row in rows):
        never.append("never on a GPU")
    if never:
        parts.append(", ".join(never))
    if overridden:
        parts.append("the overrides were not part of it")
    return f"{name}: {'; '.join(parts)}"


def _part(row: Row, *, changed: bool) -> str:
    passed = row["result"] == PASSED
    result = "verified" if passed else "failed"
    if changed:
        result = f"changed since it {'was verified' if passed else 'failed'}"
    return f"{result} with {_WITH.get(row['what'], row['what'])} on {row['hardware']} ({when(row)})"
