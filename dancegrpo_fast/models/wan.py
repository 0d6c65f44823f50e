"""Wan text-to-video: Wan2.1, and Wan2.2 with its two experts.

Dtypes: timesteps float32 (diffusers' own grid), norms and modulation float32 (diffusers keeps them
so), the rest `model.dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.family import Family, check_frames, check_multiple
from dancegrpo_fast.prompt import Prompt


class WanFamily(Family):
    """A stock diffusers `WanPipeline` folder."""

    pipelines = ("WanPipeline",)
    networks = ("transformer", "transformer_2")
    encoders = ("tokenizer", "text_encoder")
    blocks = ("blocks",)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    text_length = 512

    def read_latent_shape(self) -> tuple[int, ...]:
        if self.source.index.get("expand_timesteps"):
            raise UserError(
                f"model.path = {self.config.path!r}: this pipeline gives each token its own "
                "timestep (Wan2.2-5B), which family wan does not train; use a Wan2.1 or "
                "Wan2.2-A14B folder"
            )
        config, vae = self.config, self.source.config("vae")
        space, time = vae["scale_factor_spatial"], vae["scale_factor_temporal"]
        patch = self.source.config("transformer")["patch_size"]
        check_multiple("height", config.height, space * patch[1])
        check_multiple("width", config.width, space * patch[2])
        check_frames(config.frames, time)
        frames = (config.frames - 1) // time + 1
        return vae["z_dim"], frames, config.height // space, config.width // space

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
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(shape)
        std = torch.tensor(vae.config.latents_std, device=latents.device).view(shape)
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
