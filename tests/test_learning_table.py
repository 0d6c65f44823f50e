"""The learning table of `benchmarks/algorithms.py`: its rows, what is missing, what is counted."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import algorithms  # noqa: E402
from algorithm_groups import GROUPS, group_of  # noqa: E402

NAMES = [name for group in GROUPS for name in group.algorithms]
GROUP = GROUPS[0]


def row(name: str, seed: int, gain: float, **changes: Any) -> dict[str, Any]:
    """A row as `measure` makes it, with a gain of standard error 0.01."""
    group = group_of(name)
    found = {
        "algorithm": name, "seed": seed, "recipe": group.hash(name, group.budget[0]),
        "trained": 0.6 + gain, "gain": gain, "standard_error": 0.01, "diversity": 1.0,
        "iterations": 4, "model_evaluations": 1000, "scored": 100, "cpu_seconds": 50.0,
        "seconds_to_target": 20.0 + seed, "commit": "a" * 40,
    }  # fmt: skip
    return found | changes


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_without_rows_every_cell_is_not_run() -> None:
    for group in GROUPS:
        lines = algorithms.table([], group)
        assert [line[0] for line in lines] == list(group.algorithms)
        assert all(line[1] == "not run" and not any(line[2:]) for line in lines)
        assert {len(line) for line in lines} == {len(algorithms.HEAD)}


def test_lines_are_means_over_seeds_best_first_and_missing_last() -> None:
    rows = [
        row("Flow-CPS", 0, 0.9),  # Superseded by the next.
        row("Flow-CPS", 0, 0.03), row("Flow-CPS", 1, 0.05, standard_error=0.02),
        row("AWM", 2, 0.06, seconds_to_target=None),
        row("MixGRPO", 0, 0.5, recipe="of another recipe"),
    ]  # fmt: skip
    lines = algorithms.table(rows, GROUP)
    assert [line[0] for line in lines[:2]] == ["AWM", "Flow-CPS"]
    assert all(line[1] == "not run" for line in lines[2:]) and len(lines) == len(GROUP.algorithms)
    # (0.01 + 0.02) / 2, more than 0.0141 / sqrt(2) of the seeds; 1000 + 2.35 * 100 evaluations.
    assert lines[1][1:] == [
        "0, 1", "0.640", "+0.040", "0.015", "+0.030 +0.050", "1.00", "4", "1000", "1235", "50", "20"
    ]  # fmt: skip
    assert lines[0][1] == "2" and lines[0][-1] == "not reached"
    apart = [row("AWM", seed, gain) for seed, gain in enumerate((0.0, 0.03, 0.06))]
    assert algorithms.table(apart, GROUP)[0][4] == "0.017"  # 0.03 / sqrt(3), more than 0.01.


def test_recipes_load_and_hashes_tell_apart_what_a_row_depends_on() -> None:
    assert len(set(NAMES)) == len(NAMES)
    hashes = {group_of(name).hash(name, budget) for name in NAMES for budget in (1, 2)}
    assert len(hashes) == 2 * len(NAMES)
    group = group_of("ReFL")
    dearer = dataclasses.replace(group, gradient=group.gradient + 1)
    assert dearer.hash("ReFL", 1) != group.hash("ReFL", 1)
    for name in NAMES:
        config = group_of(name).config(name, 7, "x")
        assert config.seed == 7 and config.output == "x"


def test_the_price_of_a_sample_counts_the_second_decoding() -> None:
    group = group_of("ReFL")
    differentiated = group.price(group.config("ReFL", 0, "x"))
    assert differentiated == group.scoring + group.gradient
    assert group.price(group.config("Flow-CPS, soft reward", 0, "x")) == group.scoring


def test_recorded_rows_are_of_the_table_or_of_an_earlier_recipe() -> None:
    for line in algorithms.RESULTS.read_text().splitlines():
        found = json.loads(line)
        assert found["algorithm"] in NAMES and len(found["recipe"]) == 12
        assert found["gain"] == pytest.approx(found["trained"] - found["base"])


def test_the_meter_counts_rows_and_backwards() -> None:
    module = nn.Linear(3, 2)
    meter = algorithms.Meter(module)
    with torch.no_grad():
        module(torch.zeros(5, 3))
    assert meter.evaluations == 5
    module(input=torch.zeros(4, 3))
    assert meter.evaluations == 5 + 3 * 4


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[tuple[str, int]]]:
    """The command with `measure` replaced; its exit code and what it measured."""
    measured: list[tuple[str, int]] = []

    def measure(group: Any, name: str, seed: int, **rest: Any) -> dict[str, Any]:
        measured.append((name, seed))
        return row(name, seed, 0.01)

    monkeypatch.setattr(algorithms, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["algorithms.py", *arguments])
    threads = torch.get_num_threads()
    try:
        return algorithms.main(), measured
    finally:
        torch.set_num_threads(threads)


def test_rows_are_appended_over_several_sittings(monkeypatch, tmp_path, capsys, at_root) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("AWM", 0, 0.02, commit="b" * 40 + "+changes")) + "\n")
    chosen = ("--full", "--json", str(path), "--only", "AWM", "DDPO", "--seeds")
    assert run(monkeypatch, *chosen, "0") == (0, [("AWM", 0), ("DDPO", 0)])
    assert len(path.read_text().splitlines()) == 3
    assert run(monkeypatch, *chosen, "0", "1") == (0, [("AWM", 1), ("DDPO", 1)])
    assert run(monkeypatch, *chosen, "1") == (0, [])
    capsys.readouterr()
    assert run(monkeypatch, "--table", "--json", str(path)) == (0, [])
    printed = capsys.readouterr().out
    assert printed.count("not run") == len(NAMES) - 2 and "| 0, 1 " in printed
    assert len(path.read_text().splitlines()) == 5


def test_a_dirty_checkout_appends_nothing_to_the_published_rows(
    monkeypatch, tmp_path, capsys, at_root
) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(algorithms, "RESULTS", path)
    monkeypatch.setattr(algorithms, "commit", lambda: "a" * 40 + "+changes")
    assert run(monkeypatch, "--full") == (2, []) and not path.exists()
    assert "commit first" in capsys.readouterr().err
    monkeypatch.setattr(algorithms, "commit", lambda: "a" * 40)
    assert run(monkeypatch, "--full", "--only", "AWM") == (0, [("AWM", 0)]) and path.exists()
