"""The Triton kernels in Triton's interpreter: a pytest invocation of its own (scripts/test).

`TRITON_INTERPRET` is read when Triton is imported, so it is set here, before any test imports it.
"""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "Triton is already imported without its interpreter: run `pytest tests/interpreter` alone"
    )
os.environ["TRITON_INTERPRET"] = "1"

try:
    import triton  # noqa: F401
except ModuleNotFoundError:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    if "triton" in sys.modules:
        return None
    return "TRITON TESTS NOT RUN: Triton is missing; pip install 'dancegrpo-fast[triton-cpu]'"
