"""Snapshots: 2N iterations are N, a resume, and N, bit for bit; damage and signals are survived."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from tiny_models import CPU, tiny_config, tiny_recipe

from dancegrpo_fast import checkpoint
from dancegrpo_fast.cli import main
from dancegrpo_fast.config import Interrupted, RunConfig, UserError
from dancegrpo_fast.held_out import HeldOut
from dancegrpo_fast.report.evaluate import Evaluation
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer

WINDOW = {"rollout.tree.kind": "window", "rollout.tree.window_size": 2}
RUNNING = {"advantage.scope": "running", "advantage.running_window": 20}
EVERY = {"checkpoint.every": 1, "policy.ema_decay": 0.9}


STOPPED = RUNNING | {"policy.ema_decay": 0.9, "policy.train": "lora", "iterations": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_wan_folder) -> RunConfig:
    """The run of `STOPPED` that nothing stopped."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), tiny_wan_folder, STOPPED)
    train(config)
    return config


def state_of(config: RunConfig) -> tuple[dict[str, torch.Tensor], dict]:
    """Everything that the newest snapshot holds."""
    trainer = Trainer(config, CPU)
    assert trainer.resume()
    tensors = checkpoint.collect(trainer.policy, trainer.engine.optimizers)
    extra = {
        "done": trainer.done,
        "ema_updates": trainer.policy.ema_updates,
        "running": {prompt: list(map(tuple, h)) for prompt, h in trainer.running.history.items()},
    }
    return {name: value.clone() for name, value in tensors.items()}, extra


def metrics_of(config: RunConfig) -> list[dict]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(first: RunConfig, second: RunConfig) -> None:
    tensors, extra = state_of(first)
    other, other_extra = state_of(second)
    assert extra == other_extra
    assert {name.split(".")[0] for name in tensors} == {"weights", "optimizer", "ema"}
    assert tensors.keys() == other.keys()
    for name, value in tensors.items():
        assert torch.equal(value, other[name]), name
    assert metrics_of(first) == metrics_of(second)
    assert len(metrics_of(first)) == first.iterations
    assert checkpoint.weights_hash(Path(first.output) / "final") == checkpoint.weights_hash(
        Path(second.output) / "final"
    )


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_resumed_run_is_the_whole_run(tmp_path, tiny_wan_folder, trained):
    """With reward history (its window overflows), drawn windows, two updates and an average."""
    overrides = EVERY | WINDOW | RUNNING | {
        "policy.train": trained, "loss.updates": 2, "iterations": 4,
        "data.prompts_per_iteration": 3,
    }  # fmt: skip
    whole = tiny_config(tmp_path / "whole", tiny_wan_folder, overrides)
    train(whole)
    half = tiny_config(tmp_path / "half", tiny_wan_folder, overrides | {"iterations": 2})
    train(half)
    parts = tiny_config(tmp_path / "half", tiny_wan_folder, overrides)
    train(parts, resume=True)
    assert_same_run(whole, parts)
    base, _ = state_of_base(whole)
    trained_now, extra = state_of(whole)
    assert any(not torch.equal(trained_now[k], v) for k, v in base.items() if "weights" in k)
    assert extra["done"] == 4 and extra["ema_updates"] == 8
    assert {len(history) for history in extra["running"].values()} == {16}
    starts = {Trainer(whole, CPU).plan(i).states[-1].path for i in range(4)}
    assert len(starts) > 1, "all four windows start alike: nothing was drawn"


def state_of_base(config: RunConfig):
    trainer = Trainer(config, CPU)
    return checkpoint.collect(trainer.policy, trainer.engine.optimizers), trainer


def snapshots(config: RunConfig) -> list[Path]:
    return sorted((Path(config.output) / "snapshots").iterdir())


