"""Tiny Qwen-Image and Qwen-Image-Edit pipelines of the real classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# scheduler/scheduler_config.json of Qwen/Qwen-Image and Qwen/Qwen-Image-Edit (the rest: defaults).
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# The stock templates' words would be 200 single characters: a few merges keep the tests short.
PAIRS = ["in", "er", "th", "at", "on", "es", "or", "an", "ed", "re"]


def _tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    symbols = [*sorted(ByteLevel.alphabet()), *PAIRS]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)},
        merges=[tuple(pair) for pair in PAIRS],
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokenizer


def _parts(compressions: int) -> dict[str, Any]:
    """Components; the VAE compresses 2 ** compressions times in space."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    number = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "pad_token_id": number["<|endoftext|>"],
            "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
            "out_hidden_size": 16, "fullatt_block_indexes": [1], "window_size": 56,
        },
        image_token_id=number["<|image_pad|>"], video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1] * (compressions + 1), num_res_blocks=1,
        temperal_downsample=[False] * compressions,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0],
    )  # fmt: skip
    # At random weights all samples are the same grey.
    vae.decoder.conv_out.weight.data *= 10
    return {
        "transformer": QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(text).eval(),
        "tokenizer": tokenizer,
    }  # fmt: skip


def tiny_qwen_image(folder: Path, *, seed: int = 0) -> Path:
    """Save a `QwenImagePipeline` of some 80k parameters, latents compressed 4 times in space."""
    from diffusers import QwenImagePipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        QwenImagePipeline(**_parts(2)).save_pretrained(folder)
    return folder


@contextmanager
def small_images() -> Iterator[None]:
    """Images to edit get about 128 x 128 pixels, here and in the stock pipeline: not 1024."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock

    whole = stock.calculate_dimensions
    stock.calculate_dimensions = lambda area, ratio: whole(area // 64, ratio)
    try:
        yield
    finally:
        stock.calculate_dimensions = whole


def tiny_qwen_image_edit(folder: Path, *, seed: int = 0, compressions: int = 2) -> Path:
    """Save a `QwenImageEditPipeline`, latents compressed 4 times in space unless said otherwise.

    The processor's files are those of a published folder, written by hand: the class cannot be
    built without torchvision. It shows the text encoder at most 84 x 84 pixels.
    """
    from diffusers import QwenImageEditPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = _parts(compressions)
        QwenImageEditPipeline(**parts, processor=None).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    processor = folder / "processor"
    parts["tokenizer"].save_pretrained(processor)
    settings = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": 2, "patch_size": 14, "temporal_patch_size": 2, "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84},
    }  # fmt: skip
    for kind, name in [("Image", "preprocessor"), ("Video", "video_preprocessor")]:
        content = settings | {f"{kind.lower()}_processor_type": f"Qwen2VL{kind}Processor"}
        (processor / f"{name}_config.json").write_text(json.dumps(content, indent=2))
    return folder
