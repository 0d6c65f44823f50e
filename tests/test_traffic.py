"""What crosses the wires in an iteration, counted: benchmarks/traffic.py's claims hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import planning
import traffic
from tiny_models import tiny_config

from dancegrpo_fast.models import open_family
from dancegrpo_fast.planner.network import Networks
from dancegrpo_fast.planner.traffic import Mesh, wire
from dancegrpo_fast.planner.work import work_of

GROUPS = 3  # FSDP2's: the tiny network's two blocks, and the rest.


@pytest.fixture(scope="module")
def patterns(tmp_path_factory) -> dict:
    return traffic.launch(tmp_path_factory.mktemp("traffic"))["patterns"]


def received(found: dict, stage: str, reach: str = "") -> int:
    pairs = found["received"].items()
    return sum(n for key, n in pairs if key.startswith(stage) and key.endswith(reach))


def calls(found: dict, path: str) -> int:
    return sum(n for key, n in found["calls"].items() if key.startswith(path))


def test_weights_are_gathered_once_per_rollout(patterns):
    for name in ("ours", "ours, gradients once per update"):
        assert calls(patterns[name], "rollout/all_gather_tensor/inside") == GROUPS
        others = calls(patterns[name], "rollout") - calls(patterns[name], "rollout/values")
        assert others == GROUPS, "no weights and no gradients move in a rollout otherwise"
        assert received(patterns["public"], "rollout") >= 50 * received(patterns[name], "rollout")


def test_gradients_cross_machines_once_per_update(patterns):
    assert calls(patterns["public"], "update/reduce_scatter_tensor/between") > 10 * GROUPS
    for name in ("ours", "ours, gradients once per update"):
        found = patterns[name]
        assert calls(found, "update/all_reduce/between") == GROUPS
        assert calls(found, "update/all_gather_tensor/between") == 0
        assert calls(found, "update/reduce_scatter_tensor/between") == 0
    deferred = patterns["ours, gradients once per update"]
    assert calls(deferred, "update/reduce_scatter_tensor/inside") == GROUPS
    assert calls(patterns["ours"], "update/reduce_scatter_tensor/inside") > GROUPS


def test_the_planned_public_pattern_is_the_counted_one(tmp_path, tiny_wan_folder):
    """As benchmarks/planning.py compares with, whatever a recipe itself says."""
    ours = tiny_config(tmp_path, tiny_wan_folder, traffic.COMMON | traffic.PATTERNS["ours"])
    planned = planning.public(ours, traffic.PROCESSES)
    for path, value in traffic.PATTERNS["public"].items():
        section, name = path.split(".")
        assert getattr(getattr(planned, section), name) == value
    parallel = planned.parallel
    assert (parallel.dp_replicate, parallel.dp_shard, parallel.sp) == (1, traffic.PROCESSES, 1)
    work = work_of(planned, open_family(planned.model), traffic.PROCESSES)
    # One prompt a process, each of its 8 samples alone: 8 steps, 0.6 of 7 of them trained.
    assert work.rollout["transformer"] == [1] * 64
    assert work.training[0]["transformer"] == [1] * 32


def test_the_planner_predicts_what_is_counted(patterns, tmp_path, tiny_wan_folder):
    """To the byte, and to the collective."""
    for name, pattern in traffic.PATTERNS.items():
        config = tiny_config(tmp_path, tiny_wan_folder, traffic.COMMON | pattern)
        family = open_family(config.model)
        copies = config.parallel.dp_replicate
        mesh = Mesh(copies, traffic.PROCESSES // copies, traffic.MACHINE)
        planned = wire(
            config.parallel, mesh, Networks(config, family).networks,
            work_of(config, family, traffic.PROCESSES), width=4, reference=False, copied=False,
        )  # fmt: skip
        for stage, moved in zip(("rollout", "update"), planned, strict=True):

            def counted(kind: str, reach: str = "", of: str = name, stage: str = stage) -> int:
                return sum(
                    size
                    for key, size in patterns[of][kind].items()
                    if key.startswith(stage) and key.endswith(reach) and "/values/" not in key
                )

            found = {reach: counted("received", reach) for reach in ("inside", "between")}
            found["collectives"] = counted("calls")
            assert vars(moved) == pytest.approx(found), (name, stage)
