"""SkyReels image to video: the image's latents, first frames that are drawn, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from case_skyreels_i2v import CASES, write_images
from conformance import CPU, Case, family_of, initial, rolled_out
from PIL import Image
from tiny_hunyuan_video import tiny_hunyuan_video, tiny_skyreels
from tiny_sd import tiny_sd

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.models.first_frame import FirstFrames, noise_seed
from dancegrpo_fast.models.images import load_fitted, to_tensor
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.trainer import Trainer

CASE: Case = CASES[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_skyreels(tmp_path_factory.mktemp("models") / "skyreels")


@pytest.fixture(scope="module")
def painter(tmp_path_factory) -> Path:
    """A text-to-image pipeline."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def prompts(tmp_path) -> list[Prompt]:
    return write_images(tmp_path, CASE.prompts)


def test_image_latents_are_the_stock_pipelines(tmp_path, folder, prompts):
    """Bit for bit, with the same noise; zeros stand for the later frames."""
    family = family_of(CASE.recipe(tmp_path, folder))
    stock = family.stock_pipeline(None, "full")
    given = family.prompt_arguments(prompts)
    pixels = stock.video_processor.preprocess(given["image"], height=16, width=16)
    _, expected = stock.prepare_latents(
        pixels, 2, 4, 16, 16, 5, torch.float32, CPU.device, given["generator"]
    )
    conditions = family.encode(prompts)
    found = conditions.shared("image")
    assert found.dtype == torch.float32 and found.shape == (2, 4, 1, 2, 2)
    assert torch.equal(found, expected[:, :, :1]) and not expected[:, :, 1:].any()
    seen = []
    network = family.modules["transformer"]
    network.x_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    noise = initial(family, 2)
    rows = conditions.select([0])
    family.model_output(network, noise[:1], torch.tensor([500.0]), rows)
    assert len(seen) == 2  # Branches of unequal length; both see noise and image.
    for inputs in seen:
        assert torch.equal(inputs, torch.cat([noise[:1], expected[:1]], dim=1))


def test_image_latents_are_a_function_of_the_image(tmp_path, folder, prompts):
    """Neither the global generator nor the other prompts move them, and they are drawn latents."""
    family = family_of(CASE.recipe(tmp_path, folder))
    first, second = family.encode(prompts).shared("image")
    torch.manual_seed(1)
    again = family.encode([prompts[1], Prompt("another text", prompts[0].image)]).shared("image")
    assert torch.equal(again[1], first) and torch.equal(again[0], second)
    assert (first - second).abs().max() > 0.01
    with family.vae() as vae:
        image = to_tensor(load_fitted(prompts[0].image, 16, 16))[None, :, None]
        posterior = vae.encode(image).latent_dist
        assert not torch.equal(first, posterior.mode()[0] * vae.config.scaling_factor)


def test_policy_chooses_every_frame_and_conditions_stay(tmp_path, folder, prompts):
    config = CASE.recipe(tmp_path, folder)
    family = family_of(config)
    conditions = family.encode(prompts)
    before = conditions.shared("image").clone()
    drawn = rolled_out(config, family, prompts)
    assert family.action_box is None and drawn.shape == (2, *family.latent_shape)
    assert (drawn - initial(family, 2)).abs().amin(dim=(0, 1, 3, 4)).min() > 0
    assert torch.equal(family.encode(prompts).shared("image"), before)


def painted(tmp_path, folder, painter, **changes):
    changes = {"first_frame": str(painter), "first_frame_steps": 2} | changes
    config = CASE.recipe(tmp_path, folder, {f"model.{k}": v for k, v in changes.items()})
    return config, open_family(config.model)


def test_drawn_first_frame_is_the_text_to_image_pipelines(tmp_path, folder, painter, prompts):
    """From noise that the prompt alone decides; a prompt that has an image keeps it."""
    from diffusers import StableDiffusionPipeline

    _, family = painted(tmp_path, folder, painter)
    stock = StableDiffusionPipeline.from_pretrained(painter)
    text = prompts[0].text
    expected = stock(
        text, height=16, width=16, num_inference_steps=2,
        generator=torch.Generator().manual_seed(noise_seed(text)),
    ).images[0]  # fmt: skip
    expected.save(tmp_path / "drawn.png")
    mixed = [Prompt(text), prompts[1], Prompt("blue")]
    drawn, own, other = family.encode(mixed).rows
    given = family.encode([Prompt(text, tmp_path / "drawn.png"), prompts[1]]).rows
    assert torch.equal(drawn.shared["image"], given[0].shared["image"])
    assert torch.equal(own.shared["image"], given[1].shared["image"])
    assert not torch.equal(other.shared["image"], drawn.shared["image"])
    assert noise_seed("a") != noise_seed("b") and noise_seed("a") == 0xCA978112CA1B
    _, longer = painted(tmp_path, folder, painter, first_frame_steps=3)
    three = longer.encode(mixed[:1]).rows[0]
    assert not torch.equal(three.shared["image"], drawn.shared["image"])


