"""The core with the oldest torch that it supports, in an environment of its own. Slow: 3 GB.

Run: pytest -m slow tests/test_oldest_torch.py      (log: benchmarks/results/torch_2_5_1.log)
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "benchmarks" / "results" / "torch_2_5_1.log"
PACKAGES = ["torch==2.5.1", "numpy<2.3", "pytest", "scipy"]  # no diffusers, no transformers
CORE = [
    "tests/test_ops.py", "tests/test_policy_loss.py", "tests/test_forward_loss.py",
    "tests/test_forward_loss_refused.py", "tests/test_implementations.py",
    "tests/test_torch_integration.py", "tests/integrations",
]  # fmt: skip


@pytest.mark.slow
def test_the_core_passes_with_torch_2_5_1(tmp_path: Path) -> None:
    """OLDEST_TORCH_PYTHON names the python of an environment that already has PACKAGES."""
    python = os.environ.get("OLDEST_TORCH_PYTHON")
    if python is None:
        venv.create(tmp_path / "venv", with_pip=True)
        python = str(tmp_path / "venv" / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(install, check=True, timeout=1800)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    versions = subprocess.run(
        [python, "-c", "import torch, numpy; print('torch', torch.__version__, 'numpy', "
         "numpy.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    told = [line for line in done.stdout.splitlines() if line.startswith(("SKIPPED", "FAILED"))]
    head = f"Python {platform.python_version()}, {versions}commit {commit}pytest {' '.join(CORE)}"
    LOG.write_text("\n".join([head, *told, done.stdout.strip().splitlines()[-1], ""]))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert sys.platform != "linux" or "torch 2.5.1" in versions
