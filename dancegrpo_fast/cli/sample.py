"""`dancegrpo-fast sample`: draw images or videos of a run, an export or a base model."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dancegrpo_fast.cli.searching import add_arguments, pixel_values, search_all, settings_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from dancegrpo_fast.config import RewardConfig, RunConfig
    from dancegrpo_fast.models import Family
    from dancegrpo_fast.prompt import Prompt
    from dancegrpo_fast.rewards import Reward
    from dancegrpo_fast.search import SearchCost

logger = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "sample",
        description=(
            "Draws samples with the stock diffusers pipeline, at the recipe's size and number of "
            "steps: images as PNG, videos as MP4, all of them on OUT/sheet/sheet.png, and a line "
            "with prompt, seed and scores each in OUT/samples.jsonl. The same prompt position and "
            "seed start from the same noise, whatever the weights. SOURCE says whose samples: a "
            "run's folder (its newest snapshot, averaged weights if it keeps them), or a recipe "
            "(the base model; with --weights, what `train` or `export` wrote for it)."
        ),
        epilog="""\
examples:
  dancegrpo-fast sample runs/demo --prompt "a red square moving left" --out samples
  dancegrpo-fast sample runs/demo --prompts my_prompts.txt --seeds 2 --out samples
  dancegrpo-fast sample recipes/demo.yaml --prompt "a red square moving left" --out base
  dancegrpo-fast sample recipes/demo.yaml --weights runs/demo/final --prompts p.txt --out final
  dancegrpo-fast sample runs/lora --lora-scale 0.5 --prompt "a fox" --out half
  dancegrpo-fast sample runs/demo --prompts p.txt --best-of 16 --seeds 2 --out best
  dancegrpo-fast sample runs/flux --prompts p.txt --best-of 8 --reward pickscore --out best
  dancegrpo-fast sample runs/demo --prompts p.txt --search greedy --search-width 4 \\
      --search-steps 2,4,6 --out searched
