"""Wan image-to-video: image conditions, the frame that is given, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from case_wan import euler, with_index
from case_wan_i2v import CASES
from conformance import CPU, family_of, initial
from tiny_wan_i2v import tiny_ti2v, tiny_wan_i2v, write_images

from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.models import open_family
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories

CASE = {case.name: case for case in CASES}
BUILD = {
    "wan21_i2v": partial(tiny_wan_i2v, clip=True),
    "wan22_i2v": partial(tiny_wan_i2v, experts=2),
    "wan22_ti2v": tiny_ti2v,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=list(BUILD))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    return BUILD[name](tmp_path_factory.mktemp("models") / name)


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory) -> Path:
    return tiny_ti2v(tmp_path_factory.mktemp("models") / "ti2v")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[Prompt]:
    return write_images(tmp_path_factory.mktemp("images"), CASES[0].prompts)


def test_conditions_are_the_stock_pipelines(name, folder, prompts, tmp_path):
    """Mask and latents of the clip, or latents of the frame, and CLIP's tokens; bit by bit."""
    family = family_of(CASE[name].recipe(tmp_path, folder))
    row = family.encode(prompts).rows[1]
    stock = family.stock_pipeline(None, "full")
    image = family.image_of(prompts[1])
    pixels = stock.video_processor.preprocess(image, family.config.height, family.config.width)
    with torch.no_grad():
        prepared = stock.prepare_latents(
            pixels, 1, 4, family.config.height, family.config.width, family.config.frames,
            torch.float32, torch.device("cpu"), latents=initial(family, 1),
        )  # fmt: skip
        assert torch.equal(row.shared["image"], prepared[1][0])
        assert ("image_tokens" in row.shared) == (name == "wan21_i2v")
        if name == "wan21_i2v":
            assert torch.equal(row.shared["image_tokens"], stock.encode_image(image)[0])
    if name == "wan22_ti2v":
        # The stock mask is 0 on the frame that is given: what lies outside our action box.
        box = family.action_box
        assert box == ((0, 4), (1, 3), *((0, size) for size in family.latent_shape[2:]))
        assert torch.equal(prepared[2][0, 0, :, 0, 0], torch.tensor([0.0, 1.0, 1.0]))
    else:
        assert family.action_box is None
        assert row.shared["image"].shape[0] == 2 + 4  # Two frames to a latent frame, four channels.


def drawn_trees(config: RunConfig, prompts: list[Prompt]) -> tuple[Trainer, Trajectories]:
    file = prompts[0].image.parent / "prompts.jsonl"  # type: ignore[union-attr]
    rows = [{"prompt": p.text, "image": p.image.name} for p in prompts]  # type: ignore[union-attr]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = config.data.model_copy(update={"prompts": str(file)})
    trainer = Trainer(config.model_copy(update={"data": data}), CPU)
    batch = [prompt for _, prompt in trainer.prompts.batch(0, config.seed, 2)]
    return trainer, trainer.sample(trainer.plan(0), trainer.family.encode(batch))


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16"])
def test_the_given_frame_keeps_its_bits_in_a_rollout(ti2v, prompts, tmp_path, latent_dtype):
    """Root, every stochastic state and the decoded leaf; the other frames differ by sample."""
    config = CASE["wan22_ti2v"].recipe(tmp_path, ti2v, {"rollout.latent_dtype": latent_dtype})
    trainer, drawn = drawn_trees(config, prompts)
    batch = [prompt for _, prompt in trainer.prompts.batch(0, config.seed, 2)]
    given = trainer.family.encode(batch).shared("image")
    if latent_dtype == "bfloat16":
        given = given.bfloat16()
    assert len(drawn.latents) == 2 * (1 + 4 * 4)
    for (prompt, _), latents in drawn.latents.items():
        assert latents.dtype == given.dtype
        assert torch.equal(latents[:, :1], given[prompt])
    samples = drawn.samples()
    assert not torch.equal(samples[0, :, 1:], samples[1, :, 1:])
    assert all(torch.isfinite(value) for value in drawn.log_prob.values())


def test_tokens_of_the_given_frame_have_timestep_zero(ti2v, prompts, tmp_path):
    """And the others 954.5, which bfloat16 would turn into 956."""
    config = CASE["wan22_ti2v"].recipe(tmp_path, ti2v, {"model.dtype": "bfloat16"})
    family = family_of(config)
    module, seen = family.modules["transformer"], []
    module.register_forward_pre_hook(lambda _, args, kw: seen.append(kw), with_kwargs=True)
    conditions = family.encode(prompts)
    latents = family.begin(initial(family, 2), conditions)
    outputs = [
        family.model_output(module, latents, torch.tensor([t, 20.0]), conditions)
        for t in (954.5, 956.0)
    ]
    timesteps = seen[0]["timestep"]  # [both branches of 2, 3 frames of 2 x 2 tokens]
    assert timesteps.dtype == torch.float32 and timesteps.shape == (4, 12)
    expected = torch.tensor([[0.0] * 4 + [t] * 8 for t in (954.5, 20.0)])
    assert torch.equal(timesteps, expected.repeat(2, 1))
    assert torch.equal(outputs[0][1], outputs[1][1]) and not torch.equal(*outputs)


def test_both_branches_see_the_image(name, folder, prompts, tmp_path):
    family = family_of(CASE[name].recipe(tmp_path, folder))
    conditions = family.encode(prompts)
    positive, negative = conditions.positive(), conditions.negative()
    assert negative is not None and positive.keys() == negative.keys()
    for key in positive.keys() - {"text"}:
        assert torch.equal(positive[key], negative[key])
    assert not torch.equal(positive["image"][0], positive["image"][1])
    assert not torch.equal(positive["text"], negative["text"])


def test_what_does_not_fit_is_refused(tmp_path, ti2v):
    case = CASE["wan22_ti2v"]

    def refused(path: Path, reason: str, **model: object) -> None:
        changes = {f"model.{key}": value for key, value in model.items()}
        with pytest.raises(UserError) as caught:
            open_family(case.recipe(tmp_path, path, changes).model)
        assert reason in str(caught.value) and "\n" not in str(caught.value)

    refused(ti2v, "model.frames = 1: family wan_i2v draws what follows the image; use 3", frames=1)
    refused(ti2v, "model.frames = 4: (frames - 1) must be divisible by 2 here; use 3", frames=4)
    refused(ti2v, "model.height = 24: must be a multiple of 16 here; use 16 or 32", height=24)
    refused(euler(tmp_path / "t2v"), "it holds a text-to-video WanPipeline; use model.family = wan")
    last = tiny_wan_i2v(tmp_path / "flf", clip=True)
    config = last / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pos_embed_seq_len": 514}))
    refused(last, "it needs a last frame beside the first (FLF2V)")
    i2v = with_index(tiny_wan_i2v(tmp_path / "i2v"))
    refused(i2v, "and model.family = wan loads WanPipeline", family="wan")


def test_a_prompt_without_an_image_is_refused(tmp_path, ti2v):
    family = family_of(CASE["wan22_ti2v"].recipe(tmp_path, ti2v))
    with pytest.raises(UserError, match="prompt 'a dog' has no image"):
        family.encode(["a dog"])
