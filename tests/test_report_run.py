"""What a run logs and reports while it goes on, and what is there after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_config

from dancegrpo_fast.advantages import LeafAdvantages
from dancegrpo_fast.config import Interrupted, RunConfig
from dancegrpo_fast.losses.step_ratios import StepRatios
from dancegrpo_fast.report.metrics import read_metrics
from dancegrpo_fast.report.statistics import reward_metrics
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer

UPDATES = {
    "iterations": 3, "checkpoint.every": 2, "loss.updates": 2, "optimizer.learning_rate": 0.01,
}  # fmt: skip


def held_out(folder: Path) -> dict:
    (folder / "held_out.txt").write_text("a red dot\na green dot\na blue dot")
    return {"evaluation.prompts": str(folder / "held_out.txt"), "evaluation.every": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_wan_folder) -> RunConfig:
    """A run of two updates an iteration, without held-out prompts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder, tiny_wan_folder, UPDATES)
    assert train(config) == folder / "run" / "report.html"
    return config


def test_a_run_without_held_out_prompts_has_a_report_and_a_summary(finished):
    run = Path(finished.output)
    page = (run / "report.html").read_text()
    assert "3 of 3 iterations. Written" in page and "Training samples" in page
    assert "from_pretrained" in page and "Ratio by step" in page
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["weights_sha256"]) == {"base", "trained"} and "reward" not in summary


