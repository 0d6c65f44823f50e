"""The CUDA part of the build: the kernels' machine code, without a GPU, and the search for nvcc.

The gate: no kernel that draws has a fused, flushed or approximate operation. With it, a comparison
of bits on the CPU speaks for the GPU too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "noise_cuda.cu"


# ---------------------------------------------------------------------------- machine code


def find_nvcc() -> str:
    """The machine's nvcc, else that of the package which [dev] names."""
    if found := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"):
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvcc" and file.parent.name == "bin":
            return str(file.locate())
    pytest.fail(
        "CUDA KERNELS NOT COMPILED: no nvcc on the path, and no nvidia-cuda-nvcc package: "
        "pip install 'dancegrpo-fast[dev]'"
    )


def flags() -> list[str]:
    """The flags of the build, read from CMakeLists.txt."""
    text = (ROOT / "CMakeLists.txt").read_text()
    values = dict(re.findall(r"set\((DG_NVCC_EXACT|DG_NVCC_FLAGS) ([^)]*)\)", text))
    return values["DG_NVCC_FLAGS"].replace("${DG_NVCC_EXACT}", values["DG_NVCC_EXACT"]).split()


def run_nvcc(source: Path, out: Path, *options: str) -> str:
    """Compiles for sm_90; returns the compiler's messages."""
    command = [find_nvcc(), *options, "-arch=sm_90", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:\.[a-z0-9_:]+)*)[\s;]", re.M)


def inexact(ptx: str) -> list[str]:
    """The instructions that a kernel which draws must not have."""
    return sorted({code for code in INSTRUCTION.findall(ptx) if _is_inexact(code)})


def _is_inexact(code: str) -> bool:
    name, *parts = code.split(".")
    if {"ftz", "approx", "full"} & set(parts) or name in ("fma", "mad") and "f32" in parts:
        return True
    if name in ("add", "sub", "mul", "div", "sqrt", "rcp") and {"f32", "f16", "bf16"} & set(parts):
        return "rn" not in parts  # without .rn ptxas may fuse
    if name in ("ex2", "lg2", "sin", "cos", "rsqrt", "tanh", "fma"):
        return True
    return "f64" in parts and name not in ("cvt", "st", "ld", "mov")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("ptx") / "noise.ptx"
    run_nvcc(SOURCE, out, *flags(), "-ptx")
    return out.read_text()