def test_a_first_frame_is_drawn_once(tmp_path, folder, painter, monkeypatch):
    """In a run: by the embedding; the stock pipeline of an evaluation takes the same picture."""
    drawn = []
    draw = FirstFrames._draw
    monkeypatch.setattr(FirstFrames, "_draw", lambda self, t: drawn.append(t) or draw(self, t))
    config, _ = painted(tmp_path, folder, painter)
    trainer = Trainer(config, CPU)
    trainer.iteration()
    metrics = trainer.iteration()
    assert metrics["reward/failed"] == 0 and metrics["update/grad_norm"] > 0
    assert len(drawn) == len(set(drawn)) >= 2
    again = Prompt(drawn[0])
    with trainer.family.live_pipeline() as pipeline:
        video = trainer.family.draw(pipeline, [again], initial(trainer.family, 1), 2)
    assert video.shape == (1, 5, 3, 16, 16) and len(drawn) == len(set(drawn))


def test_prompts_without_an_image_are_refused(tmp_path, folder):
    family = open_family(CASE.recipe(tmp_path, folder).model)
    with pytest.raises(UserError, match="has no image.*or set model.first_frame"):
        family.encode([Prompt("a dog")])


def test_what_draws_first_frames_is_checked_at_the_start(tmp_path, folder, painter):
    with pytest.raises(UserError, match="model.first_frame = .*does not exist"):
        painted(tmp_path, folder, tmp_path / "absent")
    with pytest.raises(UserError, match="a HunyuanSkyreelsImageToVideoPipeline, which draws no"):
        painted(tmp_path, folder, folder)
    with pytest.raises(ValueError, match="no effect without model.first_frame"):
        painted(tmp_path, folder, painter, first_frame=None)
    partial = tmp_path / "partial"
    shutil.copytree(painter, partial)
    shutil.rmtree(partial / "unet")
    _, family = painted(tmp_path, folder, partial)
    with pytest.raises(UserError, match="unet"):
        family.load()


def test_unfit_images_are_refused_by_name(tmp_path, folder, prompts):
    family = open_family(CASE.recipe(tmp_path, folder).model)
    path = tmp_path / "long.png"
    Image.new("RGB", (64, 16)).save(path)
    with pytest.raises(UserError, match="long.png.*only 25% of it would be left"):
        family.encode([Prompt("a dog", path)])


def test_a_text_to_video_network_is_refused(tmp_path, folder):
    """As happens where the pipeline's folder is put together by hand."""
    tiny_hunyuan_video(tmp_path / "t2v")
    index = tmp_path / "t2v" / "model_index.json"
    content = json.loads(index.read_text())
    content["_class_name"] = "HunyuanSkyreelsImageToVideoPipeline"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="takes 4 channels, and an image-to-video one 8"):
        open_family(CASE.recipe(tmp_path, tmp_path / "t2v").model)


def test_bfloat16_keeps_image_latents_until_the_network(tmp_path, folder, prompts):
    family = family_of(CASE.recipe(tmp_path, folder, {"model.dtype": "bfloat16"}))
    full = family_of(CASE.recipe(tmp_path, folder))
    found = family.encode(prompts).shared("image")
    assert found.dtype == torch.float32
    assert torch.equal(found, full.encode(prompts).shared("image"))
    told = []
    network = family.modules["transformer"]
    for part in (network.time_text_embed, network.context_embedder.time_text_embed):
        part.time_proj.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    rows = family.encode(prompts[:1])
    family.model_output(network, initial(family, 1), torch.tensor([954.5]), rows)
    # Two branches; in each the timestep twice and the embedded scale once.
    assert [t.dtype for t in told] == [torch.float32] * 6
    assert [t.item() for t in told] == [954.5, 1000, 954.5] * 2
