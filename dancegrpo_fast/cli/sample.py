"""`dancegrpo-fast sample`: draw clips of a run or of its base model."""

from __future__ import annotations

import argparse
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "sample",
        help="draw samples of a model or of a run",
        description=(
            "Draws one GIF per prompt and seed with the stock pipeline, at the recipe's size and "
            "number of steps. The same prompt position and seed start from the same noise."
        ),
        epilog="""\
examples:
  dancegrpo-fast sample runs/demo --prompt "a red square moving left" --out samples
  dancegrpo-fast sample runs/demo --prompts my_prompts.txt --seeds 2 --out samples
  dancegrpo-fast sample recipes/demo.yaml --prompt "a red square moving left" --out base
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder of a run, or a recipe (its base model)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", action="append", metavar="TEXT", help="may be given repeatedly")
    which.add_argument("--prompts", metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--seeds", type=int, default=1, help="samples per prompt (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="root of the initial noise (default 0)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the recipe's)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where GIFs are written")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.quiet import quiet_libraries

    quiet_libraries()
    import torch
    from tqdm import tqdm

    from dancegrpo_fast.config import EvaluationConfig, UserError, load_config
    from dancegrpo_fast.data import PromptSet
    from dancegrpo_fast.models import load_family
    from dancegrpo_fast.parallel.world import World
    from dancegrpo_fast.prompt import Prompt
    from dancegrpo_fast.report.evaluate import initial_latents
    from dancegrpo_fast.report.metrics import write_gif
    from dancegrpo_fast.run import restore

    if args.seeds < 1:
        raise UserError(f"--seeds = {args.seeds}: must be at least 1")
    prompts = [Prompt(text) for text in args.prompt or ()]
    prompts = prompts or list(PromptSet.load(args.prompts, field="--prompts").prompts)
    weights: AbstractContextManager[None] = nullcontext()
    if Path(args.source).is_dir():
        trainer = restore(Path(args.source))
        config, family, weights = trainer.config, trainer.family, trainer.policy.averaged()
    else:
        config = load_config(args.source, [])
        family = load_family(config.model, World.from_environment().device)
    settings = EvaluationConfig(
        seeds=args.seeds, seed=args.seed, batch_size=config.evaluation.batch_size
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(p, s) for p in range(len(prompts)) for s in range(args.seeds)]
    steps = args.steps or config.rollout.steps
    bar = tqdm(total=len(jobs), desc="sample")
    with weights, torch.no_grad(), family.live_pipeline() as pipeline, bar:
        for start in range(0, len(jobs), settings.batch_size):
            batch = jobs[start : start + settings.batch_size]
            latents = initial_latents(settings, batch, family.latent_shape, family.device)
            chosen = [prompts[p] for p, _ in batch]
            videos = family.draw(pipeline, chosen, latents, steps)
            for (p, s), prompt, video in zip(batch, chosen, videos, strict=True):
                name = re.sub(r"[^A-Za-z0-9]+", "_", prompt.text).strip("_")[:60]
                write_gif(out / f"{p:04d}_{name}_seed{s}.gif", video)
            bar.update(len(batch))
    print(f"{len(jobs)} samples in {out}")
    return 0
