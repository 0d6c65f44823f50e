"""Train a reward model on pairs of images: CLIP with a small network on its features.

    python examples/train_reward.py --pairs pairs.jsonl --held-out held_out.jsonl \\
        --clip openai/clip-vit-large-patch14 --freeze-clip --out weights/mine

Each line of the files is a pair, with paths that count from the file's folder:

    {"prompt": "a red square", "first": "a.png", "second": "b.png", "label": 1}

`label` is 1 (the default) where the first is better, 0 where the second is, 0.5 for a tie; the loss
`soft` takes anything between. A recipe then names the folder:

    rewards: [{name: preference, path: weights/mine}]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dancegrpo_fast.rewards.clip import Clip, load_clip
from dancegrpo_fast.rewards.files import read
from dancegrpo_fast.rewards.preference import PreferenceHead, save_preference, text_features
from dancegrpo_fast.rewards.preference_losses import (
    agreement,
    bradley_terry,
    bradley_terry_ties,
    soft_labels,
    uncertain_bradley_terry,
)

LOSSES = ("bt", "ties", "soft", "uncertain")


@dataclass(frozen=True)
class Pair:
    """Two image files for one prompt, and how far the first is better."""

    prompt: str
    first: Path
    second: Path
    label: float


def read_pairs(file: str) -> list[Pair]:
    """The pairs of a .jsonl file.

    Raises:
        ValueError: A line that is no pair, by its number.
    """
    folder = Path(file).resolve().parent
    pairs = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            label = float(fields.get("label", 1))
            paths = [(folder / fields[name]).resolve() for name in ("first", "second")]
            if not 0 <= label <= 1 or not all(path.is_relative_to(folder) for path in paths):
                raise ValueError("label outside [0, 1] or path outside the file's folder")
            pairs.append(Pair(str(fields["prompt"]), paths[0], paths[1], label))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: no pair ({error})") from None
    return pairs


def scores(
    clip: Clip, head: PreferenceHead, pairs: list[Pair], *, frozen: bool
) -> tuple[Tensor, Tensor]:
    """[B, outputs] of the first and of the second images."""
    pixels = [read(path)[0][0] for pair in pairs for path in (pair.first, pair.second)]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        # Sizes may differ: images of one size go through the tower together.
        features: list[Tensor] = [torch.empty(0)] * len(pixels)
        for shape in {image.shape for image in pixels}:
            rows = [i for i, image in enumerate(pixels) if image.shape == shape]
            found = clip.image_features(torch.stack([pixels[i] for i in rows]))
            for i, feature in zip(rows, found, strict=True):
                features[i] = feature
        texts = text_features(clip, [pair.prompt for pair in pairs])
    images = torch.stack(features)
    return head(images[::2], texts), head(images[1::2], texts)


def loss_of(name: str, first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """The loss of scores [B, outputs] and labels [B]; `bt` and `uncertain` leave ties out."""
    if name == "soft":
        both = torch.stack([first[:, 0], second[:, 0]], dim=1)
        return soft_labels(both, torch.stack([label, 1 - label], dim=1))
    if name == "ties":
        return bradley_terry_ties(first[:, 0] - second[:, 0], label)
    chosen = label != 0.5
    turned = (label < 0.5)[chosen, None]
    first, second = first[chosen], second[chosen]
    better, worse = torch.where(turned, second, first), torch.where(turned, first, second)
    if not len(better):
        return 0.0 * first.sum()  # A batch of ties alone; the mean of nothing would be NaN.
    if name == "bt":
        return bradley_terry(better[:, 0], worse[:, 0])
    return uncertain_bradley_terry(better[:, 0], worse[:, 0], better[:, 1], worse[:, 1])


@torch.no_grad()
def evaluate(
    clip: Clip, head: PreferenceHead, pairs: list[Pair], *, frozen: bool, batch: int
) -> tuple[float, float]:
    """Accuracy and calibration error on pairs."""
    differences = []
    for start in range(0, len(pairs), batch):
        first, second = scores(clip, head, pairs[start : start + batch], frozen=frozen)
        differences.append((first - second)[:, 0].cpu())
    labels = torch.tensor([pair.label for pair in pairs])
    return agreement(torch.cat(differences), labels)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Trains, saves, and returns accuracy and calibration error on the held-out pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, help="pairs to train on (.jsonl)")
    parser.add_argument("--held-out", required=True, help="pairs to measure on (.jsonl)")
    parser.add_argument("--clip", required=True, help="CLIP folder or hub id to begin with")
    parser.add_argument("--out", required=True, help="folder of the result")
    parser.add_argument("--loss", choices=LOSSES, default="bt")
    parser.add_argument("--freeze-clip", action="store_true", help="train the small network only")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    train, held_out = read_pairs(args.pairs), read_pairs(args.held_out)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = load_clip(args.clip, "transformers")
    clip.model.to(device).requires_grad_(not args.freeze_clip)
    outputs = 2 if args.loss == "uncertain" else 1
    head = PreferenceHead(clip.model.config.projection_dim, args.hidden, outputs).to(device)
    weights = [p for m in (clip.model, head) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate)
    steps = args.epochs * -(-len(train) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, max(2, steps))
    for epoch in range(args.epochs):
        total = 0.0
        order = torch.randperm(len(train)).tolist()
        for start in range(0, len(order), args.batch):
            batch = [train[i] for i in order[start : start + args.batch]]
            first, second = scores(clip, head, batch, frozen=args.freeze_clip)
            labels = torch.tensor([pair.label for pair in batch], device=device)
            loss = loss_of(args.loss, first, second, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        accuracy, error = evaluate(
            clip, head, held_out, frozen=args.freeze_clip, batch=args.batch
        )
        print(f"epoch {epoch + 1}: loss {total / len(train):.4f}, held out: accuracy "
              f"{accuracy:.3f}, calibration error {error:.3f}", flush=True)  # fmt: skip
    save_preference(args.out, args.clip, clip, head)
    print(f"saved: rewards: [{{name: preference, path: {args.out}}}]")
    return accuracy, error


if __name__ == "__main__":
    main()
