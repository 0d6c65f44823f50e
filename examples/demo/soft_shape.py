"""A form of the demo's reward with a gradient everywhere: what ReFL and DRaFT need.

The demo's own reward (`dancegrpo_fast.rewards.moving_shape`) is made of clamps, gates and flat
ends: where it says 0 it does not say in which direction less wrong lies. Here each part is a smooth
function of all pixels and of the same thing. It is trained on; what it taught is judged by the
demo's own:

    rewards: [{name: "examples/demo/soft_shape.py:SoftShape"}, {name: moving_shape, weight: 0}]
"""

from __future__ import annotations

import torch
from torch import Tensor

from dancegrpo_fast.rewards import SampleReward, Samples
from dancegrpo_fast.rewards.interface import Scored, checked_pixels
from dancegrpo_fast.rewards.moving_shape import COLOURS, DIRECTIONS, SHAPES, coverage, parse_prompt


class SoftShape(SampleReward):
    """Colour, direction and shape, softly; the mean of three parts in [0, 1].

    1. *colour*: probability of the named colour among all, by the distance of bright pixels' hue.
    2. *direction*: agreement of the centroid's displacement over three frames with the named
       direction, times how much of the least speed it has.
    3. *shape*: overlap with the named template where the bright thing is, times the probability of
       that template among all.

    All count as far as there is a thing of plausible size. True clips get about 0.75: probabilities
    stay short of 1.
    """

    name, differentiable = "soft_shape", True
    light_width = 0.07  # Of the step from dark to bright, in brightness.
    colour_width = 0.4
    shape_temperature = 0.08
    span = 3  # frames
    min_speed = 0.03  # Widths per frame at which speed earns tanh(1) of its credit.

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """Scores clips [N, F, 3, H, H]; see `SampleReward.score`."""
        videos, errors = checked_pixels(samples.videos)
        videos = videos.float() / 255 if videos.dtype == torch.uint8 else videos
        return Scored.of(self.parts(videos, samples.prompts).mean(1), errors)

    def gradient_scores(self, samples: Samples) -> Tensor:
        """See `SampleReward.gradient_scores`."""
        return self.parts(samples.videos, samples.prompts).mean(1)

    def parts(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """The three parts [N, 3] (colour, direction, shape) of clips [N, F, 3, H, H] in [0, 1]."""
        scenes = [parse_prompt(prompt) for prompt in prompts]
        rows = torch.arange(len(scenes), device=videos.device)
        brightest = videos.amax(2)
        light = torch.sigmoid((brightest - 0.505) / self.light_width)  # [N, F, H, H]
        size = light.shape[-1]
        mass = light.sum((2, 3))
        line = torch.arange(size, dtype=light.dtype, device=light.device)
        x = (light.sum(2) * line).sum(2) / mass
        y = (light.sum(3) * line).sum(2) / mass
        present = torch.tanh(mass / 40) * torch.sigmoid((0.22 - mass / size**2) / 0.02)

        palette = light.new_tensor(list(COLOURS.values()))
        palette = palette / palette.amax(1, keepdim=True)
        hue = videos / brightest[:, :, None].clamp_min(0.05)
        gap = (hue[:, :, None] - palette[:, :, None, None]).square().sum(3)  # [N, F, K, H, H]
        like = (-gap / (2 * self.colour_width**2)).softmax(2)
        named = like[rows, :, [list(COLOURS).index(scene.colour) for scene in scenes]]
        colour = (named * light).sum((2, 3)) / mass * present

        track = torch.stack([x, y], dim=-1)
        step = (track[:, self.span :] - track[:, : -self.span]) / self.span
        speed = (step.square().sum(-1) + 0.01).sqrt()  # Of nothing 0.1 pixels: no corner at rest.
        asked = light.new_tensor([DIRECTIONS[scene.direction] for scene in scenes])
        cosine = (step * asked[:, None]).sum(-1) / speed
        direction = ((1 + cosine) / 2).square() * torch.tanh(speed / (self.min_speed * size))
        direction = direction * present[:, self.span :] * present[:, : -self.span]

        # With their gradient: templates that stood still would hold the thing in its place. That of
        # a circle around the very middle of a pixel is NaN, so that they are moved a little.
        at = x + 1e-3, y, mass
        templates = torch.stack([coverage(shape, *at, size) for shape in SHAPES], dim=2)
        both = (light[:, :, None] * templates).sum((3, 4))
        overlap = both / (mass[:, :, None] + templates.sum((3, 4)) - both)  # [N, F, shapes]
        index = [SHAPES.index(scene.shape) for scene in scenes]
        against = (overlap / self.shape_temperature).softmax(2)
        shape = against[rows, :, index] * overlap[rows, :, index] * present
        return torch.stack([colour.mean(1), direction.mean(1), shape.mean(1)], dim=1)
