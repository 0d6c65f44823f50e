"""The source distribution and a wheel without a compiler: what is in them, and what they can do."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib
from docs_blocks import fresh_copy
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone without a native module."""
    clone = fresh_copy(tmp_path_factory.mktemp("packaging") / "clone")
    for built in (clone / "dancegrpo_fast").glob("_native*"):
        built.unlink()
    return clone


def backend(project: Path, call: str) -> Path:
    """Calls the build backend as pip does, in a process without a compiler; returns the file."""
    pytest.importorskip("setuptools")
    code = f"from setuptools import build_meta as b; print('made:' + b.{call})"
    tools = project.parent / "tools"  # An empty path: no c++, and no git for setuptools to ask.
    tools.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH")}
        | {"PATH": str(tools)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = done.stdout.rpartition("made:")[2].strip()
    return project / "dist" / made


def test_source_distribution_holds_what_a_build_and_the_docs_need(project: Path) -> None:
    archive = backend(project, "build_sdist('dist')")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"setup.py", "CMakeLists.txt", "constraints.txt", "LICENSE", "mkdocs.yml"}
    for folder in ("csrc", "recipes", "docs", "dancegrpo_fast", "scripts"):
        files = (path for path in (project / folder).rglob("*") if path.is_file())
        needed |= {path.relative_to(project).as_posix() for path in files}
    needed = {name for name in needed if "__pycache__" not in name}
    assert needed - names == set()
    unwanted = (".so", ".pyc", "__pycache__")
    assert [name for name in names if name.endswith(unwanted) or name.startswith("build/")] == []


@pytest.fixture(scope="module")
def installed(project: Path) -> Path:
    """A folder with the wheel that a machine without a compiler makes, unpacked."""
    wheel = backend(project, "build_wheel('dist')")
    # No compiled part: the same wheel for every Python and machine.
    assert wheel.name.endswith("-py3-none-any.whl")
    target = project.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


# An editable installation of this environment would find the native module for any copy.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]\n"

LOOP = """
import warnings
import torch
import dancegrpo_fast as g

warnings.simplefilter("ignore")  # that the reference is slow
print(g.__file__)
torch.manual_seed(0)
row = g.transition(g.dance_schedule(8, 3.0), 2, 3, dynamics="dance", kind="sde", level=0.3)
rows = g.coefficient_table([row] * 4)
x, m = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8, requires_grad=True)
keys = [g.NoiseKey.from_seed(0).fold_in(n).draw() for n in range(4)]
drawn = g.sample_transition(m.detach(), x, rows, keys=keys)
new = g.transition_log_prob(m, x, drawn[0], rows)
assert (new.detach() == drawn[1]).all()  # a ratio of exactly 1
a = torch.tensor([1.0, -1.0, 2.0, -2.0])
g.policy_loss(m, x, drawn[0], rows, a, old_log_prob=drawn[1]).loss.backward()
# At ratio 1 the loss has the gradient of -mean(a log p).
p = m.detach().double().requires_grad_()
residual = drawn[0].double() - row.a * x.double() - row.b * p
(row.w * (residual * residual).flatten(1).mean(1) * a).mean().backward()
# float32 rounds x (up to 4) by 2e-7, and residuals are of the size s = 0.05: 5e-6 of the largest.
torch.testing.assert_close(m.grad, p.grad.float(), rtol=0, atol=1e-5 * float(p.grad.abs().max()))
"""


def python(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code with the installed package, away from the project."""
    return subprocess.run(
        [sys.executable, "-c", ALONE + code], capture_output=True, text=True,
        cwd=installed.parent / "tools", env=os.environ | {"PYTHONPATH": str(installed)},
    )  # fmt: skip


def test_wheel_without_compiler_runs_the_drop_in(installed: Path) -> None:
    assert not list(installed.rglob("_native*"))
    done = python(installed, LOOP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))


def test_doctor_says_what_is_missing_and_how_to_get_it(installed: Path) -> None:
    call = "import runpy\nsys.argv[1:] = ['doctor']\n"
    done = python(installed, call + "runpy.run_module('dancegrpo_fast', {}, '__main__')")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "native module" in line]
    assert line.startswith("note") and "Without it noise is 30 times slower" in line
    assert "compiler" in line and "install" in line  # the way out


def test_declared_versions() -> None:
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    wheels = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert wheels == ["cp310-*", "cp311-*", "cp312-*", "cp313-*"]
    assert all(f"3.{tag[3:5]}" in supported for tag in wheels)
    assert {"train", "docs", "dev", "serve"} <= set(PROJECT["project"]["optional-dependencies"])
