"""Stable Diffusion: its grid, what is refused, and what only it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from case_sd import CASES, ddim
from conformance import CPU, TOLERANCE, family_of, initial, rolled_out
from diffusers import DDIMScheduler
from tiny_sd import SCHEDULER, tiny_sd

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.transitions import transition

CASE = CASES[0]
PROMPTS = [Prompt(text) for text in CASE.prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


def altered(folder: Path, out: Path, part: str, **changes) -> Path:
    """A copy of a pipeline folder with another `part` (a JSON file)."""
    shutil.copytree(folder, out)
    file = out / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return out


def test_grid_is_ddims_at_the_published_configuration(tmp_path, folder):
    """50 steps as DanceGRPO and DDPO: 981, 961, ... 1, and on to 0 with noise left to add."""
    config = CASE.recipe(tmp_path, folder, {"rollout.steps": 50})
    schedule = open_family(config.model).grid.schedule(config.rollout)
    assert schedule.timesteps == tuple(range(981, 0, -20))
    assert schedule.prediction == "epsilon"
    found = schedule.alphas_cumprod
    assert found is not None and len(found) == 51
    # float32 values, printed with 6 digits.
    assert found[:2] == pytest.approx((0.00577550, 0.00728173), rel=2e-6)
    assert found[-2:] == pytest.approx((0.99829602, 0.99914998), rel=1e-6)
    expected = DDIMScheduler(**{k: v for k, v in SCHEDULER.items() if k != "skip_prk_steps"})
    expected.set_timesteps(50)
    assert schedule.timesteps == tuple(expected.timesteps.tolist())
    assert found[:-1] == tuple(expected.alphas_cumprod[expected.timesteps].tolist())
    assert found[-1] == expected.final_alpha_cumprod.item()
    first, last = (
        transition(schedule, i, i + 1, dynamics="ddim", kind="sde", level=1.0) for i in (0, 49)
    )
    # reference numbers of DDPO's step; alphas in float32 leave 6 digits
    assert (first.s, last.s) == pytest.approx((0.45446327, 0.02064832), rel=1e-5)


def test_v_prediction_and_another_spacing(tmp_path, folder):
    """Both are read from the folder; stock DDIM agrees."""
    changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    other = altered(folder, tmp_path / "v", "scheduler/scheduler_config.json", **changes)
    config = CASE.recipe(tmp_path, other)
    family = family_of(config)
    assert family.grid.schedule(config.rollout).timesteps == (999, 749, 499, 249)
    pipeline = family.stock_pipeline(None, "full")
    ddim(pipeline)
    # Trailing spacing ends at timestep -1 in diffusers; ours is clamped to 0, which is the same
    # signal (set_alpha_to_one is false).
    expected = family.draw(pipeline, PROMPTS, initial(family, 2), config.rollout.steps)
    found = family.decode(rolled_out(config, family, PROMPTS))
    assert (found - expected).abs().max() < TOLERANCE


def test_recomputed_activations_give_the_same_update(tmp_path, folder):
    weights = []
    for kind in ("none", "full"):
        changes = {"parallel.checkpointing": kind, "model.guidance": 1.0}
        trainer = Trainer(CASE.recipe(tmp_path / kind, folder, changes), CPU)
        trainer.iteration()
        weights.append(trainer.policy.trainable())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("dynamics", ["ddim", "vp"])
def test_both_dynamics_train(tmp_path, folder, dynamics):
    """All steps of the chain, the last one included: its noise is small but not zero."""
    changes = {
        "rollout.dynamics": dynamics, "rollout.noise_level": 1.0, "rollout.final": "sample",
        "rollout.train_last": True,
    }  # fmt: skip
    trainer = Trainer(CASE.recipe(tmp_path, folder, changes), CPU)
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    metrics = trainer.iteration()
    assert metrics["gate/max_gap"] < 1e-4 and metrics["reward/std_in_group"] > 0
    assert any(not torch.equal(p, before[n]) for n, p in trainer.policy.trainable().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.height": 20}, "model.height = 20: must be a multiple of 8 here; use 16 or 24"),
        ({"model.width": 4}, "model.width = 4: must be a multiple of 8 here; use 8"),
        ({"model.frames": 5}, "model.frames = 5: family sd draws images; leave it at 1"),
        ({"model.max_text_length": 50}, "model.max_text_length = 50: family sd always reads 77"),
        ({"model.guidance_2": 2.0}, "model.guidance_2 = 2.0: it is for the second expert"),
        ({"model.embedded_guidance": 3.5}, "model.embedded_guidance = 3.5: family sd has no such"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, folder, changes, message):
    with pytest.raises(UserError) as caught:
        open_family(CASE.recipe(tmp_path, folder, changes).model)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"rollout.dynamics": "dance"},
            "rollout.dynamics = 'dance': model.family = 'sd' needs ddim or vp",
        ),
        (
            {"model.family": "wan"},
            "rollout.dynamics = 'ddim': model.family = 'wan' needs dance, flow, flow_wan or cps",
        ),
        (
            {"rollout.schedule": "dance", "rollout.shift": 3.0},
            "rollout.schedule = 'dance': is a flow's grid; with dynamics ddim use diffusers",
        ),
        (
            {"rollout.noise_level": 1.1},
            "rollout.noise_level = 1.1: ddim takes a level (eta) in (0, 1], such as 1.0",
        ),
        (
            {"loss.kl": "flow_image"},
            "loss.kl = 'flow_image': leaves out the step length of a flow's SDE noise; use exact",
        ),
    ],
)
def test_dynamics_and_family_must_fit(tmp_path, folder, changes, message):
    with pytest.raises(ValueError) as caught:
        CASE.recipe(tmp_path, folder, changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "scheduler, steps, dynamics, message",
    [
        # Zero terminal SNR: x holds no signal at the first point, where vp's step is infinite.
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
          "timestep_spacing": "trailing"}, 4, "vp", "not with this model's schedule of 4 steps: "
         "alpha = 0.0: the step is undefined at 0 and at 1; use other dynamics"),
        # Without an offset the last timestep is 0 already: nothing is left to be renoised.
        ({"steps_offset": 0}, 4, "ddim", "step 3 of this model's schedule of 4 adds no noise, so "
         "it has no density to train; use rollout.train_last = false"),
    ],
)  # fmt: skip
def test_steps_without_a_density_are_refused_before_anything_is_loaded(
    tmp_path, folder, scheduler, steps, dynamics, message
):
    settings = {key: value for key, value in SCHEDULER.items() if key != "skip_prk_steps"}
    model = altered(folder, tmp_path / "m", "model_index.json",
                    scheduler=["diffusers", "DDIMScheduler"])  # fmt: skip
    DDIMScheduler(**(settings | scheduler)).save_pretrained(model / "scheduler")
    last = {"rollout.final": "sample", "rollout.train_last": True}
    changes = last | {"rollout.steps": steps, "rollout.dynamics": dynamics}
    with pytest.raises(UserError) as caught:
        Trainer(CASE.recipe(tmp_path, model, changes), CPU)
    assert str(caught.value).startswith(f"rollout.dynamics = {dynamics!r}: {message}")


def test_attention_backends_of_diffusers_are_refused(tmp_path, folder):
    """A UNet's processors never ask for one; the run used to end when its weights were loaded."""
    with pytest.raises(UserError, match="parallel.attention = native: UNet2D.* use default"):
        Trainer(CASE.recipe(tmp_path, folder, {"parallel.attention": "native"}), CPU)


