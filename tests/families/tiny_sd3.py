"""A tiny `StableDiffusion3Pipeline` of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_flux import clip_encoder, clip_tokenizer, image_vae, t5

# scheduler/scheduler_config.json of stabilityai/stable-diffusion-3.5-medium and -large.
SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}


def tiny_sd3(folder: Path, *, dual: bool = True, seed: int = 0) -> Path:
    """Save a pipeline of some 100k parameters, with the published scaling and scheduler.

    Args:
        folder: Where to.
        dual: A second image attention in the first block, as 3.5 medium has; large has none.
        seed: Of the weights.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizers = [clip_tokenizer(), clip_tokenizer()]
        encoders = [clip_encoder(tokenizer, projected=True) for tokenizer in tokenizers]
        tokenizer_3, text_encoder_3 = t5(32)
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
            joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=12,
            dual_attention_layers=(0,) if dual else (), qk_norm="rms_norm",
        )  # fmt: skip
        # At random weights prompt and guidance hardly move a pixel.
        transformer.proj_out.weight.data *= 3
        StableDiffusion3Pipeline(
            transformer=transformer,
            vae=image_vae(scaling_factor=1.5305, shift_factor=0.0609),
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            text_encoder=encoders[0],
            tokenizer=tokenizers[0],
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizers[1],
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        ).save_pretrained(folder)
    return folder
