"""`train --profile`: what is written, and which lines of ours make the host wait for a value."""

from __future__ import annotations

import gzip
import importlib
import json
import py_compile
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from dancegrpo_fast.cli import main
from dancegrpo_fast.profiling import Profile, tally
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


def test_modules_may_be_imported_meanwhile(tmp_path, monkeypatch):
    """Their code is gone when torch reads the names of its frames: UnicodeDecodeError in 2.13."""
    names = [f"imported_while_profiled_{number}" for number in range(40)]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"class {name.title()}:\n    def f(self): pass\n")
        py_compile.compile(str(tmp_path / f"{name}.py"))
    monkeypatch.syspath_prepend(tmp_path)
    with Profile(tmp_path, 1, torch.device("cpu")).of(1, {"sample": 1.0}):
        for name in names:
            importlib.import_module(name)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        found = " ".join({event.get("name", "") for event in json.load(file)["traceEvents"]})
    assert all(f"/{name}.py(" in found for name in names)


@pytest.mark.parametrize("number", ["0", "100000"])
def test_an_iteration_that_the_run_does_not_have(number, tmp_path, capsys):
    recipe = str(ROOT / "recipes" / "demo.yaml")
    assert main(["train", recipe, f"output={tmp_path / 'run'}", "--profile", number]) == 2
    assert f"--profile = {number}: must be an iteration of the run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_launches_of_torch_and_of_triton_are_counted():
    names = {"cudaLaunchKernel": 2, "cuLaunchKernelEx": 3, "aten::_local_scalar_dense": 1,
             "nccl:all_reduce": 4, "cudaMemcpyAsync": 5}  # fmt: skip
    told = tally(Counter(names))
    assert (told.launches, told.values, told.collectives) == (5, 1, {"nccl:all_reduce": 4})


def test_only_known_lines_of_ours_wait_for_values(profiled):
    text = (profiled / "summary.md").read_text()
    found = re.findall(r"\| dancegrpo_fast/(?:\w+/)*(\w+\.py)\(\d+\): (\w+) \| (\d+) \|", text)
    assert found
    for file, function, times in found:
        assert int(times) <= MAY_WAIT.get(file, {}).get(function, 0), (file, function, times)
