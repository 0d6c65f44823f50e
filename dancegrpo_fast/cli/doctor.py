"""`dancegrpo-fast doctor`: what this installation can do, what is missing, what that costs."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

# What `train` imports; each is a distribution of the extra [train].
_TRAIN = (
    "diffusers", "transformers", "peft", "safetensors", "pydantic", "pyyaml", "tqdm",
    "tensorboard", "matplotlib", "pillow", "ftfy", "av", "huggingface_hub",
)  # fmt: skip
_MARKS = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        mark: "ok"; "note": works, but something could be better; "missing": the core cannot run.
        name: What was looked at.
        text: What was found and, unless all is well, what to do.
    """

    mark: str
    name: str
    text: str


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    subparsers.add_parser(
        "doctor",
        description=(
            "Prints a line for each thing that was looked at: what works, what is missing, what "
            "that costs and how to get it. Exit code 0, or 2 if the core cannot run."
        ),
        epilog="example:\n  dancegrpo-fast doctor",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0, or 2 if the core (torch and numpy) cannot run."""
    lines = diagnose()
    for line in lines:
        print(f"{_MARKS[line.mark]}  {line.name:<14} {line.text}")
    return 2 if any(line.mark == "missing" for line in lines) else 0


def diagnose() -> list[Line]:
    """All checks, in the order in which they are printed."""
    lines = [_python()]
    for name in ("numpy", "torch"):
        lines.append(_core_package(name))
    if any(line.mark == "missing" for line in lines):
        return lines  # Nothing below can be imported.
    return [*lines, _cuda(), _native(), _cuda_noise(), _threads(), _triton(), *_train()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Line:
    text = f"{platform.python_version()} ({sys.executable}), {platform.platform()}"
    if not (3, 11) <= sys.version_info < (3, 14):
        return Line("note", "python", f"{text}: the core runs; training is for 3.11 to 3.13")
    return Line("ok", "python", text)


def _core_package(name: str) -> Line:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library of it that does not load.
        return Line("missing", name, f"does not import ({error}): pip install {name}")
    return Line("ok", name, str(module.__version__))


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver runs; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    # Needs no device and no initialisation; 12040 is 12.4.
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _cuda() -> Line:
    import torch

    built, driver = torch.version.cuda, _driver_cuda()
    found = f"torch for CUDA {built}" if built else "torch without CUDA"
    if driver is None:
        return Line("note", "cuda", f"no NVIDIA driver, {found}: everything runs on the CPU")
    runs = ".".join(map(str, driver))
    text = f"driver for CUDA up to {runs}, {found}"
    if built is None:
        return Line("note", "cuda", f"{text}: install torch for CUDA {runs} to use the GPU")
    # A driver runs every minor version of the newest major version it knows.
    if int(built.split(".")[0]) > driver[0]:
        way = f"update the driver, or install torch for CUDA {runs}"
        return Line("note", "cuda", f"{text}: the driver is too old; {way}")
    if not torch.cuda.is_available():
        return Line("note", "cuda", f"{text}, but torch sees no device: check CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    return Line("ok", "cuda", f"{text}, {count} x {', '.join(names)}")


def _native() -> Line:
    from dancegrpo_fast.ops import native

    reason = native.why_not()
    if reason is not None:
        return Line("note", "native module", f"{reason}. Without it noise is 30 times slower")
    build = native.module().build()
    text = f"compiled by {build['compiler']}; instruction sets: {build['instruction_sets']}"
    if not build["openmp"]:
        return Line("note", "native module", f"{text}; one thread: the compiler has no OpenMP")
    return Line("ok", "native module", f"{text}; OpenMP")


def _cuda_noise() -> Line:
    import torch

    from dancegrpo_fast.ops import noise_cuda

    name, build, driver = "cuda noise", noise_cuda.build(), _driver_cuda()
    gpu = torch.cuda.is_available()
    if build is None:
        way = "put nvcc on the path and reinstall with DANCEGRPO_FAST_CUDA=ON"
        cost = f"noise for the GPU is drawn on the CPU and copied: {way}" if gpu else "none needed"
        return Line("note" if gpu else "ok", name, f"not compiled in; {cost}")
    text = f"compiled by CUDA {build['toolkit']} for {build['architectures']}"
    if driver is not None and int(build["toolkit"].split(".")[0]) > driver[0]:
        runs = ".".join(map(str, driver))
        return Line("note", name, f"{text}, but the driver runs CUDA up to {runs}: update it")
    if not gpu:
        return Line("ok", name, f"{text}; torch sees no GPU to use it on")
    for index in range(torch.cuda.device_count()):
        reason = noise_cuda.why_not(torch.device("cuda", index))
        if reason is not None:
            return Line("note", name, f"{text}; GPU {index}: {reason}")
    return Line("ok", name, f"{text}; in use")


def _threads() -> Line:
    import torch

    used, cores = torch.get_num_threads(), os.cpu_count()
    variable = os.environ.get("OMP_NUM_THREADS", "not set")
    text = f"torch uses {used} of {cores} logical cores; OMP_NUM_THREADS {variable}"
    if variable == "1" and cores and cores > 1:
        # torchrun sets it where the user did not.
        return Line("note", "threads", f"{text}: set it to cores / processes per machine")
    return Line("ok", "threads", text)


def _triton() -> Line:
    version = _version("triton")
    if version is None:
        return Line("note", "triton", "not installed: pip install 'dancegrpo-fast[triton-cpu]'")
    return Line("ok", "triton", version)


def _train() -> list[Line]:
    versions = {name: _version(name) for name in _TRAIN}
    absent = [name for name, version in versions.items() if version is None]
    lines = []
    if present := [f"{name} {version}" for name, version in versions.items() if version]:
        lines.append(Line("ok", "training", ", ".join(present)))
    if absent:
        way = "pip install 'dancegrpo-fast[train]'"
        lines.append(Line("note", "training", f"cannot run without {', '.join(absent)}: {way}"))
    return lines
