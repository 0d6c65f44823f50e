"""The files of examples/cluster: their syntax, and that all they name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from docs_blocks import environment, fresh_copy
from torch.distributed.run import get_args_parser

from dancegrpo_fast.config import load_config

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "examples" / "cluster"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
JOB = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text(encoding="utf-8"))
DOCKERFILES = sorted(CLUSTER.glob("Dockerfile.*"))


def containers() -> list[dict]:
    replicas = JOB["spec"]["pytorchReplicaSpecs"]
    return [replicas[kind]["template"]["spec"]["containers"][0] for kind in ("Master", "Worker")]


def launches() -> list[tuple[str, str]]:
    """The torchrun command of every file."""
    texts = [(path.name, path.read_text(encoding="utf-8")) for path in SCRIPTS]
    texts += [("pytorchjob.yaml", container["args"][0]) for container in containers()]
    found = []
    for name, text in texts:
        text = text.replace("\\\n", " ")
        (line,) = [line for line in text.splitlines() if re.match(r"(srun|exec) torchrun ", line)]
        found.append((name, line))
    return found


def test_shell_parses() -> None:
    for text in [p.read_text() for p in SCRIPTS] + [c["args"][0] for c in containers()]:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(("name", "line"), launches())
def test_launches_name_options_and_fields_that_exist(name: str, line: str) -> None:
    line = line.replace('"$@"', "").replace('${resume[@]+"${resume[@]}"}', "")
    words = shlex.split(re.sub(r"\$\w+", "1", line))
    words = words[words.index("torchrun") + 1 :]
    options = get_args_parser().parse_args(words)
    assert options.module and options.rdzv_backend == "c10d" and options.rdzv_endpoint
    assert options.training_script == "dancegrpo_fast"
    command, _, *overrides = options.training_script_args
    assert command == "train"
    overrides = [word for word in overrides if "=" in word and not word.startswith("output=")]
    config = load_config(ROOT / "recipes/flux_hps.yaml", overrides)
    # Saving must end before torchrun kills, and torchrun before the scheduler does.
    assert config.checkpoint.grace_seconds < options.shutdown_timeout
    if name == "slurm.sh":
        text = (CLUSTER / name).read_text(encoding="utf-8")
        assert options.shutdown_timeout < int(re.search(r"--signal=TERM@(\d+)", text)[1])
    if name == "pytorchjob.yaml":
        for kind in JOB["spec"]["pytorchReplicaSpecs"].values():
            spec = kind["template"]["spec"]
            assert options.shutdown_timeout < spec["terminationGracePeriodSeconds"]
            names = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == names


def test_job_counts_agree() -> None:
    replicas = JOB["spec"]["pytorchReplicaSpecs"]
    machines = sum(kind["replicas"] for kind in replicas.values())
    (container, _) = containers()
    assert f"parallel.dp_replicate={machines}" in container["args"][0]
    assert int(JOB["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    images = re.findall(r"^FROM (\S+)", text, re.M)
    # Public images by name and tag, none from another registry, none by `latest`.
    assert all(re.fullmatch(r"(nvidia/)?[a-z]+:[\w.-]+", image) for image in images)
    assert not any(image.endswith(":latest") for image in images)
    assert re.findall(r"^USER (\S+)", text, re.M) == ["1001"]  # not root
    for copied in re.findall(r"^COPY (?!--from)(\S+)", text, re.M):
        assert (ROOT / copied).exists()
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1])
    assert entry == ["dancegrpo-fast"]
    if linter := shutil.which("hadolint"):
        subprocess.run([linter, path], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    subprocess.run(["shellcheck", path], check=True)


@pytest.mark.slow
def test_two_machines_that_are_one(tmp_path: Path) -> None:
    # Two launchers of one process each, as two machines start them; then again, which resumes.
    project = fresh_copy(tmp_path / "clone")
    env = environment(project) | {
        "HEAD": "localhost", "MACHINES": "2", "GPUS": "1", "PORT": "29655", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    tiny = [
        "data.prompts_per_iteration=2", "rollout.group_size=4", "evaluation.prompts=null",
        "evaluation.every=null", "checkpoint.every=1",
    ]  # fmt: skip

    def launch(iterations: int) -> None:
        command = [
            "examples/cluster/multi_machine.sh", "recipes/demo.yaml", "runs/two", *tiny,
            f"iterations={iterations}",
        ]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        machines = [subprocess.Popen(command, cwd=project, env=env, **pipes) for _ in range(2)]
        told = [machine.communicate(timeout=300)[0] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], "\n".join(told)

    def logged() -> list[int]:
        lines = (project / "runs/two/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["iteration"] for line in lines]

    launch(1)
    assert logged() == [1]
    launch(2)
    assert logged() == [1, 2]
    assert os.path.isdir(project / "runs/two/final")
