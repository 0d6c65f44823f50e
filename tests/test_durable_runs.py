"""Runs of two processes (FSDP2): resumed exactly, on other meshes, after damage, signals, NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from durable_worker import DAMAGES, KINDS, SIGNALLED, continued
from safetensors.torch import load_file
from test_resume import assert_same_run, snapshots
from tiny_models import CPU

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import RunConfig

WORKER = Path(__file__).with_name("durable_worker.py")


def launched(what: str, processes: int, model: Path, out: Path) -> Path:
    """The folder of what a worker left there."""
    tests = WORKER.parent
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc-per-node={processes}", str(WORKER), what, str(model), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def resumed(tiny_wan_folder, tmp_path_factory) -> Path:
    return launched("resumed", 2, tiny_wan_folder, tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def troubled(tiny_wan_folder, tmp_path_factory) -> Path:
    return launched("troubled", 2, tiny_wan_folder, tmp_path_factory.mktemp("troubled"))


@pytest.fixture(scope="module")
def four(resumed, tiny_wan_folder) -> Path:
    return launched("continued", 4, tiny_wan_folder, resumed)


def config_of(folder: Path, **changes) -> RunConfig:
    """The recipe that a run left, read on one process."""
    values = yaml.safe_load((folder / "run" / "recipe.yaml").read_text())
    return RunConfig.model_validate(values | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_whole_run(resumed, kind):
    """Bit for bit, with an average, drawn windows, reward history and two updates an iteration."""
    whole, half = (config_of(resumed / f"{part}-{kind}") for part in ("whole", "half"))
    assert whole.policy.train == kind
    assert len([path for path in (snapshots(whole)[-1]).glob("__*.distcp")]) == 2
    assert_same_run(whole, half)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_seen_by_all_and_said_once(resumed, name):
    (iteration, said), (other, nothing) = (
        torch.load(resumed / f"damaged-{rank}.pt", weights_only=True)[name] for rank in (0, 1)
    )
    assert iteration == other == 3
    assert nothing == []
    (warning,) = said
    assert "iteration-000004 is damaged" in warning and "trying the one before" in warning
    assert DAMAGES[name][0] in warning


def found_on(resumed: Path, size: int) -> list[dict]:
    files = [resumed / f"continued-{size}-{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def alone(resumed, tiny_wan_folder) -> dict:
    return continued(resumed / "continued-1", tiny_wan_folder, CPU, resumed / "begun")


@pytest.mark.parametrize("size", [2, 4])
def test_another_mesh_goes_on_with_the_same_draws(resumed, four, alone, size):
    """What two processes began, one, two and four go on with: keys exactly, results nearly.

    1e-5 is promised; 5e-7 is some roundings of numbers of size 1, and below a loss of 1e-5.
    """
    ranks = found_on(resumed, size)
    assert set().union(*(found["keys"] for found in ranks)) == set(alone["keys"])
    assert sorted(sum((found["leaves"] for found in ranks), [])) == alone["leaves"]
    for found in ranks:
        for name in ("plan", "prompts", "divisors", "modules"):
            assert found[name] == alone[name], name
        np.testing.assert_allclose(found["rewards"], alone["rewards"], atol=1e-5)
        for place, latents in found["latents"].items():
            if place[1] in found["roots"]:
                assert torch.equal(latents, alone["latents"][place])
    for update, expected in enumerate(alone["trained"]):
        parts = [found["trained"][update] for found in ranks]
        assert set().union(*parts) == set(expected)
    expected = alone["metrics"]
    assert expected["update/grad_norm"] > 1e-3 and expected["policy/ratio_deviation"] > 1e-5
    for name, value in ranks[0]["metrics"].items():
        # An advantage divides the rewards' roundings by their deviation, here some hundredths.
        tolerance = 1e-5 if name.startswith("advantage/") else 5e-7
        assert value == pytest.approx(expected[name], abs=tolerance), name


def test_signal_to_one_process_stops_both(troubled, tiny_wan_folder, tmp_path):
    """In rollout, scoring, update and save; the run of which one went on ends as it would have."""
    first, second = (
        torch.load(troubled / f"stopped-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for place, (_, _, newest) in SIGNALLED.items():
        assert f"interrupted by another process's signal after {newest} it" in first[place]
        assert f"interrupted by SIGTERM after {newest} iterations; the newest" in second[place]
    whole, again = (config_of(troubled / name) for name in ("stopped-scoring", "stopped-update"))
    assert_same_run(whole, again)


def test_one_process_with_nan_skips_the_update_on_both(troubled):
    """Counted, in a row and in all; the third in a row ends the run on both, with one message."""
    both = [torch.load(troubled / f"spoiled-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for found in both:
        counted = [(m["update/skipped"], m["update/skipped_total"]) for m in found["metrics"]]
        assert counted == [(0, 0), (2, 2), (0, 2), (2, 4)]
        first, second, third, fourth = found["weights"]
        for name, value in first.items():
            assert torch.equal(value, second[name]) and value.isfinite().all()
            assert torch.equal(third[name], fourth[name]) and third[name].isfinite().all()
        assert any(not torch.equal(value, third[name]) for name, value in first.items())
        assert "3 updates in a row had no finite gradient" in found["error"]
    assert both[0]["error"] == both[1]["error"]


def test_run_of_two_processes_is_exported_and_sampled_on_one(resumed, tmp_path, capsys):
    run = resumed / "whole-lora" / "run"
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    folders = (tmp_path / "out", run / "final")
    exported, final = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
    assert exported.keys() == final.keys()
    for name, value in final.items():
        assert torch.equal(value, exported[name]), name
    shown = tmp_path / "samples"
    assert main(["sample", str(run), "--prompt", "a red square", "--out", str(shown)]) == 0
    assert len((shown / "samples.jsonl").read_text().splitlines()) == 1
