"""The still demo: data, reward, and the stock `StableDiffusionPipeline` folder of its recipe."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402

from dancegrpo_fast.config import load_config  # noqa: E402
from dancegrpo_fast.parallel.world import World  # noqa: E402
from dancegrpo_fast.trainer import Trainer  # noqa: E402

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo"
FOLDER = DEMO / "still_model"
sys.path.insert(0, str(DEMO))
import stills  # noqa: E402

RED, REWARD = "a red square at the left", stills.StillShape()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        FOLDER, dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(seed: int, count: int) -> Tensor:
    """[count, 4, 8, 8] as the training script's record drew it: a generator for each sample."""
    seeds = (1000 * seed + i for i in range(count))
    return torch.stack([torch.randn(4, 8, 8, generator=g) for g in map(_generator, seeds)])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: StableDiffusionPipeline, prompts: list[str], latents: Tensor) -> Tensor:
    with torch.no_grad():
        return pipe(
            prompts, latents=latents, height=32, width=32, num_inference_steps=10,
            guidance_scale=1.0, output_type="pt",
        ).images[:, None]  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The recipe over two prompts of four samples."""
    changes = [
        f"output={tmp_path_factory.mktemp('still')}", f"model.path={FOLDER}",
        f"data.prompts={DEMO / 'still_train_prompts.txt'}", "data.prompts_per_iteration=2",
        f"evaluation.prompts={DEMO / 'still_heldout_prompts.txt'}", "rollout.group_size=4",
        f"rewards=[{{name: {DEMO / 'stills.py'}:StillShape}}]", "rollout.batch_size=3",
    ]  # fmt: skip
    config = load_config(ROOT / "recipes" / "demo_sd.yaml", changes)
    return Trainer(config, World(0, 1, torch.device("cpu")))


# --- data and reward


def test_prompt_files_are_the_two_halves_of_all_prompts() -> None:
    train, held_out = stills.split_prompts()
    for name, prompts in (("train", train), ("heldout", held_out)):
        assert (DEMO / f"still_{name}_prompts.txt").read_text().splitlines() == prompts
        for words in (stills.COLOURS, stills.SHAPES, stills.PLACES):
            counts = {w: sum(w in stills.parse_prompt(p) for p in prompts) for w in words}
            assert len(set(counts.values())) == 1, counts
    assert sorted(train + held_out) == sorted(stills.all_prompts()) and len(held_out) == 72


def test_true_images_score_high_for_every_prompt() -> None:
    prompts = stills.all_prompts()
    parts = REWARD.parts(stills.render(prompts, _generator(0))[:, None], prompts)
    assert parts.mean() > 0.95 and parts.min() > 0.8 and parts.max() <= 1


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (0, "a blue square at the left"),
        (1, "a red square at the top left"),
        (1, "a red square at the right"),
        (2, "a red cross at the left"),
    ],
)
def test_a_wrong_word_lowers_its_part_only(part: int, shown: str) -> None:
    image = stills.render([shown], _generator(1))[:, None]
    right, found = REWARD.parts(image, [shown])[0], REWARD.parts(image, [RED])[0]
    assert found[part] < 0.2
    others = [i for i in range(3) if i != part]
    torch.testing.assert_close(found[others], right[others])


def test_nothing_a_full_screen_and_broken_pixels() -> None:
    images = torch.full((3, 1, 3, 32, 32), 0.06)
    images[1] = 1.0
    images[2, 0, 0, 4, 4] = torch.nan
    parts = REWARD.parts(images, [RED] * 3)
    assert (parts[0] == 0).all() and parts[1, [0, 2]].max() == 0 and parts[1, 1] < 0.1
    assert parts[2].isnan().all()
    with pytest.raises(ValueError, match=r"must be \[B, 1, 3, 32, 32\]"):
        REWARD(images.expand(-1, 2, -1, -1, -1), [RED] * 3)
    with pytest.raises(ValueError, match="'a red square moving left' is not 'a COLOUR SHAPE at"):
        REWARD(images[:1], ["a red square moving left"])


# --- the model


def test_the_folder_is_small_and_holds_nothing_that_unpickles() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3 * 10**6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_every_word_is_one_token(pipe: StableDiffusionPipeline) -> None:
    for prompt in stills.all_prompts():
        ids = pipe.tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 2
        assert [ids[0], ids[-1]] == [pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id]


def test_it_draws_as_well_as_its_record_says_and_leaves_room(pipe: StableDiffusionPipeline) -> None:
    """The record has three decimals; another machine's rounding moves a sample's pixels by 1e-5 or
    so, and the mean of 144 rewards, none of them steeper than a few units per unit, by less."""
    record = re.search(r"samples of the base.*?\| ([\d.]+) ", (FOLDER / "README.md").read_text())
    assert record is not None
    prompts = stills.split_prompts()[1]
    images = torch.cat([draw(pipe, prompts, noise(seed, len(prompts))) for seed in (0, 1)])
    found = float(REWARD(images, [*prompts, *prompts]).mean())
    assert found == pytest.approx(float(record[1]), abs=2e-3)
    assert 0.6 < found < 0.93  # True images: 0.97.
    others = [*prompts[7:], *prompts[:7]] * 2  # The words matter.
    assert found > float(REWARD(images, others).mean()) + 0.15


def test_the_family_draws_what_the_stock_pipeline_draws(
    pipe: StableDiffusionPipeline, trainer: Trainer
) -> None:
    """Weights are stored in half precision, and trained and run in float32."""
    (module,) = trainer.engine.modules.values()
    assert isinstance(module, UNet2DConditionModel)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    rows = trainer.prompts.prompts[:4]
    latents = noise(5, 4)
    with trainer.engine.gathered() as modules, torch.no_grad():
        ours = trainer.draw(modules, rows, latents[:, :, None])
    stock = draw(pipe, [row.text for row in rows], latents)
    # The affine form and the scheduler's order round differently: 10 steps of 1e-7, amplified.
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)


def test_an_iteration_of_the_recipe(trainer: Trainer) -> None:
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    metrics = trainer.iteration()
    assert metrics["reward/failed"] == 0 and metrics["update/grad_norm"] > 0
    assert metrics["gate/max_gap"] < trainer.config.loss.clip_range / 2
    assert any(not torch.equal(p, before[n]) for n, p in trainer.policy.trainable().items())
