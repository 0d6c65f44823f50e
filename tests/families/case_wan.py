"""Wan2.1 and Wan2.2 text-to-video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conformance import Case
from tiny_models import tiny_wan

from dancegrpo_fast.models import Family


def flow_match(pipeline: Any) -> None:
    """Wan folders come with UniPC, a multistep solver; ours is Euler's step on a flow grid."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def scaled_timesteps(family: Family) -> None:
    network = family.network
    family.network = lambda m, x, t, inputs: network(m, x, t * 1.1, inputs)  # type: ignore


def scaled_vae(family: Family) -> None:
    unscale = family.vae_latents
    family.vae_latents = lambda x, vae: unscale(x, vae) * 1.1  # type: ignore


BREAKS = {
    "guidance": {"model.guidance": 3.3},
    "shift": {"rollout.schedule": "dance", "rollout.shift": 4.0},
    "timestep scale": scaled_timesteps,
    "vae scale": scaled_vae,
}
MODEL = {"guidance": 3.0, "negative_prompt": "dull", "max_text_length": 16}


def experts(folder: Path) -> Path:
    return tiny_wan(folder, experts=2, boundary=0.8)


CASES = [
    Case("wan21", "wan", tiny_wan, MODEL, scheduler=flow_match, breaks=BREAKS),
    Case("wan22", "wan", experts, MODEL | {"guidance_2": 2.0}, scheduler=flow_match, breaks=BREAKS),
]
