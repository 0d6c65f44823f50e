"""The still demo's architecture: a `StableDiffusionPipeline` in small sizes, not yet trained.

Images of 32x32 pixels become 4 x 8x8 latents. Its parts are of Stable Diffusion's classes, with its
noise schedule and epsilon prediction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from stills import all_prompts
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_LENGTH = 77  # As Stable Diffusion's.


def build_pipeline() -> StableDiffusionPipeline:
    """Random weights from the global generator; one token per word of the grammar."""
    tokenizer = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 24, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4,
        norm_num_groups=8, sample_size=32,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(48, 64), norm_num_groups=8, cross_attention_dim=64,
        attention_head_dim=4,  # The number of heads, as in Stable Diffusion's own config.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    """Byte pairs, merged until every word of the grammar is one token; the same in every run."""
    words = sorted({word for prompt in all_prompts() for word in prompt.split()})
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    symbols = sorted({symbol for parts in pieces.values() for symbol in parts})
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in pieces.values() for pair in pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *map("".join, merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """The parts of a word with every occurrence of a pair made one, from the left."""
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)
