"""Every family against its stock pipeline, through training, export and back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conformance import (
    TOLERANCE,
    Case,
    family_of,
    move,
    policy_of,
    rolled_out,
    stock_pixels,
)
from tiny_models import CPU

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models import FAMILIES, export, load_lines
from dancegrpo_fast.report.verification import STOCK
from dancegrpo_fast.trainer import Trainer

CASES: list[Case] = [
    case
    for file in sorted(Path(__file__).parent.glob("case_*.py"))
    for case in importlib.import_module(file.stem).CASES
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def verifies(case: Case) -> pytest.MarkDecorator:
    family = "custom_family" if ".py:" in case.family else case.family
    return pytest.mark.verifies(f"family:{family}", STOCK)


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=verifies(case), id=case.name) for case in CASES],
)
def case(request) -> Iterator[Case]:
    with request.param.around():
        yield request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory) -> Path:
    return case.build(tmp_path_factory.mktemp("models") / case.name)


@pytest.fixture(scope="module")
def prompts(case, tmp_path_factory):
    return case.made_prompts(tmp_path_factory.mktemp("images"))


def test_every_family_has_a_case():
    ours = {case.family for case in CASES if ".py:" not in case.family}
    assert ours == set(FAMILIES)


def test_deterministic_rollout_is_the_stock_pipeline(case, folder, prompts, tmp_path):
    """Pixels, with guidance and prompts of unequal length; then each wrong setting breaks it."""
    config = case.recipe(tmp_path, folder)
    family = family_of(config)
    expected = stock_pixels(case, config, family, family.stock_pipeline(None, "full"), prompts)
    found = family.decode(rolled_out(config, family, prompts))
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.02 and (expected[0] - expected[1]).abs().max() > 0.05
    assert set(case.breaks) >= {"guidance", "shift", "timestep scale", "vae scale"}
    for name, change in case.breaks.items():
        wrong = case.recipe(tmp_path, folder, change if isinstance(change, dict) else {})
        broken = family_of(wrong)
        if callable(change):
            change(broken)
        other = broken.decode(rolled_out(wrong, broken, prompts))
        assert (other - expected).abs().max() > 100 * TOLERANCE, f"{name} does not matter"


@pytest.mark.parametrize("train", ["full", "lora"])
def test_stock_loads_what_is_exported(case, folder, prompts, tmp_path, train):
    config = case.recipe(tmp_path, folder, {"policy.train": train})
    family = family_of(config)
    base = family.decode(rolled_out(config, family, prompts))
    policy = policy_of(config, family)
    move(policy, 0.05)
    expected = family.decode(rolled_out(config, family, prompts))
    export(family, policy, tmp_path / "out")
    pipeline = family.stock_pipeline(tmp_path / "out", train)
    found = stock_pixels(case, config, family, pipeline, prompts)
    # Moved weights make steep pixels: a rounding error of the latents grows about tenfold.
    assert (found - expected).abs().max() < 10 * TOLERANCE
    assert (expected - base).abs().max() > 1e-2, "the weights hardly moved"
    lines = load_lines(family, tmp_path / "out", train, 2)
    compile(lines, "load_lines", "exec")
    assert "dancegrpo" not in lines.replace(str(tmp_path), "")


def test_encoded_prompts_do_not_depend_on_company(case, folder, prompts, tmp_path):
    """A prompt's condition has the same bits alone and beside others."""
    family = family_of(case.recipe(tmp_path, folder))
    together = family.encode(prompts)
    for prompt, row in zip(prompts, together.rows, strict=True):
        alone = family.encode([prompt]).rows[0].flat()
        assert alone.keys() == row.flat().keys()
        assert all(torch.equal(alone[name], tensor) for name, tensor in row.flat().items())


TREES = {
    "shared_root": {},
    "window": {"kind": "window", "window_size": 2, "window_range": [0, 3]},
    "branches": {"kind": "branch_points", "branch_steps": [0, 1], "branches": 2},
}


def trained(case: Case, folder: Path, tmp_path: Path, prompts, changes: dict) -> RunConfig:
    """A recipe whose prompt file holds `prompts`."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    config = case.recipe(tmp_path, folder, changes)
    if case.images is not None:
        import json

        folder_of_images = prompts[0].image.parent
        file = folder_of_images / "prompts.jsonl"
        rows = [{"prompt": p.text, "image": p.image.name} for p in prompts]
        file.write_text("\n".join(json.dumps(row) for row in rows))
        changes = changes | {"data.prompts": str(file)}
        config = case.recipe(tmp_path, folder, changes)
    return config


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("tree", TREES)
def test_one_update(case, folder, prompts, tmp_path, tree, train):
    """Rollout, decode, reward, update: the gate sees equal log-probs, every module moves."""
    changes = {"rollout.tree": TREES[tree], "policy.train": train}
    trainer = Trainer(trained(case, folder, tmp_path, prompts, changes), CPU)
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
    metrics = trainer.iteration()
    # One process, but the batch differs (8 in rollout, up to 8 items in training): rounding only.
    assert metrics["gate/max_gap"] < 1e-4
    assert metrics["reward/failed"] == 0 and metrics["update/grad_norm"] > 0
    moved = {n for n, p in trainer.policy.trainable().items() if not torch.equal(p, before[n])}
    assert moved, "nothing was trained"
    if tree == "shared_root" and train == "lora":
        trainer.save()
        trainer.saver.finish()
        again = Trainer(trainer.config, CPU)
        assert again.resume() and again.done == 1
        for name, parameter in again.policy.trainable().items():
            assert torch.equal(parameter, trainer.policy.trainable()[name]), name
