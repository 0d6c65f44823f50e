"""benchmarks/throughput.py: what it composes, predicts and counts is what runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import counted
import ladder
import measuring
import scaling
import slices

from dancegrpo_fast.parallel.world import World

SIZE = {"height": 32, "width": 32, "frames": 5, "group_size": 3, "steps": 4, "batch": 3}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """An iteration of a smaller model in the public pattern and in ours."""
    changes = ladder.MODELS["small_wan"]["changes"]
    network = changes["transformer"] | {"ffn_dim": 64, "num_layers": 2}
    small = SIZE | {"changes": changes | {"transformer": network}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ladder.MODELS, "small_wan", ladder.MODELS["small_wan"] | small)
        rungs = (ladder.PUBLIC, ladder.OURS)
        found = measuring.measure("small_wan", rungs, 1)["rows"]
        whole = {"group_size": 3, "steps": 4}
        return {
            rung.name: row | {"counted": slices.counts("small_wan", rung, whole),
                              "planned": scaling.planned("small_wan")}
            for rung, row in zip(rungs, found, strict=True)
        }  # fmt: skip


def test_states_are_those_of_the_tree(rows):
    """3 chains of 4 steps from one noise, the last step not trained; shared: the root only."""
    for name, drawn, trained in (("public pattern", 12, 9), ("ours", 10, 7)):
        row = rows[name]
        assert (row["forwards"], row["trained"], row["samples"]) == (drawn, trained, 3)
        assert row["counted"] == {"drawn": drawn, "trained": trained, "samples": 3}
    assert rows["public pattern"]["calls"] == 12 + 9, "one state a call"
    assert rows["ours"]["calls"] == 4 + 3, "a root, then three states a call"


def test_products_are_those_that_the_planner_predicts(rows):
    """The lines of the figure, against the trace of each call that was made."""
    assert rows["ours"]["planned"] == pytest.approx(rows["ours"]["flops"])


def test_every_part_of_an_iteration_is_reported(rows):
    for row in rows.values():
        assert 0 < row["fused_share"] < 0.5
        assert 0 < row["step_seconds"] < row["update_seconds"]
        assert row["values_asked_for"] > 0
        assert row["collectives"] == 0 and row["launches"] is None
        seconds = row["sample_seconds"] + row["score_seconds"] + row["update_seconds"]
        assert row["samples_per_second"] == pytest.approx(3 / seconds)


def test_every_kernel_of_ours_is_known_by_name():
    root = Path(__file__).parents[1]
    triton = "".join(p.read_text() for p in (root / "dancegrpo_fast/ops/kernels").glob("*.py"))
    cuda = "".join(p.read_text() for p in (root / "csrc").glob("*.cu"))
    names = re.findall(r"^def (\w+_kernel)\(", triton, re.M) + re.findall(r" (\w+_kernel)\(", cuda)
    assert len(names) > 10
    assert all(counted.FUSED.search(name) for name in names), names
    assert counted.FUSED.search("(anonymous namespace)::whole_kernel(void*)")
    others = ("vectorized_elementwise_kernel", "at::native::layer_norm_gradient_kernel<float>")
    assert not any(counted.FUSED.search(name) for name in others)


@pytest.mark.parametrize("part", ["samples", "loss", "norm"])
@pytest.mark.parametrize("wrong", [float("nan"), 3.0])
def test_no_time_is_printed_where_rungs_disagree(part, wrong):
    """Python's `max` passes over a NaN."""

    def found(**changes: Any) -> dict[str, Any]:
        return {"samples": torch.ones(2, 3), "loss": 0.0, "norm": 1.0} | changes

    value = torch.full((2, 3), wrong) if part == "samples" else wrong
    for dtype in ladder.CLOSE:
        assert len(ladder.agreement([found(), found()], dtype)) == 1
        for first, second in (({}, {part: value}), ({part: value}, {})):
            with pytest.raises(SystemExit, match="disagree"):
                ladder.agreement([found(**first), found(**second)], dtype)


