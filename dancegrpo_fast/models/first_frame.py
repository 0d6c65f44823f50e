"""First frames of prompts that bring none, drawn by a text-to-image pipeline.

DanceGRPO draws SkyReels' first frames with FLUX.1-dev this way. Here the noise is a function of the
prompt alone, so that a prompt starts from the same picture in every iteration, on every rank and
after every resumption; and since its latents are part of the prompt's embedding, it is drawn once.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from dancegrpo_fast.config import ModelConfig, UserError
from dancegrpo_fast.models.images import fit, load_fitted
from dancegrpo_fast.models.source import Source, locate, read_index
from dancegrpo_fast.prompt import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

_KEPT = 256  # Pictures in memory, for evaluations; below a megabyte each.


class FirstFrames:
    """The pictures that prompts start from, at the sample's size.

    Args:
        config: The recipe's model section; `first_frame` is a folder or hub id, or None.
        dtype: Of the text-to-image pipeline.
        device: Where it works.

    Raises:
        UserError: `first_frame` is no folder of a stock text-to-image pipeline.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.source: Source | None = None
        self._pipeline: Any = None
        self._drawn = lru_cache(_KEPT)(self._draw)
        if config.first_frame is not None:
            where = f"model.first_frame = {config.first_frame!r}"
            folder = locate(config.first_frame, field="model.first_frame")
            self.source = Source(folder, read_index(folder, where))
            _check_text_to_image(self.source.index["_class_name"], where)

    def of(self, prompt: Prompt) -> Image:
        """A prompt's own image, or a drawn one; afterwards `rest` frees the device.

        Raises:
            UserError: The image cannot be used, or there is none and nothing to draw it.
        """
        if prompt.image is not None:
            return load_fitted(prompt.image, self.config.height, self.config.width)
        if self.source is None:
            raise UserError(
                f"prompt {prompt.text!r} has no image, and model.family = {self.config.family} "
                "starts from one; give a JSON lines file with the keys prompt and image, or set "
                "model.first_frame to a text-to-image pipeline that draws it"
            )
        return self._drawn(prompt.text)

    def check(self) -> None:
        """Refuse an incomplete text-to-image folder before anything is loaded."""
        if self.source is not None:
            self.source.check()

    def rest(self) -> None:
        """Take the text-to-image pipeline, if it was needed, off the device."""
        if self._pipeline is not None:
            self._pipeline.to("cpu")

    @torch.no_grad()
    def _draw(self, text: str) -> Image:
        from diffusers import AutoPipelineForText2Image

        config = self.config
        if self._pipeline is None:
            assert self.source is not None
            self._pipeline = AutoPipelineForText2Image.from_pretrained(
                self.source.folder, dtype=self.dtype, local_files_only=True
            )
            self._pipeline.set_progress_bar_config(disable=True)
        steps = config.first_frame_steps
        picture = self._pipeline.to(self.device)(
            prompt=text,
            height=config.height,
            width=config.width,
            **({} if steps is None else {"num_inference_steps": steps}),
            generator=torch.Generator().manual_seed(noise_seed(text)),
        ).images[0]
        return fit(picture.convert("RGB"), config.height, config.width)


def noise_seed(text: str) -> int:
    """Seed of the noise that a prompt's first frame is drawn from."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _check_text_to_image(name: str, where: str) -> None:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    if name not in {kind.__name__ for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}:
        raise UserError(
            f"{where}: it holds a {name}, which draws no image from a text; give the folder of a "
            "text-to-image pipeline, such as FLUX.1-dev"
        )