""",
    )
    parser.add_argument("source", help="folder of a run, or a recipe")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; may be given repeatedly"
    )
    which.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line; .jsonl with images and metadata"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where files are written")
    parser.add_argument(
        "--weights", metavar="FOLDER", help="with a recipe: exported weights, whole or LoRA"
    )
    parser.add_argument(
        "--lora-scale", type=float, metavar="X", help="strength of a LoRA (1 is as trained)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="samples kept a prompt (default 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="root of the initial noise (default 0)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (default: the recipe's)"
    )
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="draw N a prompt and keep the best by reward"
    )
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="score with it: a name of the recipe's or of ours, or path/to/file.py:ClassName; may "
        "be given repeatedly (default with --best-of or --search: the recipe's rewards, weighted)",
    )
    add_arguments(parser)
    parser.add_argument("--gif", action="store_true", help="videos as GIF instead of MP4")
    parser.add_argument(
        "--fps",
        type=int,
        metavar="N",
        help="frames per second of videos (default: the recipe's model.fps, or 16)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from dancegrpo_fast.cli.quiet import quiet_libraries

    quiet_libraries()
    from dancegrpo_fast.config import EvaluationConfig, UserError
    from dancegrpo_fast.data import PromptSet, clean_text
    from dancegrpo_fast.prompt import Prompt
    from dancegrpo_fast.report.samples import Row, contact_sheet, shown
    from dancegrpo_fast.rewards import load_rewards, placed
    from dancegrpo_fast.search import SearchCost

    count = args.best_of or args.seeds
    for name in ("seeds", "best_of", "steps", "fps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} = {value}: must be at least 1")
    if count < args.seeds:
        raise UserError(f"--best-of = {count}: must be at least --seeds = {args.seeds}, the kept")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed = {args.seed}: must be from 0 to 2**63 - 1")
    if args.gif and (args.fps or 0) > 100:
        raise UserError(f"--fps = {args.fps}: a GIF has at most 100; leave --gif out")
    search = settings_of(args)
    prompts = [Prompt(clean_text(text, "--prompt")) for text in args.prompt or ()]
    prompts = prompts or list(PromptSet.load(args.prompts, field="--prompts").prompts)
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out = {args.out!r}: is a file or not empty; name a new folder")
    with _opened(args) as (config, family, pipeline):
        if family.needs_image:
            PromptSet(tuple(prompts)).need_images("--prompts")
        chosen = _chosen_rewards(args, config)
        if (args.best_of or args.search) and not any(reward.weight for reward in chosen):
            way = "--best-of" if args.best_of else "--search"
            raise UserError(f"{way}: every reward has weight 0, so none is best; give --reward")
        rewards, weights = load_rewards(chosen, family.device), [r.weight for r in chosen]
        settings = EvaluationConfig(
            seeds=count, seed=args.seed, batch_size=config.evaluation.batch_size
        )
        fps = args.fps or config.model.fps or 16
        steps, rows, lines = args.steps or config.rollout.steps, list[Row](), list[str]()
        names, totals, costs = [r.name for r in rewards], list[float](), list[SearchCost]()
        with placed(rewards, family.device), ExitStack() as files:
            if search is None:
                plain = draw_all(family, pipeline, prompts, settings, steps)
                cost = SearchCost(count * steps, previews=0, reward_calls=count)
                drawn = _scored(plain, prompts, rewards, cost, fps, family.device)
            else:
                drawn = search_all(
                    family, pipeline, prompts, rewards, config, search, weights=weights,
                    seeds=args.seeds, seed=args.seed, steps=steps, fps=fps,
                )  # fmt: skip
            (out / "sheet").mkdir(parents=True)
            listed = files.enter_context((out / "samples.jsonl").open("w", encoding="utf-8"))
            for position, (videos, values, cost) in enumerate(drawn):
                prompt = prompts[position]
                kept = _keep(videos, values, names, weights, count=args.seeds)
                lines += _write(kept, prompt, position, out, gif=args.gif, fps=fps)
                listed.writelines(f"{line}\n" for line in lines[-len(kept) :])
                listed.flush()  # What was drawn before Ctrl-C keeps its scores.
                thumbnails = [sample.video[shown(sample.video)] for sample in kept]
                rows.append(Row(prompt.text, thumbnails, [sample.caption for sample in kept]))
                totals += [sample.total for sample in kept if sample.total is not None]
                costs.append(cost)
    contact_sheet(rows).save(out / "sheet" / "sheet.png")
    if rewards:
        print(_worth(totals, SearchCost.total(costs)))
    print(f"{len(lines)} samples in {out}, together on {out / 'sheet' / 'sheet.png'}")
    return 0


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[tuple[RunConfig, Family, Any]]:
    """The recipe, its family and a stock pipeline with the weights that were asked for."""
    from dancegrpo_fast.config import UserError, load_config
    from dancegrpo_fast.models import load_family, open_family
    from dancegrpo_fast.parallel.world import World
    from dancegrpo_fast.policy import ADAPTER
    from dancegrpo_fast.run import restore

    source = Path(args.source)
    if source.is_dir():
        if args.weights is not None:
            raise UserError(
                f"--weights = {args.weights!r}: goes with a recipe; {args.source} is a run's "
                f"folder, so give {source / 'recipe.yaml'} as SOURCE"
            )
        trainer = restore(source)
        if args.lora_scale is not None:
            _need_lora(trainer.config.policy.train == "lora", args.lora_scale)
            for module in trainer.policy.modules.values():
                module.set_adapters([ADAPTER], [args.lora_scale])
        with trainer.policy.averaged(), trainer.family.live_pipeline() as pipeline:
            yield trainer.config, trainer.family, pipeline
        return
    config = load_config(args.source, [])
    device = World.from_environment().device
    if args.weights is None:
        _need_lora(args.lora_scale is None, args.lora_scale)
        family = load_family(config.model, device)
        with family.live_pipeline() as pipeline:
            yield config, family, pipeline
        return
    family, folder = open_family(config.model, device), Path(args.weights)
    family.source.check(family.unused)
    lora = (folder / "pytorch_lora_weights.safetensors").is_file()
    if not lora and not (folder / "model_index.json").is_file():
        raise UserError(
            f"--weights = {args.weights!r}: holds neither model_index.json nor "
            "pytorch_lora_weights.safetensors; give what `train` wrote as `final`, or `export`"
        )
    pipeline = family.stock_pipeline(folder, "lora" if lora else "full")
    if args.lora_scale is not None:
        _need_lora(lora, args.lora_scale)
        for component, names in pipeline.get_list_adapters().items():
            getattr(pipeline, component).set_adapters(names, [args.lora_scale] * len(names))
    yield config, family, pipeline


def _need_lora(there: bool, scale: float) -> None:
    from dancegrpo_fast.config import UserError

    if not there:
        raise UserError(f"--lora-scale = {scale}: these weights are no LoRA; leave it out")


def _chosen_rewards(args: argparse.Namespace, config: RunConfig) -> list[RewardConfig]:
    """What samples are scored with: nothing, unless it was asked for."""
    from dancegrpo_fast.config import RewardConfig

    if args.reward:
        known = {reward.name: reward for reward in config.rewards}
        # Each once: scores are kept by name.
        return [known.get(name) or RewardConfig(name=name) for name in dict.fromkeys(args.reward)]
    return list(config.rewards) if args.best_of or args.search else []


def draw_all(
    family: Family, pipeline: Any, prompts: Sequence[Prompt], settings: Any, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every prompt's samples, in the order of the prompts; on the CPU.

    Returns:
        [seeds, F, 3, H, W] uint8, and [seeds] bool: whose pixels were no numbers, and are black.
    """
    import torch
    from tqdm import tqdm

    from dancegrpo_fast.report.evaluate import initial_latents, not_finite

    jobs = [(p, s) for p in range(len(prompts)) for s in range(settings.seeds)]
    waiting: list[Tensor] = []
    broken: list[Tensor] = []
    with tqdm(total=len(jobs), desc="sample") as bar:
        for start in range(0, len(jobs), settings.batch_size):
            batch = jobs[start : start + settings.batch_size]
            latents = initial_latents(settings, batch, family.latent_shape, family.device)
            videos = family.draw(pipeline, [prompts[p] for p, _ in batch], latents, steps)
            waiting += (videos * 255).round().clamp(0, 255).to(torch.uint8).cpu()
            broken += not_finite(videos)
            bar.update(len(batch))
            while len(waiting) >= settings.seeds:
                yield torch.stack(waiting[: settings.seeds]), torch.stack(broken[: settings.seeds])
                del waiting[: settings.seeds], broken[: settings.seeds]


