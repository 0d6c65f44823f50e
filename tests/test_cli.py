"""The commands, from a recipe to weights that a stock pipeline loads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_recipe

from dancegrpo_fast.checkpoint import weights_hash
from dancegrpo_fast.cli import COMMANDS, main
from dancegrpo_fast.config import load_config

HELD_OUT = ["a red dot", "a green dot", "a blue dot"]


def write_recipe(folder: Path, model: Path, overrides=()) -> Path:
    recipe = tiny_recipe(folder, model, dict(overrides))
    (folder / "held_out.txt").write_text("\n".join(HELD_OUT))
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_wan_folder) -> Path:
    """A LoRA run with held-out prompts and an average, trained through the command."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    overrides = {
        "iterations": 3, "policy.train": "lora", "policy.ema_decay": 0.9, "checkpoint.every": 2,
        "evaluation.prompts": str(folder / "held_out.txt"), "evaluation.every": 2,
        "optimizer.learning_rate": 0.01,
    }  # fmt: skip
    recipe = write_recipe(folder, tiny_wan_folder, overrides)
    assert main(["train", str(recipe)]) == 0
    return folder


def test_train_writes_what_it_promises(finished, tiny_wan_folder):
    run = finished / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["iteration"] for line in lines if "evaluation/reward" in line]
    trained = [line["iteration"] for line in lines if "reward/mean" in line]
    assert (held_out, trained) == ([0, 2, 3], [1, 2, 3])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 3 and summary["prompts"] == 3
    curve = {line["iteration"]: line for line in lines if "evaluation/reward" in line}
    assert summary["reward"]["base"] == pytest.approx(curve[0]["evaluation/reward"])
    assert summary["reward"]["trained"] == pytest.approx(curve[3]["evaluation/reward"])
    difference = summary["reward"]["trained"] - summary["reward"]["base"]
    assert summary["reward"]["gain"] == pytest.approx(difference) and difference != 0
    assert summary["weights_sha256"] == {
        "base": weights_hash(tiny_wan_folder), "trained": weights_hash(run / "final")
    }  # fmt: skip
    assert {"sample", "score", "update", "evaluate"} <= summary["seconds"].keys()
    page = (run / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") or "src=\"http" not in page
    assert HELD_OUT[0] in page and "load_lora_weights" in page
    assert load_config(run / "recipe.yaml", []) == load_config(finished / "r.yaml", [])
    assert sorted(p.name for p in (run / "snapshots").iterdir()) == [
        "iteration-000002", "iteration-000003"
    ]  # fmt: skip
    pipeline = WanPipeline.from_pretrained(tiny_wan_folder)
    pipeline.load_lora_weights(run / "final")
    assert pipeline.get_active_adapters()


def test_report_line_is_printed(tmp_path, tiny_wan_folder, capsys):
    overrides = {"iterations": 1, "evaluation.prompts": str(tmp_path / "held_out.txt")}
    recipe = write_recipe(tmp_path, tiny_wan_folder, overrides)
    assert main(["train", str(recipe)]) == 0
    assert capsys.readouterr().out.strip().endswith(f"report: {tmp_path / 'run' / 'report.html'}")


def test_print_config_round_trips(tmp_path, tiny_wan_folder, capsys):
    recipe = write_recipe(tmp_path, tiny_wan_folder)
    override = "rollout.tree={kind: window, window_size: 2}"
    assert main(["train", str(recipe), override, "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed, []) == load_config(recipe, [override])
    assert main(["train", str(printed), "--print-config"]) == 0
    assert capsys.readouterr().out == printed.read_text()
    assert not (tmp_path / "run").exists()


def test_export_writes_the_snapshot(finished, tmp_path, capsys):
    """The averaged weights of the newest snapshot: those that the end of the run exported."""
    out = tmp_path / "out"
    assert main(["export", str(finished / "run"), str(out)]) == 0
    assert weights_hash(out) == weights_hash(finished / "run" / "final")
    printed = capsys.readouterr().out
    assert "iteration 3 of" in printed and f"load_lora_weights('{out}')" in printed
    (file,) = out.glob("*.safetensors")
    assert any(value.any() for name, value in load_file(file).items() if "lora_B" in name)
    assert main(["export", str(finished / "run"), str(out)]) == 2
    assert f"OUT = '{out}': is a file or not empty; name a new folder" in capsys.readouterr().err


def test_a_run_that_was_moved_is_itself(finished, tmp_path, monkeypatch):
    """Its recipe names where it was: nothing is there, or another run."""
    run = tmp_path / "moved"
    shutil.copytree(finished / "run", run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "gone")}))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert weights_hash(tmp_path / "out") == weights_hash(run / "final")
    assert not (tmp_path / "gone").exists()
    # A relative output counts from the folder in which it was trained.
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output": "moved"}))
    monkeypatch.chdir(finished)
    assert main(["export", str(run), str(tmp_path / "again")]) == 0


