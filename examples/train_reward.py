"""Train a reward model on comparisons of images or videos: CLIP with a small network on it.

    python examples/train_reward.py --pairs pairs.jsonl --held-out held_out.jsonl \\
        --clip openai/clip-vit-large-patch14 --freeze-clip --out weights/mine

Each line of the files is a pair, with paths that count from the file's folder:

    {"prompt": "a red square", "first": "a.png", "second": "b.png", "label": 1}

`label` is 1 (the default) where the first is better, 0 where the second is, 0.5 for a tie; the loss
`soft` takes anything between. Or a line is a scored sample, as `dancegrpo-fast sample ... --reward
NAME` writes them into samples.jsonl; all samples of a prompt are then compared with each other:

    {"prompt": "a red square", "file": "a.gif", "scores": {"moving_shape": 0.4}}

A recipe then names the folder: `rewards: [{name: preference, path: weights/mine}]`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.rewards.clip import Clip, load_clip
from dancegrpo_fast.rewards.files import read
from dancegrpo_fast.rewards.preference import (
    PreferenceHead,
    clip_features,
    evenly,
    save_preference,
    small_clip,
    text_features,
)
from dancegrpo_fast.rewards.preference_losses import LOSSES, agreement, pair_loss, stranger_loss


@dataclass(frozen=True)
class Pair:
    """Two files for one prompt, and how far the first is better."""

    prompt: str
    first: Path
    second: Path
    label: float


def read_pairs(files: Sequence[str]) -> list[Pair]:
    """The pairs of .jsonl files, and those of the scored samples that have a prompt in common.

    Raises:
        ValueError: A line that is neither, by its number.
    """
    pairs: list[Pair] = []
    samples: dict[str, list[tuple[Path, float]]] = defaultdict(list)
    for file in files:
        folder = Path(file).resolve().parent
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
            try:
                _read_line(json.loads(line), folder, pairs, samples)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}, line {number}: no pair ({error})") from None
    for prompt, scored in samples.items():
        for (first, a), (second, b) in itertools.combinations(scored, 2):
            pairs.append(Pair(prompt, first, second, (1 + (a > b) - (a < b)) / 2))
    return pairs


def _read_line(
    fields: dict[str, Any],
    folder: Path,
    pairs: list[Pair],
    samples: dict[str, list[tuple[Path, float]]],
) -> None:
    scored = "file" in fields
    paths = [(folder / fields[k]).resolve() for k in (("file",) if scored else ("first", "second"))]
    if not all(path.is_relative_to(folder) for path in paths):
        raise ValueError("path outside the file's folder")
    if scored:
        (score,) = fields["scores"].values()  # One reward is the judge.
        if score is not None:  # It could not be scored.
            samples[str(fields["prompt"])].append((paths[0], float(score)))
        return
    label = float(fields.get("label", 1))
    if not 0 <= label <= 1:
        raise ValueError("label outside [0, 1]")
    pairs.append(Pair(str(fields["prompt"]), paths[0], paths[1], label))


def batches(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Pairs in random order, those of one prompt together: a file is read and seen once a batch.

    All comparisons of a prompt as one batch element also keep the model from learning its samples
    by heart (Ouyang et al., arXiv 2203.02155, section 3.5).
    """
    by_prompt: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_prompt[pair.prompt].append(pair)
    groups = [random.sample(group, len(group)) for group in by_prompt.values()]
    order = list(itertools.chain(*random.sample(groups, len(groups))))
    return [order[start : start + size] for start in range(0, len(order), size)]


@functools.cache
def kept(path: Path) -> Tensor:
    """A file's frames, in memory from its first epoch on (`--keep`)."""
    return read(path)[0]


def moved(video: Tensor, pixels: int) -> Tensor:
    """A video [..., H, W] moved by up to so many pixels each way; its border is repeated."""
    for dim in (-2, -1) if pixels else ():
        places = torch.arange(video.shape[dim]) + random.randint(-pixels, pixels)
        video = video.index_select(dim, places.clamp(0, video.shape[dim] - 1))
    return video


