"""HunyuanVideo: text to video, and with one frame text to image.

Guidance is distilled: the scale (stock: 6.0, times 1000) is an input of the network, one forward a
step. `model.guidance` above 1 adds true classifier-free guidance as the stock pipeline does
(`true_cfg_scale`: unguided + scale * (guided - unguided), Ho & Salimans 2022). DanceGRPO's 6018 is
rounded to 6016 by its bfloat16, as is the stock pipeline's 6000 under bfloat16 weights: say
`embedded_guidance: 6.016` for either.

Text is trimmed: the stock network masks its padding out of every attention and mean, so nothing
that is kept changes, and attention may leave its mask out. A pooled CLIP vector goes beside it.

Dtypes: timesteps and guidance reach their sinusoids in float32 (954.5 and 6018 stay so), rope is
float32, modulation, norms and the rest `model.dtype`. Latents are the VAE's times
`scaling_factor`. The scheduler's sigmas start from linspace(1, 0, T + 1) without its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.checks import check_frames, check_multiple
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.prompt import Prompt


class HunyuanVideoFamily(Family):
    """A stock diffusers `HunyuanVideoPipeline` folder."""

    pipelines = ("HunyuanVideoPipeline",)
    encoders = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    text_length = 256
    sequence = "replicated_text"
    guidance_input = 6.0

    def read_latent_shape(self) -> tuple[int, ...]:
        config, vae = self.config, self.source.config("vae")
        network = self.source.config("transformer")
        if config.guidance < 1:
            raise UserError(
                f"model.guidance = {config.guidance}: the stock pipeline guides above 1 only; use "
                "1 for none, or more"
            )
        if config.embedded_guidance is not None and not network["guidance_embeds"]:
            raise UserError(
                f"model.embedded_guidance = {config.embedded_guidance}: the network of this folder "
                "has no such input (guidance_embeds is false); use model.guidance"
            )
        space, time = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
        check_multiple("height", config.height, space * network["patch_size"])
        check_multiple("width", config.width, space * network["patch_size"])
        check_frames(config.frames, time)
        frames = (config.frames - 1) // time + 1
        return vae["latent_channels"], frames, config.height // space, config.width // space

    def read_grid(self) -> Grid:
        return Grid(self.source.scheduler(), self.networks, unshifted="0")

    @property
    def embedded_guidance(self) -> float:
        """The scale that the network takes as an input."""
        given = self.config.embedded_guidance
        return self.guidance_input if given is None else given

    def token_patch(self) -> tuple[int, int, int]:
        network = self.source.config("transformer")
        return network["patch_size_t"], network["patch_size"], network["patch_size"]

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """Text embeddings [length, D] without padding, and the pooled vector [D']."""
        guided = self.config.guidance != 1
        negative = self._text(pipeline, self.config.negative_prompt) if guided else None
        return Condition(self._text(pipeline, prompt.text), negative)

    def _text(self, pipeline: Any, text: str) -> dict[str, Tensor]:
        embeds, pooled, mask = pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.max_text_length
        )
        kept = mask[0].bool()
        length = int(kept.sum())
        if length == 0 or not kept[:length].all():
            raise UserError(
                f"model.path = {self.config.path!r}: the tokenizer leaves {length} tokens of the "
                f"prompt {text!r} or pads it on the left; set padding_side to right in its "
                "tokenizer_config.json"
            )
        # Copies: a view would keep the padding in memory, and in files.
        return {"text": embeds[0, :length].clone(), "pooled": pooled[0].clone()}

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        text = inputs["text"].to(self.dtype)
        return module(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=text,
            encoder_attention_mask=text.new_ones(text.shape[:2]),
            pooled_projections=inputs["pooled"].to(self.dtype),
            guidance=torch.full_like(timesteps, self.embedded_guidance) * 1000,
            return_dict=False,
        )[0]

    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        return latents / vae.config.scaling_factor

    def call_arguments(self) -> dict[str, Any]:
        config = self.config
        return {
            "height": config.height,
            "width": config.width,
            "num_frames": config.frames,
            "true_cfg_scale": config.guidance,
            "guidance_scale": self.embedded_guidance,
            "max_sequence_length": self.max_text_length,
        }

    def from_dance(self, record: Mapping[str, Tensor]) -> Condition:
        """A prompt of DanceGRPO's folder: the pooled vector is row 0 of the padded embeddings."""
        if self.config.guidance != 1:
            raise UserError(
                f"model.guidance = {self.config.guidance}: DanceGRPO's folders hold no negative "
                "prompt; embed the prompts anew, or use 1"
            )
        pooled, embeds = record["prompt_embed"][0], record["prompt_embed"][1:]
        width = self.source.config("transformer")["pooled_projection_dim"]
        length = min(int(record["prompt_attention_mask"].sum()), self.max_text_length)
        return Condition({"text": embeds[:length].clone(), "pooled": pooled[:width].clone()})

    @contextmanager
    def live_pipeline(self) -> Iterator[Any]:
        """The stock pipeline around the live network.

        It pads its text, so attention that was told to leave masks out takes them meanwhile.
        """
        networks: list[Any] = list(self.modules.values())
        attention = {p for network in networks for p in network.attn_processors.values()}
        maskless = [p for p in attention if not getattr(p, "takes_mask", True)]
        for processor in maskless:
            processor.takes_mask = True
        try:
            with super().live_pipeline() as pipeline:
                yield pipeline
        finally:
            for processor in maskless:
                processor.takes_mask = False
