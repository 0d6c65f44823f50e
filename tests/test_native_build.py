"""The native module as compiled code: instruction sets, forks, the GIL, and how it is built."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ops_cases import randn

from dancegrpo_fast.ops.noise import DrawKey, keys_table, normal, normal_batch

ROOT = Path(__file__).resolve().parent.parent
# Programs of the environment that runs the tests (cmake, ninja) come first.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
LEVELS = {
    "baseline": set(),
    "v3": {"avx2", "bmi1", "bmi2", "fma", "f16c", "abm", "movbe"},
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
KEYS = [DrawKey(0, 0), DrawKey(0x0123456789ABCDEF, 2**64 - 77)]
ELEMENTS = 1 << 23  # of each key: 16,777,216 draws


# ---------------------------------------------------------------------------- instruction sets


@pytest.fixture(scope="module")
def isa_folder(native_module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiles csrc/tests/isa.cpp once for each instruction set, and once contracted.

    Asks for the native module so that a machine without a compiler is told once, not thrice.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"ISA TESTS NOT RUN: they compare x86-64 levels, this is {platform.machine()}")
    if not shutil.which("c++", path=PATH) or not shutil.which("cmake", path=PATH):
        pytest.skip("ISA TESTS NOT RUN: no C++ compiler or no cmake (apt install g++ cmake)")
    folder = tmp_path_factory.mktemp("isa")
    env = os.environ | {"PATH": PATH}
    for command in (
        ["cmake", str(ROOT), "-DDG_ISA_TESTS_ONLY=ON"],
        ["cmake", "--build", ".", "--target", "isa_tests", "--parallel", "2"],
    ):
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """uint32 [2, ELEMENTS] of NumPy."""
    drawn = normal_batch((ELEMENTS,), KEYS, implementation="reference")
    return drawn.numpy().view(np.uint32)


def draw(folder: Path, name: str) -> np.ndarray:
    library = ctypes.CDLL(str(folder / f"libisa_{name}.so"))
    keys = keys_table(KEYS).numpy()
    out = np.empty((len(KEYS), ELEMENTS), np.float32)
    pointers = (ctypes.c_void_p(out.ctypes.data), ctypes.c_void_p(keys.ctypes.data))
    library.dg_normal(*pointers, ctypes.c_int64(len(KEYS)), ctypes.c_int64(ELEMENTS))
    return out.view(np.uint32)


class Transition:
    """Inputs of dg_transition: rows of an odd size, and the bits of its three outputs."""

    ROWS, SIZE = 3, 9001

    def __init__(self) -> None:
        self.m = randn(self.ROWS, self.SIZE, seed=0, dtype=torch.float32)
        self.x = randn(self.ROWS, self.SIZE, seed=1, dtype=torch.bfloat16)
        row = [0.9, -0.13, 0.31, 5.0, 0.2, 1.0, 1.0, 1.0]
        self.table = torch.tensor(row).repeat(self.ROWS, 1)
        self.keys = keys_table([DrawKey(i, 5) for i in range(self.ROWS)])
        self.factors = torch.tensor([0.37, 0.0, 0.0]).repeat(self.ROWS, 1)

    def outputs(self) -> list[torch.Tensor]:
        return [torch.empty_like(self.m), torch.empty(self.ROWS), torch.empty_like(self.m)]

    def run(self, folder: Path, name: str) -> list[torch.Tensor]:
        out = self.outputs()
        inputs = (self.m, self.x, self.table, self.keys, self.factors)
        library = ctypes.CDLL(str(folder / f"libisa_{name}.so"))
        library.dg_transition(
            *(ctypes.c_void_p(t.data_ptr()) for t in inputs),
            ctypes.c_int64(self.ROWS), ctypes.c_int64(self.SIZE),
            *(ctypes.c_void_p(t.data_ptr()) for t in out),
        )  # fmt: skip
        return out

    def shipped(self, module) -> list[torch.Tensor]:
        y, log_prob = module.sample_transition(
            self.m, self.x, self.table, self.keys, None, None, None, torch.float32, 1
        )
        one = torch.ones(())
        gradient = module.transition_gradient(
            one, self.factors, self.m, self.x, y, self.table, None, None, None, None, 1
        )
        return [y, log_prob, gradient]


def skip_without(level: str) -> None:
    text = Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    if lacking := LEVELS[level] - flags:
        pytest.skip(f"ISA LEVEL x86-64-{level} NOT RUN: this CPU lacks {sorted(lacking)}")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set_gives_the_reference_bits(level, isa_folder, expected) -> None:
    skip_without(level)
    assert np.count_nonzero(draw(isa_folder, level) != expected) == 0


def test_contracted_build_is_caught(isa_folder, expected) -> None:
    """The negative control: with fused multiply-add the comparison above must fail."""
    skip_without("v3")
    different = np.count_nonzero(draw(isa_folder, "contracted") != expected)
    assert different > ELEMENTS // 100


@pytest.mark.parametrize("level", LEVELS)
def test_transition_bits_are_those_of_the_shipped_build(level, isa_folder, native_module) -> None:
    """Sampled latents, log-probs and gradients."""
    skip_without(level)
    case = Transition()
    expected = case.shipped(native_module)
    for ours, theirs in zip(case.run(isa_folder, level), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_contracted_transition_is_caught(isa_folder, native_module) -> None:
    """The negative control, for each of the three outputs."""
    skip_without("v3")
    case = Transition()
    expected = case.shipped(native_module)
    for ours, theirs in zip(case.run(isa_folder, "contracted"), expected, strict=True):
        assert not torch.equal(ours, theirs)


def test_shipped_build_gives_the_reference_bits(native_module, expected) -> None:
    drawn = normal_batch((ELEMENTS,), KEYS, implementation="native").numpy().view(np.uint32)
    assert np.count_nonzero(drawn != expected) == 0


# ---------------------------------------------------------------------------- processes, threads


def _draw_and_learn() -> list[bytes]:
    """Bits of noise, of a sampled transition and of its loss, on two threads where they may."""
    from dancegrpo_fast.ops import native

    z = normal((1 << 18,), DrawKey(1, 2), implementation="native")
    m, keys = z.view(2, -1), keys_table([DrawKey(3, 4), DrawKey(5, 6)])
    table = torch.tensor([0.9, -0.1, 0.3, 5.0, 0.2, 1.0, 1.0, 1.0]).repeat(2, 1)
    y, log_prob = native.module().sample_transition(
        m, m, table, keys, None, None, None, torch.float32, 2
    )
    loss = native.module().policy_loss(
        m, m, y, table, torch.ones(2), None, None, None, None, None, None, 0.1, 0.1, None, 0.0,
        None, 1.0, None, True, 2,
    )  # fmt: skip
    return [t.numpy().tobytes() for t in (z, y, log_prob, *loss)]


def _in_child(connection) -> None:
    from dancegrpo_fast.ops import native

    connection.send(native.module().usable_threads(8))
    connection.send(_draw_and_learn())


def test_forked_child_runs_on_one_thread(native_module) -> None:
    """After the parent's OpenMP team has started, a child that enters OpenMP would hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = _draw_and_learn()
        assert native_module.usable_threads(8) == 8
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_in_child, args=(theirs,))
        child.start()
        try:
            assert ours.poll(60), "the forked child hangs"
            assert ours.recv() == 1
            assert ours.poll(60), "the forked child hangs while drawing"
            assert ours.recv() == expected
        finally:
            child.kill()
            child.join()
    finally:
        torch.set_num_threads(before)


