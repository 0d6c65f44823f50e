"""Recipes: every mistake is one line with field, value and way out, and all come together."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import Interrupted, RunConfig, UserError, load_config
from dancegrpo_fast.config.section import Section

RECIPE = {
    "output": "runs/x",
    "iterations": 5,
    "model": {"family": "wan", "path": "models/x", "height": 16, "width": 16},
    "data": {"prompts": "prompts.txt", "prompts_per_iteration": 4},
    "rollout": {"group_size": 12, "steps": 10, "noise_level": 0.7, "batch_size": 12},
    "rewards": [{"name": "a"}, {"name": "b", "weight": 0.5}],
    "loss": {"micro_batch_size": 12},
    "optimizer": {"learning_rate": 1e-4},
}
WINDOW = ["rollout.tree.kind=window"]
POINTS = ["rollout.tree.kind=branch_points"]
TRUNK = ["rollout.tree.kind=trunk_with_branches"]
KINDS = "set that to branch_points or trunk_with_branches, or leave it at"

OURS = (
    "must be 'flux', 'hunyuan_video', 'qwen_image', 'qwen_image_edit', 'sd', 'sd3', "
    "'skyreels_i2v', 'wan' or 'wan_i2v', or path/to/file.py:ClassName"
)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    return "r.yaml"


def lines(path, overrides=()) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).split("\n")


def text_recipe(tmp_path, text: str) -> str:
    (tmp_path / "t.yaml").write_text(text)
    return "t.yaml"


BAD_FIELDS = [
    # unknown keys: near, elsewhere, nowhere
    ("rollout.grup_size=3", "= 3: unknown key; did you mean rollout.group_size?"),
    ("rewards.0.wieght=2", "= 2: unknown key; did you mean rewards.0.weight?"),
    ("window_start=3", "= 3: unknown key; did you mean rollout.tree.window_start?"),
    ("checkpoint.zzz=1", "= 1: unknown key; known here: every, keep, keep_every, "
     "background, on_failure, grace_seconds"),
    # wrong types
    ("iterations=many", "= 'many': must be a whole number"),
    ("iterations=2.5", "= 2.5: must be a whole number"),
    ("iterations=true", "= true: must be a whole number"),
    ("iterations='3'", "= '3': must be a whole number"),
    ("model.guidance=no", "= 'no': must be a number"),
    ("model.path=12", "= 12: must be text; put quotes around it"),
    ("rollout.train_last=yes", "= 'yes': must be true or false"),
    ("rollout.train_last=1", "= 1: must be true or false"),
    ("rollout.tree=window", "= 'window': must be a section, key: value lines"),
    ("rollout.tree.branch_steps=3", "= 3: must be a list, such as [a, b]"),
    ("optimizer.learning_rate=.nan", "= nan: must be a finite number"),
    # bad choices
    ("model.dtype=bfloat", "= 'bfloat': must be 'float32' or 'bfloat16'; did you mean bfloat16?"),
    ("model.family=flix", f"= 'flix': {OURS} for your own; did you mean flux?"),
    ("model.family=zzzzz", f"= 'zzzzz': {OURS} for your own"),
    ("model.family=my.py", "= 'my.py': which class of the file? write my.py:ClassName"),
    ("rollout.dynamics=xyz", "= 'xyz': must be 'dance', 'flow', 'flow_wan', 'cps', 'ddim' or 'vp'"),
    # out of range
    ("iterations=0", "= 0: must be greater than or equal to 1"),
    ("rollout.noise_level=-1", "= -1: must be greater than or equal to 0"),
    ("rollout.noise_level=0", "= 0: a policy gradient needs noise; or use loss.kind nft, awm, refl "
     "or draft"),
    ("loss.timestep_fraction=1.5", "= 1.5: must be less than or equal to 1"),
    ("policy.ema_decay=1", "= 1: must be less than 1"),
    ("advantage.best_of_n=3", "= 3: must be a multiple of 2"),
    ("seed=-1", "= -1: must be greater than or equal to 0"),
    ("rewards=[]", "= []: List should have at least 1 item after validation, not 0"),
    # fields that contradict each other
    ("rollout.shift=3", "= 3: has no effect with rollout.schedule = 'diffusers'; "
     "set that to dance, or leave it at null"),
    ("rollout.schedule=dance", "!rollout.shift = null: schedule dance needs a shift, such as 3.0; "
     "1.0 leaves it unshifted"),
    ("rollout.exact_density=true", "= true: has no effect with rollout.dynamics = 'dance'; "
     "set that to cps, or leave it at false"),
    ("rollout.train_last=true", "= true: needs rollout.final = sample (the other ends have no "
     "density)"),
    ("rollout.steps=1", "= 1: the last step is not trained, so nothing is; take 2 or more steps"),
    ("rollout.group_size=1", "= 1: one sample has no group to compare with; use 2 or more, "
     "or advantage.scope = batch or running"),
    ("rollout.tree.window_size=2", "= 2: has no effect with rollout.tree.kind = 'shared_root'; "
     "set that to window or branch_points, or leave it at null"),
    ("rollout.tree.window_order=decaying", "= 'decaying': has no effect with rollout.tree.kind = "
     "'shared_root'; set that to window or branch_points, or leave it at 'random'"),
    ("rollout.tree.window_decay=0.2", "= 0.2: has no effect with rollout.tree.window_order = "
     "'random'; set that to exponential, or leave it at 0.1"),
    ("rollout.tree.flash=0.4", "= 0.4: has no effect with rollout.tree.kind = 'shared_root'; "
     "set that to window, or leave it at null"),
    ("rollout.tree.noise_scale=4", "= 4: has no effect with rollout.tree.kind = 'shared_root'; "
     "set that to branch_points, or leave it at 1.0"),
    ("advantage.keep=best", "= 'best': has no effect without advantage.best_of_n; give that a "
     "number"),
    ("loss.timesteps=last", "= 'last': must be 'random', 'first' or a list of ascending steps, "
     "such as [0, 1, 2]"),
    ("loss.timesteps=[2, 1]", "= [2, 1]: must be 'random', 'first' or a list of ascending steps, "
     "such as [0, 1, 2]"),
    ("loss.timesteps=[0, 9]", "= [0, 9]: must be steps from 0 to 8 (9 of 10 steps can be trained)"),
    ("loss.timesteps=first", "= 'first': with timestep_fraction = 1 every step is used; lower "
     "that"),
    ("loss.timestep_scope=group", "= 'group': with timestep_fraction = 1 every step is used; "
     "lower that"),
    ("loss.timestep_weights=[1, 2]", "= [1, 2]: has 2 values: must be 9 (9 of 10 steps can be "
     "trained)"),
    ("loss.timestep_weights=[1, -2]", "= [1, -2]: must be 'uniform', 'std', 'inverse_dt' or a list "
     "of positive numbers, one a trainable step"),
    ("rollout.tree.branches=2", "= 2: has no effect with rollout.tree.kind = 'shared_root'; "
     f"{KINDS} null"),
    ("rollout.tree.trunks=2", "= 2: has no effect with rollout.tree.kind = 'shared_root'; "
     "set that to trunk_with_branches, or leave it at 1"),
    ("advantage.best_of_n=12", "= 12: must be below rollout.group_size = 12, or null for all"),
    ("advantage.running_window=8", "= 8: has no effect with advantage.scope = 'group'; "
     "set that to running, or leave it at 32"),
    ("advantage.credit=siblings", "= 'siblings': needs rollout.tree.kind = trunk_with_branches "
     "or branch_points; with shared_root use leaf or depth"),
    ("policy.lora_rank=4", "= 4: has no effect with policy.train = 'full'; "
     "set that to lora, or leave it at 16"),
    ("loss.updates=13", "= 13: a group has 12 trained samples, so at most 12 updates"),
    ("evaluation.every=5", "= 5: needs evaluation.prompts, a file of held-out prompts, or null"),
    ("data.match=(a", "= '(a': is no regular expression: missing ), unterminated subpattern at "
     "position 0"),
    ("data.skip_zero_variance=0", "= 0: must be greater than or equal to 1"),
    ("logging.trackers.0=tensorbord", "!logging.trackers.0=tensorbord: logging.trackers is no list "
     "in the recipe; give the whole list"),
    ("logging.trackers=[wandb, wandb]", "= ['wandb', 'wandb']: names a tracker twice; each once is "
     "enough"),
    ("logging.offline=true", "= true: has no effect without wandb in logging.trackers; add it, or "
     "leave this at false"),
    ("logging.project=x", "= 'x': has no effect without wandb in logging.trackers; add it, or "
     "leave this at null"),
    # malformed overrides
    ("seed", "!seed: write it as key=value, such as rollout.steps=8"),
    ("=3", "!=3: write it as key=value, such as rollout.steps=8"),
    ("output=", "!output=: has no value; write output=null for none or output='' for empty text"),
    ("output=[", "!output=[: line 1: not valid YAML: expected the node content, "
     "but found '<stream end>'"),
    ("rewards.2.weight=1", "!rewards.2.weight=1: rewards holds 2, counted from 0; there is no 2"),
    ("rewards.x=1", "!rewards.x=1: rewards holds 2, counted from 0; there is no x"),
    ("iterations.x=1", "!iterations.x=1: iterations = 5 has no keys; set iterations itself"),
    ("rollout.tree.branch_steps.0=1", "!rollout.tree.branch_steps.0=1: rollout.tree.branch_steps "
     "is no list in the recipe; give the whole list"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), BAD_FIELDS, ids=[o for o, _ in BAD_FIELDS])
def test_each_mistake_is_one_line_with_field_value_and_way_out(recipe, override, expected):
    # "!" marks lines that do not begin with the overridden field.
    name = override.partition("=")[0]
    source = "r.yaml" if expected.startswith("!rollout.shift") else "override"
    line = expected[1:] if expected.startswith("!") else f"{name} {expected}"
    assert lines(recipe, [override]) == [f"{source}: {line}"]


def test_an_item_of_a_list_of_choices_is_named_with_the_nearest(recipe):
    assert lines(recipe, ["logging.trackers=[wandb, tensorbord]"]) == [
        "override: logging.trackers.1 = 'tensorbord': must be 'tensorboard' or 'wandb'; did you "
        "mean tensorboard?"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*WINDOW], "window_size = null: kind window needs a size from 1 to 9 (9 of 10 steps"),
        ([*WINDOW, "rollout.tree.window_size=10"], "window_size = 10: must be from 1 to 9 (9 of"),
        (
            [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_start=7"],
            "window_start = 7: a window of 3 must start in 0 to 6 (9 of 10 steps can be trained)",
        ),
        (
            [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_range=[4, 10]"],
            "window_range = [4, 10]: must be [first, end) inside [0, 9] (9 of 10 steps can be",
        ),
        (
            [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_range=[4, 6]"],
            "window_range = [4, 6]: must hold at least window_size = 3 steps",
        ),
        (
            [*WINDOW, "rollout.tree={kind: window, window_size: 2, window_start: 1, "
             "window_range: [0, 5]}"],
            "window_range = [0, 5]: has no effect beside window_start; set one of them to null",
        ),
        (
            [*POINTS, "rollout.tree.branches=2", "rollout.tree.branch_steps=[4, 4]"],
            "branch_steps = [4, 4]: must ascend from 0 to at most 8 (9 of 10 steps can be trained)",
        ),
        ([*POINTS, "rollout.tree.branch_steps=[0]"], "branches = null: kind branch_points needs"),
        ([*POINTS, "rollout.tree.branches=2"], "branch_steps = []: kind branch_points needs a"),
    ],
)  # fmt: skip
def test_a_tree_must_fit_its_schedule(recipe, overrides, expected):
    found = lines(recipe, overrides)
    assert any(expected in line for line in found)
    assert all(": rollout.tree." in line for line in found)


@pytest.mark.parametrize(
    ("overrides", "leaves", "formula"),
    [
        (
            [*POINTS, "rollout.tree.branches=3", "rollout.tree.branch_steps=[0, 4]"],
            9,
            "branches ** steps = 3 ** 2",
        ),
        (
            [*TRUNK, "rollout.tree.branches=4", "rollout.tree.branch_steps=[0, 2, 8]",
             "rollout.tree.trunks=2"],
            24,
            "trunks * steps * branches = 2 * 3 * 4",
        ),
    ],
)  # fmt: skip
def test_group_size_must_be_the_leaves_and_the_error_says_how_many(
    recipe, overrides, leaves, formula
):
    (line,) = lines(recipe, overrides)
    assert line == (
        f"r.yaml: rollout.group_size = 12: must be {leaves}, the leaves of this tree ({formula})"
    )
    assert load_config(recipe, [*overrides, f"rollout.group_size={leaves}"])


def test_last_step_is_trained_only_when_it_has_a_density(recipe):
    window = [*WINDOW, "rollout.tree.window_size=3", "rollout.tree.window_start=7"]
    last = ["rollout.final=sample", "rollout.train_last=true"]
    assert load_config(recipe, window + last).rollout.tree.window_start == 7
    assert lines(recipe, [*last, "rollout.dynamics=cps"]) == [
        "override: rollout.train_last = true: cps adds no noise in its last step; set it to false"
    ]


def test_cps_level_is_an_angle(recipe):
    assert lines(recipe, ["rollout.dynamics=cps", "rollout.noise_level=1.1"]) == [
        "override: rollout.noise_level = 1.1: cps takes a level in (0, 1], such as 0.7"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["rollout.dynamics=cps", "loss.ratio_norm=true"],
            "loss.ratio_norm = true: needs a Gaussian log-prob, which cps has with "
            "rollout.exact_density = true; or leave it at false",
        ),
        (
            ["model.family=sd", "rollout.dynamics=ddim", "loss.timestep_weights=inverse_dt"],
            "loss.timestep_weights = 'inverse_dt': dynamics ddim has no step length; use std or "
            "uniform",
        ),
        (
            [*WINDOW, "rollout.tree.window_size=2", "loss.timesteps=[0]"],
            "loss.timesteps = [0]: kind window trains the steps of rollout.tree.window_start; use "
            "that",
        ),
        (
            ["loss.timesteps=[0, 1]", "loss.timestep_fraction=0.5"],
            "loss.timestep_fraction = 0.5: has no effect beside a list of timesteps; set it to 1",
        ),
        (
            ["model.family=sd", "rollout.dynamics=ddim", *WINDOW,
             "rollout.tree={kind: window, window_size: 2, flash: 0.5}"],
            "rollout.tree.flash = 0.5: DPM-Solver++ is written for a flow's velocity here; with "
            "dynamics ddim use null",
        ),
        (
            ["rollout.tree={kind: window, window_size: 2, window_start: 1, "
             "window_order: decaying}"],
            "rollout.tree.window_order = 'decaying': has no effect beside window_start, which "
            "stands still",
        ),
    ],
)  # fmt: skip
def test_algorithm_settings_that_make_no_sense_together(recipe, overrides, expected):
    assert lines(recipe, overrides) == [f"override: {expected}"]


def test_lists_of_steps_and_weights_are_read(recipe):
    loss = load_config(
        recipe, ["loss.timesteps=[0, 3]", "loss.timestep_weights=[1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    ).loss
    assert loss.timesteps == [0, 3] and loss.timestep_weights == [float(i) for i in range(1, 10)]


def test_two_siblings_are_refused_and_three_are_not(recipe):
    tree = [*TRUNK, "rollout.tree.branch_steps=[0, 3]", "advantage.credit=siblings"]
    (line,) = lines(recipe, [*tree, "rollout.tree.branches=2", "rollout.group_size=4"])
    assert line.startswith(
        "override: advantage.credit = 'siblings': needs rollout.tree.branches of 3 or more, here 2"
    )
    assert load_config(recipe, [*tree, "rollout.tree.branches=3", "rollout.group_size=6"])


@pytest.mark.parametrize("credit", ["depth", "siblings"])
def test_credit_inside_a_tree_has_no_other_scope(recipe, credit):
    tree = [*TRUNK, "rollout.tree.branch_steps=[0, 3]", "rollout.tree.branches=6"]
    assert lines(recipe, [*tree, f"advantage.credit={credit}", "advantage.scope=batch"]) == [
        f"override: advantage.scope = 'batch': credit {credit} normalises inside one prompt's "
        "tree; use group"
    ]


def test_on_policy_with_several_updates_is_refused(recipe):
    assert lines(recipe, ["loss.old_log_prob=on_policy", "loss.updates=2"]) == [
        "override: loss.old_log_prob = 'on_policy': with loss.updates = 2 the later updates are "
        "off-policy; use recompute (or auto), or updates = 1"
    ]


def test_updates_are_counted_against_the_selected_samples(recipe):
    assert lines(recipe, ["advantage.best_of_n=4", "loss.updates=5"]) == [
        "override: loss.updates = 5: a group has 4 trained samples, so at most 4 updates"
    ]
    assert load_config(recipe, ["advantage.best_of_n=4", "loss.updates=4"])


def test_a_single_sample_is_fine_with_another_scope(recipe):
    assert load_config(recipe, ["rollout.group_size=1", "advantage.scope=batch"])


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ("[{name: a, weight: 0}]", "every weight is 0, so nothing is trained; give one another"),
        ("[{name: a}, {name: a}]", "a is listed twice; keep one and add the weights"),
    ],
)
def test_rewards_must_train_something(recipe, rewards, reason):
    (line,) = lines(recipe, [f"rewards={rewards}"])
    assert line.startswith("override: rewards = [") and reason in line


def test_missing_fields_say_what_they_are(recipe, tmp_path):
    raw = copy.deepcopy(RECIPE)
    del raw["rollout"]["steps"], raw["model"]["path"]
    del raw["loss"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    assert lines(recipe) == [
        "r.yaml: model.path: is missing; Folder of a diffusers pipeline (relative to the working "
        "directory), or its hub id.",
        "r.yaml: rollout.steps: is missing; Denoising steps.",
        "r.yaml: loss: is missing; its required keys: micro_batch_size",
    ]


def test_all_mistakes_come_together_each_with_its_source(recipe, tmp_path):
    raw = copy.deepcopy(RECIPE)
    raw["rollout"]["grup_size"] = 8
    raw["model"]["height"] = "tall"
    raw["advantage"] = {"credit": "siblings"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    found = lines(recipe, ["iterations=0", "rollout.tree.window_size=4", "loss.updates=99", "x"])
    assert found == [
        "override: x: write it as key=value, such as rollout.steps=8",
        "override: iterations = 0: must be greater than or equal to 1",
        "r.yaml: model.height = 'tall': must be a whole number",
        "r.yaml: rollout.grup_size = 8: unknown key; did you mean rollout.group_size?",
        "override: rollout.tree.window_size = 4: has no effect with rollout.tree.kind = "
        "'shared_root'; set that to window or branch_points, or leave it at null",
        "r.yaml: advantage.credit = 'siblings': needs rollout.tree.kind = trunk_with_branches or "
        "branch_points; with shared_root use leaf or depth",
    ]  # loss.updates is silent: its limit is group_size, which grup_size was meant to set


def test_a_check_does_not_guess_about_fields_that_are_wrong_themselves(recipe):
    tree = "rollout.tree"
    assert lines(recipe, [f"{tree}.knd=window", f"{tree}.window_size=30"]) == [
        f"override: {tree}.knd = 'window': unknown key; did you mean {tree}.kind?"
    ]
    assert lines(recipe, [f"{tree}.kind=window", f"{tree}.window_size=3", "rollout.steps=x"]) == [
        "override: rollout.steps = 'x': must be a whole number"
    ]


def test_long_values_are_cut(recipe):
    (line,) = lines(recipe, ["iterations=" + "x" * 500])
    assert len(line) < 140 and "xxx...: must be a whole number" in line


# --- the documentation


def documented() -> dict[str, list[tuple[str, str]]]:
    """Section -> (field, default as it stands there) of the tables in docs/start.md."""
    text = (Path(__file__).parents[1] / "docs" / "start.md").read_text(encoding="utf-8")
    text = text.split("\n## A recipe, section by section\n")[1].split("\n## ")[0]
    found: dict[str, list[tuple[str, str]]] = {"": []}
    section = ""
    for line in text.splitlines():
        if heading := re.match(r"\*\*`(.+?)`\*\*", line):
            section = heading[1]
            found[section] = []
        elif line.startswith("| `"):
            names, defaults = (cell.strip() for cell in line.split("|")[1:3])
            fields = re.findall(r"`(\w+)`", names)
            several = defaults.split(", ") if len(fields) > 1 else [defaults]
            values = several if len(several) > 1 else several * len(fields)
            found[section] += zip(fields, values, strict=True)
    return found


def declared(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted name, class) of a section and those below it."""
    yield prefix, section
    for name, field in section.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from declared(kind, f"{prefix}.{name}".strip("."))


