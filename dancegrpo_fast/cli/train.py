"""`dancegrpo-fast train`: run a recipe."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "train",
        description="Runs a recipe to its end and writes weights, metrics and a report.",
        epilog="""\
examples:
  dancegrpo-fast train recipes/demo.yaml
  dancegrpo-fast train recipes/demo.yaml seed=1 output=runs/seed1
  dancegrpo-fast train recipes/demo.yaml --resume latest
  dancegrpo-fast train recipes/demo.yaml rollout.group_size=12 --print-config
  torchrun --nproc-per-node 8 -m dancegrpo_fast train recipes/demo.yaml
""",
    )
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the recipe, by dotted path"
    )
    parser.add_argument(
        "--resume",
        metavar="latest|SNAPSHOT",
        help=(
            "continue the run in the output folder from its newest undamaged snapshot, or from "
            "the snapshot of this folder (RUN/snapshots/iteration-000010), also of another run and "
            "on another number of processes"
        ),
    )
    parser.add_argument(
        "--profile", metavar="N", type=int,
        help="profile iteration N of the run: trace and summary in its folder profile/",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole checked recipe and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import UserError, dump, load_config

    config = load_config(args.recipe, args.overrides)
    if args.print_config:
        print(dump(config), end="")
        return 0
    if args.profile is not None and not 1 <= args.profile <= config.iterations:
        raise UserError(
            f"--profile = {args.profile}: must be an iteration of the run, from 1 to iterations = "
            f"{config.iterations}"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from dancegrpo_fast.cli.quiet import quiet_libraries

    quiet_libraries()
    from dancegrpo_fast.report.verification import recipe_label
    from dancegrpo_fast.run import train

    label = recipe_label(Path(args.recipe), overridden=bool(args.overrides))
    if label is not None and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).info(label)
    resume = Path(args.resume) if args.resume not in (None, "latest") else args.resume == "latest"
    page = train(config, resume=resume, profile=args.profile)
    if page is not None:
        print(f"report: {page}")
    return 0
