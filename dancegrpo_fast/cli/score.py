"""`dancegrpo-fast score`: rewards of images and videos on disk, as a table and a contact sheet."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dancegrpo_fast.config import RewardConfig
    from dancegrpo_fast.rewards.files import Job


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "score",
        description=(
            "Scores the images and videos of a folder. Writes scores.csv and sheet.png, best "
            "first. A file's prompt is the one whose number (from 0) begins its name, or the one "
            'that names it as "file" in a .jsonl, or the one at its place if the counts agree.'
        ),
        epilog="""\
examples:
  dancegrpo-fast score --list
  dancegrpo-fast score samples --prompts prompts.txt --reward colourfulness
  dancegrpo-fast score samples --prompts prompts.txt --reward hpsv2 path=weights/hpsv2
  dancegrpo-fast score samples --prompts prompts.txt --reward videoalign options.fps=8
  dancegrpo-fast score samples --prompts prompts.txt --recipe recipes/demo.yaml
""",
    )
    parser.add_argument(
        "folder", nargs="?", help="folder of images (png, ...) or videos (mp4, gif)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of every --reward: path=..., frames=[0], options.NAME=...; with --recipe "
        "its fields",
    )
    parser.add_argument("--list", action="store_true", help="say which rewards there are, and stop")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="one of --list, or path/to/file.py:ClassName; may be given repeatedly",
    )
    which.add_argument("--recipe", metavar="FILE", help="score with the rewards of a recipe")
    parser.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line; .jsonl with files and metadata"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where results go (default: scores in the folder)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="files at once (default 16)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.config import UserError

    if args.list:
        print(listing())
        return 0
    needed = {"FOLDER": args.folder, "--prompts": args.prompts}
    missing = [name for name, value in needed.items() if value is None]
    missing += ["--reward or --recipe"] * (args.reward is None and args.recipe is None)
    if missing:
        raise UserError(f"score needs {', '.join(missing)}; see dancegrpo-fast score --help")
    if args.batch_size < 1:
        raise UserError(f"--batch-size = {args.batch_size}: must be at least 1")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"folder = {args.folder!r}: is no folder")

    from dancegrpo_fast.cli.quiet import quiet_libraries
    from dancegrpo_fast.data import PromptSet
    from dancegrpo_fast.rewards.files import find_jobs

    prompts = PromptSet.load(args.prompts, field="--prompts").prompts
    jobs = find_jobs(folder, prompts)
    quiet_libraries()
    configs = reward_configs(args)
    out = Path(args.out) if args.out else folder / "scores"
    out.mkdir(parents=True, exist_ok=True)  # Now: a place that cannot be had should cost no hours.
    scores, problems = _score(jobs, prompts, configs, args.batch_size)
    total = [
        sum(c.weight * row[k] for k, c in enumerate(configs) if c.weight != 0) for row in scores
    ]
    # Best first; what has no score comes last.
    order = sorted(range(len(jobs)), key=lambda i: (math.isnan(total[i]), -total[i]))
    names = [config.name for config in configs]
    texts = [prompts[job.prompt].text for job in jobs]
    # A name of a file need be no text.
    with open(out / "scores.csv", "w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "prompt", *names, "weighted", "error"])
        for i in order:
            numbers = ["" if math.isnan(x) else repr(x) for x in (*scores[i], total[i])]
            writer.writerow([jobs[i].file.name, texts[i], *numbers, problems[i]])
    contact_sheet([jobs[i].file for i in order], [total[i] for i in order]).save(out / "sheet.png")
    print(table(names, scores))
    failed = [i for i in order if math.isnan(total[i])]
    if failed:
        print(f"{len(failed)} of {len(jobs)} without a score, such as {jobs[failed[0]].file.name}: "
              f"{problems[failed[0]]}")  # fmt: skip
    print(f"{len(jobs)} files in {out / 'scores.csv'} and {out / 'sheet.png'}, best first")
    return 0


def reward_configs(args: argparse.Namespace) -> list[RewardConfig]:
    """The rewards that the command names, with `key=value` for each of them.

    Raises:
        UserError: Settings that a reward does not have.
    """
    from pydantic import ValidationError

    from dancegrpo_fast.config import RewardConfig, UserError, load_config

    if args.recipe is not None:
        return load_config(args.recipe, args.overrides).rewards
    settings: dict[str, Any] = {}
    for override in args.overrides:
        key, equals, text = override.partition("=")
        target, _, option = key.partition(".")
        if not equals or key in ("name", "options") or (option and target != "options"):
            raise UserError(f"{override!r}: write path=..., frames=[0] or options.NAME=...")
        value: Any = text
        try:
            value = json.loads(text)
        except ValueError:
            pass  # Text needs no quotes.
        if option:
            settings.setdefault("options", {})[option] = value
        else:
            settings[key] = value
    configs = []
    for name in args.reward:
        try:
            configs.append(RewardConfig(**{"name": name, **settings}))
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}"
                for e in error.errors()
            ]
            raise UserError("\n".join(lines)) from None
    return configs


def _score(
    jobs: Sequence[Job], prompts: Sequence[Any], configs: Sequence[RewardConfig], size: int
) -> tuple[list[list[float]], list[str]]:
    """Scores [files][rewards], NaN where they failed, and each file's first problem."""
    from tqdm import tqdm

    from dancegrpo_fast.parallel.world import World
    from dancegrpo_fast.report.evaluate import as_in_training
    from dancegrpo_fast.rewards import load_rewards, placed
    from dancegrpo_fast.rewards.files import batches
    from dancegrpo_fast.rewards.scoring import attempt

    device = World.from_environment().device
    rewards = load_rewards(configs, device)
    whole = any(getattr(reward, "groupwise", False) for reward in rewards)
    scores = [[math.nan] * len(rewards) for _ in jobs]
    unreadable: dict[int, str] = {}
    problems = [""] * len(jobs)
    with placed(rewards, device), tqdm(total=len(jobs), desc="score") as bar:
        for rows, samples in batches(
            jobs, prompts, size=size, whole_prompts=whole, unreadable=unreadable
        ):
            there = as_in_training(rewards, samples, device)
            for column, reward in enumerate(rewards):
                scored = attempt(reward, there[column])
                for row, value, why in zip(
                    rows, scored.values.tolist(), scored.errors, strict=True
                ):
                    scores[row][column] = value
                    problems[row] = problems[row] or (why and f"{reward.name}: {why}")
            bar.update(len(rows))
    for row, why in unreadable.items():
        problems[row] = why
    return scores, problems


