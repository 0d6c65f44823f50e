"""Stable Diffusion 3.5: its grid, what is refused, and what only it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from case_sd3 import CASES
from conformance import (
    KEY,
    TOLERANCE,
    family_of,
    initial,
    policy_of,
    rolled_out,
)
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_flux import altered
from tiny_sd3 import SCHEDULER, tiny_sd3

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.ops.noise import normal
from dancegrpo_fast.prompt import Prompt

CASE = CASES[0]
PROMPTS = [Prompt(text) for text in CASE.prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.mark.parametrize("steps", [10, 40], ids=["train", "evaluation"])
def test_grid_is_the_published_schedulers(tmp_path, folder, steps):
    """Shifted twice: the points lie evenly between shifted ends, and are shifted again."""
    config = CASE.recipe(tmp_path, folder, {"rollout.steps": steps})
    schedule = open_family(config.model).grid.schedule(config.rollout)
    lowest = 3 * 0.001 / (1 + 2 * 0.001)
    u = np.linspace(1, lowest, steps)
    expected = 3 * u / (1 + 2 * u)
    assert schedule.sigmas == pytest.approx([*expected, 0], abs=2e-7)
    assert schedule.timesteps == pytest.approx(1000 * expected, abs=2e-4)
    if steps == 10:
        assert schedule.sigmas[1:3] == pytest.approx((0.9601293, 0.9133490), abs=2e-7)
    stock = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    stock.set_timesteps(steps)
    assert schedule.sigmas == tuple(stock.sigmas.tolist())
    assert schedule.timesteps == tuple(stock.timesteps.tolist())


def test_a_dynamic_shift_is_the_stock_pipelines(tmp_path, folder):
    """24 patches, and this pipeline's own constant where the scheduler has none."""
    part = "scheduler/scheduler_config.json"
    other = altered(folder, tmp_path / "dynamic", part, use_dynamic_shifting=True)
    config = CASE.recipe(tmp_path, other)
    family = family_of(config)
    assert family.grid.mu == pytest.approx(24 * 0.65 / 3840 + 0.5 - 256 * 0.65 / 3840)
    pipeline = family.stock_pipeline(None, "full")
    expected = family.draw(pipeline, PROMPTS, initial(family, 2), config.rollout.steps)
    found = family.decode(rolled_out(config, family, PROMPTS))
    assert (found - expected).abs().max() < TOLERANCE
    still = family_of(CASE.recipe(tmp_path, folder))
    assert still.grid.mu is None
    unshifted = still.decode(rolled_out(config, still, PROMPTS))
    assert (unshifted - expected).abs().max() > 100 * TOLERANCE


def test_timesteps_reach_a_bfloat16_network_unrounded(tmp_path, folder):
    """bfloat16 has no 954.5: its neighbours are 952 and 956."""
    family = family_of(CASE.recipe(tmp_path, folder, {"model.dtype": "bfloat16"}))
    module, seen = family.modules["transformer"], []
    module.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args))
    conditions, x = family.encode(PROMPTS), initial(family, 2)
    assert conditions.one_forward
    outputs = [
        family.model_output(module, x, torch.full((2,), t), conditions) for t in (954.5, 956.0)
    ]
    timesteps, pooled = seen[0]
    assert len(seen) == 2 and timesteps.dtype == torch.float32
    assert timesteps.tolist() == [954.5] * 4
    assert pooled.dtype == torch.bfloat16 and outputs[0].dtype == torch.float32
    assert not torch.equal(*outputs)


def test_text_is_both_clips_and_then_t5(tmp_path, folder):
    """77 + 16 tokens, padded: two prompts of unequal length may share a forward."""
    conditions = family_of(CASE.recipe(tmp_path, folder)).encode(PROMPTS)
    for row in conditions.rows:
        assert row.positive["text"].shape == (77 + 16, 32) and row.negative is not None
        assert row.positive["pooled"].shape == (32,)
    assert conditions.kinds == (0, 0)
    family = open_family(CASE.recipe(tmp_path, folder, {"model.max_text_length": None}).model)
    assert family.max_text_length == 256


def test_lora_leaves_the_second_attention_alone(tmp_path, folder):
    """As Flow-GRPO's targets, whose dot keeps `attn2` out."""
    config = CASE.recipe(tmp_path, folder, {"policy.train": "lora"})
    names = policy_of(config, family_of(config)).trainable()
    assert any("attn.to_q" in name for name in names)
    assert any("attn.add_k_proj" in name for name in names)
    assert not any("attn2" in name for name in names)


def test_decode_is_unscaled_as_published(tmp_path, folder):
    family = family_of(CASE.recipe(tmp_path, folder))
    latents = normal((1, *family.latent_shape), KEY.draw())
    with family.vae() as vae:
        given = family.vae_latents(latents, vae)
    assert (given - (latents[:, :, 0] / 1.5305 + 0.0609)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.height": 18}, "model.height = 18: must be a multiple of 4 here; use 16 or 20"),
        ({"model.width": 52}, "model.width = 52: the network of this folder has positions for 48"),
        ({"model.frames": 5}, "model.frames = 5: family sd3 draws images; leave it at 1"),
        ({"model.guidance": 0.5}, "model.guidance = 0.5: the stock pipeline guides only above 1"),
        ({"model.max_text_length": 600}, "model.max_text_length = 600: the stock pipeline takes"),
        ({"model.embedded_guidance": 3.5}, "model.embedded_guidance = 3.5: family sd3 has no such"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, folder, changes, message):
    with pytest.raises(UserError) as caught:
        open_family(CASE.recipe(tmp_path, folder, changes).model)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_folders_without_t5_are_refused(tmp_path, folder):
    """The stock pipeline would put zeros in its place, of the network's width."""
    changes = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    other = altered(folder, tmp_path / "small", "model_index.json", **changes)
    with pytest.raises(UserError, match="it has no tokenizer_3, text_encoder_3; family sd3 embeds"):
        open_family(CASE.recipe(tmp_path, other).model)
