"""FLUX.1-dev and its undistilled kin."""

from __future__ import annotations

from pathlib import Path

from conformance import Case
from tiny_flux import tiny_flux

from dancegrpo_fast.models import Family


def scaled_timesteps(family: Family) -> None:
    network = family.network
    family.network = lambda m, x, t, inputs: network(m, x, t * 1.1, inputs)  # type: ignore


def scaled_vae(family: Family) -> None:
    unscale = family.vae_latents
    family.vae_latents = lambda x, vae: unscale(x, vae) * 1.1  # type: ignore


def undistilled(folder: Path) -> Path:
    return tiny_flux(folder, distilled=False)


BREAKS = {
    "shift": {"rollout.schedule": "dance", "rollout.shift": 4.0},
    "timestep scale": scaled_timesteps,
    "vae scale": scaled_vae,
}
MODEL = {"height": 16, "width": 24, "frames": 1, "max_text_length": 16}
TRUE_CFG = {"guidance": 3.0, "negative_prompt": "dull"}

CASES = [
    Case(
        "flux",
        "flux",
        tiny_flux,
        MODEL | TRUE_CFG | {"embedded_guidance": 2.5},
        breaks=BREAKS
        | {
            "guidance": {"model.guidance": 3.3},
            "no guidance": {"model.guidance": 1.0},
            "embedded guidance": {"model.embedded_guidance": 3.5},
        },
    ),
    Case(
        "flux_undistilled",
        "flux",
        undistilled,
        MODEL | TRUE_CFG,
        breaks=BREAKS | {"guidance": {"model.guidance": 3.3}},
    ),
    Case(
        "flux_dev",
        "flux",
        tiny_flux,
        MODEL,
        breaks=BREAKS | {"guidance": {"model.embedded_guidance": 4.0}},
    ),
]