def test_times_stand_in_a_file_of_their_own(finished):
    lines = read_metrics(Path(finished.output) / "times.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    for line in lines:
        work = sum(line[f"time/{stage}"] for stage in ("sample", "score", "update"))
        # 2 prompts of 4 samples.
        assert line["speed/samples_per_second"] == pytest.approx(8 / work)
    assert "time/snapshot" in lines[1] and "time/snapshot" not in lines[0]
    assert "time/" not in (Path(finished.output) / "metrics.jsonl").read_text()


def test_ratios_by_step_are_those_of_the_whole_taken_apart(finished):
    """Every sample trains each of the three steps: the plain mean over steps is the mean."""
    lines = read_metrics(Path(finished.output) / "metrics.jsonl")
    for line in lines:
        deviations = [line[f"steps/ratio_deviation/{step:02d}"] for step in range(3)]
        clipped = [line[f"steps/clipped/{step:02d}"] for step in range(3)]
        assert "steps/clipped/03" not in line  # The last step is not trained.
        # The op sums float32 ratios near 1, whose rounding is 6e-8.
        assert np.mean(deviations) == pytest.approx(line["policy/ratio_deviation"], abs=3e-7)
        both = line["policy/clipped_low"] + line["policy/clipped_high"]
        assert np.mean(clipped) == pytest.approx(both, abs=1e-12)
    assert lines[-1]["policy/ratio_deviation"] > 1e-5


def test_sums_by_step_by_hand():
    """Two states of one call: step 1 with children of ratios 1.05 and 0.98, step 2 with one."""
    states = [SimpleNamespace(step=step) for step in (1, 2)]
    drawn = SimpleNamespace(plan=SimpleNamespace(states=states))
    call = SimpleNamespace(items=[
        SimpleNamespace(state=0, children=[5, 6], weights=[1.0, 2.0]),
        SimpleNamespace(state=1, children=[7, 8], weights=[1.0, 0.0]),  # The last is not trained.
    ])  # fmt: skip
    ratios = StepRatios(4, 0.03, torch.device("cpu"))
    old = torch.tensor([0.3, -0.2, 1.0, 0.0])
    new = old + torch.tensor([1.05, 0.98, 0.9, torch.nan]).log()
    ratios.record(call, drawn, new, old)
    ratios.record(call, drawn, new.nan_to_num(), None)  # On the policy: another 1 each.
    found = ratios.metrics(lambda values, op: None)
    # float32 log-probs near 1 hold 1e-7.
    assert found == pytest.approx({
        "steps/ratio_deviation/01": (0.05 + 0.02) / 4, "steps/clipped/01": 1 / 4,
        "steps/ratio_deviation/02": 0.1 / 2, "steps/clipped/02": 1 / 2,
    }, abs=1e-6)  # fmt: skip


def test_on_policy_runs_have_no_ratios_by_step(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, {"iterations": 1})
    train(config)
    (line,) = read_metrics(Path(config.output) / "metrics.jsonl")
    assert not [name for name in line if name.startswith("steps/")]
    page = (Path(config.output) / "report.html").read_text()
    assert "Every ratio was exactly 1: nothing was clipped." in page


def test_a_killed_run_leaves_the_page_of_its_last_evaluation(
    tmp_path, tiny_wan_folder, monkeypatch
):
    iteration = Trainer.iteration

    def stops(trainer: Trainer) -> dict[str, float]:
        if trainer.done == 2:
            raise KeyboardInterrupt
        return iteration(trainer)

    monkeypatch.setattr(Trainer, "iteration", stops)
    overrides = {"iterations": 4, "checkpoint.every": 4, **held_out(tmp_path)}
    config = tiny_config(tmp_path, tiny_wan_folder, overrides)
    with pytest.raises(Interrupted):
        train(config)
    page = (Path(config.output) / "report.html").read_text()
    assert "2 of 4 iterations; the run goes on or was interrupted" in page
    assert "Highest reward" in page and 'alt="iteration 2: a blue dot"' in page


def test_a_page_that_fails_ends_no_run(tmp_path, tiny_wan_folder, monkeypatch, caplog):
    def fails(folder):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("dancegrpo_fast.report.log.write_page", fails)
    config = tiny_config(tmp_path, tiny_wan_folder, {"iterations": 2, "checkpoint.every": 1})
    assert train(config) is None
    assert "no report after iteration 1 (ZeroDivisionError: a defect); the run" in caplog.text
    assert (Path(config.output) / "summary.json").is_file()


def test_a_resumed_run_fills_its_page(tmp_path, tiny_wan_folder):
    overrides = {"iterations": 1, "checkpoint.every": 1, **held_out(tmp_path)}
    config = tiny_config(tmp_path, tiny_wan_folder, overrides)
    train(config)
    run = Path(config.output)
    assert json.loads((run / "audit.json").read_text())[0].keys() == {
        "name", "base", "trained", "threshold", "flagged", "advice",
    }  # fmt: skip
    train(config.model_copy(update={"iterations": 2}), resume=True)
    assert [p.name for p in sorted((run / "evaluations").iterdir())] == [
        "000000", "000001", "000002",
    ]  # fmt: skip
    page = (run / "report.html").read_text()
    assert "2 of 2 iterations. Written" in page and "<h2>Audit</h2>" in page
    assert len(read_metrics(run / "times.jsonl")) == 2


def test_statistics_of_rewards_and_advantages():
    rewards = np.array([[[1.0, 5.0], [3.0, np.nan]], [[2.0, 7.0], [np.nan, 9.0]]])
    valid = np.array([[True, True], [True, False]])
    values = np.array([[[-1.0, 0.5], [1.0, -0.5]], [[0.0, 2.0], [0.0, 0.0]]])
    advantages = LeafAdvantages(values, np.array([1.0, 2.0]), valid, 0.5)
    found = reward_metrics(rewards, np.array([2.0, 0.0]), ["a", "b"], advantages)
    assert found == {
        "reward/mean": 4.0,  # 2, 6, 4; the last sample failed
        "reward/std_in_group": 1.0,  # 2 and 0
        "reward/failed": 0.5,
        "reward/zero_variance": 0.5,
        "reward/a": 2.0,
        "reward/b": 7.0,
        "advantage/mean_size": pytest.approx(4 / 3),  # 0, 0, 4
        "advantage/min": 0.0,
        "advantage/max": 4.0,
    }


def test_statistics_of_nothing_are_no_numbers():
    rewards = np.full((1, 2, 1), np.nan)
    advantages = LeafAdvantages(np.zeros((1, 2, 1)), np.ones(1), np.zeros((1, 2), bool), 1.0)
    found = reward_metrics(rewards, np.ones(1), ["a"], advantages)
    assert np.isnan(found["reward/mean"]) and found["reward/failed"] == 1.0
    assert "advantage/max" not in found and "reward/a" not in found
