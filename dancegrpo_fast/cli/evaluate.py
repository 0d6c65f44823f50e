"""`dancegrpo-fast evaluate`: models against each other on prompts of the user's choice."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo_fast.config import RewardConfig
    from dancegrpo_fast.evaluating import Model


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "evaluate",
        description=(
            "Draws every prompt with every model from the same noise, with the stock diffusers "
            "pipeline, scores the samples and compares each model with the first. Writes "
            "evaluation.json and page.html in OUT, and keeps samples and scores there by what they "
            "are made of: a second call computes only what is missing. SOURCE is the folder of a "
            "finished run, or a recipe (its base model; with --weights also what was exported for "
            "it). The base model of the first source comes first. Under torchrun the work is "
            "spread over the processes; each holds a whole model. See docs/evaluation.md."
        ),
        epilog="""\
examples:
  dancegrpo-fast evaluate runs/demo --prompts examples/demo/heldout_prompts.txt --out evaluation
  dancegrpo-fast evaluate runs/flux --prompts benchmark --format hpsv2 --reward hpsv2 --out hps
  dancegrpo-fast evaluate runs/a runs/b --prompts p.txt --seeds 8 --best-of 1,2,4,8 --out ab
  dancegrpo-fast evaluate recipes/flux_lora.yaml --weights exported --prompts p.txt --out lora
  dancegrpo-fast evaluate runs/demo --prompts p.txt --seeds 4 --audit --out audited
