"""Patching a host: modules as they are imported, and functions that a script defines itself."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dancegrpo_fast.integrations import run

ROOT = Path(__file__).resolve().parents[2]

SD3 = '''
def sde_step_with_logprob(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None,
                          generator=None, sde_type="sde", return_sqrt_dt=False):
    raise AssertionError("the host's own")
'''
DANCE = '''
"""A docstring."""
from __future__ import annotations
import sys


def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    raise AssertionError("the host's own")


def run_sample_step(step=flux_step):
    return flux_step, step, undefined_name if len(sys.argv) > 9 else None


def annotated(x: Missing) -> Missing:  # evaluated only without the script's future import
    return x


if __name__ == "__main__":
    used, default, _ = run_sample_step()
    print(used.__module__, default.__module__, sys.argv, __name__, __file__)
'''


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs in a folder, with our package and that folder on the path."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT}:{folder}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def runner(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "dancegrpo_fast.integrations.run", *arguments)


def test_a_function_of_the_script_itself(tmp_path: Path) -> None:
    write(tmp_path, {"fastvideo/train.py": DANCE})
    done = runner(tmp_path, "fastvideo/train.py", "--lr", "1e-5")
    assert done.returncode == 0, done.stderr
    ours = "dancegrpo_fast.integrations.dancegrpo"
    path = "fastvideo/train.py"
    assert done.stdout.split("\n")[0] == (
        f"{ours} {ours} ['{path}', '--lr', '1e-5'] __main__ {path}"
    )
    assert f"dancegrpo_fast: patched {path}: flux_step" in done.stderr


def test_the_documented_line_in_the_script(tmp_path: Path) -> None:
    line = "from dancegrpo_fast.integrations.dancegrpo import flux_step\n"
    edited = DANCE.replace("\nif __name__", "\n" + line + "\nif __name__")
    write(tmp_path, {"train.py": edited})
    done = python(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    used, default = done.stdout.split()[:2]
    assert used == "dancegrpo_fast.integrations.dancegrpo" and default == "__main__"


FLOW = {
    "flow_grpo/__init__.py": "",
    "flow_grpo/diffusers_patch/__init__.py": "",
    "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py": SD3,
    # By name from a sibling, as the pipelines do, and under another name.
    "flow_grpo/pipeline.py": """
        from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob as step
    """,
    "train.py": """
        import flow_grpo.pipeline
        from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob
        print(sde_step_with_logprob.__module__, flow_grpo.pipeline.step.__module__)
    """,
}
OURS = "dancegrpo_fast.integrations.flow_grpo " * 2


def test_functions_of_a_module_through_the_runner(tmp_path: Path) -> None:
    write(tmp_path, {**FLOW, "scripts/train.py": FLOW["train.py"]})
    for host in ([], ["--host", "flow_grpo"]):
        done = runner(tmp_path, *host, "scripts/train.py")
        assert done.returncode == 0, done.stderr
        assert done.stdout == OURS.strip() + "\n"
        assert done.stderr.count("patched flow_grpo.diffusers_patch.sd3_sde_with_logprob") == 1


@pytest.mark.parametrize("first", [True, False])
def test_the_documented_import_first_or_late(tmp_path: Path, first: bool) -> None:
    line = "import dancegrpo_fast.integrations.flow_grpo\n"
    body = textwrap.dedent(FLOW["train.py"])
    imports, show = body.rsplit("print", 1)
    text = line + body if first else imports + line + "print" + show
    write(tmp_path, {**FLOW, "train.py": text})
    done = python(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == OURS.strip() + "\n"


def test_the_stable_diffusion_script_of_dancegrpo(tmp_path: Path) -> None:
    # Its pipeline takes the name from a sibling module, relatively.
    folder = "fastvideo/models/stable_diffusion"
    files = {
        "fastvideo/__init__.py": "",
        "fastvideo/models/__init__.py": "",
        f"{folder}/__init__.py": "",
        f"{folder}/ddim_with_logprob.py": SD3.replace("sde_step", "ddim_step"),
        f"{folder}/pipeline_with_logprob.py": "from .ddim_with_logprob import *",
    }
    name = "ddim_step_with_logprob"
    script = f"""
        from fastvideo.models.stable_diffusion.pipeline_with_logprob import {name} as in_pipeline
        from fastvideo.models.stable_diffusion.ddim_with_logprob import {name}
        print(in_pipeline.__module__, {name}.__module__)
    """
    line = (
        "from dancegrpo_fast.integrations import dancegrpo; dancegrpo.install(dancegrpo.PATCHES)\n"
    )
    write(tmp_path, {**files, "train.py": script, "edited.py": line + textwrap.dedent(script)})
    for done in (runner(tmp_path, "train.py"), python(tmp_path, "edited.py")):
        assert done.returncode == 0, done.stderr
        assert done.stdout == ("dancegrpo_fast.integrations.dancegrpo " * 2).strip() + "\n"


def test_loaders_keep_their_class_and_a_changed_host_is_said(tmp_path: Path) -> None:
    name = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
    show = """
        import flow_grpo.diffusers_patch.sd3_sde_with_logprob as m
        print(type(m.__loader__).__name__, m.__spec__.origin == m.__file__)
    """
    write(tmp_path, {**FLOW, "train.py": show})
    done = runner(tmp_path, "train.py")
    assert done.stdout == "SourceFileLoader True\n", done.stderr
    write(tmp_path, {name: "def renamed(): pass\n"})
    done = runner(tmp_path, "train.py")
    assert done.returncode == 1
    assert "has no sde_step_with_logprob: this version of the host" in done.stderr


def test_another_function_of_the_same_name_stays(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": "def flux_step(latents, model_output):\n    return 1\n"})
    done = runner(tmp_path, "--host", "dancegrpo", "train.py")
    assert done.returncode == 2
    assert "left alone train.py: flux_step(latents, model_output)" in done.stderr


def test_nothing_to_patch_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": "print('ran')\n"})
    done = runner(tmp_path, "--host", "dancegrpo", "train.py")
    assert done.returncode == 2 and done.stdout == ""
    assert "nothing to patch for train.py: found none of the script: flux_step" in done.stderr
    # The host is there, but the script does not use it: said when it ends.
    write(tmp_path, FLOW | {"train.py": "print('ran')\n"})
    done = runner(tmp_path, "--host", "flow_grpo", "train.py")
    assert done.returncode == 2 and done.stdout == "ran\n"
    assert "train.py ended without importing any of flow_grpo" in done.stderr


def test_errors_and_exits_of_the_script_are_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": DANCE + "\n\nraise ValueError('of the script')\n"})
    done = runner(tmp_path, "train.py")
    assert done.returncode == 1 and "ValueError: of the script" in done.stderr
    last = len(textwrap.dedent(DANCE).split("\n")) + 2
    assert f'train.py", line {last}' in done.stderr  # line numbers stay
    write(tmp_path, {"train.py": DANCE + "\n\nsys.exit(7)\n"})
    assert runner(tmp_path, "train.py").returncode == 7


def test_every_host_has_what_the_runner_asks_for() -> None:
    assert {"dancegrpo", "flow_grpo"} <= set(run.HOSTS)
    for host in run.HOSTS:  # what is not a host is not offered as one
        text = (Path(run.__file__).parent / f"{host}.py").read_text()
        assert "Written against commit" in text, host
    patches = run.patches_of(run.HOSTS)
    for patch in patches:
        assert callable(getattr(patch.replacement, "__func__", patch.replacement)), patch
    names = [patch.name for patch in patches if patch.module is None]
    assert len(names) == len(set(names))  # one owner for what a script defines
    with pytest.raises(SystemExit):
        run.main(["--host", "nobody", "train.py"])


def test_torchrun(tmp_path: Path) -> None:
    write(tmp_path, {"train.py": DANCE})
    done = python(
        tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "dancegrpo_fast.integrations.run", "train.py", "--x",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.split("\n") if "__main__" in line]
    assert len(lines) == 2
    assert all("dancegrpo_fast.integrations.dancegrpo" in line for line in lines)