def test_every_field_stands_once_in_the_docs_with_its_default():
    sections, found = dict(declared(RunConfig)), documented()
    assert found.keys() == sections.keys()
    for name, section in sections.items():
        # At the top level only what is no section itself.
        fields = {k: f for k, f in section.model_fields.items() if name or k not in sections}
        assert sorted(field for field, _ in found[name]) == sorted(fields), name
        for field, shown in found[name]:
            default = fields[field].get_default()
            if fields[field].is_required():
                assert shown == "*required*", f"{name}.{field}"
            elif isinstance(default, Section):
                assert shown == "a section", f"{name}.{field}"
            else:
                stated = yaml.safe_load(shown.strip("`"))
                stated = float(stated) if isinstance(default, float) else stated
                default = list(default) if isinstance(default, tuple) else default
                assert stated == default, f"{name}.{field}"


# --- command line


def test_exit_codes(capsys, monkeypatch):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'trian'" in error and "--help" in error
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def fails(arguments):
        raise arguments[0]

    monkeypatch.setattr("dancegrpo_fast.cli._run", fails)
    assert main([UserError("one\ntwo")]) == 2
    assert capsys.readouterr().err == "one\ntwo\n"
    assert main([Interrupted("resume me")]) == 3
    assert capsys.readouterr().err == "resume me\n"
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        main([ZeroDivisionError()])


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for command in ("train", "sample", "plan", "export", "doctor"):
        assert f"\n    {command} " in shown
    assert "dancegrpo-fast train recipes/" in shown and "exit codes" in shown