""",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="run folders or recipes")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="prompts: a file, a folder or a hub id"
    )
    parser.add_argument(
        "--format",
        default="plain",
        metavar="NAME",
        help="what FILE is: plain, hpsv2, pickapic, geneval, drawbench, videoalign or ocr (default "
        "plain: as data.prompts of a recipe)",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="key or column of the prompt, if not the format's own"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N prompts (hpsv2: of each style)"
    )
    parser.add_argument(
        "--expect",
        metavar="SHA256",
        help="refuse other prompts than those of this hash (or its beginning), which a first call "
        "writes as prompts_sha256",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where everything is kept")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="FOLDER",
        help="with one recipe: exported weights; may be given repeatedly",
    )
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="a name of the recipe's or of ours, path/to/file.py:ClassName, or a mapping as in a "
        "recipe, '{name: hpsv2, path: ...}'; may be repeated (default: the recipe's)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="samples of a prompt (default 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="root of the initial noise (default 0)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (default: the recipes')"
    )
    parser.add_argument(
        "--best-of", metavar="N,N,...", help="best-of-n curves by the first reward, at most --seeds"
    )
    parser.add_argument("--audit", action="store_true", help="look for rewards that were cheated")
    parser.add_argument(
        "--no-base", action="store_true", help="do not add the base model of the first source"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.cli.quiet import quiet_libraries

    quiet_libraries()
    from dancegrpo_fast.evaluating import Evaluating
    from dancegrpo_fast.parallel.lock import FolderLock
    from dancegrpo_fast.parallel.world import World
    from dancegrpo_fast.report.benchmarks import load_benchmark
    from dancegrpo_fast.report.comparison import Results, table, write_json
    from dancegrpo_fast.report.side_by_side import write_page
    from dancegrpo_fast.report.store import Asked, Store

    counts, models = _checked(args), list(_models(args))
    chosen = _rewards(args, models)
    read = load_benchmark(
        args.format, args.prompts, column=args.column, limit=args.limit, expect=args.expect
    )
    world, out = World.from_environment(), Path(args.out)
    lock = FolderLock(out, world, field="--out")
    try:
        lock.take()
        work = Evaluating(
            models,
            chosen,
            Asked.all_of(read.prompts),
            seeds=args.seeds,
            root=args.seed,
            steps=args.steps,
            store=Store(out, world.rank),
            world=world,
        )
        drawn, scored = work.draw(), work.score()
        scores = work.scores()
        if args.audit:
            work.measure()
        if world.is_main:
            results = Results(
                read.note,
                tuple(prompt.text for prompt in read.prompts),
                read.groups,
                tuple(model.name for model in models),
                tuple(reward.name.rpartition(":")[2] for reward in chosen),
                scores,
                counts,
                work.findings(scores) if args.audit else {},
                {"format": args.format, "prompts_sha256": read.sha256, "seeds": args.seeds,
                 "seed": args.seed, "models_sha256":
                 dict(zip((model.name for model in models), work.ids, strict=True))},
            )  # fmt: skip
            print(table(results))
            write_json(results, out / "evaluation.json")
            fps = [model.config.model.fps or 8 for model in models]
            page = write_page(results, work.videos, out / "page.html", fps=fps)
            print(f"\n{drawn} samples drawn and {scored} scores computed now; {page}")
        world.barrier()
    finally:
        lock.release()
        world.close()
    return 0


def _checked(args: argparse.Namespace) -> tuple[int, ...]:
    """The values of n for best-of-n."""
    from dancegrpo_fast.config import UserError
    from dancegrpo_fast.report.benchmarks import BENCHMARKS

    for name in ("seeds", "steps", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} = {value}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed = {args.seed}: must be at least 0")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out = {args.out!r}: is a file; name a folder")
    if args.format not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"--format = {args.format!r}: no such format; known: {known}")
    if args.expect is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", args.expect):
        raise UserError(f"--expect = {args.expect!r}: must be 8 to 64 hex digits of a SHA-256")
    if args.column is not None and args.format == "hpsv2":
        raise UserError("--column: hpsv2 is lists of texts, which have no columns; leave it out")
    if args.best_of is None:
        return ()
    try:
        counts = tuple(sorted({int(n) for n in args.best_of.split(",")}))
    except ValueError:
        counts = (0,)
    if counts[0] < 1 or counts[-1] > args.seeds:
        raise UserError(
            f"--best-of = {args.best_of}: must be numbers from 1 to --seeds = {args.seeds}, such "
            "as 1,2,4"
        )
    return counts


def _models(args: argparse.Namespace) -> Iterator[Model]:
    """The models in the order of the table, each name once."""
    from dancegrpo_fast.config import UserError, load_config
    from dancegrpo_fast.evaluating import Model

    found: list[Model] = []
    for position, text in enumerate(args.sources):
        source = Path(text)
        recipe = source / "recipe.yaml" if source.is_dir() else source
        if not recipe.is_file():
            raise UserError(f"SOURCE = {text!r}: is neither a recipe nor the folder of a run")
        config = load_config(recipe, [])
        if not position and args.no_base and not source.is_dir() and not args.weights:
            raise UserError(f"--no-base: SOURCE {text!r} is a base model itself; leave one out")
        if not position and not args.no_base:
            found.append(Model("base", config, None))
        if source.is_dir():
            if not (source / "final").is_dir():
                raise UserError(
                    f"SOURCE = {text!r}: is not finished; write what it has with `dancegrpo-fast "
                    f"export {text} EXPORTED` and give {recipe} --weights EXPORTED"
                )
            found.append(Model(source.resolve().name, config, source / "final"))
        elif position:
            found.append(Model(source.stem, config, None))
    if args.weights and (len(args.sources) > 1 or Path(args.sources[0]).is_dir()):
        raise UserError(f"--weights = {args.weights[0]!r}: goes with one recipe as SOURCE")
    for text in args.weights:
        folder = Path(text)
        if not any((folder / name).is_file() for name in _EXPORTED):
            raise UserError(
                f"--weights = {text!r}: holds neither {' nor '.join(_EXPORTED)}; give what `train` "
                "wrote as `final`, or `export`"
            )
        whole = folder.resolve()
        named = whole.parent if whole.name == "final" else whole
        found.append(Model(named.name, config, folder))
    names: dict[str, int] = {}
    for model in found:
        names[model.name] = again = names.get(model.name, 0) + 1
        yield model if again == 1 else Model(f"{model.name} ({again})", model.config, model.weights)


_EXPORTED = ("model_index.json", "pytorch_lora_weights.safetensors")


def _rewards(args: argparse.Namespace, models: Sequence[Model]) -> list[RewardConfig]:
    """What is measured: what was asked for, or every reward of the first recipe."""
    from pydantic import ValidationError

    from dancegrpo_fast.config import RewardConfig, UserError, parse_value
    from dancegrpo_fast.rewards.catalogue import REWARDS

    known = {reward.name: reward for reward in models[0].config.rewards}
    if not args.reward:
        return list(known.values())
    found = []
    for text in args.reward:
        if not text.startswith("{"):
            found.append(known.get(text) or RewardConfig(name=text))
            continue
        try:
            found.append(RewardConfig.model_validate(parse_value(text, "--reward")))
        except ValidationError as error:
            told = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            reason = "; ".join(told)
            raise UserError(f"--reward = {text!r}: is no reward of a recipe: {reason}") from None
    names = [reward.name for reward in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--reward = {twice[0]!r}: is given twice")
    for name in names:  # Rewards are built after drawing: a slip should not cost hours.
        file = name.rpartition(":")[0]
        if name.partition(".")[0] not in REWARDS and not Path(file).is_file():
            raise UserError(
                f"--reward = {name!r}: no such reward; known: {', '.join(REWARDS)}; your own is "
                "path/to/file.py:ClassName"
            )
    return found
