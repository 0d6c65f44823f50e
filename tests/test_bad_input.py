"""What users get wrong: one line each with field, value and way out, exit code 2, no work lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import CPU, AlwaysFails, tiny_config, tiny_recipe

from dancegrpo_fast.cli import main
from dancegrpo_fast.config import UserError
from dancegrpo_fast.ops import policy_loss, sample_transition, transition_log_prob
from dancegrpo_fast.parallel.lock import FolderLock
from dancegrpo_fast.trainer import Trainer

HERE = Path(__file__).parent


@pytest.fixture
def recipe(tmp_path, tiny_wan_folder, monkeypatch) -> str:
    """A recipe that would run, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "no_class.py").write_text("class Other:\n    pass\n")
    Path("r.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_wan_folder)))
    return "r.yaml"


def refused(capsys, *arguments: str) -> list[str]:
    """Runs `train`, which must end in exit code 2 before anything is written; its lines."""
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.strip().split("\n") if "Loading" not in line]
    assert not any("Traceback" in line for line in lines)
    assert not Path("run").exists(), "something was written before the mistake was found"
    return lines


@pytest.mark.parametrize(
    ("override", "named", "way_out"),
    [
        # unknown key, wrong type, out of range
        ("rollout.grup_size=3", "rollout.grup_size = 3", "did you mean rollout.group_size?"),
        ("iterations=many", "iterations = 'many'", "must be a whole number"),
        ("rollout.noise_level=0", "rollout.noise_level = 0", "needs noise"),
        # fields that do not fit each other
        (
            "rollout.group_size=1",
            "rollout.group_size = 1",
            "use 2 or more, or advantage.scope = batch or running",
        ),
        (
            "rollout.tree={kind: window, window_size: 2, window_start: 2}",
            "rollout.tree.window_start = 2",
            "must start in 0 to 1 (3 of 4 steps can be trained)",
        ),
        (
            "rollout.tree={kind: window, window_size: 9}",
            "rollout.tree.window_size = 9",
            "must be from 1 to 3 (3 of 4 steps can be trained)",
        ),
        # files
        ("model.path=gone", "model.path = 'gone'", "give the folder of a diffusers pipeline"),
        ("data.prompts=gone.txt", "data.prompts = 'gone.txt'", "give a text file with one prompt"),
        ("data.prompts=empty.txt", "data.prompts = 'empty.txt'", "holds no prompt; write one a"),
        (
            "evaluation.prompts=empty.txt",
            "evaluation.prompts = 'empty.txt'",
            "holds no prompt; write one a",
        ),
        # the model's own limits
        ("model.height=20", "model.height = 20", "must be a multiple of 16 here; use 16 or 32"),
        (
            "model.frames=4",
            "model.frames = 4",
            "(frames - 1) must be divisible by 2 here; use 3 or 5",
        ),
        (
            "policy={train: lora, lora_targets: [to_z]}",
            "policy.lora_targets = ['to_z']",
            "give names of its linear layers",
        ),
        # rewards
        ("rewards=[{name: aesthetic}]", "rewards.0.name = 'aesthetic'", "your own is path/to/file"),
        ("rewards=[{name: 'x.py:A'}]", "rewards.0.name = 'x.py:A'", "x.py is not a file; paths"),
        ("rewards=[{name: 'no_class.py:A'}]", "rewards.0.name = 'no_class.py:A'", "defines no A"),
        (
            "rewards=[{name: 'no_class.py:Other'}]",
            "rewards.0.name = 'no_class.py:Other'",
            "needs a `name` and `__call__(videos, prompts)`",
        ),
    ],
)
def test_one_line_names_field_value_and_way_out(recipe, capsys, override, named, way_out):
    (line,) = refused(capsys, recipe, override)
    assert named in line and way_out in line


@pytest.mark.parametrize("output", ["r.yaml", "r.yaml/run", "''"])
def test_an_output_that_is_no_folder(recipe, capsys, monkeypatch, output):
    monkeypatch.setattr("dancegrpo_fast.run.Trainer.__init__", None)  # It would load for minutes.
    (line,) = refused(capsys, recipe, f"output={output}")
    assert line.startswith("output = '") and line.endswith("is no folder; name one")


def test_all_mistakes_come_at_once(recipe, capsys):
    wrong = {
        "rollout.grup_size=3": "rollout.grup_size",
        "iterations=0": "iterations",
        "loss.micro_batch_size=two": "loss.micro_batch_size",
        "optimizer.learning_rate=-1": "optimizer.learning_rate",
    }
    lines = refused(capsys, recipe, *wrong)
    assert len(lines) == len(wrong)
    for field in wrong.values():
        assert sum(field in line for line in lines) == 1


def test_recipe_that_is_not_there(recipe, capsys):
    (line,) = refused(capsys, "gone.yaml")
    assert line.startswith("gone.yaml: cannot be read")


def test_usage_is_one_line_too(capsys):
    for arguments in (["train"], ["tran", "r.yaml"], []):
        capsys.readouterr()
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert line.endswith("--help")


