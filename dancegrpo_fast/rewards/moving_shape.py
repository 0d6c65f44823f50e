"""A reward for clips of one coloured shape on a dark background, computed from pixels alone.

Prompts read ``a {colour} {shape} moving {direction}``. The vocabulary below is the only source of
these words: the demo's renderer (`examples/demo/shapes.py`) imports it, so what is drawn and what
is judged cannot drift apart.

Nothing here is learned. Every part is a smooth function of the pixels (no thresholds with a flat
side), because a group-relative policy gradient needs the samples of one prompt to differ.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

#: RGB in [0, 1]. All share the same maximum, so brightness tells the shape from the background.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.10, 0.10),
    "green": (0.10, 0.95, 0.10),
    "blue": (0.10, 0.10, 0.95),
    "yellow": (0.95, 0.95, 0.10),
    "cyan": (0.10, 0.95, 0.95),
    "magenta": (0.95, 0.10, 0.95),
}
SHAPES: tuple[str, ...] = ("square", "circle", "triangle", "cross")
_D = math.sqrt(0.5)
#: Unit vectors (x to the right, y downwards, as image rows count).
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-_D, -_D),
    "up right": (_D, -_D),
    "down left": (-_D, _D),
    "down right": (_D, _D),
}
BACKGROUND = 0.06
BRIGHT = 0.95

_GRAMMAR = re.compile(
    rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(DIRECTIONS)})"
)
# Trace of the second-moment matrix of each shape at area 1 (closed forms; a smeared or split blob
# has more).
_SPREAD = {
    "square": 1 / 6,
    "circle": 1 / (2 * math.pi),
    "triangle": 1 / (3 * math.sqrt(3)),
    "cross": 0.2 - 1 / 150,
}


@dataclass(frozen=True)
class Scene:
    """What one prompt asks for: words of `COLOURS`, `SHAPES` and `DIRECTIONS`."""

    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


def parse_prompt(prompt: str) -> Scene:
    """Reads a prompt of the grammar ``a {colour} {shape} moving {direction}``.

    Raises:
        ValueError: the prompt is not of this grammar; the message names it and the known words.
    """
    match = _GRAMMAR.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not 'a COLOUR SHAPE moving DIRECTION' with COLOUR in "
            f"{list(COLOURS)}, SHAPE in {list(SHAPES)}, DIRECTION in {list(DIRECTIONS)}"
        )
    return Scene(*match.groups())


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (negative inside) to a shape of area 1 whose centroid is the origin.

    Exact inside and along straight edges, a lower bound outside corners: what antialiasing needs.
    """
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.5
    if shape == "circle":
        return torch.hypot(x, y) - 1 / math.sqrt(math.pi)
    if shape == "triangle":  # equilateral, pointing up; r is the radius of the inscribed circle
        r = 1 / math.sqrt(3 * math.sqrt(3))
        slanted = 0.5 * math.sqrt(3) * x.abs() - 0.5 * y
        return torch.maximum(slanted, y) - r
    if shape == "cross":  # two bars of length 3 w and width w, 5 w^2 = 1
        w = math.sqrt(0.2)
        bar_x = torch.maximum(x.abs() - 1.5 * w, y.abs() - 0.5 * w)
        bar_y = torch.maximum(x.abs() - 0.5 * w, y.abs() - 1.5 * w)
        return torch.minimum(bar_x, bar_y)
    raise ValueError(f"shape {shape!r} is not one of {list(SHAPES)}")


def coverage(shape: str, centre_x: Tensor, centre_y: Tensor, area: Tensor, size: int) -> Tensor:
    """Antialiased coverage in [0, 1] of a shape on a square pixel grid.

    Args:
        shape: a word of `SHAPES`.
        centre_x, centre_y: centroid in pixels (pixel centres at integers), any shape S.
        area: area in pixels, broadcastable to S.
        size: height and width in pixels.

    Returns:
        Tensor of shape S + (size, size).
    """
    grid = torch.arange(size, dtype=centre_x.dtype, device=centre_x.device)
    scale = area.clamp_min(1e-6).sqrt()[..., None, None]
    x = (grid - centre_x[..., None, None]) / scale
    y = (grid[:, None] - centre_y[..., None, None]) / scale
    return (0.5 - signed_distance(shape, x, y) * scale).clamp(0, 1)