def test_resuming_at_a_snapshot_by_its_name_alone(finished, tmp_path, monkeypatch, capsys):
    run, recipe = tmp_path / "run", str(finished / "r.yaml")
    shutil.copytree(finished / "run", run)
    monkeypatch.chdir(run / "snapshots")
    more = ["iterations=4", "evaluation.every=null"]
    named = ["train", recipe, f"output={run}", *more, "--resume"]
    # Another run's snapshot of the same number is no continuation of this one.
    other = str(finished / "run" / "snapshots" / "iteration-000003")
    assert main([*named, other]) == 2
    assert "would be mixed up with the new ones" in capsys.readouterr().err
    assert main([*named, "iteration-000009"]) == 2
    assert "iteration-000009: is no usable snapshot" in capsys.readouterr().err
    (run / "recipe.yaml").write_text("model: [")  # Only what changes is looked for in it.
    assert main([*named, "iteration-000003"]) == 0
    assert load_config(run / "recipe.yaml").iterations == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "reward/mean" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("mesh", [{"sp": 2}, {"dp_replicate": 4}, {"dp_shard": 8}])
def test_export_of_a_run_of_many_processes(finished, tmp_path, mesh):
    """A snapshot is of no number of processes: one writes what eight have trained."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["parallel"] |= mesh
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert weights_hash(tmp_path / "out") == weights_hash(run / "final")


@pytest.mark.parametrize(
    "command", [["export", "run", "out"], ["sample", "run", "--prompt", "x", "--out", "out"]]
)
def test_commands_of_one_process_refuse_torchrun(monkeypatch, capsys, command):
    """Each process would do all of it, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"WORLD_SIZE = 2: {command[0]} runs on one process; start it without torchrun (train, "
        "evaluate and embed take several)\n"
    )


