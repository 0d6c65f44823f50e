"""The Triton kernels compiled for GPUs that are not here: a pytest invocation of its own.

`TRITON_INTERPRET` must be unset: it is read when Triton is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise pytest.UsageError("TRITON_INTERPRET is set: run `pytest tests/compile_only` by itself")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

try:
    import triton  # noqa: F401
except ModuleNotFoundError:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    if "triton" in sys.modules:
        return None
    return "COMPILE TESTS NOT RUN: Triton is missing; pip install 'dancegrpo-fast[triton-cpu]'"