class MovingShape:
    """Colour, direction and shape of the one thing in the clip; the mean of three parts in [0, 1].

    1. *colour*: how much more the bright pixels look like the named colour than like the others,
       averaged over frames, for a thing of a plausible size (a full screen is nothing).
    2. *direction*: over every span of three frames, agreement of the centroid's displacement with
       the named direction, times the share of the minimum speed reached.
    3. *shape*: per frame, the fit of the named template (same centroid and area) against the other
       templates, times compactness (one blob) and constancy of the area over the clip.
    """

    name = "moving_shape"
    part_names = ("colour", "direction", "shape")

    #: Full speed credit from this displacement per frame, in widths (about 1 pixel of 32).
    min_speed = 0.03
    #: A displacement 45 degrees off scores exp(-4 (1 - cos 45)) = 0.31.
    direction_sharpness = 4.0
    colour_width = 0.25
    template_temperature = 0.05
    span = 3

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """Scores a batch of clips.

        Args:
            videos: `[B, F, 3, H, W]` floating point in [0, 1], H = W, F >= 2.
            prompts: B prompts of the grammar.

        Returns:
            `[B]` float32 in [0, 1]; NaN where the clip has a pixel that is not finite.

        Raises:
            ValueError: wrong shape, dtype or range of `videos`, or a prompt outside the grammar.
        """
        return self.parts(videos, prompts).mean(dim=1)

    @torch.no_grad()
    def parts(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """The three parts (colour, direction, shape) as `[B, 3]` float32; see `__call__`."""
        scenes = [parse_prompt(prompt) for prompt in prompts]
        _check(videos, len(scenes))
        if not scenes:
            return videos.new_zeros((0, 3), dtype=torch.float32)
        finite = videos.isfinite().flatten(1).all(dim=1)
        videos = torch.where(finite[:, None, None, None, None], videos.float(), 0.0)
        low, high = (float(bound) for bound in videos.aminmax())
        if high > 1.001 or low < -0.001:
            raise ValueError(
                f"videos has values in [{low:.3f}, {high:.3f}], outside [0, 1]; "
                "map the decoder's [-1, 1] to [0, 1] first"
            )
        # On the CPU a few clips at a time stay in the cache, which is twice as fast and more.
        size = 4 if videos.device.type == "cpu" else len(scenes)
        chunks = zip(videos.split(size), _split(scenes, size), strict=True)
        parts = torch.cat([self._parts(some, asked) for some, asked in chunks])
        return torch.where(finite[:, None], parts, math.nan)

    def _parts(self, videos: Tensor, scenes: list[Scene]) -> Tensor:
        mask = _mask(videos.amax(dim=2))
        blob = _measure(mask, torch.tensor([_SPREAD[s.shape] for s in scenes], device=mask.device))
        colour = self._colour(videos, mask, scenes) * blob.present
        shape = self._shape(mask, blob, scenes)
        direction = self._direction(blob, scenes, mask.shape[-1])
        return torch.stack([colour.mean(1), direction.mean(1), shape.mean(1)], dim=1)

    def _colour(self, videos: Tensor, mask: Tensor, scenes: list[Scene]) -> Tensor:
        """Colour agreement per frame, `[B, F]`."""
        # Dividing by the brightest channel leaves hue and saturation, so that antialiased edges
        # (a mix with the dark background) keep the colour of the inside.
        palette = torch.tensor(list(COLOURS.values()), device=videos.device)
        palette = palette / palette.amax(dim=1, keepdim=True)
        pixels = videos / videos.amax(dim=2, keepdim=True).clamp_min(1e-3)
        gap = pixels[:, :, None] - palette[:, :, None, None]
        like = torch.exp(-gap.square().sum(3) / (2 * self.colour_width**2))  # [B, F, K, H, W]
        index = torch.tensor([list(COLOURS).index(s.colour) for s in scenes], device=videos.device)
        named = like[torch.arange(len(scenes), device=videos.device), :, index]
        # 0.05: a pixel that is like no colour (grey, white) is not like the nearest one either.
        agreement = named * 1.05 / (like.sum(2) + 0.05)
        return (agreement * mask).sum((2, 3)) / mask.sum((2, 3)).clamp_min(1e-3)

    def _direction(self, blob: _Blob, scenes: list[Scene], width: int) -> Tensor:
        """Agreement of the displacement per span of frames, `[B, spans]`."""
        span = min(self.span, blob.area.shape[1] - 1)
        named = torch.tensor([DIRECTIONS[s.direction] for s in scenes], device=blob.area.device)
        track = torch.stack([blob.x, blob.y], dim=-1)
        step = (track[:, span:] - track[:, :-span]) / span
        speed = step.norm(dim=-1)
        cosine = (step * named[:, None]).sum(-1) / speed.clamp_min(1e-6)
        enough = (speed / (self.min_speed * width)).clamp(max=1)
        seen = blob.present * blob.whole  # a centroid says nothing unless there is one thing
        seen = torch.minimum(seen[:, span:], seen[:, :-span])
        return torch.exp(self.direction_sharpness * (cosine - 1)) * enough * seen

    def _shape(self, mask: Tensor, blob: _Blob, scenes: list[Scene]) -> Tensor:
        """Fit of the named shape, kept over time, per frame `[B, F]`."""
        size = mask.shape[-1]
        overlaps = []
        for shape in SHAPES:
            template = coverage(shape, blob.x, blob.y, blob.area, size)
            template = _mask(BACKGROUND + (BRIGHT - BACKGROUND) * template)
            union = torch.maximum(mask, template).sum((2, 3))
            overlaps.append(torch.minimum(mask, template).sum((2, 3)) / union.clamp_min(1e-3))
        overlap = torch.stack(overlaps, dim=2)  # [B, F, shapes]
        index = torch.tensor([SHAPES.index(s.shape) for s in scenes], device=mask.device)
        pick = index[:, None, None].expand(-1, overlap.shape[1], 1)
        against = (overlap / self.template_temperature).softmax(dim=2).gather(2, pick)[..., 0]
        itself = ((overlap.gather(2, pick)[..., 0] - 0.4) / 0.4).clamp(0, 1)
        change = blob.area / blob.area.mean(dim=1, keepdim=True).clamp_min(1e-3) - 1
        constant = torch.exp(-(change / 0.3).square())
        return against * itself * constant * blob.present * blob.whole


@dataclass(frozen=True)
class _Blob:
    """What is bright in each frame, all `[B, F]`: centroid and area in pixels, two gates."""

    x: Tensor
    y: Tensor
    area: Tensor
    present: Tensor  # 1 for a thing of plausible size, 0 for nothing and for a full screen
    whole: Tensor  # 1 for one compact blob, falling with the excess of the second moments


def _measure(mask: Tensor, spread: Tensor) -> _Blob:
    size = mask.shape[-1]
    grid = torch.arange(size, dtype=mask.dtype, device=mask.device)
    area = mask.sum((2, 3))
    safe = area.clamp_min(1e-3)
    columns, rows = mask.sum(2), mask.sum(3)
    x, y = (columns * grid).sum(2) / safe, (rows * grid).sum(2) / safe
    second = (columns * (grid - x[..., None]) ** 2).sum(2) / safe
    second = second + (rows * (grid - y[..., None]) ** 2).sum(2) / safe
    excess = (second / (safe * spread[:, None]) - 1).clamp_min(0)
    share = area / size**2
    present = ((share - 0.01) / 0.03).clamp(0, 1) * ((0.3 - share) / 0.15).clamp(0, 1)
    return _Blob(x, y, area, present, torch.exp(-(excess / 0.75).square()))


def _split(scenes: list[Scene], size: int) -> list[list[Scene]]:
    return [scenes[start : start + size] for start in range(0, len(scenes), size)]


def _mask(value: Tensor) -> Tensor:
    """Brightness to saliency: a smooth step, antisymmetric about half coverage (0.505)."""
    t = ((value - 0.205) / 0.6).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _check(videos: Tensor, prompts: int) -> None:
    if videos.ndim != 5 or videos.shape[2] != 3 or videos.shape[3] != videos.shape[4]:
        raise ValueError(f"videos has shape {tuple(videos.shape)}, not [B, F, 3, H, H]")
    if videos.shape[1] < 2:
        raise ValueError("videos has 1 frame; motion needs at least 2: raise num_frames")
    if not videos.is_floating_point():
        raise ValueError(f"videos has dtype {videos.dtype}; give floating point in [0, 1]")
    if videos.shape[0] != prompts:
        raise ValueError(f"videos has {videos.shape[0]} clips for {prompts} prompts")
