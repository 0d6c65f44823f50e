"""One process and two make the same update: keys, data and selection bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_worker import CASES, run_case, whole_run
from launching import launch
from safetensors.torch import load_file
from tiny_models import CPU, tiny_wan

from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.report.metrics import read_metrics
from dancegrpo_fast.run import train

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for experts in (1, 2):
        tiny_wan(folder / f"wan{experts}", experts=experts)
    return folder


@pytest.fixture(scope="module")
def two_processes(models, tmp_path_factory) -> Path:
    """The folder of what two processes recorded: one launch for all cases."""
    out = tmp_path_factory.mktemp("two")
    launch(WORKER, models, out, timeout=150)
    return out


@pytest.fixture(scope="module", params=CASES)
def runs(request, models, two_processes, tmp_path_factory):
    """(name, what one process did, what each of two did)."""
    name = request.param
    files = [two_processes / f"{name}-{rank}.pt" for rank in (0, 1)]
    missing = [file.name for file in files if not file.is_file()]
    assert not missing, f"{missing}: a process failed in this case or in one before"
    torch.set_num_threads(1)
    alone = run_case(name, CPU, models, tmp_path_factory.mktemp(f"one-{name}"))
    return name, alone, [torch.load(file, weights_only=True) for file in files]


def test_noise_data_and_selection_are_the_same_bits(runs):
    _, alone, both = runs
    for found in both:
        assert found["plan"] == alone["plan"]
        assert found["prompts"] == alone["prompts"]
        assert found["divisors"] == alone["divisors"]
        assert found["modules"] == alone["modules"]
        for place, latents in found["latents"].items():
            if place[1] in found["roots"]:
                assert torch.equal(latents, alone["latents"][place])
    assert set(both[0]["keys"]) | set(both[1]["keys"]) == set(alone["keys"])
    assert sorted(both[0]["leaves"] + both[1]["leaves"]) == alone["leaves"]
    assert_same_credit(alone["trained"], [found["trained"] for found in both])


def assert_same_credit(alone, both) -> None:
    """Edges and weights exactly; advantages to the rounding of the rewards."""
    for update, expected in enumerate(alone):
        parts = [found[update] for found in both]
        assert set(parts[0]) | set(parts[1]) == set(expected)
        for edge, (weight, advantages) in expected.items():
            here = [part[edge] for part in parts if edge in part]
            assert sum(w for w, _ in here) == weight
            total = np.sum([a for _, a in here], axis=0)
            np.testing.assert_allclose(total, advantages, rtol=1e-3, atol=1e-4)


def test_samples_and_rewards_agree(runs):
    _, alone, both = runs
    for found in both:
        np.testing.assert_array_equal(found["rewards"], both[0]["rewards"])
        np.testing.assert_allclose(found["rewards"], alone["rewards"], atol=1e-5)
        for place in found["leaves"]:
            difference = (found["latents"][place] - alone["latents"][place]).abs().max()
            assert difference < 1e-5


def test_one_update_agrees(runs):
    name, alone, both = runs
    moved = 0.0
    for key, weight in alone["after"].items():
        assert torch.equal(both[0]["after"][key], both[1]["after"][key]), "replicas drifted"
        assert torch.equal(both[0]["before"][key], alone["before"][key])
        assert (both[0]["after"][key] - weight).abs().max() < 1e-6
        change = (weight - alone["before"][key]).abs().max().item()
        trained = any(key.split(".")[0] in names for names in alone["modules"])
        assert trained or change == 0, f"{key}: an expert with nothing to train was stepped"
        moved = max(moved, change)
    # The tolerance says something: the update is hundreds of times larger and more.
    assert moved > 5e-4, f"{name} moved by {moved:.1e}"


def test_all_processes_make_the_same_calls(runs):
    _, alone, both = runs
    first, second = both
    assert first["calls"] == first["planned"] == second["calls"] == second["planned"]
    assert first["collectives"] == second["collectives"]
    assert sum(entry.startswith("all_gather") for entry in first["collectives"]) == 1
    np.testing.assert_array_equal(
        list(first["metrics"].values()), list(second["metrics"].values())
    )
    assert alone["collectives"] == []


def test_the_cases_are_what_they_claim(two_processes):
    """Processes with nothing to train, an unequal share, and a tree that two processes hold."""

    def of(name):
        return [torch.load(two_processes / f"{name}-{r}.pt", weights_only=True) for r in (0, 1)]

    assert [len(found["leaves"]) for found in of("uneven_tree")] == [3, 2]
    for name in ("best_of_n", "nan_prompt"):
        busy, idle = sorted(of(name), key=lambda found: -len(found["trained"][0]))
        assert busy["trained"][0] and not idle["trained"][0]
        assert idle["calls"], "the process with nothing to do still owes its calls"
    assert np.isnan(of("nan_prompt")[0]["rewards"]).sum() == 4
    first, second = of("siblings")
    assert first["latents"].keys() & second["latents"].keys()
    assert of("idle_expert")[0]["modules"] == [("transformer_2",)]
    assert of("split_experts")[0]["modules"] == [("transformer", "transformer_2")]
    for name in ("later_expert", "later_expert_awm"):
        assert of(name)[0]["modules"] == [("transformer",), ("transformer_2",)]


def test_ratio_gate_stops_every_process(two_processes):
    """The gap is in process 1's samples alone: both stop, and only it looks for the reason."""
    both = [torch.load(two_processes / f"gate-{r}.pt", weights_only=True) for r in (0, 1)]
    first, second = (message.split("\n") for message in both)
    assert first[:-1] == second[:-1]
    assert first[0].startswith("ratio gate: rollout and training log-probs differ by up to ")
    assert first[-1].endswith("at most; the gap is in another one's samples")
    assert second[-1].startswith("the batch shape does not explain it")