def test_a_process_whose_peer_is_gone_shows_no_traceback(monkeypatch, capsys, tmp_path):
    """The peer says what happened; this one can be started again, as `evaluate` and `embed` are."""
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")
    monkeypatch.setattr("dancegrpo_fast.cli.evaluate.run", mock.Mock(side_effect=gone))
    arguments = ["evaluate", "r.yaml", "--prompts", "p.txt", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError):  # Alone there is no peer: a defect.
        main(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(arguments) == 3
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("[rank 1] evaluate: no answer from another process: [gloo/")
    assert line.endswith("its own output says more; start the command again, it goes on")


def frames_of(file: Path) -> list[bytes]:
    with Image.open(file) as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append(gif.convert("RGB").tobytes())
    return frames


def test_sample_draws_a_run_and_its_base(finished, tmp_path, capsys):
    """Same noise: the clips differ by the training alone, and not from one draw to the next."""
    prompts = ["--prompt", "a red dot", "--prompt", "a blue dot", "--seeds", "2", "--gif"]
    clips = {}
    for name, source in {
        "run": finished / "run", "again": finished / "run", "base": finished / "r.yaml",
    }.items():  # fmt: skip
        assert main(["sample", str(source), *prompts, "--out", str(tmp_path / name)]) == 0
        assert f"4 samples in {tmp_path / name}" in capsys.readouterr().out
        clips[name] = {f.name: frames_of(f) for f in sorted((tmp_path / name).glob("*.gif"))}
    assert list(clips["run"]) == [
        "0000_a_red_dot_seed0.gif", "0000_a_red_dot_seed1.gif",
        "0001_a_blue_dot_seed0.gif", "0001_a_blue_dot_seed1.gif",
    ]  # fmt: skip
    assert clips["run"] == clips["again"]
    assert all(clips["run"][name] != clips["base"][name] for name in clips["run"])
    assert len({str(frames) for frames in clips["run"].values()}) == 4


def test_sample_and_export_refuse_what_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["export", str(tmp_path / "empty"), str(tmp_path / "out")],
        ["sample", str(tmp_path / "empty"), "--prompt", "x", "--out", str(tmp_path / "out")],
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert "holds no recipe.yaml; give the folder of a run" in line
    assert main(["sample", str(tmp_path / "empty"), "--out", "x"]) == 2
    assert "one of the arguments --prompt --prompts is required" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def plan_lines(capsys, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out.strip().split("\n")


def test_plan_prints_the_tree_and_its_cost(tmp_path, tiny_wan_folder, capsys):
    """Counted by hand: two prompts, a window of steps 1 and 2 out of four, four leaves."""
    recipe = str(write_recipe(tmp_path, tiny_wan_folder))
    tree = "rollout.tree={kind: window, window_size: 2, window_start: 1}"
    lines = plan_lines(capsys, recipe, tree)
    rows = [line.split() for line in lines]
    states = [row[4] for row in rows[1:5]]
    assert states == ["1", "1", "4", "4"]
    edges = [" ".join(row[5:]) for row in rows[1:5]]
    assert edges == [
        "1 ode", "4 sde trained (up to 4 children a state)", "4 sde trained", "4 x0",
    ]  # fmt: skip
    assert "4 leaves a prompt" in lines
    counts = {line[:22].strip(): line[22:].split() for line in lines}
    # shared: 1 + 1 + 4 + 4 and 1 + 4 evaluations; unshared: 4 leaves x 4 steps and x 2 trained
    assert counts["shared (what runs)"] == ["20", "10"]
    assert counts["rollout shared only"] == ["20", "16"]
    assert counts["nothing shared"] == ["32", "16"]
    guided = plan_lines(capsys, recipe, tree, "model.guidance=3")
    assert any(line.split()[-2:] == ["40", "20"] for line in guided)
    assert not (tmp_path / "run").exists()


def test_plan_counts_what_a_loss_at_every_point_trains(tmp_path, tiny_wan_folder, capsys):
    recipe = str(write_recipe(tmp_path, tiny_wan_folder))
    for range_, points in (("null", 4), ("[1, 3]", 2)):
        change = f"loss.timestep_range={range_}"
        lines = plan_lines(capsys, recipe, "algorithm=awm", "rollout.noise_level=0", change)
        counts = {line[:22].strip(): line[22:].split() for line in lines}
        assert counts["shared (what runs)"][1] == str(2 * 4 * points)  # Prompts, samples.


def test_plan_of_a_drawn_window_differs_by_iteration(tmp_path, tiny_wan_folder, capsys):
    recipe = str(write_recipe(tmp_path, tiny_wan_folder))
    tree = "rollout.tree={kind: window, window_size: 1}"
    drawn = [plan_lines(capsys, recipe, tree, "--iteration", str(i)) for i in range(12)]
    assert 1 < len({tuple(lines) for lines in drawn}) <= 3
    assert drawn[0] == plan_lines(capsys, recipe, tree)


def test_help_of_every_command(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"dancegrpo-fast {command}" in capsys.readouterr().out


def test_exit_codes_of_the_process(tmp_path):
    """0, 2, and 1 with a traceback for a defect, as the shell sees them."""
    script = (
        "import sys, dancegrpo_fast.config as c\n"
        "from dancegrpo_fast.cli import main\n"
        "if sys.argv[1] == 'defect':\n"
        "    def load_config(*a): raise RuntimeError('a defect')\n"
        "    c.load_config = load_config\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )

    def shell(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    assert shell("as is", "--help").returncode == 0
    mistaken = shell("as is", "train", str(tmp_path / "gone.yaml"))
    assert mistaken.returncode == 2 and "Traceback" not in mistaken.stderr
    defect = shell("defect", "train", "r.yaml")
    assert defect.returncode == 1 and "RuntimeError: a defect" in defect.stderr


def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys):
    """A file that cannot be had, a package, Ctrl-C; anything else keeps its traceback."""
    cases = {
        PermissionError(errno.EACCES, "Permission denied", "out"): (
            2, "out: Permission denied; give a place that you may use\n"
        ),
        OSError(errno.ENOSPC, "No space left on device", b"out"): (
            2, "out: No space left on device; make room\n"
        ),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"): (
            2, "a/b: Not a directory; name another place\n"
        ),
        ModuleNotFoundError("no", name="yaml.reader"): (
            2, "the package yaml is missing: pip install 'dancegrpo-fast[train]'; `dancegrpo-fast "
            "doctor` says what is missing\n"
        ),
        KeyboardInterrupt(): (3, "interrupted\n"),
    }  # fmt: skip
    for error, (code, told) in cases.items():
        monkeypatch.setattr("dancegrpo_fast.cli.doctor.run", mock.Mock(side_effect=error))
        assert (main(["doctor"]), capsys.readouterr().err) == (code, told)
    for error in (OSError("odd"), ModuleNotFoundError("no", name="ours"), KeyError("x")):
        monkeypatch.setattr("dancegrpo_fast.cli.doctor.run", mock.Mock(side_effect=error))
        with pytest.raises(type(error)):
            main(["doctor"])


def test_a_reader_that_has_left_is_no_defect():
    """As in `... | head`: 128 + SIGPIPE, and not a word."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dancegrpo_fast", "score", "--list"],
        cwd=Path(__file__).parents[1], stdout=writing, stderr=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_recipe_is_printed_in_utf_8_whatever_the_locale(tmp_path, tiny_wan_folder):
    recipe = write_recipe(tmp_path, tiny_wan_folder, {"model.negative_prompt": chr(0x7EA2)})
    done = subprocess.run(
        [sys.executable, "-m", "dancegrpo_fast", "train", str(recipe), "--print-config"],
        cwd=Path(__file__).parents[1], capture_output=True, timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    (tmp_path / "printed.yaml").write_bytes(done.stdout)
    assert load_config(tmp_path / "printed.yaml") == load_config(recipe)


@pytest.mark.parametrize("package", ["pydantic", "yaml", "diffusers"])
def test_the_core_alone_says_what_training_needs(package):
    code = (
        f"import sys; sys.modules['{package}'] = None; from dancegrpo_fast.cli import main;"
        "sys.exit(main(['plan', 'recipes/demo.yaml']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"the package {package} is missing: pip install")
    assert "Traceback" not in done.stderr


def test_overrides_may_follow_options(tmp_path, tiny_wan_folder, capsys):
    """argparse alone would stop collecting them at the first option."""
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_wan_folder, {})))
    recipe = str(file)
    assert main(["train", recipe, "--print-config", "iterations=7", "seed=3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["iterations"], shown["seed"]) == (7, 3)
    assert main(["train", recipe, "--print-config", "--nonsense"]) == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