def table(names: Sequence[str], scores: Sequence[Sequence[float]]) -> str:
    """Mean, spread and range of each reward over the files that have a score."""
    lines = [f"{'reward':<28}{'mean':>12}{'std':>12}{'least':>12}{'most':>12}{'files':>8}"]
    for column, name in enumerate(names):
        values = [row[column] for row in scores if not math.isnan(row[column])]
        if not values:
            lines.append(f"{name:<28}{'no scores':>12}")
            continue
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        numbers = "".join(f"{x:>12.4g}" for x in (mean, std, min(values), max(values)))
        lines.append(f"{name:<28}{numbers}{len(values):>8}")
    return "\n".join(lines)


def listing() -> str:
    """What is known of each reward, a paragraph each."""
    import textwrap

    from dancegrpo_fast.rewards.catalogue import REWARDS

    lines = []
    for name, entry in REWARDS.items():
        lines.append(f"{name}: {entry.measures}")
        facts = [("scores", entry.range)]
        if entry.weights:
            facts += [("weights", entry.weights), ("licence", entry.licence)]
            facts += [("memory", entry.memory)]
        for label, text in [*facts, ("cheated by", entry.cheats)]:
            lines += textwrap.wrap(
                f"{label}: {text}", 96, initial_indent="    ", subsequent_indent="      "
            )
    return "\n".join([*lines, "your own: path/to/file.py:ClassName; see docs/rewards.md"])


def contact_sheet(files: Sequence[Path], scores: Sequence[float], *, most: int = 96) -> Any:
    """A PIL image of thumbnails (of a video its middle frame) with their scores, best first.

    Of more than `most` files it shows the best and the worst half of that number.
    """
    from PIL import Image, ImageDraw

    from dancegrpo_fast.rewards.files import read

    chosen = list(zip(files, scores, strict=True))
    if len(chosen) > most:
        chosen = chosen[: most // 2] + chosen[-(most // 2) :]
    side, label, columns = 160, 28, min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + label)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (file, score) in enumerate(chosen):
        x, y = place % columns * side, place // columns * (side + label)
        try:
            frames, _ = read(file)
            picture = Image.fromarray(frames[len(frames) // 2].permute(1, 2, 0).numpy())
            times = (side - 4) // max(picture.size)
            if times > 1:  # A sheet of specks shows nothing; whole pixels stay whole.
                size = (picture.width * times, picture.height * times)
                picture = picture.resize(size, Image.Resampling.NEAREST)
            picture.thumbnail((side - 4, side - 4))
            sheet.paste(picture, (x + 2, y + 2))
        except (OSError, ValueError):
            pen.text((x + 4, y + 4), "unreadable", fill="red")
        shown = "no score" if math.isnan(score) else f"{score:.4g}"
        name = file.name[:24].encode("utf-8", "replace").decode()
        pen.text((x + 4, y + side), f"{shown}\n{name}", fill="black")
    return sheet
