"""Qwen-Image-Edit: an image and an instruction.

The image is brought to about 1024 x 1024 pixels of its own aspect, whatever the sample's size; its
latents follow the sample's in the sequence, and Qwen2.5-VL embeds the instruction together with it.
All else (dtypes, latents, norm-rescaled guidance) is family qwen_image's.

The stock pipeline runs unchanged but for one component: `Qwen2VLProcessor` cannot be built without
torchvision, and `ImageTextProcessor` stands in for it. The stock pipeline encodes the image in the
text encoder's dtype, so the VAE must have it too.

Text is never cut (the stock pipeline does not). diffusers up to 0.42 with transformers 5 does not
tell the text encoder which tokens are the image's, which gives it sequential positions instead of
Qwen2.5-VL's (diffusers issue 14194): as the installed stock pipeline embeds, so do we, and a
repaired one finds `mm_token_type_ids` here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.conditions import Condition
from dancegrpo_fast.models.images import MAX_ENLARGED, load_image
from dancegrpo_fast.models.qwen_image import MAX_TEXT, QwenImageFamily
from dancegrpo_fast.prompt import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

AREA = 1024 * 1024  # Of the image to edit, in pixels: the stock pipeline's.
MAX_ASPECT = 16  # Ours: the processor alone would take 200.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class QwenImageEditFamily(QwenImageFamily):
    """A stock diffusers `QwenImageEditPipeline` folder."""

    pipelines = ("QwenImageEditPipeline",)
    encoders = ("tokenizer", "text_encoder", "processor")
    replaced = ("processor",)
    text_length = MAX_TEXT
    sequence = ""  # The image's tokens would have to be split by themselves.
    takes_image = True

    def read_latent_shape(self) -> tuple[int, ...]:
        config = self.config
        if config.max_text_length is not None:
            raise UserError(
                f"model.max_text_length = {config.max_text_length}: the stock pipeline never cuts "
                "this model's text; leave it out"
            )
        if config.vae_dtype != config.dtype:
            raise UserError(
                f"model.vae_dtype = {config.vae_dtype}: the stock pipeline gives the VAE an image "
                f"of the text encoder's dtype; use {config.dtype} (model.dtype)"
            )
        return super().read_latent_shape()

    @cached_property
    def processor(self) -> ImageTextProcessor:
        """In place of the folder's `Qwen2VLProcessor`."""
        return ImageTextProcessor.of(self.source.folder / "processor")

    @contextmanager
    def encoder_pipeline(self) -> Iterator[Any]:
        with super().encoder_pipeline() as pipeline:
            pipeline.processor = self.processor
            yield pipeline

    def stock_pipeline(self, exported: Path | None, train: str) -> Any:
        pipeline = super().stock_pipeline(exported, train)
        pipeline.processor = self.processor
        return pipeline

    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """Embeddings [L, D] of instruction and image, and the image's latents [C, 1, H, W]."""
        picture = read_picture(prompt)
        width, height = edit_size(*picture.size)
        resized = pipeline.image_processor.resize(picture, height, width)

        def text(words: str) -> dict[str, Tensor]:
            embeds, mask = pipeline.encode_prompt(words, resized, device=self.device)
            assert mask is None, "one prompt has no padding"
            return {"text": embeds[0]}

        guided = self.config.guidance != 1
        pixels = pipeline.image_processor.preprocess(resized, height, width).unsqueeze(2)
        given = pixels.to(self.device, pipeline.vae.dtype)
        return Condition(
            text(prompt.text),
            text(self.config.negative_prompt) if guided else None,
            {"image": pipeline._encode_vae_image(given, None)[0]},
        )

    def from_dance(self, record: Mapping[str, Tensor]) -> Condition:
        """As of qwen_image, with the image's latents."""
        row = super().from_dance(record)
        return Condition(row.positive, None, {"image": record["image_latents"]})

    def prompt_arguments(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        (prompt,) = prompts
        return super().prompt_arguments(prompts) | {"image": read_picture(prompt)}

    def draw(
        self, pipeline: Any, prompts: Sequence[Prompt], latents: Tensor, steps: int
    ) -> Tensor:
        """One at a time: the stock pipeline gives all images of a call the first one's aspect."""
        one = super().draw
        rows = zip(prompts, latents.split(1), strict=True)
        return torch.cat([one(pipeline, [prompt], row, steps) for prompt, row in rows])

    def call_arguments(self) -> dict[str, Any]:
        arguments = super().call_arguments()
        del arguments["max_sequence_length"]  # It cuts nothing here.
        return arguments


def read_picture(prompt: Prompt) -> Image:
    """The image to edit.

    Raises:
        UserError: There is none, it cannot be read as 8-bit RGB, it is too narrow or too small.
    """
    if prompt.image is None:
        raise UserError(
            f"prompt {prompt.text!r} has no image, and family qwen_image_edit edits one; name it "
            'under "image" in a .jsonl file of prompts'
        )
    picture = load_image(prompt.image)
    given = f"image = {str(prompt.image)!r}: {picture.width} x {picture.height} pixels"
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise UserError(f"{given} are over {MAX_ASPECT} times as long as wide; crop it")
    width, height = edit_size(*picture.size)
    if (enlarged := width / picture.width) > MAX_ENLARGED:
        least = f"{-(-width // int(MAX_ENLARGED))} x {-(-height // int(MAX_ENLARGED))}"
        raise UserError(
            f"{given} are too few: the model sees it as {width} x {height} (enlarged "
            f"{enlarged:.1f} times); give at least {least}"
        )
    return picture


def edit_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) that the stock pipeline resizes an image of this size to."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock

    wide, high, _ = stock.calculate_dimensions(AREA, width / height)
    return wide, high


