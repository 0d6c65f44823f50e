"""Builds the optional native module `dancegrpo_fast._native` with CMake; needs no torch.

DANCEGRPO_FAST_NATIVE=AUTO (default): build it if there are a C++ compiler and Python headers, else
install the Python alone and say so. ON: build it or fail. OFF: do not build it. A compiler that is
there and fails always fails the installation, with its log.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def missing() -> str | None:
    """What this machine lacks to compile, in one line; None if nothing."""
    named = os.environ.get("CXX")
    compilers = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        return f"no C++ compiler ({', '.join(compilers)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python headers (on Debian: apt install python3-dev)"
    return None


def wanted() -> bool:
    """Whether to build the native module."""
    mode = os.environ.get("DANCEGRPO_FAST_NATIVE", "AUTO").upper()
    if mode not in ("ON", "OFF", "AUTO"):
        raise SystemExit(f"DANCEGRPO_FAST_NATIVE = {mode}: must be ON, OFF or AUTO")
    if mode == "OFF":
        return False
    lack = missing()
    if lack is None:
        return True
    if mode == "ON":
        raise SystemExit(f"DANCEGRPO_FAST_NATIVE = ON, but there is {lack}")
    print(
        f"dancegrpo-fast: {lack}: installing without the native module; results are the same, "
        "noise is slower. `dancegrpo-fast doctor` explains.",
        file=sys.stderr,
    )
    return False


class CMakeBuild(build_ext):
    """Runs CMake and puts the module where setuptools expects it (also in editable installs)."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", str(ROOT), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        # A cache from another environment (pip's build directories are temporary) names tools
        # that are gone.
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        for command in (configure, ["cmake", "--build", ".", "--target", "_native"]):
            try:
                subprocess.run(command, cwd=work, check=True)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"dancegrpo-fast: the native module failed to build (log above): {error}\n"
                    "DANCEGRPO_FAST_NATIVE=OFF installs without it."
                ) from error
        if not target.exists():
            raise SystemExit(f"dancegrpo-fast: CMake did not make {target.name}")


setup(
    ext_modules=[Extension("dancegrpo_fast._native", sources=[])] if wanted() else [],
    cmdclass={"build_ext": CMakeBuild},
)
