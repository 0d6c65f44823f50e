"""FLUX.1-dev, and other folders of `FluxPipeline` (undistilled ones and FLUX.1-schnell).

Guidance: dev is distilled, the scale (stock: 3.5) is an input of the network, one forward a step;
folders whose network has `guidance_embeds: false` take none. `model.guidance` above 1 adds true
classifier-free guidance as the stock pipeline does (`true_cfg_scale`: unguided + scale * (guided -
unguided), Ho & Salimans 2022), with the embedded scale in both branches.

Dtypes: timesteps (0 .. 1) and guidance reach the network in float32; the network itself casts them
to the dtype of its activations and multiplies by 1000 there, so bfloat16 turns 954.5 into 952 (and
into 956 in the stock pipeline, which rounds once more before) and 3.5 into 3504. DanceGRPO does the
same. RoPE tables are computed in float64 from float32 positions; RMS and layer norms are float32
under CUDA's autocast; modulation and the rest are `model.dtype`.

Latents are (the VAE's - shift_factor) * scaling_factor; the network sees patches of 2 x 2,
[B, H W / 4, 4 C]. Text: 512 T5 tokens, zero-padded without a mask as in the model's training, so
never trimmed, and a pooled CLIP vector. The grid is shifted by the number of patches
(`calculate_shift`), from sigmas 1 .. 1/T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
from dancegrpo_fast.models.patches import calculate_shift, pack, unpack
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.prompt import Prompt


class FluxFamily(Family):
    """A stock diffusers `FluxPipeline` folder."""

    pipelines = ("FluxPipeline",)
    encoders = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    unused = ("image_encoder", "feature_extractor")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    text_length = 512
    sequence = "ulysses"
    guidance_input = 3.5

    def read_latent_shape(self) -> tuple[int, ...]:
        config = self.config
        network, vae = self.source.config("transformer"), self.source.config("vae")
        self.distilled = network["guidance_embeds"]
        if config.embedded_guidance is not None and not self.distilled:
            raise UserError(
                f"model.embedded_guidance = {config.embedded_guidance}: the network of this folder "
                "has no such input (guidance_embeds is false); use model.guidance"
            )
        check_guidance(config)
        check_one_frame(config)
        check_text_length(config, 512)
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        check_multiple("height", config.height, 2 * scale)
        check_multiple("width", config.width, 2 * scale)
        return network["in_channels"] // 4, 1, config.height // scale, config.width // scale

    def read_grid(self) -> Grid:
        """Shift by the number of patches; a scheduler without dynamic shift ignores it."""
        scheduler = self.source.scheduler()
        patches = self.latent_shape[2] * self.latent_shape[3] // 4
        mu = calculate_shift(scheduler, patches, max_shift=1.15)
        return Grid(scheduler, self.networks, mu=mu, unshifted="1/T")

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """T5's hidden states [L, D], padded or cut to L tokens, and CLIP's pooled vector."""

        def text(words: str) -> dict[str, Tensor]:
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt=words, device=self.device, max_sequence_length=self.max_text_length
            )
            return {"text": embeds[0], "pooled": pooled[0]}

        guided = self.config.guidance != 1
        return Condition(text(prompt.text), text(self.config.negative_prompt) if guided else None)

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        text, (height, width) = inputs["text"], latents.shape[-2:]
        output = module(
            hidden_states=pack(latents.to(self.dtype)),
            timestep=timesteps / 1000,
            guidance=torch.full_like(timesteps, self.embedded) if self.distilled else None,
            pooled_projections=inputs["pooled"].to(self.dtype),
            encoder_hidden_states=text.to(self.dtype),
            txt_ids=latents.new_zeros(text.shape[1], 3),
            img_ids=positions(height // 2, width // 2, latents.device),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    @property
    def embedded(self) -> float:
        """Guidance scale that the network takes as an input."""
        given = self.config.embedded_guidance
        return self.guidance_input if given is None else given

    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        return latents[:, :, 0] / vae.config.scaling_factor + vae.config.shift_factor

    def call_arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "height": config.height,
            "width": config.width,
            "true_cfg_scale": config.guidance,
            **({"guidance_scale": self.embedded} if self.distilled else {}),
            "max_sequence_length": self.max_text_length,
        }

    def stock_latents(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_dance(self, record: Mapping[str, Tensor]) -> Condition:
        """A prompt of `preprocess_flux_embedding.py`: T5's hidden states and the pooled vector."""
        if self.config.guidance != 1:
            raise UserError(
                f"model.guidance = {self.config.guidance}: DanceGRPO's folders hold no negative "
                "prompt; embed the prompts anew, or use 1"
            )
        return Condition(
            {"text": record["prompt_embed"], "pooled": record["pooled_prompt_embeds"]}
        )


def positions(height: int, width: int, device: torch.device) -> Tensor:
    """[height width, 3] float32 positions of patches, row by row: (0, row, column)."""
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
