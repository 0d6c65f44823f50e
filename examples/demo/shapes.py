"""The demo's data: prompts such as "a red square moving left", and a renderer for their clips.

`python examples/demo/shapes.py` writes the two prompt files beside it: 64 held-out combinations
and the 128 others, each file using every word. The vocabulary is the reward's own
(`dancegrpo_fast.rewards.moving_shape`).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor

from dancegrpo_fast.rewards.moving_shape import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Scene,
    coverage,
    parse_prompt,
)

FRAMES = 9
SIZE = 32
HELD_OUT = 64
AREA = (66.0, 90.0)  # pixels
SPEED = (1.1, 1.7)  # pixels per frame
# Half width, top and bottom of each shape at area 1, measured from its centroid.
_EXTENT = {
    "square": (0.500, 0.500, 0.500),
    "circle": (0.565, 0.565, 0.565),
    "triangle": (0.760, 0.878, 0.439),
    "cross": (0.671, 0.671, 0.671),
}


def all_prompts() -> list[str]:
    """Every prompt of the grammar, in a fixed order."""
    return [str(Scene(*words)) for words in itertools.product(COLOURS, SHAPES, DIRECTIONS)]


def split_prompts(seed: int = 0) -> tuple[list[str], list[str]]:
    """Splits all prompts into (training, held-out) so that both use every pair of words evenly.

    Shape s moving in direction d is held out for the colours c with (c + s + d + seed) mod 3 = 0:
    a Latin square, so no word and no pair of words is rarer in one file than in the other.
    """
    train: list[str] = []
    held_out: list[str] = []
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                chosen = held_out if (c + s + d + seed) % 3 == 0 else train
                chosen.append(str(Scene(colour, shape, direction)))
    assert len(held_out) == HELD_OUT
    return train, held_out


def render(prompts: list[str], generator: torch.Generator) -> Tensor:
    """Draws one clip per prompt, with random start, speed and size.

    Returns:
        `[B, 9, 3, 32, 32]` float32 in [0, 1]; the shape stays inside the frame throughout.

    Raises:
        ValueError: a prompt is not of the grammar.
    """
    scenes = [parse_prompt(prompt) for prompt in prompts]
    unit = torch.rand(len(scenes), 4, generator=generator)
    area = AREA[0] + (AREA[1] - AREA[0]) * unit[:, 0]
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * unit[:, 1]
    alpha = torch.empty(len(scenes), FRAMES, SIZE, SIZE)
    for i, scene in enumerate(scenes):
        half, top, bottom = (area[i].sqrt() * e for e in _EXTENT[scene.shape])
        dx, dy = (speed[i] * d for d in DIRECTIONS[scene.direction])
        frame = torch.arange(FRAMES)
        x = _start(dx * (FRAMES - 1), half, half, unit[i, 2]) + dx * frame
        y = _start(dy * (FRAMES - 1), top, bottom, unit[i, 3]) + dy * frame
        alpha[i] = coverage(scene.shape, x, y, area[i], SIZE)
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])
    colour = colour[:, None, :, None, None]
    return BACKGROUND + (colour - BACKGROUND) * alpha[:, :, None]


def _start(travel: Tensor, before: Tensor, after: Tensor, u: Tensor) -> Tensor:
    """A start coordinate from which the whole way stays inside [0, SIZE - 1]."""
    low = before - travel.clamp(max=0)
    high = SIZE - 1 - after - travel.clamp(min=0)
    return low + u * (high - low)


def main() -> None:
    """Writes `train_prompts.txt` and `heldout_prompts.txt`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="which third is held out (default 0)")
    args = parser.parse_args()
    train, held_out = split_prompts(args.seed)
    for name, prompts in (("train_prompts.txt", train), ("heldout_prompts.txt", held_out)):
        (args.out / name).write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