def test_a_figure_shows_every_model(tmp_path):
    """`--scaling` on a GPU has four."""
    point = {"value": 8, "planned_flops": 2.0, "seconds": 1.0}
    points = [{"axis": axis, **point} for axis in scaling.AXES]
    models = [f"model{n}" for n in range(4)]
    scaling.draw([{"model": m, "rate": 2.0, "points": points} for m in models], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert all(f"<!-- {model} -->" in text for model in models)


def test_a_whole_is_composed_by_counts():
    part = {
        "sample_seconds": 10.0, "forwards": 5, "score_seconds": 4.0, "samples": 4,
        "update_seconds": 21.0, "step_seconds": 1.0, "trained": 4,
    }  # fmt: skip
    whole = slices.composition(part, {"drawn": 50, "trained": 40, "samples": 12})
    # 2 s a state drawn, 1 s a sample, 5 s a state trained and one optimizer step of 1 s.
    assert whole["seconds"] == {"sample": 100.0, "score": 12.0, "update": 201.0}


def test_a_published_iteration_is_composed_and_not_run(monkeypatch, capsys):
    """Its own entry in the ladder is the slice: composed onto itself it would say nothing."""
    measured = []

    def measure(name: str, rungs: Any, rounds: int, **rollout: Any) -> dict[str, Any]:
        measured.append(rollout)
        cost = {stage: 1.0 for stage in ("sample", "score", "update")}
        row = {f"{stage}_seconds": second for stage, second in cost.items()}
        row |= {"step_seconds": 0.0, "forwards": 13, "trained": 9, "samples": 4}
        ran = rungs if rollout == slices.SLICE else rungs[1:]  # The first did not fit.
        return {"rows": [row | {"rung": rung.name} for rung in ran], "agreement": []}

    monkeypatch.setattr(slices, "measure", measure)
    found = slices.compared("hunyuan", 1)
    assert measured == [slices.SLICE]
    assert found["whole"] == slices.WHOLE["hunyuan"]
    # 24 chains of 16 steps of which 15 train; shared: the noise they begin with.
    public, ours = (row["counts"] for row in found["extrapolated"])
    assert public == {"drawn": 24 * 16, "trained": 24 * 15, "samples": 24}
    assert ours == {"drawn": 1 + 24 * 15, "trained": 1 + 24 * 14, "samples": 24}
    assert "not run" in capsys.readouterr().out
    found = slices.compared("small_wan", 1)
    assert measured[1:] == [slices.SLICE, {"group_size": 12, "steps": 10}]
    assert ["measured" in row for row in found["extrapolated"]] == [False, True]


def test_a_gpu_runs_first_what_says_most_and_ends_in_time(monkeypatch):
    rungs = ladder.ladder(compiled=True, kept="selective")
    assert rungs[4].name == "+ less recomputation" and rungs[4].checkpointing == "selective"
    clock = [0.0]

    class Subject:
        def __init__(self, name: str, rung: ladder.Rung, *_: Any, **__: Any) -> None:
            self.rung, family = rung, SimpleNamespace(dtype=torch.float32)
            self.trainer = SimpleNamespace(family=family)
            self.found = {"samples": torch.ones(1), "loss": 0.0, "norm": 1.0}

    def run(subjects: list[Subject], *_: Any) -> None:
        clock[0] += 100.0
        if subjects[0].rung.name == "+ states shared in training":
            raise torch.cuda.OutOfMemoryError("no room\nfor it")

    gpu = World(0, 1, torch.device("cuda"))
    monkeypatch.setattr(measuring.World, "from_environment", lambda: gpu)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measuring, "Subject", Subject)
    monkeypatch.setattr(measuring, "_run", run)
    monkeypatch.setattr(measuring, "peak", lambda *_: 1.0)
    monkeypatch.setattr(measuring, "_row", lambda s, *_: {"rung": s.rung.name})
    found = measuring.measure("wan", rungs, 1, seconds=520.0)
    names = ["public pattern", "+ states shared in the rollout", "+ samples batched",
             "+ blocks compiled"]  # fmt: skip
    assert [row["rung"] for row in found["rows"]] == names, "in the order of the ladder"
    assert found["not_run"][0] == ("+ states shared in training", "no room")
    late = [rung for rung, why in found["not_run"][1:] if "not end within 520 s" in why]
    assert late[0] == "+ less recomputation" and len(late) == len(rungs) - 5


def test_the_rate_of_the_figure():
    points = [{"planned_flops": 8.0, "seconds": 4.0}, {"planned_flops": 8.0, "seconds": 1.0}]
    rate, error = scaling.fit(points)
    assert rate == pytest.approx(4.0)
    assert error == pytest.approx(1.0)
