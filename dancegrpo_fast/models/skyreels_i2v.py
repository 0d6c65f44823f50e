"""SkyReels-V1 image to video: HunyuanVideo's network, told the first frame.

The image (`images.py` says how it is brought to size) goes through the VAE alone; its latents times
`scaling_factor`, with zeros for the later latent frames, are concatenated to the noisy ones on
channels, in both branches. The policy chooses every latent frame. As the stock pipeline and
DanceGRPO do, latents are drawn from the VAE's posterior, here always with the same seed: so they
are a function of the image alone.

Guidance is real (stock: 6.0, DanceGRPO: 5.0; unguided + scale * (guided - unguided) in float32),
beside the network's embedded scale (1.0, DanceGRPO's 1000 / 1000). The rest is as in hunyuan_video.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.first_frame import FirstFrames
from dancegrpo_fast.models.hunyuan_video import HunyuanVideoFamily
from dancegrpo_fast.models.images import to_tensor
from dancegrpo_fast.prompt import Prompt


class SkyReelsFamily(HunyuanVideoFamily):
    """A stock diffusers `HunyuanSkyreelsImageToVideoPipeline` folder."""

    pipelines = ("HunyuanSkyreelsImageToVideoPipeline",)
    guidance_input = 1.0
    takes_image = True
    draws_first_frame = True

    def read_latent_shape(self) -> tuple[int, ...]:
        shape = super().read_latent_shape()
        self.first_frames = FirstFrames(self.config, self.dtype, self.device)
        channels = self.source.config("transformer")["in_channels"]
        if channels != 2 * shape[0]:
            raise UserError(
                f"model.path = {self.config.path!r}: its network takes {channels} channels, and an "
                f"image-to-video one {2 * shape[0]} (noise and image); is it a text-to-video model?"
            )
        return shape

    def load(self) -> Family:
        """Load the network; what draws first frames is checked, and loaded when it is needed."""
        self.first_frames.check()
        return super().load()

    @contextmanager
    def encoder_pipeline(self) -> Iterator[Any]:
        """The stock pipeline without networks; what draws first frames leaves the device too."""
        try:
            with super().encoder_pipeline() as pipeline:
                yield pipeline
        finally:
            self.first_frames.rest()

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """HunyuanVideo's text, and the scaled latents [C, 1, H, W] float32 of the first frame."""
        pixels = to_tensor(self.first_frames.of(prompt)).to(self.device)[None, :, None]
        vae = pipeline.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        latents = posterior.sample(image_generator()).float() * vae.config.scaling_factor
        return replace(super().embed(pipeline, prompt), shared={"image": latents[0]})

    def from_dance(self, record: Mapping[str, Tensor]) -> Condition:
        """Refused: DanceGRPO's folders hold no first frames."""
        return Family.from_dance(self, record)

    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        later = latents.shape[2] - 1
        image = pad(inputs["image"], (0, 0, 0, 0, 0, later))  # Zeros for the later frames.
        return super().network(module, torch.cat([latents, image], dim=1), timesteps, inputs)

    def prompt_arguments(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        images = [self.first_frames.of(prompt) for prompt in prompts]
        self.first_frames.rest()
        return {
            **super().prompt_arguments(prompts),
            "image": images,
            "generator": [image_generator() for _ in prompts],
        }


def image_generator() -> torch.Generator:
    """The noise that an image's latents are drawn with: the same for every image."""
    return torch.Generator().manual_seed(0)
