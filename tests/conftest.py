"""Shared by all tests: offline mode, and the skip that names a missing native module."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType

import pytest

# No test may reach a network; set before any test imports a library that reads it.
os.environ["HF_HUB_OFFLINE"] = "1"

from dancegrpo_fast.ops import native  # noqa: E402

_NOT_RUN = "NATIVE TESTS NOT RUN"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", action="store_true",
        help="append what was verified to benchmarks/results/verification.jsonl, on a clean tree",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record"):
        sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
        from record import Recorder

        config.pluginmanager.register(Recorder(config.invocation_params.args))


@pytest.fixture(scope="session")
def native_module() -> ModuleType:
    """The native module; a test that asks for it is skipped where it is not built."""
    reason = native.why_not()
    if reason is not None:
        pytest.skip(f"{_NOT_RUN}: {reason}")
    return native.module()


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stock `WanPipeline` folder; tests read it and never write there."""
    from tiny_models import tiny_wan  # here: the core's tests need no diffusers

    return tiny_wan(tmp_path_factory.mktemp("models") / "wan")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Gives these skips one place, so that the summary folds them into one line."""
    report = yield
    if isinstance(report.longrepr, tuple) and _NOT_RUN in report.longrepr[2]:
        report.longrepr = (__file__, 0, report.longrepr[2])
    return report
