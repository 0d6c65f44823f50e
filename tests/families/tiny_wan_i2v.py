"""Tiny `WanImageToVideoPipeline`s of the real classes, and images for them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case_wan import softened, with_index, with_unipc
from tiny_models import tiny_wan

from dancegrpo_fast.prompt import Prompt


def tiny_wan_i2v(folder: Path, *, clip: bool = False, experts: int = 1, seed: int = 0) -> Path:
    """Save a pipeline like Wan2.1-I2V (`clip`), or like Wan2.2-I2V-A14B (two experts).

    Text encoder, tokenizer and VAE are `tiny_wan`'s; the network takes 4 noisy channels, 2 of mask
    (one for each frame of a latent frame) and 4 of the image.
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    extra = {"image_dim": 16, "added_kv_proj_dim": 24} if clip else {}

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=10,
            out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **extra,
        )  # fmt: skip

    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        base = WanPipeline.from_pretrained(softened(tiny_wan(Path(scratch), seed=seed)))
        torch.manual_seed(seed + 1)
        parts: dict[str, Any] = {"transformer": transformer()}
        if clip:
            vision = CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                image_size=32, patch_size=8, projection_dim=16,
            )  # fmt: skip
            parts["image_encoder"] = CLIPVisionModel(vision).eval()
            parts["image_processor"] = CLIPImageProcessor(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            )
        if experts == 2:
            parts |= {"transformer_2": transformer(), "boundary_ratio": 0.9}
        WanImageToVideoPipeline(
            vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
            scheduler=base.scheduler, **parts,
        ).save_pretrained(folder)  # fmt: skip
    if clip:  # As published; without torchvision, transformers saves its Pillow class's name.
        with_index(folder, image_processor=["transformers", "CLIPImageProcessor"])
    return with_unipc(folder, 3.0 if clip else 5.0)


def tiny_ti2v(folder: Path, *, seed: int = 0) -> Path:
    """Save a `WanPipeline` folder like Wan2.2-TI2V-5B, whose clips start from an image or not.

    Its VAE works on patches of 2 pixels and has residual shortcuts, as the published one.
    """
    from diffusers import AutoencoderKLWan, WanPipeline

    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        base = WanPipeline.from_pretrained(softened(tiny_wan(Path(scratch), seed=seed)))
        torch.manual_seed(seed + 1)
        vae = AutoencoderKLWan(
            base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True], is_residual=True, in_channels=12, out_channels=12,
            patch_size=2, scale_factor_temporal=2, scale_factor_spatial=8,
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0],
        )  # fmt: skip
        vae.decoder.conv_out.weight.data *= 2
        WanPipeline(
            vae=vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
            scheduler=base.scheduler, transformer=base.transformer, transformer_2=None,
            expand_timesteps=True,
        ).save_pretrained(folder)  # fmt: skip
    return with_unipc(folder, 5.0)


def write_images(folder: Path, texts: Sequence[str]) -> list[Prompt]:
    """One image a prompt, of random pixels; sizes and shapes differ from the sample's."""
    from PIL import Image

    made = []
    for position, text in enumerate(texts):
        pixels = np.random.default_rng(position).integers(0, 256, (40, 36 + 8 * position, 3))
        path = folder / f"image{position}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        made.append(Prompt(text, path))
    return made