class ImageTextProcessor:
    """`Qwen2VLProcessor` for texts that hold one image each, without torchvision.

    The arithmetic is that of transformers' `Qwen2VLImageProcessor` (its torchvision backend), which
    calls the same torch functions: pixel values agree bit for bit
    (tests/families/test_qwen_image_edit.py).
    """

    def __init__(self, tokenizer: Any, settings: dict[str, Any]) -> None:
        """Of a tokenizer and a `preprocessor_config.json`."""
        self.tokenizer = tokenizer
        self.patch, self.merge = settings.get("patch_size", 14), settings.get("merge_size", 2)
        self.frames = settings.get("temporal_patch_size", 2)
        size = settings.get("size") or {}
        self.least = settings.get("min_pixels") or size.get("shortest_edge", 56 * 56)
        self.most = settings.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280)
        scale = 1.0 / settings.get("rescale_factor", 1 / 255)
        self.mean = torch.tensor(settings.get("image_mean", CLIP_MEAN)) * scale
        self.std = torch.tensor(settings.get("image_std", CLIP_STD)) * scale

    @classmethod
    def of(cls, folder: Path) -> ImageTextProcessor:
        """Of the `processor` folder of a pipeline, as transformers 4 or 5 wrote it."""
        from transformers import AutoTokenizer

        whole, part = folder / "processor_config.json", folder / "preprocessor_config.json"
        settings = json.loads(whole.read_text("utf-8")) if whole.is_file() else {}
        if "image_processor" in settings:
            settings = settings["image_processor"]
        else:
            settings = json.loads(part.read_text("utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer, settings)

    def __call__(
        self, text: Sequence[str], images: Any, padding: bool = True, return_tensors: str = "pt"
    ) -> Any:
        """What the text encoder is given: token ids, mask, token kinds, patches and their grid."""
        from transformers import BatchFeature

        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        patches, grids = zip(*(self.patches(picture) for picture in pictures), strict=True)
        mark = "<|image_pad|>"
        filled = [
            words.replace(mark, mark * (math.prod(grid) // self.merge**2), 1)
            for words, grid in zip(text, grids, strict=True)
        ]
        tokens = self.tokenizer(filled, padding=padding, return_tensors=return_tensors)
        kinds = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(mark)
        return BatchFeature(
            {
                "input_ids": tokens["input_ids"],
                "attention_mask": tokens["attention_mask"],
                "mm_token_type_ids": kinds.int(),
                "pixel_values": torch.cat(patches),
                "image_grid_thw": torch.tensor(grids),
            }
        )

    def patches(self, picture: Image) -> tuple[Tensor, tuple[int, int, int]]:
        """([patches, 3 * frames * patch * patch] float32, (1, rows, columns)) of an RGB image."""
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
        height, width = self.resized(*pixels.shape[-2:])
        pixels = torch.nn.functional.interpolate(  # uint8 in and out
            pixels.contiguous(), size=(height, width), mode="bicubic", antialias=True
        )
        values = (pixels.float() - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        patch, merge = self.patch, self.merge
        rows, columns = height // patch, width // patch
        # Patches that the encoder merges stand together; a still image is repeated in time.
        squares = values.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        squares = squares.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
        flat = squares.expand(*squares.shape[:5], self.frames, patch, patch)
        return flat.reshape(rows * columns, -1), (1, rows, columns)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in whole merged patches, the area within its bounds."""
        unit = self.patch * self.merge
        size = round(height / unit) * unit, round(width / unit) * unit
        if math.prod(size) > self.most:
            shrink = math.sqrt(height * width / self.most)
            return (
                max(unit, math.floor(height / shrink / unit) * unit),
                max(unit, math.floor(width / shrink / unit) * unit),
            )
        if math.prod(size) < self.least:
            grow = math.sqrt(self.least / (height * width))
            return (
                math.ceil(height * grow / unit) * unit,
                math.ceil(width * grow / unit) * unit,
            )
        return size
