"""Wan text-to-video: Wan2.1 (clips and single images), Wan2.2's two experts, Wan2.2 TI2V-5B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance import Case
from tiny_models import tiny_wan

from dancegrpo_fast.models import Family


def flow_match(pipeline: Any) -> None:
    """Euler's step, for folders that hold this scheduler already (a fresh one: it has state)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)


def first_order(pipeline: Any) -> None:
    """The published UniPC with first-order steps and no corrector: Euler's on UniPC's grid."""
    from diffusers import UniPCMultistepScheduler

    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, solver_order=1, disable_corrector=list(range(100))
    )


def with_unipc(folder: Path, flow_shift: float) -> Path:
    """Replaces a folder's scheduler by the one that Wan is published with."""
    from diffusers import UniPCMultistepScheduler

    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    ).save_pretrained(folder / "scheduler")
    return with_index(folder, scheduler=["diffusers", "UniPCMultistepScheduler"])


def softened(folder: Path) -> Path:
    """Takes `tiny_wan`'s decoder back from black and white to greys.

    As saved, an error of 1e-6 in a latent moves pixels by up to 7e-5 (measured): no tolerance of
    1e-5 could be kept.
    """
    from safetensors.torch import load_file, save_file

    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.weight"] /= 15
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def with_index(folder: Path, **changes: Any) -> Path:
    """Changes entries of a folder's `model_index.json`."""
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return folder


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
EXPERTS = MODEL | {"guidance_2": 2.0}


def unipc(folder: Path) -> Path:
    return with_unipc(softened(tiny_wan(folder)), 3.0)


def euler(folder: Path) -> Path:
    return softened(tiny_wan(folder))


def experts(folder: Path) -> Path:
    return softened(tiny_wan(folder, experts=2, boundary=0.8))


def token_timesteps(folder: Path) -> Path:
    return with_index(with_unipc(euler(folder), 5.0), expand_timesteps=True)


CASES = [
    Case("wan21", "wan", unipc, MODEL | {"width": 32}, scheduler=first_order, breaks=BREAKS),
    Case("wan21_image", "wan", euler, MODEL | {"frames": 1}, scheduler=flow_match, breaks=BREAKS),
    Case("wan22", "wan", experts, EXPERTS, scheduler=flow_match, breaks=BREAKS),
    Case("wan22_5b", "wan", token_timesteps, MODEL, scheduler=first_order, breaks=BREAKS),
]