def test_whole_run_on_two_processes_and_its_resume_on_one(two_processes, models, tmp_path):
    """Snapshots, evaluation, export and report; the run goes on elsewhere with the same draws."""
    folder = two_processes / "whole"
    two = whole_run(folder, models, CPU)
    assert {"final", "summary.json", "report.html"} <= {p.name for p in (folder / "run").iterdir()}
    one = whole_run(tmp_path, models, CPU, iterations=3)
    train(one)
    train(two.model_copy(update={"iterations": 3}), resume=True)
    ours, theirs = (read_metrics(Path(c.output) / "metrics.jsonl") for c in (one, two))
    assert [line["iteration"] for line in ours] == [0, 1, 2, 3, 3]
    trained = [line for line in ours if "reward/mean" in line]
    again = [line for line in theirs if "reward/mean" in line]
    assert len(trained) == len(again) == 3
    for first, second in zip(trained, again, strict=True):
        assert first["reward/mean"] == pytest.approx(second["reward/mean"], abs=1e-5)
        assert first["policy/log_prob"] == pytest.approx(second["policy/log_prob"], abs=1e-4)
    final = [next((Path(c.output) / "final").glob("*.safetensors")) for c in (one, two)]
    other = load_file(final[1])
    for name, value in load_file(final[0]).items():
        assert (value - other[name]).abs().max() < 1e-4
        assert "lora_B" not in name or value.abs().max() > 5e-4


def test_experts_are_evaluated_by_processes_with_unequal_work(two_processes, models, tmp_path):
    """Gathering an expert is an exchange: the process with fewer prompts takes part in each."""
    changes = {"model.path": str(models / "wan2"), "evaluation.batch_size": 1, "iterations": 1}
    one = whole_run(tmp_path, models, CPU, **changes)
    train(one)
    scores = [
        np.load(next((folder / "run").glob("evaluation-base-*.npz")))["scores"]
        for folder in (two_processes / "experts", tmp_path)
    ]
    assert scores[0].shape == (3, 1, 1)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_too_few_samples_for_the_processes_is_refused():
    with pytest.raises(ValueError, match="1 prompts x 2 samples .* 3 processes"):
        leaf_owners(1, 2, 3)


def test_what_spread_groups_leave_over_falls_on_all_ranks():
    for prompts, size, ranks in ((48, 24, 16), (3, 5, 3), (2, 7, 4), (4, 6, 3)):
        owner = leaf_owners(prompts, size, ranks, spread=True)
        for table in (owner, *owner):  # The whole, and each prompt.
            counts = np.bincount(table.ravel(), minlength=ranks)
            assert counts.max() - counts.min() <= 1


def test_gather_of_uneven_leaf_counts(monkeypatch):
    """Rewards come back in canonical order whatever the shares; padding never shows."""
    rewards = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    rewards[1, 2, 0] = np.nan
    for size in (1, 2, 3, 4, 7):
        owner = leaf_owners(2, 5, size)
        shares = [torch.from_numpy(rewards[owner == rank]) for rank in range(size)]
        most = max(len(share) for share in shares)

        def gather(parts, own, shares=shares, most=most):
            for part, share in zip(parts, shares, strict=True):
                assert part.shape == own.shape == (most, 3)
                part.fill_(torch.inf)[: len(share)] = share

        monkeypatch.setattr(torch.distributed, "all_gather", gather)
        for rank in range(size):
            world = World(rank, size, torch.device("cpu"))
            np.testing.assert_array_equal(world.gather_rewards(shares[rank], owner), rewards)
