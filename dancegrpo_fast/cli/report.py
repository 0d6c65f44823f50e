"""`dancegrpo-fast report`: write a run's page from the files in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "report",
        description=(
            "Writes one self-contained HTML page from a run's metrics, evaluations and clips. The "
            "run writes the same page at each snapshot and evaluation."
        ),
        epilog="""\
examples:
  dancegrpo-fast report runs/demo
  dancegrpo-fast report runs/demo --out demo.html
""",
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--out", metavar="FILE", help="the page (default RUN/report.html)")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import UserError
    from dancegrpo_fast.report.run_page import write_page

    out = Path(args.out) if args.out else None
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out = {args.out!r}: there is no folder {out.parent}; make it first")
    if out is not None and out.is_dir():
        example = out / "page.html"
        raise UserError(f"--out = {args.out!r}: is a folder; name a file, such as {example}")
    print(write_page(Path(args.run), out))
    return 0
