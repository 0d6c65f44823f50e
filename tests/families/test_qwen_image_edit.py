"""Qwen-Image-Edit beyond what all families share: its image, its processor, refusals.

CI runs the stock pipeline with our processor; the stock processor needs torchvision, so the test of
the two together makes an environment for it and is slow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from case_qwen_image import CASES
from conformance import family_of, initial
from PIL import Image

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.models.qwen_image_edit import ImageTextProcessor, edit_size, read_picture
from dancegrpo_fast.prompt import Prompt

CASE = CASES[1]
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return CASE.build(tmp_path_factory.mktemp("models") / "qwen_image_edit")


@pytest.fixture
def small():
    with CASE.around():
        yield


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# By hand: 1024 sqrt(ratio) and its quotient by the ratio, to the next multiple of 32.
@pytest.mark.parametrize(
    ("given", "seen"),
    [((512, 512), (1024, 1024)), ((1920, 1080), (1376, 768)), ((600, 800), (896, 1184))],
)
def test_images_get_the_published_area(given, seen):
    assert edit_size(*given) == seen


def test_image_latents_are_the_stock_pipelines(tmp_path, folder, small):
    """Normalised and packed: the stock pipeline's second half of the sequence, bit for bit."""
    family = family_of(CASE.recipe(tmp_path, folder, {"model.guidance": 1.0}))
    prompts = CASE.made_prompts(tmp_path / "images")
    conditions, seen = family.encode(prompts), []
    assert conditions.kinds == (0, 1), "a landscape and a portrait never share a forward"
    pipeline = family.stock_pipeline(None, "full")
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    noise = initial(family, len(prompts))
    family.draw(pipeline, prompts, noise, 2)  # Of one step the published grid is NaN.
    for row, call in zip(conditions.rows, seen[::2], strict=True):
        image = row.shared["image"][None]
        sample = family.stock_latents(noise).shape[1]
        assert torch.equal(call["hidden_states"][:, sample:], family.stock_latents(image))
        assert torch.equal(call["encoder_hidden_states"][0], row.positive["text"])
        assert call["img_shapes"] == [[(1, 2, 3), (1, image.shape[3] // 2, image.shape[4] // 2)]]


def test_the_image_reaches_the_text_encoder(tmp_path, folder, small):
    family = open_family(CASE.recipe(tmp_path, folder).model)
    first, second = CASE.made_prompts(tmp_path / "images")
    rows = family.encode([first, Prompt(first.text, second.image)]).rows
    assert rows[0].positive["text"].shape == rows[1].positive["text"].shape
    assert not torch.equal(rows[0].positive["text"], rows[1].positive["text"])
    assert not torch.equal(rows[0].negative["text"], rows[1].negative["text"])


def test_live_pipeline_draws_without_torchvision(tmp_path, folder, small):
    family = family_of(CASE.recipe(tmp_path, folder))
    prompts = CASE.made_prompts(tmp_path / "images")
    noise = initial(family, len(prompts))
    with family.live_pipeline() as pipeline:
        live = family.draw(pipeline, prompts, noise, 2)
    stock = family.draw(family.stock_pipeline(None, "full"), prompts, noise, 2)
    assert torch.equal(live, stock) and live.shape == (2, 1, 3, 16, 24)


def test_patches_hold_the_pixels_in_the_order_of_the_encoder():
    """Against the definition, pixel by pixel, on an image that is not resized."""
    processor = ImageTextProcessor(None, {})
    image = picture(28 * 3, 28 * 2)
    flat, (time, rows, columns) = processor.patches(image)
    assert (time, rows, columns) == (1, 4, 6) and flat.shape == (24, 3 * 2 * 14 * 14)
    pixels = (np.asarray(image) / 255.0 - [0.48145466, 0.4578275, 0.40821073]) / [
        0.26862954, 0.26130258, 0.27577711,
    ]  # fmt: skip
    order = [
        (2 * down + r, 2 * across + c)
        for down in range(2) for across in range(3) for r in range(2) for c in range(2)
    ]  # fmt: skip
    for number, (row, column) in enumerate(order):
        square = pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        both = np.stack([square.transpose(2, 0, 1)] * 2, 1).reshape(-1)
        assert np.abs(flat[number].numpy() - both).max() < 1e-6


@pytest.mark.parametrize("size", [(1024, 1024), (40, 300), (640, 416), (57, 55), (14, 20)])
def test_processor_resizes_as_pillow(size):
    """transformers' Pillow processor needs no torchvision; it may differ by one level of 255."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    limits = {"shortest_edge": 56 * 56, "longest_edge": 200 * 200}
    expected = Qwen2VLImageProcessorPil(size=limits)(picture(*size), return_tensors="pt")
    found, grid = ImageTextProcessor(None, {"size": limits}).patches(picture(*size))
    assert grid == tuple(expected["image_grid_thw"][0].tolist())
    level = 1 / 255 / 0.26130258
    assert (found - expected["pixel_values"]).abs().max() < 1.01 * level


def test_processor_counts_image_tokens(folder):
    processor = ImageTextProcessor.of(folder / "processor")
    texts = ["a <|image_pad|> b", "<|image_pad|> longer"]
    found = processor(text=texts, images=[picture(84, 84), picture(56, 112)])
    assert found["image_grid_thw"].tolist() == [[1, 6, 6], [1, 8, 4]]
    assert found["mm_token_type_ids"].sum(1).tolist() == [9, 8]
    assert found["pixel_values"].shape == (36 + 32, 1176)
    # Padding carries no weight, wherever the tokenizer puts it.
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
    assert found["attention_mask"].sum(1).tolist() == [lengths[0] + 8, lengths[1] + 7]


def test_dance_embeddings(tmp_path, folder, small):
    """What the published preprocessing stores: text padded to 5000, with the image's latents."""
    family = open_family(CASE.recipe(tmp_path, folder, {"model.guidance": 1.0}).model)
    row = family.encode(CASE.made_prompts(tmp_path / "images")[:1]).rows[0]
    text, size = row.positive["text"].shape
    stored = {
        "prompt_embed": torch.cat([row.positive["text"], torch.zeros(5000 - text, size)]),
        "prompt_attention_mask": torch.tensor([1] * text + [0] * (5000 - text)),
        "image_latents": row.shared["image"],
    }
    imported = family.from_dance(stored).flat()
    assert all(torch.equal(imported[name], tensor) for name, tensor in row.flat().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_text_length": 512}, r"model.max_text_length = 512: .* never cuts .* leave it out"),
        ({"dtype": "bfloat16"}, r"model.vae_dtype = float32: .* use bfloat16 \(model.dtype\)"),
        ({"width": 20}, r"model.width = 20: must be a multiple of 8 here; use 16 or 24"),
    ],
)
def test_refused(tmp_path, folder, change, reason):
    config = CASE.recipe(tmp_path, folder, {f"model.{k}": v for k, v in change.items()})
    with pytest.raises(UserError, match=reason):
        open_family(config.model)


def test_images_that_do_not_fit_are_refused(tmp_path):
    for name, image in [
        ("narrow", picture(1700, 100)),
        ("small", picture(200, 200)),
        ("deep", Image.fromarray(np.zeros((400, 400), dtype=np.uint16))),
    ]:
        image.save(tmp_path / f"{name}.png")
    for file, reason in [
        (None, r'"a" has no image|has no image, and family qwen_image_edit edits one'),
        ("narrow", r"1700 x 100 pixels are over 16 times as long as wide; crop it"),
        ("small", r"200 x 200 pixels are too few: .* 1024 x 1024 .* give at least 256 x 256"),
        ("deep", r"pixels of mode I;16; save it as 8-bit RGB"),
        ("absent", r"cannot be read as an image"),
    ]:
        prompt = Prompt("a", file and tmp_path / f"{file}.png")
        with pytest.raises(UserError, match=reason):
            read_picture(prompt)


@pytest.mark.slow
def test_stock_processor_and_pipeline_agree_where_torchvision_is(tmp_path):
    """In a process of its own, with torchvision beside this environment's packages."""
    major, minor = torch.__version__.split(".")[:2]
    assert major == "2"
    # torchvision 0.(n + 15) is the one of torch 2.n; without dependencies torch stays as it is.
    wanted = f"torchvision==0.{int(minor) + 15}.*"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    made = subprocess.run(
        [*install, "--target", str(tmp_path / "packages"), wanted], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no {wanted}: {made.stderr.strip().splitlines()[-1]}")
    paths = [str(HERE.parents[1]), str(tmp_path / "packages")]
    done = subprocess.run(
        [sys.executable, str(HERE / "stock_qwen_image_edit.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "stock and ours agree" in done.stdout, done.stderr[-3000:]
