"""How many things there are and where they lie, for pictures of plain things on a plain ground.

No detector is learned here: a thing is a connected region that differs from the ground, and a thing
is told from another by its colour. Meant for synthetic domains; photographs need a detector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dancegrpo_fast.rewards.interface import SpecReward
from dancegrpo_fast.rewards.pixels import PALETTE, colour_shares, unit_pixels

_NUMBERS = {
    word: number
    for number, words in enumerate(
        "no|a an one single|two|three|four|five|six|seven|eight|nine|ten".split("|")
    )
    for word in words.split()
}
#: Unit vectors from the first thing to where the second lies, x to the right, y downwards.
RELATIONS: dict[str, tuple[float, float]] = {
    "left of": (1.0, 0.0),
    "right of": (-1.0, 0.0),
    "above": (0.0, 1.0),
    "below": (0.0, -1.0),
}
_COLOUR = "|".join(PALETTE)
_POSITION = re.compile(
    rf"\b({_COLOUR})\b[^.]*?\b(left of|right of|above|below)\b[^.]*?\b({_COLOUR})\b", re.IGNORECASE
)


class Counting(SpecReward):
    """1 for as many things as `count` of the metadata or the prompt's first number says.

    Otherwise 1 - |found - asked| / asked, at least 0; with `strict` 0.

    Args:
        strict: Only the exact number counts.
        contrast: Distance from the ground's colour (in RGB of [0, 1]) that makes a pixel part of a
            thing. The ground is the median of the picture's border.
        smallest: Share of the picture that a thing covers at least.
    """

    name = "counting"

    def __init__(
        self,
        *,
        strict: bool = False,
        contrast: Annotated[float, Field(gt=0)] = 0.25,
        smallest: Annotated[float, Field(ge=0, lt=1)] = 0.002,
    ) -> None:
        self.strict, self.contrast, self.smallest = strict, contrast, smallest

    def spec(self, prompt: str, metadata: Mapping[str, Any]) -> int:
        """See `SpecReward.spec`."""
        if "count" in metadata:
            asked = metadata["count"]
            if not isinstance(asked, int) or asked < 1:
                raise ValueError(f"count = {asked!r} in the metadata: must be 1 or more")
            return asked
        for word in re.findall(r"[a-z]+|\d+", prompt.lower()):
            number = int(word) if word.isdecimal() else _NUMBERS.get(word, 0)
            if number:
                return number
        raise ValueError("the prompt holds no number and its metadata no count")

    def score_frames(self, images: Tensor, spec: int) -> Tensor:
        """See `SpecReward.score_frames`."""
        missed = (count_things(unit_pixels(images), self.contrast, self.smallest) - spec).abs()
        return (missed == 0).float() if self.strict else (1 - missed / spec).clamp(min=0)


def count_things(images: Tensor, contrast: float, smallest: float) -> Tensor:
    """[M] float32 on the CPU: connected regions (8 neighbours) that stand out from the ground."""
    longer = max(images.shape[-2:])
    if longer > 128:  # Connectivity needs no more, and the flood below takes as many rounds.
        scale = 128 / longer
        size = [max(round(side * scale), 1) for side in images.shape[-2:]]
        images = F.interpolate(images, size, mode="area")
    border = torch.cat(
        [images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1
    )
    ground = border.median(dim=-1).values[..., None, None]
    mask = (images - ground).square().sum(dim=1).sqrt() > contrast
    height, width = mask.shape[-2:]
    ids = torch.arange(1, height * width + 1, dtype=torch.float32, device=mask.device)
    labels = ids.view(1, height, width) * mask
    while True:  # Each round the largest number of a region spreads by one pixel.
        spread = F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    counts = []
    for picture in labels:
        _, sizes = picture[picture > 0].unique(return_counts=True)
        counts.append(int((sizes >= smallest * height * width).sum()))
    return torch.tensor(counts, dtype=torch.float32)


class Position(SpecReward):
    """How far the thing of one colour lies on the asked side of the thing of another.

    `relation` of the metadata is [colour, relation, colour]; else the prompt is read: "a red square
    left of a blue circle". Known relations: left of, right of, above, below.

    Args:
        margin: Distance of the centres along the asked direction, in widths (heights) of the
            picture, from which the score is 1; at the same distance on the wrong side it is 0.
        smallest: Share of the picture that each thing covers at least; below it the score falls to
            0 in proportion.
    """

    name = "position"

    def __init__(
        self,
        *,
        margin: Annotated[float, Field(gt=0)] = 0.1,
        smallest: Annotated[float, Field(gt=0, lt=1)] = 0.005,
    ) -> None:
        self.margin, self.smallest = margin, smallest

    def spec(self, prompt: str, metadata: Mapping[str, Any]) -> tuple[str, str, str]:
        """See `SpecReward.spec`."""
        given = metadata.get("relation")
        if given is None and (match := _POSITION.search(prompt)):
            given = [word.lower() for word in match.groups()]
        if given is None:
            raise ValueError('the prompt relates no two colours, as in "red ... left of ... blue"')
        first, relation, second = given
        if relation not in RELATIONS or first not in PALETTE or second not in PALETTE:
            raise ValueError(f"relation {list(given)}: needs colours and {', '.join(RELATIONS)}")
        if first == second:
            raise ValueError("both things have the same colour: they cannot be told apart")
        return first, relation, second

    def score_frames(self, images: Tensor, spec: tuple[str, str, str]) -> Tensor:
        """See `SpecReward.score_frames`."""
        first, relation, second = spec
        # Squares: what is only slightly of a colour, all over the picture, must not pull a centre.
        weight = colour_shares(images, [first, second]).square()  # [F, 2, H, W]
        height, width = weight.shape[-2:]
        x = (torch.arange(width, device=weight.device) + 0.5) / width
        y = (torch.arange(height, device=weight.device) + 0.5) / height
        sums = torch.stack([(weight.sum(2) * x).sum(2), (weight.sum(3) * y).sum(2)], dim=2)
        centres = sums / weight.sum(dim=(2, 3)).clamp(min=1e-6)[..., None]
        apart = (centres[:, 1] - centres[:, 0]) @ weight.new_tensor(RELATIONS[relation])
        seen = (weight.mean(dim=(2, 3)) / self.smallest).clamp(max=1).prod(dim=1)
        return (0.5 + apart / (2 * self.margin)).clamp(0, 1) * seen