def test_distilled_networks_are_refused(tmp_path, folder):
    other = altered(folder, tmp_path / "lcm", "unet/config.json", time_cond_proj_dim=32)
    with pytest.raises(UserError, match="takes the guidance scale as an input"):
        open_family(CASE.recipe(tmp_path, other).model)


def test_the_safety_checker_is_never_loaded(tmp_path, folder):
    """It would black out samples in evaluation; the index names one and the folder has none."""
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    changes = {"safety_checker": checker, "requires_safety_checker": True}
    other = altered(folder, tmp_path / "checked", "model_index.json", **changes)
    family = family_of(CASE.recipe(tmp_path, other))
    with family.live_pipeline() as live:
        for pipeline in (live, family.stock_pipeline(None, "full")):
            assert pipeline.safety_checker is None
            drawn = family.draw(pipeline, PROMPTS, initial(family, 2), 2)
            assert drawn.shape == (2, 1, 3, 16, 24) and drawn.std() > 0.02


def test_timesteps_reach_a_bfloat16_network_unrounded(tmp_path, folder):
    """bfloat16 has no 954.5 (nor 951): its neighbours are 952 and 956."""
    family = family_of(CASE.recipe(tmp_path, folder, {"model.dtype": "bfloat16"}))
    module, seen = family.modules["unet"], []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    conditions, x = family.encode(PROMPTS), initial(family, 2)
    outputs = [
        family.model_output(module, x, torch.full((2,), t), conditions) for t in (954.5, 956.0)
    ]
    latents, timesteps = seen[0]
    assert timesteps.dtype == torch.float32 and timesteps.tolist() == [954.5] * 4
    assert latents.dtype == torch.bfloat16 and outputs[0].dtype == torch.float32
    assert not torch.equal(*outputs)
