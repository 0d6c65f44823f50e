"""Wan image-to-video: Wan2.1 with CLIP, Wan2.2 with two experts, Wan2.2 TI2V-5B."""

from __future__ import annotations

from functools import partial

from case_wan import BREAKS, EXPERTS, MODEL, first_order
from conformance import Case
from tiny_wan_i2v import tiny_ti2v, tiny_wan_i2v, write_images

from dancegrpo_fast.models import Family


def another_image(family: Family) -> None:
    """Upside down: the image must matter."""
    image_of = family.image_of  # type: ignore
    family.image_of = lambda prompt: image_of(prompt).rotate(180)  # type: ignore


SHARED = {"scheduler": first_order, "breaks": BREAKS | {"image": another_image}}
SHARED |= {"images": write_images}

CASES = [
    Case("wan21_i2v", "wan_i2v", partial(tiny_wan_i2v, clip=True), MODEL, **SHARED),
    Case("wan22_i2v", "wan_i2v", partial(tiny_wan_i2v, experts=2), EXPERTS, **SHARED),
    Case("wan22_ti2v", "wan_i2v", tiny_ti2v, MODEL | {"width": 32, "height": 32}, **SHARED),
]
