"""A search on two processes is that on one: the same choices, calls and update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from launching import launch
from search_worker import SEARCHES, run_case
from tiny_models import CPU, tiny_wan

WORKER = Path(__file__).with_name("search_worker.py")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_wan(folder / "wan1")
    return folder


@pytest.fixture(scope="module")
def two_processes(models, tmp_path_factory) -> Path:
    """The folder of what two processes recorded: one launch for all cases."""
    out = tmp_path_factory.mktemp("two")
    launch(WORKER, models, out, timeout=150)
    return out


def recorded(folder: Path, name: str) -> list[dict]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name in SEARCHES if name != "search_moody"])
def test_two_processes_make_the_update_of_one(name, models, two_processes, tmp_path):
    torch.set_num_threads(1)
    both = recorded(two_processes, name)
    alone = run_case("search" if name == "search_sp" else name, CPU, models, tmp_path)
    moved = 0.0
    for found in both:
        assert found["plan"] == alone["plan"] and found["divisors"] == alone["divisors"]
        # Rewards are pixels' means; forwards of other batches round differently.
        np.testing.assert_allclose(found["rewards"], alone["rewards"], atol=1e-5)
        assert found["rewards"] == both[0]["rewards"]
        assert found["calls"] == found["planned"] == both[0]["calls"]
        assert found["collectives"] == both[0]["collectives"]
        for place, latents in found["latents"].items():
            # The candidate that went on is another's, or the same to the rounding of the network.
            assert (latents - alone["latents"][place]).abs().max() < 1e-5
        assert found["metrics"] == both[0]["metrics"]
        assert found["metrics"]["searched/mean"] == pytest.approx(
            alone["metrics"]["searched/mean"], abs=1e-5
        )
        for cost in ("search/evaluations", "search/previews", "search/scored"):
            assert found["metrics"][cost] == alone["metrics"][cost]
    for key, weight in alone["after"].items():
        assert torch.equal(both[0]["after"][key], both[1]["after"][key])
        assert (both[0]["after"][key] - weight).abs().max() < 1e-6
        moved = max(moved, (weight - alone["before"][key]).abs().max().item())
    assert moved > 5e-4, f"{name} moved by {moved:.1e}"
    leaves = [tuple(leaf) for found in both for leaf in found["leaves"]]
    if name == "search_sp":  # One group holds all.
        assert both[0]["leaves"] == both[1]["leaves"] == alone["leaves"]
    else:
        assert sorted(leaves) == alone["leaves"]


def test_processes_that_share_samples_go_on_from_the_same_candidates(two_processes):
    """Though the reward says something else to each."""
    first, second = recorded(two_processes, "search_moody")
    assert first["rewards"] == second["rewards"]
    assert first["latents"].keys() == second["latents"].keys()
    for place, latents in first["latents"].items():
        assert torch.equal(latents, second["latents"][place])
    for key, weight in first["after"].items():
        assert torch.equal(weight, second["after"][key])
