"""`train --profile`: what is written, and which lines of ours make the host wait for a value."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from tiny_models import tiny_config

from dancegrpo_fast.cli import main
from dancegrpo_fast.run import train

ROOT = Path(__file__).resolve().parent.parent

# Functions of ours that may ask for a value in an iteration, and how often at most. On a GPU each
# is a wait. None lies in a loop over states, steps or micro-batches.
MAY_WAIT = {
    "policy_gradient.py": {"_pass_gate": 3},  # Is the largest gap within its limit; two metrics.
    "engine.py": {"clip_grad_norm": 1},  # Is the gradient finite.
    "interface.py": {"of": 2},  # Which scores failed: they are on the host already.
}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, tiny_wan_folder):
    folder = tmp_path_factory.mktemp("profiled")
    train(tiny_config(folder, tiny_wan_folder, {"iterations": 2}), profile=2)
    return folder / "run" / "profile"


def test_trace_and_summary_are_written(profiled):
    with gzip.open(profiled / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"dancegrpo_fast.{stage}" for stage in ("sample", "score", "update")} <= names
    text = (profiled / "summary.md").read_text()
    assert "# Iteration 2" in text
    for stage in ("sample", "score", "update"):
        assert re.search(rf"\| {stage} \| [\d.]+ \| \d+% \|", text)
    operators = text.split("## Operators")[1].split("##")[0]
    assert "| aten::" in operators and ".py(" not in operators


@pytest.mark.parametrize("number", ["0", "100000"])
def test_an_iteration_that_the_run_does_not_have(number, tmp_path, capsys):
    recipe = str(ROOT / "recipes" / "demo.yaml")
    assert main(["train", recipe, f"output={tmp_path / 'run'}", "--profile", number]) == 2
    assert f"--profile = {number}: must be an iteration of the run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_known_lines_of_ours_wait_for_values(profiled):
    text = (profiled / "summary.md").read_text()
    found = re.findall(r"\| dancegrpo_fast/(?:\w+/)*(\w+\.py)\(\d+\): (\w+) \| (\d+) \|", text)
    assert found
    for file, function, times in found:
        assert int(times) <= MAY_WAIT.get(file, {}).get(function, 0), (file, function, times)
