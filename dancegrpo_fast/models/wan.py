"""Wan text-to-video: Wan2.1, Wan2.2 with its two experts, and Wan2.2 TI2V-5B.

Dtypes: timesteps float32 (diffusers' own grid), rope float64 as diffusers computes it, norms and
modulation float32 (diffusers keeps them so), the rest `model.dtype`. Latents are the VAE's less its
mean, over its deviation, per channel. Guidance: uncond + scale (cond - uncond), with a scale per
expert; text is zero-padded without a mask, as in training, so it is never trimmed.

The folders come with UniPC, a multistep solver: its sigmas and timesteps are kept, its steps are
first order here. TI2V-5B gives each token its own timestep; in text-to-video they are all equal,
so one per sample says the same without a modulation per token. One frame draws images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.checks import check_frames, check_guidance, check_multiple
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.prompt import Prompt


class WanFamily(Family):
    """A stock diffusers `WanPipeline` folder."""

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    networks = ("transformer", "transformer_2")
    encoders: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    blocks = ("blocks",)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    text_length = 512
    sequence = "ulysses"

    def read_latent_shape(self) -> tuple[int, ...]:
        config, vae = self.config, self.source.config("vae")
        space, time = vae["scale_factor_spatial"], vae["scale_factor_temporal"]
        patch = self.source.config("transformer")["patch_size"]
        # The stock pipeline asks for multiples of 16 whatever the VAE's scale.
        check_multiple("height", config.height, math.lcm(16, space * patch[1]))
        check_multiple("width", config.width, math.lcm(16, space * patch[2]))
        check_frames(config.frames, time)
        check_guidance(config)
        if config.guidance == 1 and config.guidance_2 not in (None, 1):
            raise UserError(
                f"model.guidance_2 = {config.guidance_2}: the stock pipeline guides both experts "
                "or none, and model.guidance = 1 guides none; leave it out, or raise model.guidance"
            )
        frames = (config.frames - 1) // time + 1
        return vae["z_dim"], frames, config.height // space, config.width // space

    def token_patch(self) -> tuple[int, int, int]:
        frames, rows, columns = self.source.config("transformer")["patch_size"]
        return frames, rows, columns

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """Text embeddings, zero-padded to `model.max_text_length`."""
        guided = self.config.guidance != 1
        embeds, negative = pipeline.encode_prompt(
            prompt=prompt.text,
            negative_prompt=self.config.negative_prompt,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.max_text_length,
            device=self.device,
        )
        return Condition({"text": embeds[0]}, {"text": negative[0]} if guided else None)

    def from_dance(self, record: Mapping[str, Tensor]) -> Condition:
        """A prompt of `preprocess_wan_2_1_embeddings.py` (226 tokens, an empty negative prompt)."""
        text, negative = record["prompt_embed"], record["negative_prompt_embeds"]
        if len(text) != self.max_text_length:
            raise UserError(
                f"model.max_text_length = {self.max_text_length}: the folder's embeddings have "
                f"{len(text)} tokens; set it to {len(text)}"
            )
        if self.config.guidance == 1:
            return Condition({"text": text.to(self.dtype)})
        if self.config.negative_prompt:
            raise UserError(
                f"model.negative_prompt = {self.config.negative_prompt!r}: the folder's is empty; "
                "leave it out"
            )
        return Condition({"text": text.to(self.dtype)}, {"text": negative.to(self.dtype)})

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        return module(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=inputs["text"].to(self.dtype),
            return_dict=False,
        )[0]

    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        mean, std = latent_scale(vae, latents.device)
        return latents * std + mean

    def call_arguments(self) -> dict[str, Any]:
        config = self.config
        second = {} if config.guidance_2 is None else {"guidance_scale_2": config.guidance_2}
        return {
            "height": config.height,
            "width": config.width,
            "num_frames": config.frames,
            "guidance_scale": config.guidance,
            **second,
            "max_sequence_length": self.max_text_length,
        }


def latent_scale(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a Wan VAE's latents, both [1, C, 1, 1, 1] float32."""
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    return mean, std
