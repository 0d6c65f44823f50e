"""A model family of your own, for a diffusers pipeline that this package does not know.

Here: LTX-Video 0.9, text to video (`LTXPipeline`). A recipe names it by file and class (the path
counts from the working directory):

    model: {family: "examples/custom_family.py:LTXFamily", path: Lightricks/LTX-Video, ...}

docs/families.md walks through this file; tests/families/case_custom.py runs the tests of our own
families on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import Condition, Family, Grid
from dancegrpo_fast.models.checks import check_frames, check_guidance, check_multiple
from dancegrpo_fast.models.patches import calculate_shift
from dancegrpo_fast.prompt import Prompt

FRAME_RATE = 25  # The stock pipeline's default; positions in time are counted in seconds.


class LTXFamily(Family):
    """A stock diffusers `LTXPipeline` folder."""

    pipelines = ("LTXPipeline",)
    encoders = ("tokenizer", "text_encoder")
    blocks = ("transformer_blocks",)
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    text_length = 128

    def read_latent_shape(self) -> tuple[int, ...]:
        """(C, F, H, W), from configurations alone; what the model cannot do is refused here."""
        config = self.config
        network, vae = self.source.config("transformer"), self.source.config("vae")
        if vae["timestep_conditioning"] or any(vae["decoder_inject_noise"]):
            raise UserError(
                f"model.path = {config.path!r}: its VAE takes a timestep or draws noise to decode "
                "(LTX-Video 0.9.1 and later), which this family does not give it; use 0.9.0"
            )
        if (network["patch_size"], network["patch_size_t"]) != (1, 1):
            raise UserError(f"model.path = {config.path!r}: patches of more than one latent")
        halved = 2 ** sum(vae["spatio_temporal_scaling"])
        self.space, self.time = vae["patch_size"] * halved, vae["patch_size_t"] * halved
        # The stock pipeline asks for multiples of 32 whatever the VAE's scale.
        check_multiple("height", config.height, math.lcm(32, self.space))
        check_multiple("width", config.width, math.lcm(32, self.space))
        check_frames(config.frames, self.time)
        check_guidance(config)
        frames = (config.frames - 1) // self.time + 1
        height, width = config.height // self.space, config.width // self.space
        return network["in_channels"], frames, height, width

    def read_grid(self) -> Grid:
        """The scheduler's sigmas from 1 .. 1/T, shifted by the number of tokens."""
        scheduler = self.source.scheduler()
        mu = calculate_shift(scheduler, math.prod(self.latent_shape[1:]), max_shift=1.15)
        return Grid(scheduler, self.networks, mu=mu, unshifted="1/T")

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """T5's hidden states [L, D] of the prompt's own tokens.

        The stock network masks the others out of its cross-attention (-10000: a weight of exactly
        0) and text has no positions there, so leaving them out is exact and needs no mask.
        """
        guided = self.config.guidance != 1
        text, mask, negative, negative_mask = pipeline.encode_prompt(
            prompt=prompt.text,
            negative_prompt=self.config.negative_prompt,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.max_text_length,
            device=self.device,
        )
        unguided = {"text": negative[0, negative_mask[0]]} if guided else None
        return Condition({"text": text[0, mask[0]]}, unguided)

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """One forward: a token per latent pixel; timesteps 0 .. 1000 stay float32."""
        frames, height, width = latents.shape[2:]
        output = module(
            hidden_states=pack(latents.to(self.dtype)),
            encoder_hidden_states=inputs["text"].to(self.dtype),
            timestep=timesteps,
            encoder_attention_mask=None,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.time / FRAME_RATE, self.space, self.space),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(latents.shape)

    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        """Mean and deviation per channel lie among the VAE's weights."""
        mean, std = (x.float().view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
        return latents * std / vae.config.scaling_factor + mean

    def call_arguments(self) -> dict[str, Any]:
        """What makes the stock pipeline draw the same: for `sample` and the result's users."""
        config = self.config
        return {
            "height": config.height,
            "width": config.width,
            "num_frames": config.frames,
            "frame_rate": FRAME_RATE,
            "guidance_scale": config.guidance,
            "max_sequence_length": self.max_text_length,
        }

    def stock_latents(self, latents: Tensor) -> Tensor:
        """The stock pipeline takes its initial noise as tokens."""
        return pack(latents)


def pack(latents: Tensor) -> Tensor:
    """[B, C, F, H, W] as tokens [B, F H W, C]."""
    return latents.flatten(2).transpose(1, 2)
