"""A project of one recipe, and rows as scripts/record.py writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from dancegrpo_fast.report.verification import (
    FILE,
    ROOT,
    TWIN,
    Row,
)

sys.path.append(str(ROOT / "scripts"))
import readme  # noqa: E402, F401 -- scripts/ is no package; tests take both from here
import record  # noqa: E402
import results_table  # noqa: E402, F401

RECIPE = "seed: 42\nmodel:\n  family: wan   # a comment\n"
MARKED = """# A project
<!-- verified: made -->
<!-- end of verified -->
between
<!-- measured: made -->
<!-- end of measured -->
the end
"""


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        ["git", "-C", str(root), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def checkout(root: Path) -> str:
    """A committed project with one recipe; returns its commit."""
    (root / "recipes").mkdir(parents=True)
    (root / "recipes/one.yaml").write_text(RECIPE)
    (root / FILE).parent.mkdir(parents=True)
    (root / FILE).parent.joinpath("keep").write_text("")
    (root / "README.md").write_text(MARKED)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "one")
    return git(root, "rev-parse", "HEAD")


def row(root: Path, **changes: Any) -> Row:
    """A row as scripts/record.py writes it, of recipes/one.yaml as it is."""
    made = record.row_of(
        "recipe:one", TWIN, hardware="CPU", result="passed", command="c", commit="0123456789",
        root=root,
    )  # fmt: skip
    return made | {"date": "2026-01-02", "tests": {"passed": 2}} | changes
