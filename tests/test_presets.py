"""Presets: the published settings, beneath whatever the recipe says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.cli import main
from dancegrpo_fast.config import RunConfig, UserError, dump, load_config
from dancegrpo_fast.config.agreement import ONLY_WITH
from dancegrpo_fast.config.presets import PRESETS, leaves, preset_lines
from dancegrpo_fast.config.run import field_at

RECIPES = Path(__file__).parents[1] / "recipes"
DDIM = ("ddpo", "dpok", "refl", "draft")
# The recipe of the same algorithm, and where its own comment says that it differs.
SAME = {
    "dance_grpo": ("flux_hps", set()),
    "flow_grpo": ("sd3_pickscore", {"loss.kl_weight"}),  # 0.04 for GenEval and OCR, 0.01 here.
    "flow_grpo_fast": ("flow_grpo_fast_sd3", set()),
    "flow_cps": ("flow_grpo_cfg_free_sd3", set()),
    "grpo_guard": ("grpo_guard_sd3", set()),
    "mix_grpo": ("mixgrpo_flux", set()),
    "mix_grpo_flash": ("mixgrpo_flash_flux", set()),
    "tempflow_grpo": ("tempflow_grpo_sd3", set()),
    "branch_grpo": ("branchgrpo_flux", set()),
    "ddpo": ("ddpo_sd15", set()),
    "dpok": ("dpok_sd15", set()),
    "diffusion_nft": ("diffusion_nft_sd3", set()),
    "awm": ("awm_sd3", set()),
    "refl": ("refl_sd15", set()),
    "draft": ("draft_sd15", set()),
}


def short(name: str, **changes: Any) -> dict[str, Any]:
    """What a recipe has to say beside its preset."""
    return {
        "algorithm": name, "output": "runs/x", "iterations": 1,
        "model": {
            "family": "sd" if name in DDIM else "flux", "path": "m", "height": 64, "width": 64
        },
        "data": {"prompts": "p.txt", "prompts_per_iteration": 1},
        "rollout": {"batch_size": 1}, "rewards": [{"name": "hpsv2"}],
        "loss": {"micro_batch_size": 1},
    } | changes  # fmt: skip


def value_at(config: RunConfig, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return list(value) if isinstance(value, tuple) else value


def test_every_preset_is_compared_with_a_recipe() -> None:
    assert SAME.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_recipe_of_its_algorithm(name) -> None:
    """Every setting is a field that the algorithm reads, and equal in the recipe."""
    config = RunConfig.model_validate(short(name))
    recipe = load_config(RECIPES / f"{SAME[name][0]}.yaml")
    for path, value in leaves(PRESETS[name]):
        assert field_at(path) is not None
        assert value_at(config, path) == value, path
        if path not in SAME[name][1]:
            assert value_at(recipe, path) == value, path
    # And nothing else of the four sections that presets are about.
    for section in ("rollout", "advantage", "loss", "policy", "optimizer"):
        ours, theirs = getattr(config, section), getattr(recipe, section)
        differing = {
            f"{section}.{key}"
            for key in type(ours).model_fields
            if getattr(ours, key) != getattr(theirs, key)
        }
        own = {"rollout.batch_size", "loss.micro_batch_size"}
        assert differing <= own | SAME[name][1], differing


def write(tmp_path, raw) -> Path:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "r.yaml"


def test_what_the_recipe_says_wins(tmp_path) -> None:
    raw = short("flow_grpo_fast", loss={"micro_batch_size": 1, "clip_range": 3e-5})
    recipe = write(tmp_path, raw)
    config = load_config(recipe, ["rollout.group_size=6", "policy.ema_decay=null"])
    assert (config.loss.clip_range, config.rollout.group_size) == (3e-5, 6)
    assert config.policy.ema_decay is None and config.policy.lora_rank == 32
    assert config.rollout.tree.window_size == 2


@pytest.mark.parametrize("name", PRESETS)
def test_the_printed_recipe_loads_to_the_same(tmp_path, name, capsys) -> None:
    recipe = write(tmp_path, short(name))
    config = load_config(recipe)
    assert main(["train", str(recipe), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed == dump(config) and f"algorithm: {name}" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "dropped"),
    [
        (["rollout.tree.kind=shared_root"], "rollout.tree.window_range"),
        (["policy.train=full"], "policy.lora_rank"),
        (
            ["loss.kind=nft", "rollout.tree.kind=independent_roots", "rollout.noise_level=0"],
            "loss.clip_range",
        ),
    ],
)
def test_another_choice_drops_what_would_do_nothing(tmp_path, overrides, dropped) -> None:
    config = load_config(write(tmp_path, short("flow_grpo_fast")), overrides)
    assert value_at(config, dropped) == field_at(dropped).get_default()
    assert config.advantage.scope == "batch_std"  # The rest of the preset stands.
    assert [line for line in preset_lines(config) if line.startswith(f"{dropped} ")][0].endswith(
        f"(preset: {dict(leaves(PRESETS['flow_grpo_fast']))[dropped]})"
    )


def test_a_recipes_own_setting_is_never_dropped(tmp_path) -> None:
    recipe = write(tmp_path, short("flow_grpo_fast"))
    with pytest.raises(UserError, match=r"override: rollout.tree.window_size = 3: has no effect"):
        load_config(recipe, ["rollout.tree.kind=shared_root", "rollout.tree.window_size=3"])


def test_mistakes_name_their_source(tmp_path) -> None:
    recipe = write(tmp_path, short("tempflow_grpo"))
    with pytest.raises(UserError) as caught:
        load_config(recipe, ["rollout.tree.branches=4"])
    assert str(caught.value) == (
        "algorithm tempflow_grpo: rollout.group_size = 216: must be 144, the leaves of this tree "
        "(trunks * steps * branches = 4 * 9 * 4)"
    )
    with pytest.raises(UserError, match="did you mean mix_grpo_flash?"):
        load_config(recipe, ["algorithm=mix_grpo_flsh"])


def test_a_section_that_is_none_is_still_one_line(tmp_path) -> None:
    for raw, path in (
        (short("flow_grpo", loss=None), "loss = null"),
        (short("flow_grpo", rollout={"steps": {"a": 1}, "batch_size": 1}), "rollout.steps = {'a'"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(write(tmp_path, raw))
        assert str(caught.value).startswith(f"{tmp_path}/r.yaml: {path}")


def test_one_sample_is_not_compared_with_itself(tmp_path) -> None:
    """batch_std takes the mean of the group: of one sample every advantage would be 0."""
    recipe = short("flow_grpo", rollout={"batch_size": 1, "group_size": 1})
    recipe["loss"]["updates"] = 1
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "r.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'r.yaml'}: rollout.group_size = 1: one sample has no group to compare with; "
        "use 2 or more, or advantage.scope = batch or running"
    )
    several = ["advantage.scope=batch", "data.prompts_per_iteration=2"]
    load_config(tmp_path / "r.yaml", several)


def test_nonsense_is_refused_with_the_reason(tmp_path) -> None:
    for name, overrides, said in (
        ("grpo_guard", ["rollout.dynamics=cps"], "needs a Gaussian log-prob"),
        ("dance_grpo", ["loss.old_log_prob=on_policy"], "the later updates are off-policy"),
        ("flow_grpo", ["rollout.noise_level=0"], "a policy gradient needs noise"),
        ("diffusion_nft", ["model.guidance=4.5"], "trains the unguided velocity"),
        ("ddpo", ["loss.timestep_weights=inverse_dt"], "has no step length"),
    ):
        with pytest.raises(UserError, match=said):
            load_config(write(tmp_path, short(name)), overrides)


def test_the_run_says_what_the_preset_set(tmp_path) -> None:
    config = load_config(write(tmp_path, short("flow_grpo_fast")), ["rollout.group_size=6"])
    lines = preset_lines(config)
    assert "loss.clip_range = 1e-05" in lines
    assert "rollout.group_size = 6 (preset: 24)" in lines
    assert preset_lines(config.model_copy(update={"algorithm": None})) == []


def test_rules_name_fields_that_exist() -> None:
    for path, selector, _ in ONLY_WITH:
        assert field_at(path) and field_at(selector)


NAMED = {
    path: int(found[1])
    for path in sorted(RECIPES.glob("*.yaml"))
    if (found := re.search(r"\b(\d+) GPUs", path.read_text(encoding="utf-8")))
}


@pytest.mark.parametrize("path", NAMED, ids=lambda path: path.stem)
def test_samples_can_be_dealt_to_the_gpus_that_a_recipe_names(path) -> None:
    config = load_config(path)
    ranks = NAMED[path] // config.parallel.sp
    spread = config.parallel.groups == "spread"
    sizes = config.data.prompts_per_iteration, config.rollout.group_size
    counts = np.bincount(leaf_owners(*sizes, ranks, spread=spread).ravel())
    assert len(counts) == ranks and len(NAMED) > 15