@dataclass(frozen=True)
class Kept:
    """A sample that is written.

    Attributes:
        seed: Position of its noise.
        video: [F, 3, H, W] uint8.
        scores: By reward, NaN where it failed.
        total: Their weighted sum; None without rewards.
    """

    seed: int
    video: Tensor
    scores: dict[str, float]
    total: float | None

    @property
    def caption(self) -> str:
        return f"seed {self.seed}" + ("" if self.total is None else f": {self.total:.4g}")


def _scored(
    drawn: Iterable[tuple[Tensor, Tensor]],
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    cost: SearchCost,
    fps: float,
    device: torch.device,
) -> Iterator[tuple[Tensor, np.ndarray, SearchCost]]:
    """Plain samples as `search_all` gives searched ones."""
    for prompt, (videos, broken) in zip(prompts, drawn, strict=True):
        values = pixel_values(rewards, videos, prompt, fps, device)
        values[broken.numpy()] = math.nan  # Eight bits have none: it would be a black sample.
        if broken.any():
            logger.warning("%r: pixels of %d samples are not finite", prompt.text, broken.sum())
        yield videos, values, cost


def _keep(
    videos: Tensor, values: np.ndarray, names: list[str], weights: list[float], *, count: int
) -> list[Kept]:
    """The best `count` samples of a prompt, best first; without rewards the first ones."""
    if not names:
        return [Kept(seed, videos[seed], {}, None) for seed in range(count)]
    rows = [dict(zip(names, row, strict=True)) for row in values.tolist()]
    pairs = [list(zip(weights, row.values(), strict=True)) for row in rows]
    totals = [sum(weight * score for weight, score in pair if weight) for pair in pairs]
    order = sorted(range(len(rows)), key=lambda s: (math.isnan(totals[s]), -totals[s], s))
    return [Kept(seed, videos[seed], rows[seed], totals[seed]) for seed in order[:count]]


def _worth(totals: Sequence[float], cost: SearchCost) -> str:
    """Reward of the samples that were kept, against what finding them took."""
    finite = [total for total in totals if math.isfinite(total)]
    mean = f"{sum(finite) / len(finite):.4g}" if finite else "no number"
    return (
        f"reward {mean} (mean of {len(finite)}) for {cost.evaluations} model evaluations, "
        f"{cost.previews} previews and {cost.reward_calls} reward calls"
    )


def _write(
    kept: Sequence[Kept], prompt: Prompt, position: int, out: Path, *, gif: bool, fps: float
) -> list[str]:
    """Write a prompt's samples; returns their lines of samples.jsonl."""
    from dancegrpo_fast.report.metrics import write_gif
    from dancegrpo_fast.report.samples import write_mp4, write_png

    lines = []
    slug = re.sub(r"[^A-Za-z0-9]+", "_", prompt.text).strip("_")[:60]
    for sample in kept:
        ending = "png" if len(sample.video) == 1 else "gif" if gif else "mp4"
        file = out / f"{position:04d}_{slug}_seed{sample.seed}.{ending}"
        if ending == "png":
            write_png(file, sample.video[0])
        elif gif:
            write_gif(file, sample.video.float() / 255, fps=fps)
        else:
            write_mp4(file, sample.video, fps=max(1, round(fps)))
        scores = {k: x if math.isfinite(x) else None for k, x in sample.scores.items()}
        line = {"prompt": prompt.text, "file": file.name, "seed": sample.seed}
        lines.append(json.dumps(line | ({"scores": scores} if scores else {}), ensure_ascii=False))
    return lines
