"""HunyuanVideo: grids, two guidances, exact trimming, what is refused, what bfloat16 is given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from case_hunyuan_video import CASES
from conformance import CPU, KEY, TOLERANCE, Case, family_of, initial
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_hunyuan_video import SCHEDULER, tiny_hunyuan_video

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import load_lines, open_family
from dancegrpo_fast.ops.noise import normal
from dancegrpo_fast.parallel.joint_attention import joint_attention
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.trainer import Trainer

CASE: Case = CASES[0]
PROMPTS = [Prompt(text) for text in CASE.prompts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_hunyuan_video(tmp_path_factory.mktemp("models") / "hunyuan")


def altered(folder: Path, out: Path, part: str, **changes) -> Path:
    """A copy of a pipeline folder with another `part` (a JSON file)."""
    shutil.copytree(folder, out)
    file = out / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return out


def schedule_of(tmp_path, folder, **rollout):
    config = CASE.recipe(tmp_path, folder, {f"rollout.{k}": v for k, v in rollout.items()})
    return open_family(config.model).grid.schedule(config.rollout)


@pytest.mark.parametrize("steps", [50, 30, 4])
def test_grid_of_the_published_configuration(tmp_path, folder, steps):
    """Shift 7 of u = 1, (T-1)/T .. 1/T: the pipeline passes linspace(1, 0, T + 1) less its end."""
    schedule = schedule_of(tmp_path, folder, steps=steps)
    u = np.linspace(1, 0, steps + 1)
    shifted = 7 * u / (1 + 6 * u)
    assert schedule.sigmas == pytest.approx(shifted, abs=1e-7)  # float32 values near 1
    stock = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    stock.set_timesteps(sigmas=u[:-1])
    assert schedule.sigmas == tuple(stock.sigmas.tolist())
    assert schedule.timesteps == tuple(stock.timesteps.tolist())
    if steps == 30:
        assert schedule.timesteps[1] == pytest.approx(995.0980, abs=1e-4)
        assert schedule.timesteps[-1] == pytest.approx(194.4444, abs=1e-4)


@pytest.mark.parametrize(
    "shift, timesteps",
    [(5.0, (1000, 986, 972, 955)), (7.0, (1000, 990, 980, 968))],
    ids=["hunyuan", "skyreels"],
)
def test_dance_schedule_is_the_scripts(tmp_path, folder, shift, timesteps):
    schedule = schedule_of(tmp_path, folder, steps=16, schedule="dance", shift=shift)
    u = torch.linspace(1, 0, 17)
    published = shift * u / (1 + (shift - 1) * u)
    assert schedule.sigmas == pytest.approx(published.tolist(), abs=1e-7)
    assert schedule.timesteps == tuple(float(int(s * 1000)) for s in published[:-1])
    assert schedule.timesteps[:4] == timesteps


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.height": 24}, "model.height = 24: must be a multiple of 16 here; use 16 or 32"),
        ({"model.width": 8}, "model.width = 8: must be a multiple of 16 here; use 16"),
        ({"model.frames": 7}, "(frames - 1) must be divisible by 4 here; use 5 or 9"),
        ({"model.guidance": 0.5}, "guides above 1 only"),
        ({"model.guidance_2": 2.0}, "model.guidance_2 = 2.0"),
        ({"model.first_frame": "flux"}, "draws no first frame"),
    ],
)
def test_refused(tmp_path, folder, changes, message):
    with pytest.raises(UserError) as caught:
        open_family(CASE.recipe(tmp_path, folder, changes).model)
    assert message in str(caught.value)


def test_embedded_guidance_needs_the_input(tmp_path, folder):
    changes = {"model.embedded_guidance": 6.0}
    other = altered(folder, tmp_path / "m", "transformer/config.json", guidance_embeds=False)
    open_family(CASE.recipe(tmp_path, folder, changes).model)
    open_family(CASE.recipe(tmp_path, other).model)
    with pytest.raises(UserError, match="guidance_embeds is false"):
        open_family(CASE.recipe(tmp_path, other, changes).model)


def test_left_padding_is_refused(tmp_path, folder):
    """The pipeline cuts the first 95 tokens: with padding there, it would cut that."""
    other = altered(folder, tmp_path / "m", "tokenizer/tokenizer_config.json", padding_side="left")
    with pytest.raises(UserError, match="pads it on the left"):
        changes = {"model.max_text_length": None}
        open_family(CASE.recipe(tmp_path, other, changes).model).encode(PROMPTS[:1])


def test_embeddings_are_the_stock_ones_without_padding(tmp_path, folder):
    family = family_of(CASE.recipe(tmp_path, folder, {"model.max_text_length": 20}))
    prompts = [*PROMPTS, Prompt("a prompt that is longer than what the network is given")]
    rows = family.encode(prompts).rows
    stock = family.stock_pipeline(None, "full")
    for prompt, row in zip(prompts, rows, strict=True):
        for text, branch in ((prompt.text, row.positive), ("dull", row.negative)):
            embeds, pooled, mask = stock.encode_prompt(text, max_sequence_length=20)
            # One token a character, and the end-of-turn mark unless it is cut.
            assert len(branch["text"]) == mask.sum() == min(len(text) + 1, 20)
            assert torch.equal(branch["text"], embeds[0, : len(branch["text"])])
            assert torch.equal(branch["pooled"], pooled[0])
            held = branch["text"].untyped_storage().nbytes()
            assert held == branch["text"].numel() * branch["text"].element_size()


def test_trimming_is_exact(tmp_path, folder):
    """The stock network on padded text and its mask, ours on trimmed text: one output."""
    family = family_of(CASE.recipe(tmp_path, folder, {"model.guidance": 1.0}))
    stock = family.stock_pipeline(None, "full")
    embeds, pooled, mask = stock.encode_prompt(PROMPTS[0].text, max_sequence_length=40)
    embeds = embeds.masked_fill(mask[..., None] == 0, 1e3)  # Padding that would show.
    latents, timesteps = initial(family, 1), torch.tensor([954.5])
    with torch.no_grad():
        expected = stock.transformer(
            latents, timesteps, embeds, mask, pooled, torch.tensor([6000.0]), return_dict=False
        )[0]
        conditions = family.encode(PROMPTS[:1])
        found = family.model_output(family.modules["transformer"], latents, timesteps, conditions)
    # Sums over 14 instead of 41 tokens, in float32, of values of order 1.
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert mask.sum() < 40 and expected.abs().max() > 0.1


def test_live_pipeline_takes_its_masks(tmp_path, folder, monkeypatch):
    """It pads, so needs them; before and after, attention that was told so goes without."""
    from diffusers.models import attention_dispatch as stock

    family = family_of(CASE.recipe(tmp_path, folder))
    noise = initial(family, 2)
    expected = family.draw(family.stock_pipeline(None, "full"), PROMPTS, noise, 2)
    network = family.modules["transformer"]
    joint_attention(network).takes_mask = False
    masked, attend = [], stock.dispatch_attention_fn

    def spy(*args, attn_mask=None, **kwargs):
        masked.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(stock, "dispatch_attention_fn", spy)
    conditions, timesteps = family.encode(PROMPTS[:1]), torch.tensor([500.0])
    before = family.model_output(network, noise[:1], timesteps, conditions)
    assert masked == [False] * 4  # Two blocks, two branches.
    with family.live_pipeline() as pipeline:
        found = family.draw(pipeline, PROMPTS, noise, 2)
    # Not bit for bit: one's weights lie in a memory map, and BLAS minds how they are aligned.
    assert (found - expected).abs().max() < TOLERANCE
    assert masked == [False] * 4 + [True] * 8
    after = family.model_output(network, noise[:1], timesteps, conditions)
    assert torch.equal(after, before) and masked[12:] == [False] * 4


@pytest.mark.parametrize("train", ["full", "lora"])
def test_bfloat16_is_told_unrounded_numbers(tmp_path, folder, train):
    """954.5 is 956 in bfloat16, and 6018 is 6016: both sinusoids are made of the float32 ones."""
    config = CASE.recipe(
        tmp_path,
        folder,
        {
            "model.dtype": "bfloat16", "model.guidance": 1.0, "model.embedded_guidance": 6.018,
            "policy.train": train, "loss.max_log_prob_gap": 0.01,
        },
    )  # fmt: skip
    trainer = Trainer(config, CPU)
    family = trainer.family
    network = family.modules["transformer"]
    told = []
    for part in (network.time_text_embed, network.context_embedder.time_text_embed):
        part.time_proj.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    noise = normal(family.latent_shape, KEY.draw())[None]
    conditions = family.encode(PROMPTS[:1])
    output = family.model_output(network, noise, torch.tensor([954.5]), conditions)
    assert [t.dtype for t in told] == [torch.float32] * 3
    assert [t.item() for t in told] == [954.5, pytest.approx(6018, abs=1e-3), 954.5]
    assert output.isfinite().all()
    metrics = trainer.iteration()
    assert metrics["update/grad_norm"] > 0 and metrics["reward/failed"] == 0


def test_dance_folders_are_read(tmp_path, folder):
    """Their embeddings have the pooled vector, zero-padded, as a row before the padded text."""
    family = family_of(CASE.recipe(tmp_path, folder, {"model.guidance": 1.0}))
    expected = family.encode(PROMPTS[:1]).rows[0]
    text, pooled = expected.positive["text"], expected.positive["pooled"]
    embeds = torch.full((1 + 40, 16), 7.0)
    embeds[0] = torch.nn.functional.pad(pooled, (0, 16 - len(pooled)))
    embeds[1 : 1 + len(text)] = text
    mask = (torch.arange(40) < len(text)).long()
    found = family.from_dance({"prompt_embed": embeds, "prompt_attention_mask": mask})
    assert found.flat().keys() == expected.flat().keys()
    for name, tensor in expected.flat().items():
        assert torch.equal(found.flat()[name], tensor), name
    guided = open_family(CASE.recipe(tmp_path, folder).model)
    with pytest.raises(UserError, match="no negative prompt"):
        guided.from_dance({"prompt_embed": embeds, "prompt_attention_mask": mask})


def test_loading_lines_guide_as_the_recipe(tmp_path, folder):
    """The stock pipeline ignores `true_cfg_scale` where no negative prompt is given."""
    family = open_family(CASE.recipe(tmp_path, folder).model)
    lines = load_lines(family, tmp_path / "out", "full", 4)
    for line in ("true_cfg_scale=3.0", "negative_prompt='dull'", "guidance_scale=6.0"):
        assert f"    {line}," in lines
