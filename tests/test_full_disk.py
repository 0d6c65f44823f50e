"""A disk without room: the last snapshot stays whole, and the run goes on or says why not."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from snapshot_cases import loaded, saver, snapshot
from tiny_models import tiny_recipe

from dancegrpo_fast.config import UserError
from dancegrpo_fast.report.metrics import read_metrics


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_full_disk_leaves_the_last_snapshot_whole(
    tmp_path, monkeypatch, caplog, background, on_failure
):
    one = saver(tmp_path, background=background, on_failure=on_failure)
    one.save(snapshot(1))
    one.finish()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed.checkpoint.filesystem, "_write_item", full)
        if on_failure == "stop":
            with pytest.raises(UserError, match="make room and continue with --resume latest"):
                one.save(snapshot(2))
                one.finish()
        else:
            with caplog.at_level(logging.ERROR):
                one.save(snapshot(2))
                one.finish()
            ours = [r for r in caplog.records if r.name == "dancegrpo_fast.checkpoint"]
            said = " ".join(record.getMessage() for record in ours)
            assert len(ours) == 1
            assert "iteration 2 could not be saved" in said and "No space left" in said
            assert "the newest snapshot holds 1" in said and "the run goes on" in said
    assert one.failures == 1 and loaded(tmp_path)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-000001"]
    one.save(snapshot(3))
    one.finish()
    assert loaded(tmp_path)[0] == 3


SMALL_DISK = """
import resource, sys, torch
from tiny_models import tiny_config
from pathlib import Path
from dancegrpo_fast.cli import main
torch.set_num_threads(1)
limit = int(sys.argv[2])
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from dancegrpo_fast.trainer import Trainer
save, calls = Trainer.save, []
def limited(self):
    calls.append(1)
    if len(calls) == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if len(calls) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return save(self)
Trainer.save = limited
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_run_survives_a_disk_that_fills(tmp_path, tiny_wan_folder):
    """The kernel refuses to write more than 20 kB a file during the second snapshot."""
    changes = {"checkpoint.every": 1, "iterations": 3, "checkpoint.keep": 3}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_wan_folder, changes)))
    script = tmp_path / "small.py"
    script.write_text(SMALL_DISK)
    done = run_script(script, str(file), "20000")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "iteration 2 could not be saved" in done.stderr
    saved = sorted(p.name for p in (tmp_path / "run" / "snapshots").iterdir())
    assert saved == ["iteration-000001", "iteration-000003"]


FULL_DISK = """
import sys, torch
from pathlib import Path
from dancegrpo_fast.cli import main
from dancegrpo_fast.trainer import Trainer
torch.set_num_threads(1)
recipe, filler = sys.argv[1], Path(sys.argv[2])
save, calls = Trainer.save, []
def filled(self):
    calls.append(1)
    if len(calls) == 2:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    if len(calls) == 3:
        filler.unlink(missing_ok=True)
    return save(self)
Trainer.save = filled
code = main(["train", recipe])
if filler.is_file():
    filler.unlink()
    print("first", code)
    code = main(["train", recipe, "--resume", "latest"])
sys.exit(code)
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
        capture_output=True, text=True,
    ) if shutil.which("mount") else None  # fmt: skip
    if mounted is None or mounted.returncode:
        why = mounted.stderr.strip() if mounted else "there is no mount"
        pytest.skip(f"this test may not mount a tmpfs: {why}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_run_on_a_filled_file_system(tmp_path, tiny_wan_folder, small_disk, on_failure):
    """Not a byte is left from the second snapshot to the third: log, clips and snapshot fail.

    All prompts are embedded by then: an embedding that cannot be kept ends a run.
    """
    changes = {
        "checkpoint.every": 1, "iterations": 4, "checkpoint.keep": 4, "output": str(small_disk),
        "checkpoint.on_failure": on_failure, "data.prompts_per_iteration": 3,
    }  # fmt: skip
    file, script = tmp_path / "r.yaml", tmp_path / "full.py"
    file.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tiny_wan_folder, changes)))
    script.write_text(FULL_DISK)
    done = run_script(script, str(file), str(small_disk / "filler"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "iteration 2 could not be saved" in done.stderr
    assert "the newest snapshot holds 1" in done.stderr
    saved = sorted(path.name for path in (small_disk / "snapshots").iterdir())
    if on_failure == "continue":
        assert "iteration 3 could not be logged" in done.stderr
        assert saved == [f"iteration-{i:06d}" for i in (1, 3, 4)]
    else:
        assert "make room and continue with --resume latest" in done.stderr
        assert "first 2\n" in done.stdout and "Traceback" not in done.stderr
        assert saved == [f"iteration-{i:06d}" for i in (1, 2, 3, 4)]
    lines = read_metrics(small_disk / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]


def run_script(script: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(script), *arguments],
        env=environment, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
