"""The demo's architecture: a `WanPipeline` of the real classes in small sizes, not yet trained.

Clips of 9x32x32 pixels become 8 x 5x8x8 latents and 80 tokens. 1.1M transformer parameters.
"""

from __future__ import annotations

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from dancegrpo_fast.rewards.moving_shape import COLOURS, DIRECTIONS, SHAPES

LATENT_CHANNELS = 8
TEXT_LENGTH = 16  # use it as `max_sequence_length` everywhere
SHIFT = 2.0


def build_pipeline() -> WanPipeline:
    """Random weights from the global generator; one token per word of the grammar."""
    words = dict.fromkeys(" ".join(["a", "moving", *COLOURS, *SHAPES, *DIRECTIONS]).split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    pieces += [("\u2581" + word, -3.0) for word in words]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    text_config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,  # 2x2 pixels are folded into channels: a quarter of the convolution work
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=128,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config).eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=transformer,
    )