def test_keep_leaves_the_newest(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, EVERY | {"iterations": 4})
    train(config)
    assert [path.name for path in snapshots(config)] == ["iteration-000003", "iteration-000004"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "file, damage, said",
    [
        ("__0_0.distcp", flip, "__0_0.distcp differs from what was written"),
        ("__0_0.distcp", cut, "__0_0.distcp differs from what was written"),
        (".metadata", flip, ".metadata differs from what was written"),
        ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
        ("manifest.json", cut, "manifest.json"),
    ],
)
def test_damaged_snapshot_is_passed_over(
    tmp_path, tiny_wan_folder, caplog, whole, file, damage, said
):
    config = tiny_config(tmp_path / "run", tiny_wan_folder, STOPPED | {"checkpoint.every": 1})
    train(config.model_copy(update={"iterations": 2}))
    damage(snapshots(config)[-1] / file)
    with caplog.at_level(logging.WARNING, logger="dancegrpo_fast.checkpoint"):
        trainer = Trainer(config, CPU)
        assert trainer.resume() and trainer.done == 1
    (warning,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert "iteration-000002" in warning and said in warning and "the one before" in warning
    if damage is flip:
        train(config, resume=True)
        assert_same_run(whole, config)


def test_without_a_usable_snapshot(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder)
    with pytest.raises(UserError, match="holds no usable snapshot; start the run without --resume"):
        train(config, resume=True)


@pytest.mark.parametrize(
    "other",
    [{"policy.train": "full"}, {"policy.lora_rank": 4}, {"policy.ema_decay": 0.9},
     {"policy.lora_targets": ["to_q"]}],
)  # fmt: skip
def test_another_recipe_is_refused(tmp_path, tiny_wan_folder, other):
    overrides = {"policy.train": "lora", "iterations": 1}
    train(tiny_config(tmp_path, tiny_wan_folder, overrides))
    config = tiny_config(tmp_path, tiny_wan_folder, overrides | {"iterations": 2} | other)
    before = metrics_of(config)
    with pytest.raises(UserError, match="holds other tensors than this configuration") as caught:
        train(config, resume=True)
    assert "resume with the recipe it was made with" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert metrics_of(config) == before


def test_a_run_is_not_overwritten(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, {"iterations": 1})
    train(config)
    with pytest.raises(UserError, match="already holds a run; continue it with --resume latest"):
        train(config)


def interrupted_at(monkeypatch, method: str, call: int, number=signal.SIGTERM) -> None:
    """Sends this process a signal in the `call`-th call of a method of the trainer."""
    original, calls = getattr(Trainer, method), []

    def patched(self, *arguments, **settings):
        calls.append(method)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(Trainer, method, patched)


@pytest.mark.parametrize(
    ("method", "call", "grace", "newest"),
    [
        ("sample", 2, 60.0, 1),
        ("score", 2, 60.0, 1),
        ("update", 1, 60.0, 1),
        ("update", 3, 0.0, 2),
        ("save", 1, 60.0, 2),
        ("save", 2, 60.0, 3),
    ],
)
def test_interrupted_run_goes_on_exactly(
    tmp_path, tiny_wan_folder, monkeypatch, whole, method, call, grace, newest
):
    """In rollout or scoring the start of the iteration is saved; a begun update is finished if the
    grace period allows, else the last snapshot stands."""
    changes = STOPPED | {"checkpoint.every": 2, "checkpoint.grace_seconds": grace}
    config = tiny_config(tmp_path, tiny_wan_folder, changes)
    with monkeypatch.context() as patch:
        interrupted_at(patch, method, call)
        with pytest.raises(Interrupted, match="with --resume latest") as caught:
            train(config)
    assert f"the newest snapshot holds {newest};" in str(caught.value)
    assert snapshots(config)[-1].name == f"iteration-{newest:06d}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config, resume=True)
    assert_same_run(whole, config)


def test_a_signal_while_loading_ends_the_run_as_interrupted(
    tmp_path, tiny_wan_folder, monkeypatch
):
    """There is nothing to save: the process ends at once, resumable, and not by the signal."""
    config = tiny_config(tmp_path, tiny_wan_folder)
    with monkeypatch.context() as patch:
        interrupted_at(patch, "__init__", 1)
        with pytest.raises(Interrupted, match="interrupted at once; there is no snapshot yet"):
            train(config)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config)


def test_run_stopped_before_its_first_snapshot_can_go_on(
    tmp_path, tiny_wan_folder, monkeypatch, whole
):
    """The folder holds metrics, so it cannot be started; --resume begins it anew, and says so."""
    config = tiny_config(tmp_path, tiny_wan_folder, STOPPED | {"checkpoint.grace_seconds": 0.0})
    with monkeypatch.context() as patch:
        interrupted_at(patch, "update", 2)
        with pytest.raises(Interrupted, match="before a snapshot; --resume latest starts again"):
            train(config)
    assert len(metrics_of(config)) == 1
    train(config, resume=True)
    assert_same_run(whole, config)