def test_pipeline_of_another_family(recipe, tiny_wan_folder, capsys):
    shutil.copytree(tiny_wan_folder, "flux")
    index = Path("flux/model_index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    (line,) = refused(capsys, recipe, "model.path=flux")
    assert "model.path = 'flux': it holds a FluxPipeline" in line and "choose the matching" in line


def test_bad_lines_of_a_file_come_at_once_with_their_numbers(recipe, capsys):
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\nc\n{"prompt": "d"}\n')
    first, second = refused(capsys, recipe, "data.prompts=p.jsonl")
    assert "data.prompts = 'p.jsonl': line 2: must be an object with a text under" in first
    assert "data.prompts = 'p.jsonl': line 3: is not JSON" in second


def test_weights_that_do_not_fit(recipe, tiny_wan_folder, capsys):
    shutil.copytree(tiny_wan_folder, "other")
    config, weights = (
        Path("other/transformer") / name
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"ffn_dim": 64}))
    (line,) = refused(capsys, recipe, "model.path=other")
    assert "other/transformer: the weights do not fit its config.json" in line
    assert "has shape [32], not [64]" in line and "fetch both again" in line
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:1000])
    (line,) = refused(capsys, recipe, "model.path=other")
    assert str(weights) in line and "cut short" in line and "fetch or save it again" in line


def test_a_server_that_is_not_there(recipe, capsys):
    with socket.socket() as free:  # Nobody listens on it afterwards.
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    reward = f"rewards=[{{name: remote, path: '{url}', options: {{seconds: 1}}}}]"
    (line,) = refused(capsys, recipe, reward)
    assert "rewards.0.name = 'remote'" in line and url in line
    assert "no answer within 1 s" in line and "dancegrpo-fast serve-reward NAME" in line


@pytest.mark.parametrize(
    ("override", "named", "way_out"),
    [
        ("parallel.attention=flash", "parallel.attention = flash", "use default or native"),
        ("parallel.sp=2", "sp = 2: they must multiply to the 1 processes", "start another number"),
        ("rollout.chunk=2", "rollout.chunk = 2: has no effect here", "or null"),
        ("model.guidance_2=3", "model.guidance_2 = 3.0", "or raise model.guidance"),
        ("model.embedded_guidance=3", "model.embedded_guidance = 3.0", "use model.guidance"),
    ],
)
def test_what_a_model_or_a_machine_cannot_do_is_refused_before_networks_load(
    recipe, capsys, monkeypatch, override, named, way_out
):
    def loaded(*arguments: object) -> None:
        raise AssertionError("networks were loaded first")

    monkeypatch.setattr("dancegrpo_fast.trainer.assemble", loaded)
    (line,) = refused(capsys, recipe, override)
    assert named in line and way_out in line


def test_siblings_that_have_none(recipe, capsys):
    """One child more or less than a rule can compare, found when the plan is made."""
    tree = "{kind: trunk_with_branches, branch_steps: [0], branches: 2}"
    overrides = [f"rollout.tree={tree}", "rollout.group_size=2", "advantage.credit=siblings"]
    (line,) = refused(capsys, recipe, *overrides)
    assert "advantage.credit = 'siblings': needs rollout.tree.branches of 3 or more" in line


# ---- rewards that fail while a run is under way --------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(["train", *arguments])
    return code, capsys.readouterr().err.strip().split("\n")


# Scores the base model on held-out prompts, then fails.
FLAKY = """
class Flaky:
    name, calls = "bright", 0
    def __call__(self, videos, prompts):
        Flaky.calls += 1
        if Flaky.calls > CALLS:
            raise RuntimeError("the judge is out")
        return videos.mean(dim=(1, 2, 3, 4))
"""


@pytest.mark.parametrize("held_out", [False, True])
def test_rewards_that_all_fail_stop_the_run(recipe, capsys, held_out):
    """The line names the first error; the run goes on from there once the reward is mended."""
    Path("flaky.py").write_text(FLAKY.replace("CALLS", str(int(held_out))))
    overrides = ["checkpoint.every=10"] + ["evaluation.prompts=prompts.txt"] * held_out
    code, lines = run(capsys, recipe, *overrides, "rewards=[{name: 'flaky.py:Flaky'}]")
    assert code == 2 and not any("Traceback" in line for line in lines)
    last = lines[-1]
    assert last.startswith("rewards.0.name = 'flaky.py:Flaky': all 8 samples of iteration 0 failed")
    assert "RuntimeError: the judge is out" in last
    assert "the weights are untouched" in last and "continue with --resume latest" in last
    assert not Path("run/final").exists()
    # As the message says:
    code, lines = run(capsys, recipe, *overrides, "--resume", "latest")
    assert code == 0, lines[-1]
    assert Path("run/final").is_dir()


def test_failing_rewards_leave_the_weights_untouched(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder)
    trainer = Trainer(config, CPU)
    trainer.iteration()
    weights = {k: p.detach().clone() for k, p in trainer.policy.trainable().items()}
    trainer.rewards = [AlwaysFails()]
    with pytest.raises(UserError, match="all 8 samples of iteration 1 failed"):
        trainer.iteration()
    assert all(torch.equal(p, weights[k]) for k, p in trainer.policy.trainable().items())
    again = Trainer(config, CPU)
    assert again.resume() and again.done == 1
    assert all(torch.equal(p, weights[k]) for k, p in again.policy.trainable().items())


