"""The family of examples/custom_family.py, loaded as a user's recipe loads it: a tiny LTX-Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from case_wan import scaled_timesteps, scaled_vae
from conformance import Case
from tiny_flux import t5

FAMILY = f"{Path(__file__).parents[2] / 'examples' / 'custom_family.py'}:LTXFamily"

# scheduler/scheduler_config.json of Lightricks/LTX-Video (the rest: defaults).
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 1024, "base_shift": 0.95, "max_image_seq_len": 4096, "max_shift": 2.05,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.1, "use_dynamic_shifting": True,
}  # fmt: skip


def tiny_ltx(folder: Path, *, seed: int = 0, **vae_changes: Any) -> Path:
    """Save an `LTXPipeline`: 4 latent channels, compressed 4 times in time and in space."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, text_encoder = t5(16)
        transformer = LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
            cross_attention_dim=24, num_layers=2, caption_channels=16,
        )  # fmt: skip
        # At random weights prompt and guidance hardly move a pixel.
        transformer.proj_out.weight.data *= 3
        scaling = (True, True, False, False)
        vae = AutoencoderKLLTXVideo(
            latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
            spatio_temporal_scaling=scaling, decoder_spatio_temporal_scaling=scaling,
            scaling_factor=0.8, **vae_changes,
        )  # fmt: skip
        vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        vae.latents_std.copy_(torch.tensor([1.5, 0.8, 1.0, 2.0]))
        # At random weights all samples are the same grey.
        vae.decoder.conv_out.conv.weight.data *= 4
        LTXPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        ).save_pretrained(folder)
    return folder


MODEL = {
    "height": 32, "width": 64, "frames": 5, "max_text_length": 40,
    "guidance": 3.0, "negative_prompt": "dull",
}  # fmt: skip

CASES = [
    Case(
        "custom",
        FAMILY,
        tiny_ltx,
        MODEL,
        breaks={
            "guidance": {"model.guidance": 3.3},
            "shift": {"rollout.schedule": "dance", "rollout.shift": 4.0},
            "timestep scale": scaled_timesteps,
            "vae scale": scaled_vae,
        },
    ),
]
