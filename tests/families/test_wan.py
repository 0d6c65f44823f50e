"""Wan text-to-video: what the conformance suite does not ask of every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from case_wan import CASES, euler, flow_match, with_index, with_unipc
from conformance import (
    CPU,
    KEY,
    Case,
    deterministic,
    family_of,
    initial,
    move,
    policy_of,
    rolled_out,
    stock_pixels,
)
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_models import tiny_wan

from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.models import export, load_lines, open_family
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.trainer import Trainer

CASE = {case.name: case for case in CASES}
PROMPTS = [Prompt(text) for text in CASES[0].prompts]
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return euler(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """Steps 0 to 2 of 6 are the first expert's: the boundary lies on the third timestep."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    boundary = scheduler.timesteps[2].item() / 1000
    return tiny_wan(tmp_path_factory.mktemp("models") / "wan2", experts=2, boundary=boundary)


def recipe(tmp_path: Path, folder: Path, changes: dict | None = None) -> RunConfig:
    return CASE["wan21_image"].recipe(tmp_path, folder, {"model.frames": 5} | (changes or {}))


# ---- the grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_grid_is_unipcs_at_the_published_configuration(tmp_path, steps, shift):
    """UniPC with flow_shift 3 (Wan2.1, Wan2.2-A14B) and 5 (TI2V-5B), whole timesteps included."""
    folder = with_unipc(tiny_wan(tmp_path / "wan"), shift)
    config = recipe(tmp_path, folder, {"rollout.steps": steps})
    schedule = open_family(config.model).grid.schedule(config.rollout)
    expected = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
        flow_shift=shift, solver_order=2,
    )  # fmt: skip
    expected.set_timesteps(steps)
    assert schedule.sigmas == tuple(expected.sigmas.tolist())
    assert schedule.timesteps == tuple(expected.timesteps.tolist())
    # By hand: shifted linspace(1, 1/1000) less its end; the first is kept just below 1.
    u = np.linspace(1, 1e-3, steps + 1)[:-1]
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas[0] -= 1e-6
    assert schedule.sigmas[:-1] == pytest.approx(sigmas, abs=1e-7)
    assert schedule.timesteps == tuple(int(1000 * sigma) for sigma in sigmas)
    assert schedule.sigmas[-1] == 0


def test_numbers_of_the_published_grid(tmp_path):
    folder = with_unipc(tiny_wan(tmp_path / "wan"), 3.0)
    config = recipe(tmp_path, folder, {"rollout.steps": 4})
    schedule = open_family(config.model).grid.schedule(config.rollout)
    assert schedule.timesteps == (999, 900, 750, 500)
    assert schedule.sigmas == pytest.approx((0.999999, 0.900120, 0.750375, 0.500999, 0), abs=1e-6)


def test_dance_grid_is_the_public_scripts(tmp_path, folder):
    """20 steps, shift 3: sigmas of the continuous formula, timesteps cut to whole numbers."""
    changes = {"rollout.steps": 20, "rollout.schedule": "dance", "rollout.shift": 3.0}
    config = recipe(tmp_path, folder, changes)
    schedule = open_family(config.model).grid.schedule(config.rollout)
    u = np.linspace(1, 0, 21)
    assert schedule.sigmas == pytest.approx(3 * u / (1 + 2 * u), abs=1e-15)
    assert schedule.timesteps[:4] == (1000, 982, 964, 944) and schedule.timesteps[-1] == 136


# ---- two experts --------------------------------------------------------------------------------


def test_each_step_runs_the_expert_of_the_stock_pipeline(tmp_path, experts):
    """The boundary belongs to the high-noise expert."""
    config = recipe(tmp_path, experts, {"model.guidance": 1.0, "rollout.steps": STEPS})
    family = family_of(config)
    case = Case("", "wan", euler, {}, scheduler=flow_match)
    pipeline = family.stock_pipeline(None, "full")
    runs: dict[int, list[str]] = {0: [], 1: []}
    for side, owner in enumerate((pipeline, SimpleNamespace(**family.modules))):
        for name in ("transformer", "transformer_2"):
            record = lambda *_, name=name, side=side: runs[side].append(name)  # noqa: E731
            getattr(owner, name).register_forward_hook(record)
    stock_pixels(case, config, family, pipeline, PROMPTS)
    rolled_out(config, family, PROMPTS)
    assert runs[0] == runs[1] == ["transformer"] * 3 + ["transformer_2"] * 3
    assert family.grid.module_names(deterministic(config, family).schedule) == tuple(runs[0])


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize(
    "start, trained",
    [(0, {"transformer"}), (3, {"transformer_2"}), (2, {"transformer", "transformer_2"})],
    ids=["first", "second", "across"],
)
def test_a_window_trains_only_the_experts_it_touches(tmp_path, experts, train, start, trained):
    """One update, with weight decay: the other expert keeps every bit."""
    tree = {"kind": "window", "window_size": 2, "window_start": start}
    changes = {
        "rollout.steps": STEPS, "rollout.tree": tree, "policy.train": train,
        "optimizer.weight_decay": 0.1, "model.guidance_2": 2.0,
    }  # fmt: skip
    trainer = Trainer(recipe(tmp_path, experts, changes), CPU)
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    assert {name.partition(".")[0] for name in before} == {"transformer", "transformer_2"}
    metrics = trainer.iteration()
    assert metrics["gate/max_gap"] < 1e-4 and metrics["update/grad_norm"] > 0
    after = trainer.policy.trainable()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in moved} == trained
    for module in trained:
        own = {name for name in before if name.startswith(f"{module}.")}
        # A fresh LoRA's A has no gradient while its B is 0, and weight decay moves it.
        assert moved & own == own


