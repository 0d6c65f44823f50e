"""Qwen-Image beyond what all families share: grid, text, guidance, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from case_qwen_image import CASES
from conformance import family_of
from tiny_qwen_image import SCHEDULER

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.models.qwen_image import pack, unpack

CASE = CASES[0]
PROMPT = "two green lines on a blue one"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return CASE.build(tmp_path_factory.mktemp("models") / "qwen_image")


def schedule(tmp_path, folder, **changes):
    config = CASE.recipe(tmp_path, folder, {k.replace("__", "."): v for k, v in changes.items()})
    return open_family(config.model).grid.schedule(config.rollout)


# (pixels a side, steps) -> sigmas of the published scheduler configuration, by the closed form
# below in float64. The twin's VAE compresses 4 times, the published one 8: 360 pixels stand for
# 720 (2025 patches), 512 for 1024 (4096).
PUBLISHED = {
    (512, 4): [1.0, 0.7667094559, 0.4556138009, 0.02, 0.0],
    (360, 20): [
        1.0, 0.9695586420, 0.9376988586, 0.9043191471, 0.8693080833, 0.8325430790, 0.7938889480,
        0.7531962448, 0.7102993340, 0.6650141366, 0.6171354895, 0.5664340379, 0.5126525610,
        0.4555016076, 0.3946542848, 0.3297400015, 0.2603369137, 0.1859627477, 0.1060635766, 0.02,
        0.0,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("side", "steps"), PUBLISHED)
def test_grid_is_the_published_one(tmp_path, folder, side, steps):
    """Exponential shift by the number of patches, then stretched to end at 0.02."""
    found = schedule(tmp_path, folder, model__height=side, model__width=side, rollout__steps=steps)
    patches = (side // 8) ** 2
    mu = 0.5 + (0.9 - 0.5) * (patches - 256) / (8192 - 256)
    line = [1 + (1 / steps - 1) * i / (steps - 1) for i in range(steps)]
    shifted = [math.exp(mu) / (math.exp(mu) + 1 / u - 1) for u in line]
    stretch = (1 - shifted[-1]) / (1 - 0.02)
    exact = [*(1 - (1 - s) / stretch for s in shifted), 0.0]
    assert exact == pytest.approx(PUBLISHED[side, steps], abs=1e-10)
    # diffusers shifts in float32: a few roundings of values below 1.
    assert found.sigmas == pytest.approx(exact, abs=5e-7)
    assert found.timesteps == pytest.approx([1000 * s for s in exact[:-1]], abs=5e-4)


def test_grid_is_what_the_pipeline_sets(tmp_path, folder):
    """Bit for bit, after a call; and its scheduler holds the published numbers."""
    config = CASE.recipe(tmp_path, folder)
    family = open_family(config.model)
    pipeline = family.stock_pipeline(None, "full")
    assert SCHEDULER.items() <= dict(pipeline.scheduler.config).items()
    pipeline("a", height=16, width=24, num_inference_steps=7, output_type="latent")
    steps = config.rollout.model_copy(update={"steps": 7})
    grid = family.grid.schedule(steps)
    assert list(grid.sigmas) == pipeline.scheduler.sigmas.tolist()
    assert list(grid.timesteps) == pipeline.scheduler.timesteps.tolist()


def test_dance_grid(tmp_path, folder):
    """The published script: 20 steps, shift 3, whole timesteps."""
    dance = {"rollout__schedule": "dance", "rollout__shift": 3.0, "rollout__steps": 20}
    found = schedule(tmp_path, folder, **dance)
    assert found.sigmas[:3] == pytest.approx([1.0, 2.85 / 2.9, 2.7 / 2.8])
    assert found.sigmas[-2:] == pytest.approx([0.15 / 1.1, 0.0])
    assert found.timesteps[:3] == (1000.0, 982.0, 964.0) and found.timesteps[-1] == 136.0


def test_timesteps_reach_a_bfloat16_network_unrounded(tmp_path, folder):
    family = family_of(CASE.recipe(tmp_path, folder, {"model.dtype": "bfloat16"}))
    module, seen = family.modules["transformer"], []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    conditions = family.encode([PROMPT])
    latents = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    output = family.model_output(module, latents, torch.tensor([954.5]), conditions)
    for call in seen:
        assert call["timestep"].dtype == torch.float32
        assert torch.equal(call["timestep"], torch.tensor([954.5]) / 1000)
        assert call["hidden_states"].dtype == torch.bfloat16
    assert len(seen) == 2 and output.dtype == torch.float32  # Guidance is combined in float32.


def test_trimmed_text_is_exact(tmp_path, folder):
    """As in a padded and masked batch of the stock pipeline; noise in the padding is not seen."""
    family = family_of(CASE.recipe(tmp_path, folder))
    module = family.modules["transformer"]
    text = family.encode([PROMPT]).rows[0].positive["text"]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *family.latent_shape, generator=generator)
    trimmed = family.network(module, latents, torch.tensor([700.0]), {"text": text[None]})
    padding = torch.randn(9, text.shape[1], generator=generator)
    mask = torch.tensor([[1] * len(text) + [0] * 9])
    padded = module(
        hidden_states=pack(latents),
        timestep=torch.tensor([0.7]),
        encoder_hidden_states=torch.cat([text, padding])[None],
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, 2, 3)]],
        return_dict=False,
    )[0]
    # Attention over other lengths sums in another order.
    assert (unpack(padded, 4, 6) - trimmed).abs().max() < 1e-5 * trimmed.abs().max()


def test_text_is_cut_where_the_stock_pipeline_cuts(tmp_path, folder):
    config = CASE.recipe(tmp_path, folder, {"model.max_text_length": 20})
    family = open_family(config.model)
    with family.encoder_pipeline() as pipeline:
        whole, _ = pipeline.encode_prompt(PROMPT)
        found = family.embed(pipeline, CASE.made_prompts(tmp_path)[0])
    assert whole.shape[1] > 20 and found.positive["text"].shape[0] == 20
    assert family.call_arguments()["max_sequence_length"] == 20


def test_guidance_keeps_the_length_of_each_patch(tmp_path, folder):
    family = open_family(CASE.recipe(tmp_path, folder).model)
    generator = torch.Generator().manual_seed(2)
    unguided, guided = (
        torch.randn(2, 4, 1, 4, 6, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    found = pack(family.combine(unguided, guided, 3.0))
    plain = pack(unguided + 3.0 * (guided - unguided))
    assert torch.allclose(found.norm(dim=-1), pack(guided).norm(dim=-1), rtol=1e-12)
    assert torch.allclose(found / found.norm(dim=-1, keepdim=True),
                          plain / plain.norm(dim=-1, keepdim=True), rtol=1e-12)  # fmt: skip
    assert found.shape == (2, 6, 16)


def test_patches_are_the_stock_pipelines():
    from diffusers import QwenImagePipeline

    latents = torch.arange(2 * 4 * 6 * 8.0).reshape(2, 4, 1, 6, 8)
    stock = QwenImagePipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), stock)
    assert torch.equal(QwenImagePipeline._unpack_latents(stock, 24, 32, 4), latents)
    assert torch.equal(unpack(pack(latents), 6, 8), latents)


def test_dance_embeddings(tmp_path, folder):
    """What the published preprocessing stores: zero-padded to 1024, with its mask."""
    config = CASE.recipe(tmp_path, folder, {"model.guidance": 1.0})
    family = open_family(config.model)
    row = family.encode([PROMPT]).rows[0]
    length, size = row.positive["text"].shape
    stored = {
        "prompt_embed": torch.cat([row.positive["text"], torch.zeros(1024 - length, size)]),
        "prompt_attention_mask": torch.tensor([1] * length + [0] * (1024 - length)),
    }
    imported = family.from_dance(stored)
    assert imported.shape == row.shape
    assert torch.equal(imported.positive["text"], row.positive["text"])
    with pytest.raises(UserError, match=r"model.guidance = 3.0: .* no negative prompt"):
        open_family(CASE.recipe(tmp_path, folder).model).from_dance(stored)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"height": 20}, r"model.height = 20: must be a multiple of 8 here; use 16 or 24"),
        ({"width": 4}, r"model.width = 4: must be a multiple of 8 here; use 8"),
        ({"frames": 5}, r"model.frames = 5: family qwen_image draws images; leave it at 1"),
        ({"guidance": 0.5}, r"model.guidance = 0.5: the stock pipeline guides only above 1"),
        ({"max_text_length": 1025}, r"model.max_text_length = 1025: .* at most 1024 tokens"),
        ({"embedded_guidance": 3.5}, r"family qwen_image has no such input; use model.guidance"),
    ],
)
def test_refused(tmp_path, folder, change, reason):
    config = CASE.recipe(tmp_path, folder, {f"model.{k}": v for k, v in change.items()})
    with pytest.raises(UserError, match=reason):
        open_family(config.model)