def entries(ptx: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every kernel."""
    parts = re.split(r"^\.(?:visible )?entry (\w+)", ptx, flags=re.M)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def test_kernels_that_draw_have_only_exact_operations(ptx) -> None:
    kernels = dict(entries(ptx))
    assert len(kernels) == 14  # whole and box; four dtypes filled, three added to
    for name, text in kernels.items():
        assert inexact(text) == [], name
        assert "sqrt.rn.f32" in text and "mul.rn.f32" in text and "add.rn.f32" in text, name
        assert "mul.wide.u32" in text, name
        assert ".local" not in text, name  # nothing is indexed in memory of the thread


def test_the_gate_sees_what_it_must(tmp_path) -> None:
    """The negative control: fused, flushed and approximate code is caught."""
    source = tmp_path / "bad.cu"
    source.write_text(
        "__global__ void k(float* p) { p[0] = p[1] * p[2] + p[3]; p[4] = p[5] / p[6];"
        " p[7] = sqrtf(p[8]); p[9] = expf(p[10]); }\n"
    )
    run_nvcc(source, tmp_path / "fast.ptx", "-ptx", "-use_fast_math")
    found = inexact((tmp_path / "fast.ptx").read_text())
    for part in ("fma.rn.ftz.f32", "div.approx.ftz.f32", "sqrt.approx.ftz.f32", "ex2.approx"):
        assert any(code.startswith(part) for code in found), (part, found)
    run_nvcc(source, tmp_path / "plain.ptx", "-ptx")
    assert "fma.rn.f32" in inexact((tmp_path / "plain.ptx").read_text())


@pytest.mark.parametrize(
    ("number", "store"), [(0, "v4.f32"), (1, "v2.u32"), (2, "v2.u32"), (3, "v2.f64")]
)
def test_bodies_are_written_as_vectors(ptx, number, store) -> None:
    """128 bits for float32 and float64, 64 for the half types: four elements at a time."""
    kernels = [text for name, text in entries(ptx) if f"DtypeE{number}E" in name]
    assert len(kernels) == (2 if number == 3 else 4)
    for text in kernels:
        assert re.search(rf"st\.global\.cg\.{re.escape(store)}", text)


def test_no_spills_and_few_registers(tmp_path) -> None:
    """48 registers leave 1,280 threads to a multiprocessor: enough to hide the arithmetic."""
    log = run_nvcc(SOURCE, tmp_path / "noise.cubin", *flags(), "-cubin", "-Xptxas=-v")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    assert len(spills) == 14 and {number for row in spills for number in row} == {"0"}
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == 14 and max(registers) <= 48, registers


# ---------------------------------------------------------------------------- setup.py


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, loaded without setting anything up."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DANCEGRPO_FAST_NATIVE", "OFF")
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nvcc_is_found_in_the_order_that_is_documented(setup_py, monkeypatch) -> None:
    found = {"/home/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"}
    monkeypatch.setattr(setup_py.shutil, "which", lambda name: name if name in found else None)
    assert setup_py.nvcc() == "nvcc"
    monkeypatch.setenv("CUDA_HOME", "/home")
    assert setup_py.nvcc() == "/home/bin/nvcc"
    monkeypatch.setenv("CUDACXX", "/usr/local/cuda/bin/nvcc")
    assert setup_py.nvcc() == "/usr/local/cuda/bin/nvcc"
    monkeypatch.setenv("DANCEGRPO_FAST_CUDA", "OFF")
    assert setup_py.nvcc() == ""


def test_a_demand_for_cuda_without_nvcc_fails(setup_py, monkeypatch) -> None:
    monkeypatch.setattr(setup_py.shutil, "which", lambda name: None)
    assert setup_py.nvcc() == ""
    monkeypatch.setenv("DANCEGRPO_FAST_CUDA", "ON")
    with pytest.raises(SystemExit, match="DANCEGRPO_FAST_CUDA = ON, but there is no nvcc"):
        setup_py.nvcc()
    monkeypatch.setenv("DANCEGRPO_FAST_CUDA", "PERHAPS")
    with pytest.raises(SystemExit, match="DANCEGRPO_FAST_CUDA = PERHAPS: must be ON, OFF or AUTO"):
        setup_py.nvcc()


def test_an_nvcc_that_fails_fails_the_installation(native_module, tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").touch()
    (source / "dancegrpo_fast").mkdir()
    (source / "dancegrpo_fast" / "__init__.py").touch()
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho planted failure >&2\nexit 1\n")
    nvcc.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name in ("cmake", "ninja"):
        if not shutil.which(name, path=path):
            pytest.skip(f"needs {name}")
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", "out"],
        cwd=source, env=os.environ | {"PATH": path, "CUDACXX": str(nvcc)},
        capture_output=True, text=True,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "planted failure" in output
    assert "DANCEGRPO_FAST_CUDA=OFF builds it without CUDA" in output
    assert not list((source / "out").rglob("_native*"))


def test_what_is_built_in_says_so(native_module) -> None:
    """Both kinds of build are right; a half of one is not."""
    from dancegrpo_fast.ops import noise_cuda

    names = ("normal_cuda", "add_normal_cuda", "load_cuda", "cuda_build")
    assert len({hasattr(native_module, name) for name in names}) == 1
    if (build := noise_cuda.build()) is not None:
        assert re.fullmatch(r"\d+\.\d+", build["toolkit"])
        assert re.fullmatch(r"(\d+, )+PTX \d+", build["architectures"])