# ---- numbers ------------------------------------------------------------------------------------


def test_timesteps_reach_a_bfloat16_network_unrounded(tmp_path, folder):
    """bfloat16 has no 954.5: its neighbours are 952 and 956."""
    family = family_of(recipe(tmp_path, folder, {"model.dtype": "bfloat16"}))
    module, seen = family.modules["transformer"], []
    module.register_forward_pre_hook(lambda _, args, kw: seen.append(kw), with_kwargs=True)
    conditions, x = family.encode(PROMPTS), initial(family, 2)
    outputs = [
        family.model_output(module, x, torch.full((2,), t), conditions) for t in (954.5, 956.0)
    ]
    assert seen[0]["timestep"].dtype == torch.float32
    assert seen[0]["timestep"].tolist() == [954.5] * 4
    assert seen[0]["hidden_states"].dtype == torch.bfloat16
    assert not torch.equal(*outputs)


def test_equal_token_timesteps_say_what_one_per_sample_says(tmp_path, folder):
    """Why TI2V-5B needs no timestep per token in text-to-video."""
    family = family_of(recipe(tmp_path, folder))
    module, x, t = family.modules["transformer"], initial(family, 2), torch.tensor([954.5, 20.0])
    inputs = family.encode(PROMPTS).positive()
    tokens = t[:, None].expand(2, x[0, 0].numel() // 4)
    one, each = (family.network(module, x, times, inputs) for times in (t, tokens))
    assert (one - each).abs().max() < 1e-5 * one.abs().max()


# ---- what is refused ----------------------------------------------------------------------------


def test_folders_that_do_not_fit_are_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    flux = with_index(tiny_wan(tmp_path / "flux"), _class_name="FluxPipeline")
    for path, reason in [
        (tmp_path / "empty", "this folder has no model_index.json"),
        (flux, "it holds a FluxPipeline, and model.family = wan loads WanPipeline; choose"),
    ]:
        with pytest.raises(UserError) as caught:
            open_family(recipe(tmp_path, path).model)
        message = str(caught.value)
        assert message.startswith(f"model.path = {str(path)!r}: ") and reason in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("height", 20, "must be a multiple of 16 here; use 16 or 32"),
        ("width", 12, "must be a multiple of 16 here; use 16"),
        ("frames", 4, r"\(frames - 1\) must be divisible by 2 here; use 3 or 5"),
        ("guidance_2", 2.0, "it is for the second expert of a Wan2.2 folder"),
        ("embedded_guidance", 6.0, "family wan has no such input"),
    ],
)
def test_what_the_network_cannot_take_is_refused(tmp_path, folder, field, value, rule):
    with pytest.raises(UserError, match=f"model.{field} = {value}: {rule}"):
        open_family(recipe(tmp_path, folder, {f"model.{field}": value}).model)


def test_the_second_expert_alone_cannot_be_guided(tmp_path, experts):
    changes = {"model.guidance": 1.0, "model.guidance_2": 2.0}
    with pytest.raises(UserError, match="model.guidance_2 = 2.0: the stock pipeline guides both"):
        open_family(recipe(tmp_path, experts, changes).model)
    changes = {"model.guidance": 3.0, "model.guidance_2": 1.0}
    assert list(open_family(recipe(tmp_path, experts, changes).model).guidance.values()) == [3, 1]


# ---- export, and the reference of the KL term ---------------------------------------------------


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_average_is_exported_and_the_policy_kept(tmp_path, experts, train):
    config = recipe(tmp_path, experts, {"policy.train": train, "policy.ema_decay": 0.5})
    family = family_of(config)
    policy = policy_of(config, family)
    policy.start_average()
    move(policy, 0.03)
    policy.update_ema()
    move(policy, 0.03)
    last = rolled_out(config, family, PROMPTS)
    with policy.averaged():
        expected = rolled_out(config, family, PROMPTS)
    assert (expected - last).abs().max() > 1e-2
    export(family, policy, tmp_path / "out")
    assert torch.equal(rolled_out(config, family, PROMPTS), last), "export changed the policy"
    pipeline = family.stock_pipeline(tmp_path / "out", train)
    flow_match(pipeline)
    found = pipeline(
        prompt=[prompt.text for prompt in PROMPTS], negative_prompt=["dull"] * 2,
        latents=initial(family, 2), num_inference_steps=config.rollout.steps,
        output_type="latent", **family.call_arguments(),
    ).frames  # fmt: skip
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_lines_that_load_a_result_work(tmp_path, experts, train):
    """The report shows them: they run as they stand, without this package."""
    config = recipe(tmp_path, experts, {"policy.train": train})
    family = family_of(config)
    export(family, policy_of(config, family), tmp_path / "out")
    names: dict = {}
    exec(load_lines(family, tmp_path / "out", train, 2), names)
    assert np.shape(names["sample"]) == (5, 16, 16, 3)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_reference_is_the_untrained_network(tmp_path, folder, train):
    config = recipe(tmp_path, folder, {"policy.train": train})
    base = rolled_out(config, family_of(config), PROMPTS)
    family = family_of(config)
    policy = Policy(
        family.modules, config.policy,
        lora_targets=family.lora_targets, key=KEY, needs_reference=True,
    )  # fmt: skip
    move(policy, 0.03)
    with policy.reference() as modules:
        assert torch.equal(rolled_out(config, family, PROMPTS, modules), base)
    assert (rolled_out(config, family, PROMPTS, policy.modules) - base).abs().max() > 1e-2