def test_reward_of_the_wrong_shape(recipe, capsys):
    Path("scalar.py").write_text(
        "class Scalar:\n    name = 'scalar'\n"
        "    def __call__(self, videos, prompts):\n        return videos.mean()\n"
    )
    code, lines = run(capsys, recipe, "rewards=[{name: 'scalar.py:Scalar'}]")
    assert code == 2
    assert lines[-1] == "reward scalar returned shape () for 8 samples; it must return [8]"


def test_one_failing_reward_of_weight_zero_does_not_stop_a_run(tmp_path, tiny_wan_folder):
    rewards = [
        {"name": f"{HERE / 'tiny_models.py'}:Bright"},
        {"name": f"{HERE / 'tiny_models.py'}:AlwaysFails", "weight": 0.0},
    ]
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, {"rewards": rewards}), CPU)
    metrics = trainer.iteration()
    assert metrics["reward/failed"] == 1.0 and metrics["policy/weight"] == 1.0
    assert "reward/always_fails" not in metrics


# ---- the folder of a run -------------------------------------------------------------------------


def test_a_disk_without_room(recipe, capsys, monkeypatch):
    """Where it cannot go on without; `test_full_disk` fills a file system."""

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/embeddings/a.partial")

    with monkeypatch.context() as patch:
        patch.setattr("dancegrpo_fast.models.embeddings.save_file", full)
        code, lines = run(capsys, recipe, "output=run")
    assert code == 2 and not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("run: ") and "No space left on device" in lines[-1]
    assert lines[-1].endswith("make room and continue with --resume latest")
    code, _ = run(capsys, recipe, "output=run", "--resume", "latest")  # As it says.
    assert code == 0


def test_two_runs_in_one_folder(recipe, capsys, monkeypatch):
    """At the same time, and one after the other: refused before anything is loaded."""

    def loaded(*arguments: object) -> None:
        raise AssertionError("something was loaded first")

    lock = FolderLock(Path("run"), CPU)
    lock.take()
    monkeypatch.setattr("dancegrpo_fast.run.Trainer.__init__", loaded)
    code, lines = run(capsys, recipe, "output=run")
    assert code == 2 and lines == [
        f"output = 'run': another run is writing here (process {os.getpid()} on "
        f"{socket.gethostname()}); wait for it, stop it, or give another folder"
    ]
    lock.release()
    Path("run/metrics.jsonl").write_text('{"iteration": 1}\n')
    code, lines = run(capsys, recipe, "output=run")
    assert code == 2 and lines == [
        "output = 'run': already holds a run; continue it with --resume latest, or name another "
        "folder"
    ]


# ---- the ops ------------------------------------------------------------------------------------

LATENTS = torch.zeros(2, 4, 3, 4, 4)
TABLE = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("call", "named", "way_out"),
    [
        (
            lambda: policy_loss(LATENTS, LATENTS[:, :3], LATENTS, TABLE, torch.ones(2)),
            "latents has shape [2, 3, 3, 4, 4]",
            "must be [2, 4, 3, 4, 4]",
        ),
        (
            lambda: policy_loss(LATENTS, LATENTS, LATENTS[:1], TABLE, torch.ones(2)),
            "next_latents has shape [1, 4, 3, 4, 4]",
            "must be [2, 4, 3, 4, 4]",
        ),
        (
            lambda: policy_loss(LATENTS, LATENTS, LATENTS, TABLE, torch.ones(3)),
            "advantages has shape [3]",
            "must be",
        ),
        (
            lambda: transition_log_prob(LATENTS, LATENTS, LATENTS, TABLE[:, :7]),
            "coefficients has shape [2, 7]",
            "must be [children, 8]",
        ),
        (
            lambda: transition_log_prob(LATENTS, LATENTS, LATENTS, torch.ones(3, 8)),
            "coefficients has 3 rows for 2 states",
            "without child_offsets each state has one child",
        ),
        (
            lambda: policy_loss(
                LATENTS, LATENTS, LATENTS, TABLE, torch.ones(2), implementation="cuda"
            ),
            "implementation = 'cuda'",
            "use one of these or 'auto'",
        ),
        (
            lambda: transition_log_prob(LATENTS, LATENTS, LATENTS, TABLE, implementation="x"),
            "implementation = 'x'",
            "use one of these or 'auto'",
        ),
        (
            lambda: sample_transition(
                LATENTS, LATENTS, TABLE, noise=LATENTS, implementation="Triton"
            ),
            "implementation = 'Triton'",
            "use one of these or 'auto'",
        ),
    ],
)
def test_ops_say_which_argument_does_not_fit(call, named, way_out):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert named in message and way_out in message and "\n" not in message


def test_the_recipe_itself_runs(recipe):
    """What the tests above are refused for is the mistake alone."""
    assert main(["train", recipe, "iterations=1"]) == 0
    assert Path("run/final").is_dir()
