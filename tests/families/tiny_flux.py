"""A tiny `FluxPipeline` of the real classes; its text encoders serve tiny_sd3 too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

# scheduler/scheduler_config.json of black-forest-labs/FLUX.1-dev (the rest: defaults).
SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
}  # fmt: skip


def clip_tokenizer() -> Any:
    """Of single characters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    symbols = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip_encoder(tokenizer: Any, *, projected: bool = False) -> Any:
    """16 numbers a token, and 16 pooled."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(width: int) -> tuple[Any, Any]:
    """Tokenizer of single characters, and encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config).eval()


def image_vae(**scaling: float) -> Any:
    """Four channels, compressed 2 times in space."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, **scaling,
    )  # fmt: skip
    # At random weights all samples are the same grey.
    vae.decoder.conv_out.weight.data *= 4
    return vae


def tiny_flux(folder: Path, *, distilled: bool = True, seed: int = 0) -> Path:
    """Save a pipeline of some 100k parameters, with the published scaling and scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        tokenizer_2, text_encoder_2 = t5(16)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
            guidance_embeds=distilled, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        # At random weights prompt and guidance hardly move a pixel.
        transformer.proj_out.weight.data *= 3
        FluxPipeline(
            transformer=transformer,
            vae=image_vae(scaling_factor=0.3611, shift_factor=0.1159),
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            text_encoder=clip_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        ).save_pretrained(folder)
    return folder


def altered(folder: Path, out: Path, part: str, **changes: Any) -> Path:
    """A copy of a pipeline folder in which `part`, a JSON file, is changed."""
    shutil.copytree(folder, out)
    file = out / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return out
