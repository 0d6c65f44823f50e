"""`dancegrpo-fast export`: write a run's weights for a stock diffusers pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "export",
        description=(
            "Loads the newest undamaged snapshot of a run and writes what a stock pipeline loads: "
            "a whole folder (policy.train = full) or LoRA weights (lora). Averaged weights if the "
            "run keeps them. A finished run has already written this to its folder `final`."
        ),
        epilog="example:\n  dancegrpo-fast export runs/demo exported",
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("out", help="folder to write; must not hold anything yet")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.cli.quiet import quiet_libraries

    quiet_libraries()
    from dancegrpo_fast.config import UserError
    from dancegrpo_fast.models import export, load_lines
    from dancegrpo_fast.run import restore

    out = Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"OUT = {args.out!r}: is a file or not empty; name a new folder")
    trainer = restore(Path(args.run))
    export(trainer.family, trainer.policy, out)
    print(f"iteration {trainer.done} of {args.run} written to {out}; load it with\n")
    config = trainer.config
    print(load_lines(trainer.family, out, config.policy.train, config.rollout.steps))
    return 0
