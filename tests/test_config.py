"""Recipes: every mistake is one line with field, value and way out, and all come together."""
# ruff: noqa: F811 -- an imported fixture is named again by each test that uses it

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from recipe_cases import RECIPE, lines, recipe, text_recipe  # noqa: F401

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import Interrupted, RunConfig, UserError
from dancegrpo_fast.config.section import Section

KINDS = "set that to branch_points or trunk_with_branches or search, or leave it at"
OURS = (
    "must be 'flux', 'hunyuan_video', 'qwen_image', 'qwen_image_edit', 'sd', 'sd3', "
    "'skyreels_i2v', 'wan' or 'wan_i2v', or path/to/file.py:ClassName"
)


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
     "set that to trunk_with_branches or search, or leave it at 1"),
    ("advantage.best_of_n=12", "= 12: must be below rollout.group_size = 12, or null for all"),
    ("advantage.running_window=8", "= 8: has no effect with advantage.scope = 'group'; "
     "set that to running, or leave it at 32"),
    ("advantage.credit=siblings", "= 'siblings': needs rollout.tree.kind = trunk_with_branches, "
     "branch_points or search; with shared_root use leaf or depth"),
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
    (".seed=1", "!.seed=1: has an empty key; write it as key=value, such as rollout.steps=8"),
    ("seed=!!bool x", "!seed=!!bool x: a value does not fit the !!tag before it; leave the tag "
     "out"),
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
    ("rewards", "reason"),
    [
        ("[{name: a, weight: 0}]", "every weight is 0, so nothing is trained; give one another"),
        ("[{name: a}, {name: a}]", "a is listed twice; keep one and add the weights"),
    ],
)
def test_rewards_must_train_something(recipe, rewards, reason):
    (line,) = lines(recipe, [f"rewards={rewards}"])
    assert line.startswith("override: rewards = [") and reason in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 3000, "is nested too deeply to be a recipe"),
        ("seed: !!timestamp x", "a value does not fit the !!tag before it; leave the tag out"),
    ],
)
def test_what_pyyaml_trips_over_is_one_line(recipe, tmp_path, text, reason):
    (tmp_path / "r.yaml").write_text(text)
    assert lines(recipe) == [f"r.yaml: {reason}"]


def test_a_key_with_dots_is_not_offered_itself(recipe, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"model.path": "x"}))
    told = "is no key: dots are for overrides; write sections with keys"
    assert lines(recipe) == [f"r.yaml: model.path = 'x': {told}"]


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
        "r.yaml: advantage.credit = 'siblings': needs rollout.tree.kind = trunk_with_branches, "
        "branch_points or search; with shared_root use leaf or depth",
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
