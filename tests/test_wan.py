"""Family wan: what the stock pipeline does, ours does, and what ours exports, stock loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny_models import CPU, tiny_config, tiny_wan

from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.models import export, load_family
from dancegrpo_fast.ops.noise import NoiseKey, normal
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rollout import draw_trees
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.tree import State, TreePlan, noise_key

TEXTS = ["a red square", "two green lines on a blue one"]
PROMPTS = [Prompt(text) for text in TEXTS]
KEY = NoiseKey.from_seed(5)
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory) -> Path:
    """The boundary lies exactly on the third timestep."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    boundary = scheduler.timesteps[2].item() / 1000
    return tiny_wan(tmp_path_factory.mktemp("models") / "wan2", experts=2, boundary=boundary)


@pytest.fixture(params=[1, 2], ids=["one_expert", "two_experts"])
def folder(request, tiny_wan_folder, two_experts) -> Path:
    return tiny_wan_folder if request.param == 1 else two_experts


def make_family(tmp_path, folder, **model):
    overrides = {f"model.{name}": value for name, value in model.items()}
    return load_family(tiny_config(tmp_path, folder, overrides).model, CPU.device)


def deterministic(config: RunConfig, grid) -> TreePlan:
    """One chain of ODE steps."""
    root = State(0, -1, 0, (), "root")
    chain = [State(i + 1, i, i + 1, (), "ode") for i in range(STEPS)]
    return TreePlan(grid.schedule(config.rollout), (root, *chain))


def rolled_out(config: RunConfig, family, modules=None) -> torch.Tensor:
    """Final latents of TEXTS by our rollout, deterministically."""
    plan = deterministic(config, family.grid)
    drawn = draw_trees(
        family,
        modules or family.modules,
        plan,
        coefficient_table(plan.transitions(dynamics="dance", level=0.3)),
        family.encode(TEXTS),
        key=KEY,
        owner=np.zeros((len(TEXTS), 1), int),
        rank=0,
        batch_size=len(TEXTS),
    )
    return drawn.samples()


def initial(family) -> torch.Tensor:
    """The noise that `rolled_out` starts from."""
    root = State(0, -1, 0, (), "root")
    draws = [noise_key(KEY.fold_in(p), root, -1) for p in range(len(TEXTS))]
    return torch.stack([normal(family.latent_shape, draw) for draw in draws])


def stock(pipeline, family, output_type="latent", guidance=1.0, negative=""):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=TEXTS, negative_prompt=[negative] * len(TEXTS), latents=initial(family),
        height=16, width=16, num_frames=5, num_inference_steps=STEPS, guidance_scale=guidance,
        max_sequence_length=16, output_type=output_type,
    ).frames  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_deterministic_rollout_is_the_stock_pipeline(tmp_path, folder, guidance):
    overrides = {"model.guidance": guidance, "model.negative_prompt": "dull"}
    config = tiny_config(tmp_path, folder, overrides)
    family = load_family(config.model, CPU.device)
    pipeline = WanPipeline.from_pretrained(folder)
    expected = stock(pipeline, family, guidance=guidance, negative="dull")
    found = rolled_out(config, family)
    assert (found - expected).abs().max() < 1e-5
    assert (expected - initial(family)).abs().max() > 1, "the sampler hardly moved"
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_guidance_and_negative_prompt_matter(tmp_path, folder):
    """Else the equality above could hold by ignoring both."""
    found = []
    for guidance, negative in ((1.0, ""), (3.0, ""), (3.0, "dull")):
        overrides = {"model.guidance": guidance, "model.negative_prompt": negative}
        config = tiny_config(tmp_path, folder, overrides)
        found.append(rolled_out(config, load_family(config.model, CPU.device)))
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert (found[1] - found[2]).abs().max() > 1e-3


def test_decode_and_draw_are_the_stock_pipelines(tmp_path, tiny_wan_folder):
    """The folder's latent mean and deviation are neither 0 nor 1."""
    config = tiny_config(tmp_path, tiny_wan_folder)
    family = load_family(config.model, CPU.device)
    pipeline = WanPipeline.from_pretrained(tiny_wan_folder)
    expected = stock(pipeline, family, output_type="pt")
    pixels = family.decode(stock(pipeline, family))
    assert pixels.shape == (2, 5, 3, 16, 16) and pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() < 1e-5
    assert expected.std() > 0.02 and 0 <= expected.min() and expected.max() <= 1
    drawn = family.draw(pipeline, PROMPTS, initial(family), STEPS)
    assert (drawn - expected).abs().max() < 1e-5
    assert (family.decode(rolled_out(config, family)) - expected).abs().max() < 1e-4


def test_each_step_runs_the_expert_of_the_stock_pipeline(tmp_path, two_experts):
    """The boundary belongs to the high-noise expert."""
    config = tiny_config(tmp_path, two_experts)
    family = load_family(config.model, CPU.device)
    pipeline = WanPipeline.from_pretrained(two_experts)
    runs: dict[int, list[str]] = {0: [], 1: []}
    for side, owner in enumerate((pipeline, SimpleNamespace(**family.modules))):
        for name in ("transformer", "transformer_2"):
            record = lambda *_, name=name, side=side: runs[side].append(name)  # noqa: E731
            getattr(owner, name).register_forward_hook(record)
    stock(pipeline, family)
    rolled_out(config, family)
    assert runs[0] == runs[1] == ["transformer"] * 3 + ["transformer_2"]
    schedule = family.grid.schedule(config.rollout)
    assert family.grid.module_names(schedule) == tuple(runs[0])
    assert list(family.modules) == ["transformer", "transformer_2"]