def test_native_releases_the_gil(native_module) -> None:
    """With thread switching off, another thread runs during a draw only if the GIL is free."""
    entered, finished = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        normal((1 << 24,), DrawKey(0, 0), implementation="native")
        finished.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
        was_free = not finished.is_set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert was_free


# ---------------------------------------------------------------------------- setup.py


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What setup.py reads, with an empty package."""
    folder = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    (folder / "dancegrpo_fast").mkdir()
    (folder / "dancegrpo_fast" / "__init__.py").touch()
    return folder


def build(source: Path, **env: str) -> tuple[int, str, list[Path]]:
    """Exit status, output and native modules of `setup.py build`."""
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", "out"],
        cwd=source,
        env={k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": PATH} | env,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, list((source / "out").rglob("_native*"))


def test_no_compiler_gives_a_pure_installation_that_says_so(source) -> None:
    status, output, modules = build(source, PATH="")
    assert status == 0 and not modules, output
    assert "no C++ compiler (c++, g++, clang++): installing without the native module" in output
    assert (source / "out" / "dancegrpo_fast" / "__init__.py").exists()


def test_native_on_without_compiler_fails(source) -> None:
    status, output, _ = build(source, PATH="", DANCEGRPO_FAST_NATIVE="ON")
    assert status != 0
    assert "DANCEGRPO_FAST_NATIVE = ON, but there is no C++ compiler" in output


def test_native_off_skips(source) -> None:
    status, output, modules = build(source, DANCEGRPO_FAST_NATIVE="OFF")
    assert status == 0 and not modules, output


def test_unknown_mode_is_refused(source) -> None:
    status, output, _ = build(source, DANCEGRPO_FAST_NATIVE="MAYBE")
    assert status != 0
    assert "DANCEGRPO_FAST_NATIVE = MAYBE: must be ON, OFF or AUTO" in output


def test_a_compiler_that_fails_fails_the_installation(native_module, source) -> None:
    if not shutil.which("cmake", path=PATH) or not shutil.which("ninja", path=PATH):
        pytest.skip("needs cmake and ninja")
    pytest.importorskip("pybind11")
    with (source / "csrc" / "normal.h").open("a") as header:
        header.write("#error planted\n")
    status, output, modules = build(source)
    assert status != 0 and not modules
    assert "#error planted" in output  # the compiler's log
    assert "the native module failed to build (log above)" in output
    assert "DANCEGRPO_FAST_NATIVE=OFF installs without it" in output