INTERRUPTED = """
import os, signal, sys, torch
torch.set_num_threads(1)
# A shell without job control starts background jobs with SIGINT ignored, and so this process.
signal.signal(signal.SIGINT, signal.default_int_handler)
from dancegrpo_fast.cli import main
from dancegrpo_fast.models.wan import WanFamily
model_output, calls = WanFamily.model_output, []
def interrupted(self, *arguments):
    calls.append(torch.is_grad_enabled())
    if calls.count(False) == 6:  # The second step of the second rollout.
        os.kill(os.getpid(), signal.SIGINT)
    return model_output(self, *arguments)
WanFamily.model_output = interrupted
sys.exit(main(["train", sys.argv[1]]))
"""


def test_killed_process_exits_with_3_and_resumes(tmp_path, tiny_wan_folder):
    recipe = tiny_recipe(tmp_path / "cut", tiny_wan_folder, {"policy.ema_decay": 0.9})
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    killed = subprocess.run(
        [sys.executable, str(script), str(file)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert killed.returncode == 3, killed.stderr[-3000:]
    assert "Traceback" not in killed.stderr
    last = killed.stderr.strip().split("\n")[-1]
    assert last.endswith(
        "interrupted by SIGINT after 1 iterations; the newest snapshot holds 1; continue with "
        "--resume latest"
    )
    assert main(["train", str(file), "--resume", "latest"]) == 0
    whole = tiny_config(tmp_path / "whole", tiny_wan_folder, {"policy.ema_decay": 0.9})
    train(whole)
    assert_same_run(whole, RunConfig.model_validate(recipe))


def test_a_damaged_snapshot_is_saved_anew_when_interrupted(tmp_path, tiny_wan_folder, monkeypatch):
    """Its folder stands at the iteration that is to be saved, and holds nothing."""
    config = tiny_config(tmp_path, tiny_wan_folder, STOPPED | {"checkpoint.every": 3})
    train(config.model_copy(update={"iterations": 1}))
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupted_at(patch, "sample", 2)
            with pytest.raises(Interrupted, match="newest snapshot holds 2;"):
                train(config, resume=True)
        trainer = Trainer(config, CPU)
        assert trainer.resume() and trainer.done == 2
        damaged = trainer.snapshots / "iteration-000002"
        cut(damaged / "__0_0.distcp")
        shutil.copytree(damaged, damaged.with_name("iteration-backup"), dirs_exist_ok=True)


def test_a_prompt_without_any_valid_sample_survives_a_resume(tmp_path, tiny_wan_folder):
    """Its history is empty; after a resume the prompt comes again."""
    reward = {"name": f"{Path(__file__).parent / 'tiny_models.py'}:FailsOnFail"}
    (tmp_path / "prompts.txt").write_text("a red dog\na fail\n")
    changes = RUNNING | {"rewards": [reward], "checkpoint.every": 1, "iterations": 1}
    config = tiny_config(tmp_path, tiny_wan_folder, changes)
    train(config)
    train(config.model_copy(update={"iterations": 2}), resume=True)
    assert [line["iteration"] for line in metrics_of(config)] == [1, 2]


def test_resume_says_what_it_changes(tmp_path, tiny_wan_folder, caplog):
    """Another learning rate is legal when resuming, but never silent."""
    config = tiny_config(tmp_path, tiny_wan_folder, STOPPED)
    train(config)
    values = config.model_dump()
    values["iterations"] += 1
    values["optimizer"]["learning_rate"] *= 2
    with caplog.at_level("WARNING"):
        train(RunConfig.model_validate(values), resume=True)
    told = [r.getMessage() for r in caplog.records if "resumed with another" in r.getMessage()]
    before, after = config.optimizer.learning_rate, values["optimizer"]["learning_rate"]
    assert told == [
        f"resumed with another iterations: {config.iterations} -> {values['iterations']}",
        f"resumed with another optimizer.learning_rate: {before} -> {after}",
    ]


def test_resume_from_a_named_snapshot(tmp_path, tiny_wan_folder, whole):
    """A branch in another folder; in its own folder it would be mixed up with what came later."""
    config = tiny_config(tmp_path, tiny_wan_folder, STOPPED | {"checkpoint.every": 1})
    train(config)
    newest, before = sorted(snapshots(config))[-1], sorted(snapshots(config))[-2]
    with pytest.raises(UserError, match="add output=ANOTHER_FOLDER to branch off"):
        train(config, resume=before)
    branch = config.model_copy(update={"output": str(tmp_path / "branch")})
    train(branch, resume=before)
    hashes = [checkpoint.weights_hash(Path(c.output) / "final") for c in (whole, branch)]
    assert hashes[0] == hashes[1]
    assert [line["iteration"] for line in metrics_of(branch)] == [3]
    train(config, resume=newest)
    with pytest.raises(UserError, match="is no usable snapshot .manifest.json cannot be read"):
        train(branch, resume=tmp_path / "nothing" / "iteration-000003")
    flip(next(newest.glob("*.distcp")))
    with pytest.raises(UserError, match="is no usable snapshot .*differs from what was written"):
        train(config, resume=newest)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_resume_with_other_held_out_prompts_measures_the_base_anew(
    tmp_path, tiny_wan_folder, trained
):
    """A kept evaluation of the base must never be compared with other prompts; and it is the base
    that is measured: adapters off, or the folder's weights put back for as long as it takes."""
    prompts = tmp_path / "held.txt"
    prompts.write_text("a red dog\na blue cat\n")
    changes = STOPPED | {"evaluation.prompts": str(prompts), "evaluation.seeds": 2}
    config = tiny_config(tmp_path, tiny_wan_folder, changes | {"policy.train": trained})
    train(config)
    folder = Path(config.output)
    kept = list(folder.glob("evaluation-base-*.npz"))
    written = kept[0].stat().st_mtime_ns
    train(config, resume=True)
    assert list(folder.glob("evaluation-base-*.npz")) == kept
    assert kept[0].stat().st_mtime_ns == written
    prompts.write_text("green\na fish\na horse\n")
    train(config, resume=True)
    assert len(list(folder.glob("evaluation-base-*.npz"))) == 2
    assert json.loads((folder / "summary.json").read_text())["prompts"] == 3
    before = state_of(config)[0]
    prompts.write_text("a red dog\na blue cat\n")
    first = Evaluation.load(kept[0])
    kept[0].unlink()
    train(config, resume=True)
    assert np.array_equal(Evaluation.load(kept[0]).scores, first.scores)
    for name, value in state_of(config)[0].items():
        assert torch.equal(value, before[name]), f"{name} was not put back"


def test_all_measure_the_base_where_one_process_cannot_see_the_kept_one(
    tmp_path, tiny_wan_folder, monkeypatch
):
    """Another machine's folder may lag behind: alone in an evaluation, it would wait for ever."""
    prompts = tmp_path / "held.txt"
    prompts.write_text("a red dog")
    changes = {"evaluation.prompts": str(prompts)}
    held_out = HeldOut(tiny_config(tmp_path, tiny_wan_folder, changes))
    scores = np.zeros((1, 2, 1))
    found = Evaluation(scores, ("bright",), scores[..., :0], (), np.zeros(1), np.zeros(1))
    measured = []
    monkeypatch.setattr(HeldOut, "_evaluate", lambda *_: measured.append(1) or found)
    for answer, expected in ((0, []), (1, [1])):  # What the other process says.
        world = SimpleNamespace(is_main=True, all_reduce=lambda v, op, a=answer: v.clamp_(min=a))
        trainer = SimpleNamespace(world=world, untrained=nullcontext, done=1)
        if not answer:
            held_out.untrained(trainer, mock.Mock())
            measured.clear()
        held_out.untrained(trainer, mock.Mock())
        assert measured == expected


def test_a_failed_reward_of_weight_zero_enters_no_total():
    scores = np.array([[[1.0, np.nan]], [[3.0, 7.0]]])
    found = Evaluation(scores, ("a", "b"), scores[..., :0], (), np.zeros(2), np.zeros(2))
    np.testing.assert_array_equal(found.total([-2.0, 0.0]), [[-2.0], [-6.0]])
    assert np.isnan(found.total([1.0, 1.0])[0, 0])
