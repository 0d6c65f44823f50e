"""Wan image-to-video: Wan2.1 (CLIP image tokens), Wan2.2-I2V-A14B (two experts), Wan2.2-TI2V-5B.

Two ways to give the image, by the folder:

- Wan2.1 and A14B: the clip that is the image and then zeros goes through the VAE; a mask of the
  given frames and these latents are concatenated to the noisy ones on channels. Wan2.1 is also
  given CLIP's tokens of the image. The policy chooses every latent frame.
- TI2V-5B (`expand_timesteps`): the first latent frame is the image's. `begin` puts it in place, the
  action box leaves it out, and its tokens have timestep 0.

Dtypes, latent scaling and guidance are `wan.py`'s; both branches see the image. Image latents stay
float32 up to the network's input. Source: diffusers' `WanImageToVideoPipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.conditions import Condition, Conditions
from dancegrpo_fast.models.family import Box
from dancegrpo_fast.models.images import load_fitted, to_tensor
from dancegrpo_fast.models.wan import WanFamily, latent_scale
from dancegrpo_fast.prompt import Prompt


class WanImageToVideoFamily(WanFamily):
    """A stock `WanImageToVideoPipeline` folder, or the `WanPipeline` folder of TI2V-5B."""

    pipelines = ("WanImageToVideoPipeline", "WanPipeline")
    encoders: ClassVar[tuple[str, ...]] = (
        "tokenizer", "text_encoder", "image_processor", "image_encoder",
    )  # fmt: skip
    takes_image = True

    def read_latent_shape(self) -> tuple[int, ...]:
        path, index = self.config.path, self.source.index
        self.fixed_frame = bool(index.get("expand_timesteps"))
        if index["_class_name"] == "WanPipeline":
            if not self.fixed_frame:
                raise UserError(
                    f"model.path = {path!r}: it holds a text-to-video WanPipeline; use "
                    "model.family = wan, or a Wan2.1-I2V, Wan2.2-I2V or Wan2.2-TI2V-5B folder"
                )
            # One published folder serves both of TI2V-5B's pipelines.
            index = {**index, "_class_name": "WanImageToVideoPipeline"}
            self.source = replace(self.source, index=index)
        # Only Wan2.1 has the last two.
        self.encoders = tuple(  # type: ignore[misc]
            name for name in type(self).encoders if self.source.has(name)
        )
        self.network_config = self.source.config("transformer")
        if self.network_config["pos_embed_seq_len"] is not None:
            raise UserError(
                f"model.path = {path!r}: it needs a last frame beside the first (FLF2V), which "
                "family wan_i2v does not give it; use a Wan2.1-I2V folder"
            )
        shape = super().read_latent_shape()
        if shape[1] < 2:
            least = self.source.config("vae")["scale_factor_temporal"] + 1
            raise UserError(
                f"model.frames = {self.config.frames}: family wan_i2v draws what follows the "
                f"image; use {least} or more"
            )
        return shape

    def read_action_box(self) -> Box | None:
        if not self.fixed_frame:
            return None
        channels, frames, height, width = self.latent_shape
        return (0, channels), (1, frames), (0, height), (0, width)

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        text = super().embed(pipeline, prompt)
        image = self.image_of(prompt)
        shared = {"image": self._image_condition(pipeline.vae, to_tensor(image).to(self.device))}
        if self.network_config["image_dim"] is not None:
            shared["image_tokens"] = pipeline.encode_image(image, self.device)[0]
        return replace(text, shared=shared)

    def image_of(self, prompt: Prompt) -> Any:
        """The prompt's image, at the sample's size."""
        if prompt.image is None:
            raise UserError(
                f"prompt {prompt.text!r} has no image, and model.family = wan_i2v starts from one; "
                "give a JSON lines file with the keys prompt and image"
            )
        return load_fitted(prompt.image, self.config.height, self.config.width)

    def _image_condition(self, vae: Any, image: Tensor) -> Tensor:
        """Scaled latents of the image, [C, 1, H, W], or mask and clip latents, [4 + C, F, H, W].

        Args:
            vae: On the device.
            image: [3, height, width] in [-1, 1].
        """
        frames = 1 if self.fixed_frame else self.config.frames
        clip = image.new_zeros(1, 3, frames, *image.shape[1:])
        clip[:, :, 0] = image
        mean, std = latent_scale(vae, image.device)
        encoded = vae.encode(clip.to(vae.dtype)).latent_dist.mode().float()
        latents = ((encoded - mean) * (1.0 / std))[0]
        if self.fixed_frame:
            return latents
        # One channel for each frame that a latent frame stands for: 1 where it is given.
        mask = latents.new_zeros(vae.config.scale_factor_temporal, *latents.shape[1:])
        mask[:, 0] = 1
        return torch.cat([mask, latents])

    def begin(self, latents: Tensor, conditions: Conditions) -> Tensor:
        if not self.fixed_frame:
            return latents
        first = conditions.shared("image").to(latents.dtype)
        return torch.cat([first, latents[:, :, 1:]], dim=2)

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        if self.fixed_frame:
            timesteps = self._token_timesteps(latents, timesteps)
        else:
            latents = torch.cat([latents, inputs["image"]], dim=1)
        tokens = inputs.get("image_tokens")
        return module(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=inputs["text"].to(self.dtype),
            encoder_hidden_states_image=None if tokens is None else tokens.to(self.dtype),
            return_dict=False,
        )[0]

    def _token_timesteps(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """[B, tokens]: 0 on the first latent frame, the sample's own on the others."""
        _, rows, columns = self.network_config["patch_size"]
        batch, _, frames, height, width = latents.shape
        tokens = timesteps[:, None, None].repeat(1, frames, (height // rows) * (width // columns))
        tokens[:, 0] = 0
        return tokens.reshape(batch, -1)

    def prompt_arguments(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        (prompt,) = prompts
        return {**super().prompt_arguments(prompts), "image": self.image_of(prompt)}

    def draw(
        self, pipeline: Any, prompts: Sequence[Prompt], latents: Tensor, steps: int
    ) -> Tensor:
        """One call a prompt: the stock pipeline takes one image."""
        rows = [
            super(WanImageToVideoFamily, self).draw(pipeline, [prompt], latents[i : i + 1], steps)
            for i, prompt in enumerate(prompts)
        ]
        return torch.cat(rows)
