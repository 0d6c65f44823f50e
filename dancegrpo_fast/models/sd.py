"""Stable Diffusion 1.4 and 1.5 (and other epsilon or v models of `StableDiffusionPipeline`).

Dtypes: timesteps are whole numbers, float32 up to the sinusoids, which are then cast to
`model.dtype`; group norms run in the network's dtype under autocast's rules; the output is float32
before guidance. Latents are the VAE's times its scaling factor (0.18215). Guidance: uncond + scale
(cond - uncond), both branches in one forward (77 tokens, no mask), as the stock pipeline.

Grid: the folder's scheduler (PNDM as published) read as DDIM, as DDPO and DanceGRPO do; the
estimate of x0 is never clipped. Source: DanceGRPO `train_grpo_sd.py`; DDPO, arXiv 2305.13301.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.checks import check_guidance, check_multiple, check_one_frame
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.prompt import Prompt


class StableDiffusionFamily(Family):
    """A stock diffusers `StableDiffusionPipeline` folder."""

    pipelines = ("StableDiffusionPipeline",)
    networks = ("unet",)
    encoders = ("tokenizer", "text_encoder")
    unused = ("safety_checker", "image_encoder")
    blocks = ("down_blocks", "up_blocks")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    text_length = 77

    def read_latent_shape(self) -> tuple[int, ...]:
        config = self.config
        unet, vae = self.source.config("unet"), self.source.config("vae")
        if unet["time_cond_proj_dim"] is not None:
            raise UserError(
                f"model.path = {config.path!r}: its network takes the guidance scale as an input "
                "(a distilled model), which family sd does not give it; use an undistilled folder"
            )
        if config.max_text_length not in (None, self.text_length):
            raise UserError(
                f"model.max_text_length = {config.max_text_length}: family sd always reads "
                f"{self.text_length} tokens; leave it out"
            )
        check_guidance(config)
        check_one_frame(config)
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        # The stock pipeline asks for multiples of 8 whatever the VAE's scale.
        check_multiple("height", config.height, math.lcm(8, scale))
        check_multiple("width", config.width, math.lcm(8, scale))
        return unet["in_channels"], 1, config.height // scale, config.width // scale

    def read_grid(self) -> Grid:
        """The folder's noise schedule and timestep spacing, walked by DDIM."""
        from diffusers import DDIMScheduler

        return Grid(DDIMScheduler.from_config(self.source.scheduler().config), self.networks)

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """CLIP's last hidden state of 77 tokens, padded or cut."""
        guided = self.config.guidance != 1
        embeds, negative = pipeline.encode_prompt(
            prompt=prompt.text,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=self.config.negative_prompt if guided else None,
        )
        return Condition({"text": embeds[0]}, {"text": negative[0]} if guided else None)

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        output = module(
            latents[:, :, 0].to(self.dtype),
            timesteps,
            encoder_hidden_states=inputs["text"].to(self.dtype),
            return_dict=False,
        )[0]
        return output[:, :, None]

    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        return latents[:, :, 0] / vae.config.scaling_factor

    def stock_latents(self, latents: Tensor) -> Tensor:
        return latents[:, :, 0]

    def call_arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "height": config.height, "width": config.width, "guidance_scale": config.guidance,
        }  # fmt: skip
