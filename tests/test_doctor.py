"""The doctor names what is missing, what it costs and the way out."""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import types

import pytest
import torch

import dancegrpo_fast
from dancegrpo_fast.cli import doctor
from dancegrpo_fast.ops import native


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = doctor.run(argparse.Namespace())
    return status, capsys.readouterr().out


def test_missing_native_module(monkeypatch, capsys) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "the native module is not built: do this")
    status, out = report(capsys)
    assert status == 0
    assert "the native module is not built: do this. Without it noise is 30 times slower" in out


def test_built_native_module(native_module, capsys) -> None:
    status, out = report(capsys)
    assert status == 0
    assert f"compiled by {native_module.build()['compiler']}" in out


@pytest.mark.parametrize(
    ("built", "driver", "expected"),
    [
        (None, None, "no NVIDIA driver, torch without CUDA: everything runs on the CPU"),
        (None, (12, 4), "driver for CUDA up to 12.4, torch without CUDA: install torch for CUDA"),
        ("13.0", (12, 4), "the driver is too old; update the driver, or install torch for CUDA 12"),
        ("12.8", (12, 4), "torch for CUDA 12.8, but torch sees no device"),
    ],
)
def test_cuda_and_driver_are_compared(built, driver, expected, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver_cuda", lambda: driver)
    status, out = report(capsys)
    assert status == 0
    assert expected in out


def test_missing_training_packages_are_named_together(monkeypatch, capsys) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("diffusers", "peft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, out = report(capsys)
    assert status == 0
    assert "cannot run without diffusers, peft: pip install 'dancegrpo-fast[train]'" in out


@pytest.mark.parametrize("kind", [ImportError, OSError])  # OSError: a library is missing.
def test_core_that_cannot_run_is_exit_code_2(kind, monkeypatch, capsys) -> None:
    real = importlib.import_module

    def import_module(name: str) -> object:
        if name == "torch":
            raise kind("libtorch_cpu.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    status, out = report(capsys)
    assert status == 2
    assert "MISSING  torch          does not import (libtorch_cpu.so" in out


def test_command_speaks_where_torch_is_missing():
    """Importing the package must not need torch: doctor is there to say that it is missing."""
    code = (
        "import sys; sys.modules['torch'] = None; from dancegrpo_fast.cli import main;"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "MISSING  torch" in done.stdout


def test_every_exported_name_is_found_where_it_lives():
    for name in dancegrpo_fast.__all__:
        value = getattr(dancegrpo_fast, name)
        assert not isinstance(value, types.ModuleType), name
        assert name in dir(dancegrpo_fast)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dancegrpo_fast.nothing  # noqa: B018
