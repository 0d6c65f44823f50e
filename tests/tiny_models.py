"""Tiny pipelines of the real diffusers classes, a recipe that trains one, and rewards for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.parallel.world import World

CPU = World(0, 1, torch.device("cpu"))
PROMPTS = ("a red square", "a blue dot", "two green lines", "a fail")


def tiny_wan(folder: Path, *, experts: int = 1, boundary: float = 0.875, seed: int = 0) -> Path:
    """Save a `WanPipeline` of some 10k parameters: one transformer, or Wan2.2's two.

    Four latent channels with a mean and deviation of their own, compressed 2 times in time and 4
    in space; a tokenizer of single characters.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
            out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        letters = [(chr(code), -3.0) for code in range(33, 127)]
        tokenizer = T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=512)
        text = UMT5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True], scale_factor_temporal=2, scale_factor_spatial=4,
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0],
        )  # fmt: skip
        # At random weights all samples are the same grey; rewards of the size of rounding errors
        # would make every comparison of runs a matter of luck.
        vae.decoder.conv_out.weight.data *= 30
        second: dict[str, Any] = {"transformer_2": None}
        first = transformer()
        if experts == 2:
            second = {"transformer_2": transformer(), "boundary_ratio": boundary}
        WanPipeline(
            transformer=first,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=UMT5EncoderModel(text).eval(),
            tokenizer=tokenizer,
            **second,
        ).save_pretrained(folder)
    return folder


def tiny_recipe(folder: Path, model: Path, overrides: dict[str, Any] | None = None) -> dict:
    """A recipe (as YAML would give it) for `model`, with dotted overrides; writes its prompts.

    Two prompts of four samples of 5 frames of 16 x 16 pixels, four steps of which three train.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS[:3]))
    recipe: dict[str, Any] = {
        "output": str(folder / "run"),
        "iterations": 2,
        "model": {
            "family": "wan", "path": str(model), "height": 16, "width": 16, "frames": 5,
            "max_text_length": 16,
        },
        "data": {"prompts": str(prompts), "prompts_per_iteration": 2},
        "rollout": {"group_size": 4, "steps": 4, "noise_level": 0.3, "batch_size": 8},
        "rewards": [{"name": f"{__file__}:Bright"}],
        "loss": {"micro_batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    recipe = copy.deepcopy(recipe)
    for path, value in (overrides or {}).items():
        *parents, key = path.split(".")
        target = recipe
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = value
    return recipe


def tiny_config(folder: Path, model: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """`tiny_recipe`, checked."""
    return RunConfig.model_validate(tiny_recipe(folder, model, overrides))


class Bright:
    """The mean pixel."""

    name = "bright"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos.mean(dim=(1, 2, 3, 4))


class FailsOnFail(Bright):
    """The mean pixel, and no score for a prompt that holds the word fail."""

    name = "fails_on_fail"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        failed = torch.tensor(["fail" in prompt for prompt in prompts])
        return super().__call__(videos, prompts).masked_fill(failed, torch.nan)


class AlwaysFails(Bright):
    """A reward that always raises."""

    name = "always_fails"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        raise RuntimeError("the judge is out")
