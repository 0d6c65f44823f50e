"""Every recipe loads, and trains the tiny twin of its family for one iteration.

Kept of a recipe: dtype, guidance, schedule, dynamics, kind of tree, credit, advantage, loss,
policy, optimizer. Cut down: sizes, samples, steps, processes; its rewards are three colours.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import colours
import pytest
import torch
from conformance import CPU, Case

from dancegrpo_fast.config import RunConfig, load_config
from dancegrpo_fast.report.verification import TWIN
from dancegrpo_fast.rewards import REWARDS
from dancegrpo_fast.rewards.loading import arguments
from dancegrpo_fast.trainer import Trainer

HERE = Path(__file__).parent
RECIPES = sorted((HERE.parents[1] / "recipes").glob("*.yaml"))
CASES: list[Case] = [
    case
    for file in sorted(HERE.glob("case_*.py"))
    for case in importlib.import_module(file.stem).CASES
]
COLOURS = ("Red", "Green", "Blue")
STEPS, GROUP = 4, 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(
    params=[
        pytest.param(file, marks=pytest.mark.verifies(f"recipe:{file.stem}", TWIN), id=file.stem)
        for file in RECIPES
    ]
)
def recipe(request) -> Path:
    return request.param


def twin_of(config: RunConfig) -> Case:
    """The case of the recipe's family that is most like it."""

    def unlike(case: Case) -> int:
        second = (config.model.guidance_2 is None) != (case.model.get("guidance_2") is None)
        video = (config.model.frames == 1) != (case.model.get("frames", 5) == 1)
        return 2 * second + video

    return min((c for c in CASES if c.family == config.model.family), key=unlike)


def cut_down(config: RunConfig, case: Case, folder: Path) -> RunConfig:
    """The recipe over a tiny pipeline and two prompts."""
    raw: dict[str, Any] = config.model_dump()
    model = case.recipe(folder, case.build(folder / "model")).model
    tiny = ("path", "height", "width", "frames", "max_text_length")
    raw["model"] |= {name: getattr(model, name) for name in tiny}
    raw["model"] |= {"revision": None, "first_frame": None, "first_frame_steps": None}
    raw["output"] = str(folder / "run")
    prompts = case.made_prompts(folder / "images")
    file = folder / "images" / "prompts.jsonl"
    rows = [{"prompt": p.text} | ({"image": p.image.name} if p.image else {}) for p in prompts]
    file.write_text("\n".join(map(json.dumps, rows)))
    raw["data"] = {"prompts": str(file), "prompts_per_iteration": 2}
    raw["rollout"] |= {"steps": STEPS, "group_size": GROUP, "tree": small_tree(config)}
    raw["rewards"] = [
        {"name": f"{colours.__file__}:{colour}", "weight": reward.weight}
        for colour, reward in zip(COLOURS, config.rewards, strict=False)
    ]
    if config.advantage.best_of_n is not None:
        raw["advantage"]["best_of_n"] = 2
    raw["loss"]["updates"] = min(2, config.loss.updates)
    raw["loss"] |= {"timestep_range": None, "gradient_from": None}  # Of more steps than there are.
    if config.loss.kind in ("refl", "draft"):
        raw["rewards"] = [{"name": "colourfulness"}]
    raw["parallel"] = {"checkpointing": config.parallel.checkpointing}
    raw["evaluation"] = {}
    return RunConfig.model_validate(raw)


def small_tree(config: RunConfig) -> dict[str, Any]:
    """The recipe's kind of tree with `GROUP` leaves and `STEPS` steps."""
    tree = config.rollout.tree
    match tree.kind:
        case "window":
            assert tree.window_size is not None
            size = min(2, tree.window_size)
            moves = {"window_order": tree.window_order, "flash": tree.flash}
            return {"kind": tree.kind, "window_size": size, "window_range": (0, 2)} | moves
        case "branch_points":
            window = {"noise_scale": tree.noise_scale}
            if tree.window_size is not None:
                window |= {"window_size": 2, "window_order": tree.window_order}
            return {"kind": tree.kind, "branch_steps": [0, 1], "branches": 2} | window
        case "trunk_with_branches":
            return {"kind": tree.kind, "branch_steps": [1], "branches": GROUP}
        case _:
            return {"kind": tree.kind}


def test_it_loads(recipe):
    """Its rewards are known too, and take the options that it gives them."""
    config = load_config(recipe)
    assert "verified" not in recipe.read_text().lower(), "labels are computed, not written"
    assert len(config.rewards) <= len(COLOURS)
    for index, reward in enumerate(config.rewards):
        whole, _, part = reward.name.partition(".")
        if not reward.name.endswith(".py") and whole in REWARDS:
            kind = REWARDS[whole].load()
            arguments(kind, reward, f"rewards.{index}")
            assert not part or part in kind.part_names
        else:
            assert Path(reward.name.rpartition(":")[0]).suffix == ".py", f"no {reward.name}"


def test_it_trains_its_tiny_twin(recipe, tmp_path):
    """One iteration: the gate holds, no reward fails, weights move."""
    config = load_config(recipe)
    case = twin_of(config)
    with case.around():
        trainer = Trainer(cut_down(config, case, tmp_path), CPU)
        before = {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}
        metrics = trainer.iteration()
    assert metrics["reward/failed"] == 0 and metrics["update/grad_norm"] > 0
    assert metrics.get("gate/max_gap", 0.0) < config.loss.max_log_prob_gap
    assert ("gate/max_gap" in metrics) == (config.loss.kind == "policy_gradient")
    moved = [n for n, p in trainer.policy.trainable().items() if not torch.equal(p, before[n])]
    assert moved, "nothing was trained"
