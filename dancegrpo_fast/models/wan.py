"""Wan text-to-video: Wan2.1, and Wan2.2 with its two experts.

Dtypes: timesteps float32 (diffusers' own grid), norms and modulation float32 (diffusers keeps them
so), the rest `model.dtype`; the VAE always float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import ModelConfig, UserError
from dancegrpo_fast.models.family import DTYPES, Conditions, read_grid

NETWORKS = ("transformer", "transformer_2")


class WanFamily:
    """A stock diffusers `WanPipeline` folder."""

    lora_targets = ["to_q", "to_k", "to_v", "to_out.0"]
    action_box: tuple[tuple[int, int], ...] | None = None

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.grid = read_grid(config, NETWORKS, "WanPipeline")
        self.config = config
        self.device = device
        self.guidance = config.guidance
        self.dtype = DTYPES[config.dtype]
        self.pipeline: Any = self.stock_pipeline(None, train="full")
        if self.pipeline.config.expand_timesteps:
            raise UserError(
                f"model.path = {config.path!r}: this pipeline gives each token its own timestep "
                "(Wan2.2-5B), which family wan does not train; use a Wan2.1 or Wan2.2-A14B folder"
            )
        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.requires_grad_(False)
        self.latent_shape = self._latent_shape()

    def _latent_shape(self) -> tuple[int, ...]:
        config, pipe = self.config, self.pipeline
        patch = getattr(pipe, self.grid.networks[0]).config.patch_size
        for field, side, factor in (
            ("height", config.height, pipe.vae_scale_factor_spatial * patch[1]),
            ("width", config.width, pipe.vae_scale_factor_spatial * patch[2]),
        ):
            if side % factor:
                raise UserError(f"model.{field} = {side}: must be a multiple of {factor} here")
        if (config.frames - 1) % pipe.vae_scale_factor_temporal:
            raise UserError(
                f"model.frames = {config.frames}: must be 1 more than a multiple of "
                f"{pipe.vae_scale_factor_temporal} here"
            )
        return (
            pipe.vae.config.z_dim,
            (config.frames - 1) // pipe.vae_scale_factor_temporal + 1,
            config.height // pipe.vae_scale_factor_spatial,
            config.width // pipe.vae_scale_factor_spatial,
        )

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The high-noise (or only) transformer, then the low-noise one."""
        return {name: getattr(self.pipeline, name) for name in self.grid.networks}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditions:
        """Text embeddings of P prompts, zero-padded to `model.max_text_length`."""
        guided = self.guidance != 1
        embeds, negative = self.pipeline.encode_prompt(
            prompt=list(prompts),
            negative_prompt=[self.config.negative_prompt] * len(prompts),
            do_classifier_free_guidance=guided,
            max_sequence_length=self.config.max_text_length,
            device=self.device,
        )
        return Conditions(embeds, negative[:1] if guided else None)

    def velocity(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predicted velocity after guidance.

        Args:
            module: One of `modules`, possibly wrapped by an engine.
            latents: [B, C, F, H, W].
            timesteps: [B] float32, 1000 * sigma.
            conditions: Of B prompts.

        Returns:
            [B, C, F, H, W]; with guidance combined in float32 as u + g (c - u).
        """
        text = conditions.prompt_embeds
        count = latents.shape[0]
        if conditions.negative_embeds is not None:
            # One forward for both branches: half the calls, and one collective under sharding.
            text = torch.cat([text, conditions.negative_embeds.expand(count, -1, -1)])
            latents, timesteps = latents.repeat(2, 1, 1, 1, 1), timesteps.repeat(2)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = module(
                hidden_states=latents.to(self.dtype),
                timestep=timesteps,
                encoder_hidden_states=text.to(self.dtype),
                return_dict=False,
            )[0]
        if conditions.negative_embeds is None:
            return output
        guided, unguided = output.float().split(count)
        return unguided + self.guidance * (guided - unguided)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, F, 3, H, W] float32 in [0, 1] of canonical latents."""
        vae = self.pipeline.vae
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
        std = torch.tensor(vae.config.latents_std, device=self.device).view(shape)
        video = vae.decode(latents.float() * std + mean, return_dict=False)[0]
        return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2).contiguous()

    @torch.no_grad()
    def draw(self, pipeline: Any, prompts: Sequence[str], latents: Tensor, steps: int) -> Tensor:
        """Samples [B, F, 3, H, W] in [0, 1] of a stock pipeline, from given initial noise."""
        config = self.config
        return pipeline(
            prompt=list(prompts),
            negative_prompt=[config.negative_prompt] * len(prompts),
            latents=latents,
            height=config.height,
            width=config.width,
            num_frames=config.frames,
            num_inference_steps=steps,
            guidance_scale=config.guidance,
            max_sequence_length=config.max_text_length,
            output_type="pt",
        ).frames.float()

    def stock_pipeline(self, exported: Path | None, train: str) -> Any:
        """A stock pipeline as a user loads it: the base (None), or what was exported."""
        from diffusers import WanPipeline

        whole = exported is not None and train == "full"
        pipeline = WanPipeline.from_pretrained(
            exported if whole else self.config.path,
            dtype={"default": self.dtype, "vae": torch.float32},
            local_files_only=True,
        ).to(self.device)
        if exported is not None and train == "lora":
            pipeline.load_lora_weights(exported)
            for name in list(self.modules)[1:]:
                pipeline.load_lora_weights(exported / name, load_into_transformer_2=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def load_lines(self, exported: Path, train: str, steps: int) -> str:
        """Python that loads the result without this package and draws one clip."""
        config = self.config
        folder = exported if train == "full" else config.path
        lines = [
            "from diffusers import WanPipeline",
            f"pipeline = WanPipeline.from_pretrained({str(folder)!r})",
        ]
        if train == "lora":
            lines.append(f"pipeline.load_lora_weights({str(exported)!r})")
            for name in list(self.modules)[1:]:
                path = str(exported / name)
                lines.append(f"pipeline.load_lora_weights({path!r}, load_into_transformer_2=True)")
        return "\n".join(
            [
                *lines,
                "video = pipeline(",
                f"    'YOUR PROMPT', height={config.height}, width={config.width},",
                f"    num_frames={config.frames}, num_inference_steps={steps},",
                f"    guidance_scale={config.guidance},",
                f"    max_sequence_length={config.max_text_length},",
                ").frames[0]",
            ]
        )