def scores(
    clip: Clip,
    head: PreferenceHead,
    pairs: Sequence[Pair],
    *,
    frozen: bool,
    shift: int = 0,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, outputs] of the first and the second files, and [B] of strangers.

    A stranger is the first file of another pair under the own prompt; NaN if that pair has the same
    prompt.
    """
    files = list(dict.fromkeys(path for pair in pairs for path in (pair.first, pair.second)))
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    videos = [kept(path) if keep else read(path)[0] for path in files]
    videos = [moved(v[evenly(len(v), int(head.frames))], shift) for v in videos]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        # Sizes may differ: files of one size go through the tower together.
        found: list[Tensor] = [torch.empty(0)] * len(files)
        for shape in {video.shape for video in videos}:
            rows = [i for i, video in enumerate(videos) if video.shape == shape]
            some = clip_features(clip, torch.stack([videos[i] for i in rows]))
            for i, feature in zip(rows, some, strict=True):
                found[i] = feature
        texts = text_features(clip, prompts)
    place = {file: i for i, file in enumerate(files)} | {text: i for i, text in enumerate(prompts)}
    features = torch.stack(found)
    first, second, asked = (
        torch.tensor([place[getattr(pair, name)] for pair in pairs], device=texts.device)
        for name in ("first", "second", "prompt")
    )
    turned = len(pairs) // 2  # Pairs of a prompt stand together: half a batch away is another one.
    strangers = head(features[first.roll(turned)], texts[asked])[:, 0]
    strangers = strangers.masked_fill(asked == asked.roll(turned), torch.nan)
    return head(features[first], texts[asked]), head(features[second], texts[asked]), strangers


@torch.no_grad()
def evaluate(
    clip: Clip, head: PreferenceHead, pairs: list[Pair], *, batch: int, **how: bool
) -> tuple[float, float, float]:
    """Accuracy and calibration error on pairs, and accuracy against strangers."""
    differences, strange = [], []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        first, second, strangers = scores(clip, head, some, **how)
        differences.append((first - second)[:, 0].cpu())
        strange.append((first[:, 0] - strangers).cpu())
    labels = torch.tensor([pair.label for pair in pairs])
    known = torch.cat(strange)
    known = known[~known.isnan()]
    return *agreement(torch.cat(differences), labels), agreement(known, torch.ones_like(known))[0]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=(
        "Files, losses and how to use the result: the top of this file, docs/reward-service.md."
    ))  # fmt: skip
    add = parser.add_argument
    add("--pairs", required=True, nargs="+", help="pairs or scored samples to train on (.jsonl)")
    add("--held-out", required=True, nargs="+", help="the same, to measure on: other prompts")
    add("--out", required=True, help="folder of the result")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--clip", help="CLIP folder or hub id to begin with")
    start.add_argument("--new-clip", type=int, metavar="SIDE", help="a small untrained one instead")
    add("--loss", choices=LOSSES, default="bt", help="of a pair (default %(default)s)")
    strangers = "weight of pairs with another prompt's file (default %(default)s)"
    add("--strangers", type=float, default=0.5, help=strangers)
    add("--freeze-clip", action="store_true", help="train the small network only")
    add("--frames", type=int, default=3, help="of a video that are looked at (default %(default)s)")
    add("--shift", type=int, default=0, help="pixels that files move by in training, at most (0)")
    add("--keep", action="store_true", help="keep the decoded files in memory")
    add("--hidden", type=int, default=256, help="width of the small network (default %(default)s)")
    add("--epochs", type=int, default=4, help="the best one is saved (default %(default)s)")
    add("--batch", type=int, default=64, help="pairs at once, by prompt (default %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="of AdamW (default %(default)s)")
    add("--seed", type=int, default=0, help="of weights and order (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Trains, saves the best epoch; returns its accuracy and calibration error, held out."""
    args = arguments(argv)
    train, held_out = read_pairs(args.pairs), read_pairs(args.held_out)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.new_clip:
        small_clip(args.out, args.new_clip)
    source = args.clip or args.out
    clip = load_clip(source, "transformers")
    clip.model.to(device).requires_grad_(not args.freeze_clip)
    outputs = 2 if args.loss == "uncertain" else 1
    width = clip.model.config.projection_dim
    head = PreferenceHead(width, args.hidden, outputs, args.frames).to(device)
    weights = [p for m in (clip.model, head) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate)
    steps = args.epochs * -(-len(train) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, max(2, steps))
    best, how = (-1.0, 0.0), {"frozen": args.freeze_clip, "keep": args.keep}
    for epoch in range(args.epochs):
        total = 0.0
        for batch in batches(train, args.batch):
            first, second, strangers = scores(clip, head, batch, shift=args.shift, **how)
            labels = torch.tensor([pair.label for pair in batch], device=device)
            loss = pair_loss(args.loss, first, second, labels)
            loss = loss + args.strangers * stranger_loss(first[:, 0], strangers)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        accuracy, error, known = evaluate(clip, head, held_out, batch=args.batch, **how)
        print(f"epoch {epoch + 1}: loss {total / len(train):.4f}, held out: accuracy "
              f"{accuracy:.3f}, calibration error {error:.3f}, strangers {known:.3f}",
              flush=True)  # fmt: skip
        if not accuracy <= best[0]:  # Also where there are no pairs to measure on: NaN.
            best = (accuracy, error)
            save_preference(args.out, source, clip, head)
    print(f"accuracy {best[0]:.3f}: rewards: [{{name: preference, path: {args.out}}}]")
    return best


if __name__ == "__main__":
    main()
