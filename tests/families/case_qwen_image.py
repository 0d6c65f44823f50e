"""Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conformance import Case
from tiny_qwen_image import small_images, tiny_qwen_image, tiny_qwen_image_edit

from dancegrpo_fast.models import Family
from dancegrpo_fast.prompt import Prompt


def scaled_timesteps(family: Family) -> None:
    network = family.network
    family.network = lambda m, x, t, inputs: network(m, x, t * 1.1, inputs)  # type: ignore


def scaled_vae(family: Family) -> None:
    unscale = family.vae_latents
    family.vae_latents = lambda x, vae: unscale(x, vae) * 1.1  # type: ignore


def plain_guidance(family: Family) -> None:
    """Without the rescale to the prompted branch's length."""
    family.combine = lambda u, g, scale: u + scale * (g - u)  # type: ignore


def half_image(family: Family) -> None:
    network = family.network
    family.network = lambda m, x, t, inputs: network(  # type: ignore
        m, x, t, {**inputs, "image": inputs["image"] / 2}
    )


def pictures(folder: Path, texts: Sequence[str]) -> list[Prompt]:
    """A landscape and a portrait picture, both far from the size that the model sees."""
    import numpy as np
    from PIL import Image

    prompts = []
    for number, text in enumerate(texts):
        height, width = ((300, 400), (420, 290))[number]
        across, down = np.arange(width) / width, np.arange(height)[:, None] / height
        planes = [across + 0 * down, 0.5 + 0.5 * np.sin(9 * down + 7 * across), down + 0 * across]
        pixels = np.stack(planes[number:] + planes[:number], -1)
        file = folder / f"{number}.png"
        Image.fromarray((255 * pixels).astype(np.uint8)).save(file)
        prompts.append(Prompt(text, file))
    return prompts


BREAKS = {
    "guidance": {"model.guidance": 5.0},
    "guidance without rescale": plain_guidance,
    "shift": {"rollout.schedule": "dance", "rollout.shift": 4.0},
    "timestep scale": scaled_timesteps,
    "vae scale": scaled_vae,
}
MODEL = {
    "guidance": 3.0, "negative_prompt": "a dull, grey picture", "frames": 1, "height": 16,
    "width": 24,
}  # fmt: skip

CASES = [
    Case("qwen_image", "qwen_image", tiny_qwen_image, MODEL, breaks=BREAKS),
    Case(
        "qwen_image_edit",
        "qwen_image_edit",
        tiny_qwen_image_edit,
        MODEL,
        images=pictures,
        around=small_images,
        breaks=BREAKS | {"image": half_image},
    ),
]
