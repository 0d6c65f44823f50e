"""FLUX: its grids, its two guidances, what is refused, and what reaches a bfloat16 network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from case_flux import CASES, MODEL, undistilled
from conformance import KEY, Case, family_of, initial
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_flux import SCHEDULER, altered, tiny_flux

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.ops.noise import normal
from dancegrpo_fast.prompt import Prompt

CASE = CASES[0]
DEV = Case("dev", "flux", tiny_flux, MODEL)
PROMPTS = [Prompt(text) for text in CASE.prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("models") / "flux")


def schedule_of(tmp_path, folder, side: int, **rollout):
    """The twin compresses 2 times in space: `side` latents are 2 `side` pixels."""
    changes = {"model.height": 2 * side, "model.width": 2 * side}
    changes |= {f"rollout.{key}": value for key, value in rollout.items()}
    config = DEV.recipe(tmp_path, folder, changes)
    return open_family(config.model).grid.schedule(config.rollout)


@pytest.mark.parametrize(
    "side, steps, mu",
    [(90, 16, 0.79944010), (128, 28, 1.15), (32, 4, 0.5)],  # 720, 1024 and 256 pixels.
    ids=["720", "1024", "256"],
)
def test_grid_of_dev(tmp_path, folder, side, steps, mu):
    """exp(mu) / (exp(mu) + 1/u - 1) at u = 1 .. 1/T; mu is linear in the number of patches."""
    schedule = schedule_of(tmp_path, folder, side, steps=steps)
    u = np.linspace(1, 1 / steps, steps)
    expected = np.exp(mu) / (np.exp(mu) + 1 / u - 1)
    # float32 sigmas, and mu above is printed with 8 digits.
    assert schedule.sigmas == pytest.approx([*expected, 0], abs=2e-7)
    assert schedule.timesteps == pytest.approx(1000 * expected, abs=2e-4)
    stock = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    patches = side * side // 4
    exact = patches * (1.15 - 0.5) / (4096 - 256) + 0.5 - 256 * (1.15 - 0.5) / (4096 - 256)
    assert exact == pytest.approx(mu, abs=1e-8)
    stock.set_timesteps(sigmas=u.tolist(), mu=exact)
    assert schedule.sigmas == pytest.approx(stock.sigmas.tolist(), abs=1e-7)
    assert schedule.timesteps == pytest.approx(stock.timesteps.tolist(), abs=1e-4)


def test_grid_of_schnell_is_not_shifted(tmp_path, folder):
    changes = {"shift": 1.0, "use_dynamic_shifting": False}
    other = altered(folder, tmp_path / "schnell", "scheduler/scheduler_config.json", **changes)
    schedule = schedule_of(tmp_path, other, 128, steps=4)
    assert schedule.sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert schedule.timesteps == (1000.0, 750.0, 500.0, 250.0)


@pytest.mark.parametrize("steps", [16, 12], ids=["16_gpus", "lora"])
def test_dance_schedule_is_the_scripts(tmp_path, folder, steps):
    """Shift 3 whatever the size; whole timesteps, truncated from float32."""
    schedule = schedule_of(tmp_path, folder, 90, steps=steps, schedule="dance", shift=3.0)
    u = torch.linspace(1, 0, steps + 1)
    published = 3 * u / (1 + 2 * u)
    assert schedule.sigmas == pytest.approx(published.tolist(), abs=1e-7)
    assert schedule.timesteps == tuple(float(int(s * 1000)) for s in published[:-1])
    if steps == 16:
        assert schedule.timesteps[:3] == (1000, 978, 954)


def recorded(family, timestep: float = 954.5):
    """What reaches the network for two prompts, and its output."""
    module, seen = family.modules["transformer"], []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    conditions, x = family.encode(PROMPTS), initial(family, 2)
    output = family.model_output(module, x, torch.full((2,), timestep), conditions)
    hook.remove()
    return seen, output


def test_embedded_guidance_is_the_stock_pipelines_by_default(tmp_path, folder):
    family = family_of(DEV.recipe(tmp_path, folder))
    (call,), _ = recorded(family)
    assert call["guidance"].tolist() == [3.5, 3.5]
    assert family.encode(PROMPTS).rows[0].negative is None
    arguments = family.call_arguments()
    assert arguments["guidance_scale"] == 3.5 and arguments["true_cfg_scale"] == 1
    zero = open_family(DEV.recipe(tmp_path, folder, {"model.embedded_guidance": 0.0}).model)
    assert zero.call_arguments()["guidance_scale"] == 0


def test_both_branches_run_in_one_forward_with_the_embedded_scale(tmp_path, folder):
    seen, _ = recorded(family_of(CASE.recipe(tmp_path, folder)))
    assert len(seen) == 1 and seen[0]["guidance"].tolist() == [2.5] * 4


def test_an_undistilled_network_takes_no_scale(tmp_path):
    family = family_of(DEV.recipe(tmp_path, undistilled(tmp_path / "model")))
    (call,), _ = recorded(family)
    assert call["guidance"] is None and "guidance_scale" not in family.call_arguments()
    config = DEV.recipe(tmp_path, tmp_path / "model", {"model.embedded_guidance": 3.5})
    with pytest.raises(UserError, match="model.embedded_guidance = 3.5: the network of this fold"):
        open_family(config.model)


def test_timesteps_and_guidance_reach_a_bfloat16_network_unrounded(tmp_path, folder):
    """The network casts both before its sinusoids: nothing outside it rounds a second time."""
    changes = {"model.dtype": "bfloat16", "model.embedded_guidance": 3.51}
    family = family_of(DEV.recipe(tmp_path, folder, changes))
    inside = []
    embed = family.modules["transformer"].time_text_embed
    embed.register_forward_pre_hook(lambda _, args: inside.append(args[:2]))
    (call,), output = recorded(family)
    assert call["timestep"].dtype == call["guidance"].dtype == torch.float32
    assert (call["timestep"] * 1000).tolist() == pytest.approx([954.5] * 2, abs=1e-4)
    assert call["guidance"].tolist() == pytest.approx([3.51] * 2, abs=1e-6)
    assert call["hidden_states"].dtype == call["pooled_projections"].dtype == torch.bfloat16
    assert call["img_ids"].dtype == call["txt_ids"].dtype == torch.float32
    # What the stock network makes of them: 0.9545 -> 0.953125 -> 953.125 -> 952, and 3.51 ->
    # 3.515625 -> 3515.625 -> 3520.
    timestep, guidance = inside[0]
    assert timestep.tolist() == [952.0, 952.0] and guidance.tolist() == [3520.0, 3520.0]
    assert not torch.equal(output, recorded(family, 956.0)[1])


def test_embedding_folders_of_dancegrpo(tmp_path, folder):
    """One prompt's files are its condition; text_ids are zeros and are made anew."""
    family = family_of(DEV.recipe(tmp_path, folder))
    row = family.encode(PROMPTS[:1]).rows[0]
    record = {
        "prompt_embed": row.positive["text"],
        "pooled_prompt_embeds": row.positive["pooled"],
        "text_ids": torch.zeros(3),
    }
    found = family.from_dance(record).flat()
    assert found.keys() == row.flat().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in row.flat().items())
    guided = open_family(CASE.recipe(tmp_path, folder).model)
    with pytest.raises(UserError, match="model.guidance = 3.0: DanceGRPO's folders hold no neg"):
        guided.from_dance(record)


def test_decode_is_unscaled_as_published(tmp_path, folder):
    family = family_of(DEV.recipe(tmp_path, folder))
    latents = normal((1, *family.latent_shape), KEY.draw())
    with family.vae() as vae:
        given = family.vae_latents(latents, vae)
    assert (given - (latents[:, :, 0] / 0.3611 + 0.1159)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.height": 18}, "model.height = 18: must be a multiple of 4 here; use 16 or 20"),
        ({"model.width": 2}, "model.width = 2: must be a multiple of 4 here; use 4"),
        ({"model.frames": 5}, "model.frames = 5: family flux draws images; leave it at 1"),
        ({"model.guidance": 0.5}, "model.guidance = 0.5: the stock pipeline guides only above 1"),
        ({"model.max_text_length": 513}, "model.max_text_length = 513: the stock pipeline takes"),
        ({"model.guidance_2": 2.0}, "model.guidance_2 = 2.0: it is for the second expert"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, folder, changes, message):
    with pytest.raises(UserError) as caught:
        open_family(DEV.recipe(tmp_path, folder, changes).model)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
