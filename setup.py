"""Builds the optional native module `dancegrpo_fast._native` with CMake; needs no torch.

DANCEGRPO_FAST_NATIVE=AUTO (default): build it if there are a C++ compiler and Python headers, else
install the Python alone and say so. ON: build it or fail. OFF: do not build it. A compiler that is
there and fails always fails the installation, with its log.

DANCEGRPO_FAST_CUDA=AUTO (default): the module draws noise on GPUs too if there is an nvcc (CUDACXX,
CUDA_HOME, the path, /usr/local/cuda). ON: it does, or the installation fails. OFF: it does not.
DANCEGRPO_FAST_CUDA_ARCHS="80;90": compile for these compute capabilities only.
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


def setting(name: str) -> str:
    """The value of an ON, OFF or AUTO variable."""
    mode = os.environ.get(name, "AUTO").upper()
    if mode not in ("ON", "OFF", "AUTO"):
        raise SystemExit(f"{name} = {mode}: must be ON, OFF or AUTO")
    return mode


def nvcc() -> str:
    """The nvcc to build CUDA noise with; empty to build without."""
    mode = setting("DANCEGRPO_FAST_CUDA")
    if mode == "OFF":
        return ""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for place in [*places, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if place and (found := shutil.which(place)):
            return found
    if mode == "ON":
        raise SystemExit(
            "DANCEGRPO_FAST_CUDA = ON, but there is no nvcc (CUDACXX, CUDA_HOME, PATH, "
            "/usr/local/cuda): install the CUDA toolkit, or pip install nvidia-cuda-nvcc "
            "nvidia-cuda-runtime and set CUDACXX to its bin/nvcc"
        )
    return ""


def wanted() -> bool:
    """Whether to build the native module."""
    mode = setting("DANCEGRPO_FAST_NATIVE")
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

        cuda = nvcc()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", str(ROOT), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DDG_NVCC={cuda}",
            f"-DDG_CUDA_ARCHS={os.environ.get('DANCEGRPO_FAST_CUDA_ARCHS', '')}",
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
                    + "DANCEGRPO_FAST_CUDA=OFF builds it without CUDA; " * bool(cuda)
                    + "DANCEGRPO_FAST_NATIVE=OFF installs without it."
                ) from error
        if not target.exists():
            raise SystemExit(f"dancegrpo-fast: CMake did not make {target.name}")


setup(
    ext_modules=[Extension("dancegrpo_fast._native", sources=[])] if wanted() else [],
    cmdclass={"build_ext": CMakeBuild},
)