def test_timesteps_reach_a_bfloat16_network_unrounded(tmp_path, tiny_wan_folder):
    """bfloat16 has no 954.5: its neighbours are 952 and 956."""
    family = make_family(tmp_path, tiny_wan_folder, dtype="bfloat16")
    module = family.modules["transformer"]
    seen = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    conditions = family.encode(TEXTS)
    outputs = [
        family.model_output(module, initial(family), torch.full((2,), t), conditions)
        for t in (954.5, 956.0)
    ]
    assert seen[0]["timestep"].dtype == torch.float32
    assert seen[0]["timestep"].tolist() == [954.5, 954.5]
    assert seen[0]["hidden_states"].dtype == torch.bfloat16
    assert not torch.equal(*outputs)


def altered(folder: Path, out: Path, **changes) -> Path:
    """A copy of a pipeline folder with another index."""
    shutil.copytree(folder, out)
    index = out / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return out


def test_folders_that_do_not_fit_are_refused(tmp_path, tiny_wan_folder):
    (tmp_path / "empty").mkdir()
    for path, reason in [
        (tmp_path / "gone", "this folder does not exist; give the folder of a diffusers pipeline"),
        (tmp_path / "empty", "this folder has no model_index.json; give the folder of"),
        (
            altered(tiny_wan_folder, tmp_path / "flux", _class_name="FluxPipeline"),
            "it holds a FluxPipeline, and model.family = wan loads WanPipeline; choose",
        ),
        (
            altered(tiny_wan_folder, tmp_path / "tokens", expand_timesteps=True),
            "which family wan does not train; use a Wan2.1 or Wan2.2-A14B folder",
        ),
    ]:
        with pytest.raises(UserError) as caught:
            make_family(tmp_path, path)
        message = str(caught.value)
        assert message.startswith(f"model.path = {str(path)!r}: ") and reason in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "field, value, rule",
    [("height", 20, "must be a multiple of 8"), ("width", 12, "must be a multiple of 8"),
     ("frames", 4, r"\(frames - 1\) must be divisible by 2")],
)  # fmt: skip
def test_sizes_the_network_cannot_take_are_refused(tmp_path, tiny_wan_folder, field, value, rule):
    with pytest.raises(UserError, match=f"model.{field} = {value}: {rule}"):
        make_family(tmp_path, tiny_wan_folder, **{field: value})


# ---- export, and the reference of the KL term ---------------------------------------------------


def make_policy(tmp_path, folder, trained, **settings):
    overrides = {"policy.train": trained} | {f"policy.{k}": v for k, v in settings.items()}
    config = tiny_config(tmp_path, folder, overrides)
    family = load_family(config.model, CPU.device)
    policy = Policy(
        family.modules, config.policy,
        lora_targets=family.lora_targets, key=KEY, needs_reference=True,
    )  # fmt: skip
    return config, family, policy


def move(policy, size: float) -> None:
    """Change every trainable weight, as training would."""
    for position, parameter in enumerate(policy.trainable().values()):
        noise = normal(tuple(parameter.shape), KEY.fold_in(9).fold_in(position).draw())
        parameter.data += size * noise


@pytest.mark.parametrize("averaged", [False, True], ids=["last", "averaged"])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_stock_loads_what_is_exported(tmp_path, folder, trained, averaged):
    settings = {"ema_decay": 0.5} if averaged else {}
    config, family, policy = make_policy(tmp_path, folder, trained, **settings)
    base = rolled_out(config, family)
    move(policy, 0.03)
    policy.update_ema()
    move(policy, 0.03)
    last = rolled_out(config, family)
    with policy.averaged():
        expected = rolled_out(config, family)
    export(family, policy, tmp_path / "out")
    assert torch.equal(rolled_out(config, family), last), "export changed the policy"

    pipeline = WanPipeline.from_pretrained(tmp_path / "out" if trained == "full" else folder)
    if trained == "lora":
        pipeline.load_lora_weights(tmp_path / "out")
        for name in list(family.modules)[1:]:
            pipeline.load_lora_weights(tmp_path / "out" / name, load_into_transformer_2=True)
    found = stock(pipeline, family)
    assert (found - expected).abs().max() < 1e-5
    assert (expected - base).abs().max() > 1e-2, "the weights hardly moved"
    assert averaged == bool((expected - last).abs().max() > 1e-2)
    ours = family.stock_pipeline(tmp_path / "out", trained)
    assert (stock(ours, family) - found).abs().max() < 1e-6


def test_the_lines_that_load_a_result_work(tmp_path, folder):
    """The report shows them: they run as they stand, without this package."""
    for trained in ("full", "lora"):
        _, family, policy = make_policy(tmp_path / trained, folder, trained)
        out = tmp_path / trained / "out"
        export(family, policy, out)
        lines = family.load_lines(out, trained, 2)
        assert "dancegrpo" not in lines.replace(str(tmp_path), "")
        names: dict = {}
        exec(lines, names)
        assert np.shape(names["sample"]) == (5, 16, 16, 3)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_reference_is_the_untrained_network(tmp_path, folder, trained):
    config = tiny_config(tmp_path, folder)
    untouched = load_family(config.model, CPU.device)
    base = rolled_out(config, untouched)
    _, family, policy = make_policy(tmp_path, folder, trained)
    move(policy, 0.03)
    with policy.reference() as modules:
        assert torch.equal(rolled_out(config, family, modules), base)
    assert (rolled_out(config, family, policy.modules) - base).abs().max() > 1e-2
