"""benchmarks/rewards.py measures nothing where a batch is not its samples."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The module, under a name that is not that of the package's `rewards`."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("reward_costs", BENCHMARKS / "rewards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    sys.modules.pop("timing", None)


class Mean:
    name = "clip_score"  # One of those that must see a difference between pictures.

    def __init__(self, leak: float = 0.0, scale: float = 1.0) -> None:
        self.leak, self.scale = leak, scale

    def __call__(self, videos, prompts):
        own = videos.mean(dim=(1, 2, 3, 4)) * self.scale
        return own + self.leak * (len(own) > 1)


def test_a_batch_that_differs_or_a_model_that_sees_nothing_stops_it(benchmark):
    samples, what = benchmark.samples_of("clip_score", 3)
    assert what == "512 x 512" and samples.videos.dtype == torch.uint8
    assert benchmark.check(Mean(), samples, narrow=False) < 1e-6
    with pytest.raises(SystemExit, match="a batch differs from its samples by"):
        benchmark.check(Mean(leak=1e-4), samples, narrow=False)
    with pytest.raises(SystemExit, match="pictures change the score less"):
        benchmark.check(Mean(leak=1e-8, scale=0.0), samples, narrow=False)


def test_a_row_is_written_and_shown(benchmark):
    row = json.loads(json.dumps(benchmark.measure("flicker", torch.device("cpu"))))
    assert row["sample"] == "16 x 64 x 64" and 0 < row["batch_s"] and 0 < row["one_s"]
    cells = benchmark.shown(row | {"extrapolated_from": [2, 5], "weights_bytes": 2e9})
    assert cells[0] == "`flicker` (extrapolated from 2 and 5 layers)" and cells[6] == "2.00"
