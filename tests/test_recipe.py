"""Reading and writing recipes: YAML, overrides, values, round trip."""
# ruff: noqa: F811 -- an imported fixture is named again by each test that uses it

from __future__ import annotations

import copy
import math

import pytest
import yaml
from pydantic import ValidationError
from test_config import RECIPE, lines, recipe, text_recipe  # noqa: F401

from dancegrpo_fast.config import RunConfig, dump, load_config

# --- YAML


def test_duplicate_keys_are_refused_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = text_recipe(tmp_path, yaml.safe_dump(RECIPE) + "seed: 1\nseed: 2\n")
    text = (tmp_path / path).read_text().split("\n")
    first = text.index("seed: 1") + 1
    assert lines(path) == [
        f"t.yaml: seed: given twice, on lines {first} and {first + 1}; keep one of them"
    ]
    nested = text_recipe(tmp_path, "rewards:\n- name: a\n  name: b\n")
    assert lines(nested)[0] == (
        "t.yaml: rewards.0.name: given twice, on lines 2 and 3; keep one of them"
    )
    assert "override: rollout.tree.kind: given twice, on lines 1 and 1; keep one of them" in lines(
        nested, ["rollout.tree={kind: window, kind: window}"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n\tb: 2\n", "t.yaml: line 2: not valid YAML: found character '\\t' that cannot"),
        ("a: [1\nb: 2\n", "t.yaml: line 2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n---\nb: 2\n", "t.yaml: line 2: not valid YAML: but found another document"),
        ("a: *x\n", "t.yaml: line 1: not valid YAML: found undefined alias 'x'"),
        ("a: !!python/object:os.system 1\n", "t.yaml: line 1: not valid YAML: could not determine"),
        ("a: &x [*x]\n", "t.yaml: line 1: holds an alias to itself; write it out"),
        ("? [1]\n: 2\n", "t.yaml: line 1: a key must be plain text"),
        ("", "t.yaml: must hold sections (key: value lines) with the keys algorithm, seed, o"),
        ("- a\n", "t.yaml: must hold sections (key: value lines) with the keys algorithm, seed, o"),
        ("a: \x01\n", "t.yaml: unacceptable character"),
    ],
)
def test_broken_yaml_is_one_line_with_its_number(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (line,) = lines(text_recipe(tmp_path, text))
    assert line.startswith(expected)


def test_unreadable_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = lines("none.yaml")
    assert line.startswith("none.yaml: cannot be read as a UTF-8 recipe file:")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    (line,) = lines("b.yaml")
    assert line.startswith("b.yaml: cannot be read as a UTF-8 recipe file:")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4), ("1E+2", 100.0), (".5", 0.5), ("5.", 5.0), ("3", 3.0), ("0x10", 16.0),
        ("0o17", 15.0), ("012", 12.0), ("+3", 3.0),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(recipe, written, value):
    loaded = load_config(recipe, [f"optimizer.learning_rate={written}"]).optimizer.learning_rate
    assert loaded == value and isinstance(loaded, float)


@pytest.mark.parametrize("written", ["no", "NO", "off", "y", "2024-01-01", "1_000", "12:30", "="])
def test_what_yaml_1_1_would_convert_stays_text(recipe, written):
    assert load_config(recipe, [f"model.negative_prompt={written}"]).model.negative_prompt == (
        written
    )


# --- overrides


def test_overrides_set_scalars_items_and_whole_lists(recipe):
    config = load_config(
        recipe,
        [
            "seed=7",
            "rewards.0.weight=2",
            "evaluation.prompts=held out.txt",
            "rollout.tree={kind: trunk_with_branches, branch_steps: [1, 3, 5], branches: 4}",
            "rollout.tree.branch_steps=[0, 2]",
            "rollout.group_size=8",
            "optimizer.betas=[0.8, 0.9]",
            "seed=8",
        ],
    )
    assert config.seed == 8
    assert [(r.name, r.weight) for r in config.rewards] == [("a", 2.0), ("b", 0.5)]
    assert config.evaluation.prompts == "held out.txt"
    assert config.rollout.tree.branch_steps == [0, 2]
    assert config.optimizer.betas == (0.8, 0.9)
    replaced = load_config(recipe, ["rewards=[{name: b}]"]).rewards
    assert [(r.name, r.weight) for r in replaced] == [("b", 1.0)]  # nothing inherited by position


def test_an_override_does_not_reach_through_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = {**RECIPE, "data": {"prompts": "a.txt", "prompts_per_iteration": 4}}
    text = yaml.safe_dump({k: v for k, v in raw.items() if k != "rewards"})
    text += "rewards:\n- &r {name: a, weight: 2}\n- {name: b}\n"
    text = text.replace("- {name: b}", "- *r")
    path = text_recipe(tmp_path, text)
    config = load_config(path, ["rewards.1.name=b"])
    assert [r.name for r in config.rewards] == ["a", "b"]


def test_null_clears_an_optional_value(recipe):
    assert load_config(recipe, ["policy.ema_decay=0.9", "policy.ema_decay=null"]).policy == (
        load_config(recipe).policy
    )


# --- values


def test_defaults_and_freezing(recipe):
    config = load_config(recipe)
    assert config.loss.clip_range == 1e-4 and config.loss.old_log_prob == "auto"
    assert config.rollout.final == "x0" and not config.rollout.train_last
    assert config.output == "runs/x"  # as written, not made absolute
    with pytest.raises(ValidationError, match="frozen"):
        config.loss.updates = 2


def test_direct_construction_is_checked_too():
    raw = copy.deepcopy(RECIPE)
    raw["rollout"]["group_size"] = 1
    with pytest.raises(ValidationError, match="rollout.group_size = 1: one sample has no group"):
        RunConfig(**raw)


@pytest.mark.parametrize(
    "text",
    ["", "no", "1e-4", "012", "null", "~", "true", ".inf", "a: b", "# c", "é\u2028x", "- d", "'",
     "two\nlines", " pad ", "0x1F", "1_000", "<<", "="],
)  # fmt: skip
def test_dump_is_read_back_to_an_equal_configuration(recipe, tmp_path, text):
    tree = {"kind": "window", "window_size": 2, "window_range": [0, 5]}
    overrides = ["optimizer.learning_rate=1e-07", f"rollout.tree={tree}", "policy.ema_decay=0.95"]
    config = load_config(recipe, overrides)
    model = config.model.model_copy(update={"negative_prompt": text})
    config = config.model_copy(update={"model": model})
    (tmp_path / "again.yaml").write_text(dump(config), encoding="utf-8")
    again = load_config("again.yaml")
    assert again == config and dump(again) == dump(config)
    assert math.isclose(again.optimizer.learning_rate, 1e-7, rel_tol=0)


def test_every_field_says_what_it_is():
    def undescribed(section, prefix=""):
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(RunConfig)) == []
