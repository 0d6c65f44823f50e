"""Killed, stopped and hung processes under torchrun: the run ends as an undisturbed one does.

Run: pytest -m slow tests/test_kills.py      (log of one run: benchmarks/results/kills.log)
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import tiny_recipe

from dancegrpo_fast.report.metrics import read_metrics

HERE = Path(__file__).parent
LOG = HERE.parent / "benchmarks" / "results" / "kills.log"
CHANGES = {
    "policy.train": "lora", "policy.ema_decay": 0.9, "advantage.scope": "running",
    "checkpoint.every": 1, "loss.updates": 2, "loss.micro_batch_size": 4,
}  # fmt: skip
ASKS = 30  # About two iterations' places where all processes may stop.


def launched(
    folder: Path, model: Path, harms: list[dict], *, restarts: int = 0, **changes: object
) -> subprocess.CompletedProcess:
    """A run of two processes in `folder` that comes to harm."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, file = folder / "recipe.yaml", folder / "harms.json"
    recipe.write_text(yaml.safe_dump(tiny_recipe(folder, model, CHANGES | changes)))
    file.write_text(json.dumps(harms))
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", "--monitor-interval=0.1",
        str(HERE / "kill_worker.py"), str(recipe), str(file), str(folder),
    ]  # fmt: skip
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1500
    )


def harm(what: str, place: str, count: int, rank: int) -> dict:
    return {"what": what, "place": place, "count": count, "rank": rank}


def random_kills(count: int, seed: int) -> list[dict]:
    """Moments all over rollout, scoring, update and save, of one process or of both."""
    draw, kills = random.Random(seed), []
    for number in range(count):
        place = ("clock", "ask", "save", "clock", "finish", "complete")[number % 6]
        most = {"clock": 1500, "ask": ASKS}.get(place, 3)
        rank = draw.choice((0, -1)) if place == "complete" else draw.choice((0, 1, -1))
        kills.append(harm("kill", place, draw.randint(1, most), rank))
    return kills


def trained(run: Path) -> list[dict]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "reward/mean" in line]


def killed_run(folder: Path, model: Path, kills: list[dict], iterations: int) -> list[str]:
    """Asserts that a run with kills ends as the one without, and that little was repeated."""
    started = time.time()
    done = launched(folder, model, kills, restarts=len(kills) + 1, iterations=iterations)
    assert done.returncode == 0, done.stderr[-8000:]
    killed, whole = folder / "run", folder / "whole"
    one, other = (load_file(next((run / "final").glob("*.safetensors"))) for run in (killed, whole))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{name} differs"
    assert trained(killed) == trained(whole)
    assert len(trained(killed)) == iterations
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [start["start"] for start in starts] == list(range(1, len(kills) + 1))
    for start in starts:
        # Iteration N is logged once the snapshot of N - 1 is whole: no more than one is repeated.
        assert start["resumed"] == start["saved"] >= start["logged"] - 1
    rows = [
        f"{kill['place']:>8} {kill['count']:4d} {'all' if kill['rank'] < 0 else kill['rank']:>7}"
        f"{start['logged']:20d}{start['resumed']:15d}"
        for kill, start in zip(kills, starts, strict=True)
    ]
    return [
        f"{len(kills)} kills, {len(starts)} restarts, {iterations} iterations, both runs in "
        f"{time.time() - started:.0f} s",
        f"final parameters and all metrics of {iterations} iterations: equal, bit for bit",
        "",
        "place, its call or ms, process, last iteration logged, resumed after",
        *rows,
    ]


def test_a_kill(tmp_path, tiny_wan_folder):
    """Both processes at once, while a snapshot is completed."""
    killed_run(tmp_path, tiny_wan_folder, [harm("kill", "complete", 2, -1)], 3)


@pytest.mark.slow
def test_twenty_kills(tmp_path, tiny_wan_folder):
    kills = random_kills(20, seed=0)
    said = killed_run(tmp_path, tiny_wan_folder, kills, 40)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    head = f"commit {commit}, torch {torch.__version__}, 2 processes on CPU, FSDP2, gloo"
    LOG.write_text("\n".join([head, *said, ""]))


@pytest.mark.parametrize(
    ("place", "count", "newest"),
    [("rollout", 2, 1), ("scoring", 2, 1), ("step", 3, 2), ("save", 2, 2)],
)
@pytest.mark.slow  # Two starts of two processes each; signals at these places: test_durable_runs.
def test_torchrun_is_told_to_stop(tmp_path, tiny_wan_folder, place, count, newest):
    """It passes SIGTERM on: every process ends with code 3, in time, and the run goes on."""
    started = time.time()
    done = launched(tmp_path, tiny_wan_folder, [harm("stop", place, count, 1)], iterations=3)
    # torchrun kills after 30 s what has not ended.
    assert done.returncode != 0 and "SIGKILL" not in done.stderr and time.time() - started < 60
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert f"interrupted by SIGTERM after {newest} iterations; the newest" in done.stderr
    assert len(trained(tmp_path / "run")) == newest
    saved = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    assert saved[-1] == f"iteration-{newest:06d}"


def test_hung_process_ends_the_run(tmp_path, tiny_wan_folder):
    """Process 1 sleeps in its second rollout: process 0 says where it waited, and both end."""
    changes = {"parallel.timeout_seconds": 8, "iterations": 3}
    done = launched(tmp_path, tiny_wan_folder, [harm("hang", "rollout", 2, 1)], **changes)
    assert done.returncode != 0
    assert (tmp_path / "code-0").read_text() == "3"
    (line,) = [line for line in done.stderr.splitlines() if ": process 0 got no answer" in line]
    assert "in iteration 1 (sample)" in line and "parallel.timeout_seconds = 8;" in line
    assert "continue with --resume latest" in line
