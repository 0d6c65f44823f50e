"""A tiny `StableDiffusionPipeline` of the real classes."""

from __future__ import annotations

from pathlib import Path

import torch


def tiny_sd(folder: Path, *, seed: int = 0) -> Path:
    """Save a pipeline of some 60k parameters, with the published scheduler configuration.

    Four latent channels compressed 2 times in space; a tokenizer of single characters.
    """
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        letters = sorted(ByteLevel.alphabet())
        symbols = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = CLIPTokenizer(
            vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[],
            model_max_length=77,
        )  # fmt: skip
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=32,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
            scaling_factor=0.18215,
        )  # fmt: skip
        # At random weights the prompt hardly moves a pixel and all samples are the same grey.
        unet.conv_out.weight.data *= 3
        vae.decoder.conv_out.weight.data *= 4
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1,
}  # fmt: skip
"""scheduler_config.json of CompVis/stable-diffusion-v1-4 and of v1-5 (a PNDMScheduler)."""
