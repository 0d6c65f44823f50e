"""SkyReels-V1 image to video, its images given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from case_hunyuan_video import BREAKS, MODEL
from conformance import Case
from tiny_hunyuan_video import tiny_skyreels

from dancegrpo_fast.models import Family
from dancegrpo_fast.prompt import Prompt


def write_images(folder: Path, texts: Sequence[str]) -> list[Prompt]:
    """One image a prompt, of random pixels; neither has the sample's size or shape."""
    from PIL import Image

    made = []
    for position, text in enumerate(texts):
        pixels = np.random.default_rng(position).integers(0, 256, (24 + 4 * position, 40, 3))
        made.append(Prompt(text, folder / f"image{position}.png"))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"image{position}.png")
    return made


def no_image(family: Family) -> None:
    """The network sees zeros in the image's place."""
    network = family.network
    family.network = lambda m, x, t, inputs: network(  # type: ignore
        m, x, t, {**inputs, "image": inputs["image"] * 0}
    )


CASES = [
    Case(
        "skyreels_i2v",
        "skyreels_i2v",
        tiny_skyreels,
        MODEL,
        images=write_images,
        breaks=BREAKS | {"image": no_image},
    )
]
