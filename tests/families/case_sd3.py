"""Stable Diffusion 3.5 medium (two image attentions in the first blocks) and large."""

from __future__ import annotations

from pathlib import Path

from conformance import Case
from tiny_sd3 import tiny_sd3

from dancegrpo_fast.models import Family


def scaled_timesteps(family: Family) -> None:
    network = family.network
    family.network = lambda m, x, t, inputs: network(m, x, t * 1.1, inputs)  # type: ignore


def scaled_vae(family: Family) -> None:
    unscale = family.vae_latents
    family.vae_latents = lambda x, vae: unscale(x, vae) * 1.1  # type: ignore


def large(folder: Path) -> Path:
    return tiny_sd3(folder, dual=False)


BREAKS = {
    "guidance": {"model.guidance": 3.3},
    "shift": {"rollout.schedule": "dance", "rollout.shift": 4.0},
    "timestep scale": scaled_timesteps,
    "vae scale": scaled_vae,
}
MODEL = {
    "guidance": 3.0, "negative_prompt": "dull", "height": 16, "width": 24, "frames": 1,
    "max_text_length": 16,
}  # fmt: skip

CASES = [
    Case("sd3_medium", "sd3", tiny_sd3, MODEL, breaks=BREAKS),
    Case("sd3_large", "sd3", large, MODEL, breaks=BREAKS),
]
