"""Stable Diffusion 1.4 and 1.5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conformance import Case
from tiny_sd import SCHEDULER, tiny_sd

from dancegrpo_fast.models import Family


def ddim(pipeline: Any) -> None:
    """The published scheduler is a multistep one (PNDM), and DDIM's default clips x0."""
    from diffusers import DDIMScheduler

    config = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False)


def shifted(family: Family) -> None:
    """Noisier than the folder's schedule: what a shift is to a flow model."""
    from diffusers import DDIMScheduler

    betas = {k: v for k, v in SCHEDULER.items() if k != "skip_prk_steps"} | {"beta_end": 0.0125}
    family.grid = replace(family.grid, scheduler=DDIMScheduler(**betas))


def scaled_timesteps(family: Family) -> None:
    network = family.network
    family.network = lambda m, x, t, inputs: network(m, x, t * 1.1, inputs)  # type: ignore


def scaled_vae(family: Family) -> None:
    unscale = family.vae_latents
    family.vae_latents = lambda x, vae: unscale(x, vae) * 1.1  # type: ignore


CASES = [
    Case(
        "sd",
        "sd",
        tiny_sd,
        {"guidance": 3.0, "negative_prompt": "dull", "height": 16, "width": 24, "frames": 1},
        rollout={"dynamics": "ddim", "noise_level": 1.0},
        scheduler=ddim,
        breaks={
            "guidance": {"model.guidance": 3.3},
            "shift": shifted,
            "timestep scale": scaled_timesteps,
            "vae scale": scaled_vae,
        },
    )
]
