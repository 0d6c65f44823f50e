"""A small recipe that nothing loads, and what is said of its mistakes."""

from __future__ import annotations

import pytest
import yaml

from dancegrpo_fast.config import UserError, load_config

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
