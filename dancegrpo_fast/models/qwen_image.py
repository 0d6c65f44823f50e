"""Qwen-Image text-to-image.

Dtypes: timesteps (0 .. 1) reach the network in float32; the network itself casts them to the dtype
of its activations before the sinusoids, as every stock pipeline's do (in bfloat16 954.5 becomes
953.1, and 957.0 in the stock pipeline, which rounds twice). RoPE is complex64 over float32 queries
and keys; RMS norms take float32 statistics; layer norms follow autocast; modulation and the rest
are `model.dtype`.

Latents are the VAE's, normalised per channel by `latents_mean` and `latents_std`; the network sees
patches of 2 x 2, [B, H W / 4, 4 C]. Guidance is "true" CFG whose result is scaled back, per patch,
to the length of the prompted branch (diffusers `QwenImagePipeline.__call__`); DanceGRPO guides
nothing. Text: the stock pipeline pads a batch and masks; positions of text tokens do not depend on
the padding, so one prompt without padding and mask is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.checks import check_multiple, check_one_frame
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.patches import calculate_shift, pack, unpack
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.models.wan import latent_scale
from dancegrpo_fast.prompt import Prompt

MAX_TEXT = 1024


class QwenImageFamily(Family):
    """A stock diffusers `QwenImagePipeline` folder."""

    pipelines = ("QwenImagePipeline",)
    encoders: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    blocks = ("transformer_blocks",)
    lora_targets = [
        "to_q", "to_k", "to_v", "to_out.0",
        "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    ]  # fmt: skip
    text_length = 512
    sequence = "ulysses"
    pads_split_text = True

    def read_latent_shape(self) -> tuple[int, ...]:
        config, vae = self.config, self.source.config("vae")
        check_one_frame(config)
        if config.guidance < 1:
            raise UserError(
                f"model.guidance = {config.guidance}: the stock pipeline guides only above 1; use "
                "1 for no guidance, or more"
            )
        if (config.max_text_length or 0) > MAX_TEXT:
            raise UserError(
                f"model.max_text_length = {config.max_text_length}: the stock pipeline takes at "
                f"most {MAX_TEXT} tokens"
            )
        scale = 2 ** len(vae["temperal_downsample"])
        check_multiple("height", config.height, 2 * scale)
        check_multiple("width", config.width, 2 * scale)
        return vae["z_dim"], 1, config.height // scale, config.width // scale

    def read_grid(self) -> Grid:
        scheduler = self.source.scheduler()
        patches = self.latent_shape[2] * self.latent_shape[3] // 4
        mu = calculate_shift(scheduler, patches, max_shift=1.15)
        return Grid(scheduler, self.networks, mu=mu, unshifted="1/T")

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """Text embeddings [L, D] without padding, cut at `model.max_text_length`."""

        def text(words: str) -> dict[str, Tensor]:
            embeds, mask = pipeline.encode_prompt(
                prompt=words, device=self.device, max_sequence_length=self.max_text_length
            )
            assert mask is None, "one prompt has no padding"
            return {"text": embeds[0]}

        guided = self.config.guidance != 1
        return Condition(text(prompt.text), text(self.config.negative_prompt) if guided else None)

    def from_dance(self, record: Mapping[str, Tensor]) -> Condition:
        """A prompt of `preprocess_qwenimage_embedding.py`: hidden states, zero-padded, and mask."""
        if self.config.guidance != 1:
            raise UserError(
                f"model.guidance = {self.config.guidance}: DanceGRPO's folders hold no negative "
                "prompt; embed the prompts anew, or use 1"
            )
        length = int(record["prompt_attention_mask"].sum())
        return Condition({"text": record["prompt_embed"][: min(length, self.max_text_length)]})

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        # An image to edit follows the sample in the sequence; its outputs are dropped.
        pictures = [latents, inputs["image"]] if "image" in inputs else [latents]
        sizes = [(1, x.shape[-2] // 2, x.shape[-1] // 2) for x in pictures]
        patches = torch.cat([pack(x.to(self.dtype)) for x in pictures], dim=1)
        text, mask = inputs["text"].to(self.dtype), None
        if missing := -text.shape[1] % self.text_multiple:
            # Split text is padded, and the padding masked: exact, but slower than none.
            mask = text.new_ones(text.shape[:2], dtype=torch.bool)
            mask = torch.nn.functional.pad(mask, (0, missing))
            text = torch.nn.functional.pad(text, (0, 0, 0, missing))
        output = module(
            hidden_states=patches,
            timestep=timesteps / 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[sizes] * len(latents),
            return_dict=False,
        )[0]
        return unpack(output[:, : sizes[0][1] * sizes[0][2]], *latents.shape[-2:])

    def combine(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """Guided, then each patch scaled back to the length it has in the prompted branch."""
        combined, prompted = pack(super().combine(unguided, guided, scale)), pack(guided)
        length = prompted.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        return unpack(combined * length, *guided.shape[-2:])

    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        mean, std = latent_scale(vae, latents.device)
        return latents * std + mean

    def call_arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "height": config.height,
            "width": config.width,
            "true_cfg_scale": config.guidance,
            "max_sequence_length": self.max_text_length,
        }

    def stock_latents(self, latents: Tensor) -> Tensor:
        return pack(latents)
