"""Tiny `HunyuanVideoPipeline` and `HunyuanSkyreelsImageToVideoPipeline` of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SCHEDULER = {
    "num_train_timesteps": 1000, "shift": 7.0, "use_dynamic_shifting": False, "base_shift": 0.5,
    "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096,
    "invert_sigmas": False, "shift_terminal": None,
}  # fmt: skip
"""scheduler_config.json of hunyuanvideo-community/HunyuanVideo."""


def tiny_hunyuan_video(folder: Path, *, seed: int = 0) -> Path:
    """Save a text-to-video pipeline of some 200k parameters."""
    return _save(folder, "HunyuanVideoPipeline", in_channels=4, seed=seed)


def tiny_skyreels(folder: Path, *, seed: int = 0) -> Path:
    """Save an image-to-video pipeline: the network takes the image's latents as more channels."""
    return _save(folder, "HunyuanSkyreelsImageToVideoPipeline", in_channels=8, seed=seed)


def _save(folder: Path, pipeline: str, *, in_channels: int, seed: int) -> Path:
    """Four latent channels compressed 4 times in time, 8 in space."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=in_channels, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1,
            guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        )  # fmt: skip
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=4, scaling_factor=0.476986,
        )  # fmt: skip
        # At random weights the network hardly moves the noise.
        transformer.proj_out.weight.data *= 3
        getattr(diffusers, pipeline)(
            transformer=transformer,
            vae=vae,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            **_llama(),
            **_clip(),
        ).save_pretrained(folder)
    return folder


def _llama() -> dict[str, Any]:
    """A tokenizer of characters that reads the stock template's head as exactly 95 tokens.

    The pipeline cuts those (`crop_start`), whatever the tokenizer. So they are: a beginning, one
    token for most of the head, and its last characters (the end-of-turn mark is one of them).
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import AddedToken
    from transformers import LlamaConfig, LlamaModel, LlamaTokenizer

    head, tail = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    cut = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    single = cut - 2 + len(tail) - 1
    whole = [head[:-single], *sorted(set(head[-single:])), tail]
    letters = ["<unk>", "<s>", "</s>", "<pad>", "\u2581", *(chr(code) for code in range(33, 127))]
    tokenizer = LlamaTokenizer(
        vocab={letter: index for index, letter in enumerate(letters)}, merges=[],
        pad_token="<pad>", add_bos_token=True, padding_side="right",
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    assert len(tokenizer(head).input_ids) == cut
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=4, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        max_position_embeddings=512,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": LlamaModel(config).eval()}


def _clip() -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[],
        model_max_length=77,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=37, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModel(config).eval()}
