"""The still demo's data and reward: prompts such as "a red square at the top left", one image each.

`python examples/demo/stills.py` writes the two prompt files beside it: 72 held-out combinations and
the 144 others, each file using every word. Colours, shapes and their scores are those of the moving
demo (`dancegrpo_fast.rewards.moving_shape`); a place stands where the direction stood.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.rewards.moving_shape import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    MovingShape,
    Scene,
    coverage,
)

SIZE = 32
HELD_OUT = 72
AREA = (48.0, 72.0)  # pixels
AWAY = 7.5  # pixels from the middle to the centroid of a shape on the left, right, top or bottom
JITTER = 1.0  # pixels, to each side
#: Steps of `AWAY` from the middle (x to the right, y downwards, as image rows count).
PLACES: dict[str, tuple[int, int]] = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "centre": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
_GRAMMAR = re.compile(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})")


class Still(NamedTuple):
    """What one prompt asks for: words of `COLOURS`, `SHAPES` and `PLACES`."""

    colour: str
    shape: str
    place: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} at the {self.place}"


def parse_prompt(prompt: str) -> Still:
    """Reads a prompt of the grammar ``a {colour} {shape} at the {place}``.

    Raises:
        ValueError: the prompt is not of this grammar; the message names it and the known words.
    """
    match = _GRAMMAR.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not 'a COLOUR SHAPE at the PLACE' with COLOUR in "
            f"{list(COLOURS)}, SHAPE in {list(SHAPES)}, PLACE in {list(PLACES)}"
        )
    return Still(*match.groups())


def all_prompts() -> list[str]:
    """Every prompt of the grammar, in a fixed order."""
    return [str(Still(*words)) for words in itertools.product(COLOURS, SHAPES, PLACES)]


def split_prompts() -> tuple[list[str], list[str]]:
    """Splits all prompts into (training, held-out), each using every pair of words evenly.

    Held out are those with (colour + shape + place) mod 3 = 0, by position in their lists.
    """
    numbers = itertools.product(*(range(len(words)) for words in (COLOURS, SHAPES, PLACES)))
    pairs = list(zip(all_prompts(), (sum(one) % 3 for one in numbers), strict=True))
    train = [prompt for prompt, rest in pairs if rest]
    held_out = [prompt for prompt, rest in pairs if not rest]
    assert len(held_out) == HELD_OUT
    return train, held_out


def _centre(places: list[str]) -> Tensor:
    """[B, 2] pixels (x, y), pixel centres at integers."""
    return (SIZE - 1) / 2 + AWAY * torch.tensor([PLACES[place] for place in places])


def render(prompts: list[str], generator: torch.Generator) -> Tensor:
    """Draws one image per prompt, with a random size and a little off its place.

    Returns:
        `[B, 3, 32, 32]` float32 in [0, 1]. Where it does not fit, a corner is cut off by the edge.

    Raises:
        ValueError: a prompt is not of the grammar.
    """
    scenes = [parse_prompt(prompt) for prompt in prompts]
    unit = torch.rand(len(scenes), 3, generator=generator)
    area = AREA[0] + (AREA[1] - AREA[0]) * unit[:, 0]
    centre = _centre([scene.place for scene in scenes]) + JITTER * (2 * unit[:, 1:] - 1)
    alpha = torch.stack(
        [coverage(s.shape, *centre[i], area[i], SIZE) for i, s in enumerate(scenes)]
    )
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])[:, :, None, None]
    return BACKGROUND + (colour - BACKGROUND) * alpha[:, None]


class StillShape:
    """Colour, place and shape of the one thing in the image; the mean of three parts in [0, 1].

    Colour and shape are `MovingShape`'s, of the image held still. *Place* is 1 at the middle of the
    named place and exp(-1) at `width` pixels from it, for the centroid of what is bright.
    """

    name = "still_shape"
    part_names = ("colour", "place", "shape")
    width = 4.0

    def __init__(self) -> None:
        self.moving = MovingShape()

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[B] float32 of images `[B, 1, 3, 32, 32]` in [0, 1]; NaN for pixels not finite."""
        return self.parts(videos, prompts).mean(dim=1)

    @torch.no_grad()
    def parts(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """The three parts (colour, place, shape), `[B, 3]` float32.

        Raises:
            ValueError: wrong size, dtype or range of `videos`, or a prompt outside the grammar.
        """
        if videos.ndim != 5 or videos.shape[1] != 1 or videos.shape[-2:] != (SIZE, SIZE):
            raise ValueError(f"images have shape {list(videos.shape)}: must be [B, 1, 3, 32, 32]")
        scenes = [parse_prompt(prompt) for prompt in prompts]
        moving = [str(Scene(scene.colour, scene.shape, "left")) for scene in scenes]
        colour, _, shape = self.moving.parts(videos.expand(-1, 2, -1, -1, -1), moving).unbind(1)
        light = ((videos[:, 0].amax(1).float() - 0.205) / 0.6).clamp(0, 1)
        mass = light.sum((1, 2))
        line = torch.arange(SIZE, device=light.device, dtype=light.dtype)
        at = torch.stack([(light.sum(1) * line).sum(1), (light.sum(2) * line).sum(1)], dim=1)
        gap = at / mass.clamp_min(1e-3)[:, None] - _centre([s.place for s in scenes]).to(at)
        place = torch.exp(-(gap / self.width).square().sum(1)) * (mass / AREA[0]).clamp(0, 1)
        return torch.stack([colour, torch.where(colour.isnan(), math.nan, place), shape], dim=1)


def main() -> None:
    """Writes `still_train_prompts.txt` and `still_heldout_prompts.txt`."""
    train, held_out = split_prompts()
    for name, prompts in (("train", train), ("heldout", held_out)):
        file = Path(__file__).parent / f"still_{name}_prompts.txt"
        file.write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
