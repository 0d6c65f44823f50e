"""Stable Diffusion 3 and 3.5, medium and large (`StableDiffusion3Pipeline`).

Dtypes: timesteps are float32 up to the sinusoids, which are then cast to `model.dtype`; positions
are a stored table of `model.dtype`; layer norms are float32 under CUDA's autocast, RMS norms take
their mean square in float32; modulation and the rest are `model.dtype`.

Latents are (the VAE's - shift_factor) * scaling_factor; the network cuts its patches itself.
Guidance: unguided + scale * (guided - unguided) (Ho & Salimans 2022), both branches in one forward
as the stock pipeline. Text: 77 tokens of two CLIPs side by side and 256 of T5 after them, padded
without a mask, so never trimmed, and the pooled vectors of both CLIPs; `model.max_text_length`
counts T5's tokens. The scheduler's own grid (shift 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.checks import (
    check_guidance,
    check_multiple,
    check_one_frame,
    check_text_length,
)
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.patches import calculate_shift
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.prompt import Prompt


class StableDiffusion3Family(Family):
    """A stock diffusers `StableDiffusion3Pipeline` folder."""

    pipelines = ("StableDiffusion3Pipeline",)
    encoders = (
        "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3",
        "text_encoder_3",
    )  # fmt: skip
    unused = ("image_encoder", "feature_extractor")
    blocks = ("transformer_blocks",)
    # Flow-GRPO's; the dot keeps out the second attention (attn2) of 3.5 medium.
    lora_targets = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ]  # fmt: skip
    text_length = 256
    sequence = "replicated_text"

    def read_latent_shape(self) -> tuple[int, ...]:
        config = self.config
        network, vae = self.source.config("transformer"), self.source.config("vae")
        if absent := [name for name in self.encoders if not self.source.has(name)]:
            raise UserError(
                f"model.path = {config.path!r}: it has no {', '.join(absent)}; family sd3 embeds "
                "prompts with all three text encoders: use a complete folder"
            )
        check_guidance(config)
        check_one_frame(config)
        check_text_length(config, 512)
        scale, patch = 2 ** (len(vae["block_out_channels"]) - 1), network["patch_size"]
        for field, size in (("height", config.height), ("width", config.width)):
            check_multiple(field, size, scale * patch)
            most = network["pos_embed_max_size"] * scale * patch
            if size > most:
                raise UserError(
                    f"model.{field} = {size}: the network of this folder has positions for "
                    f"{most} pixels; use {most} or less"
                )
        return network["in_channels"], 1, config.height // scale, config.width // scale

    def read_grid(self) -> Grid:
        """The scheduler's own; shifted by the number of patches only where it asks for that."""
        scheduler = self.source.scheduler()
        if not scheduler.config.get("use_dynamic_shifting"):
            return Grid(scheduler, self.networks)
        patch = self.source.config("transformer")["patch_size"]
        patches = (self.latent_shape[2] // patch) * (self.latent_shape[3] // patch)
        mu = calculate_shift(scheduler, patches, max_shift=1.16)  # FLUX's pipeline has 1.15.
        return Grid(scheduler, self.networks, mu=mu)

    def token_patch(self) -> tuple[int, int, int]:
        side = self.source.config("transformer")["patch_size"]
        return 1, side, side

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """CLIP's and T5's hidden states one after the other, and CLIP's pooled vectors."""
        guided = self.config.guidance != 1
        text, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompt=prompt.text, prompt_2=None, prompt_3=None,
            negative_prompt=self.config.negative_prompt,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.max_text_length,
            device=self.device,
        )  # fmt: skip
        return Condition(
            {"text": text[0], "pooled": pooled[0]},
            {"text": negative[0], "pooled": negative_pooled[0]} if guided else None,
        )

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        output = module(
            hidden_states=latents[:, :, 0].to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=inputs["text"].to(self.dtype),
            pooled_projections=inputs["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return output[:, :, None]

    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        return latents[:, :, 0] / vae.config.scaling_factor + vae.config.shift_factor

    def call_arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "height": config.height,
            "width": config.width,
            "guidance_scale": config.guidance,
            "max_sequence_length": self.max_text_length,
        }

    def stock_latents(self, latents: Tensor) -> Tensor:
        return latents[:, :, 0]
