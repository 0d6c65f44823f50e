"""Launch parameters: constants, and a table per GPU; nothing is tuned while running.

Registers, instructions and bytes per element: `benchmarks/results/kernels_static.md`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

REDUCING_WARPS = 8  # 16 elements of a chunk per thread. Decides no bit, see tiles.py.
ROLLOUT_REGISTERS = 128  # Two programs for each multiprocessor; without it some variants need 137.
FINALISE_TILE = 4096  # Rows times chunk sums in registers at once.
FINALISE_WARPS = 8


@dataclass(frozen=True)
class Config:
    """How one GPU is filled.

    Attributes:
        gradient_tile: Elements that one program of an elementwise kernel takes.
        gradient_warps: Its warps.
        programs: Programs below which the children of one state are dealt out to several: small
            latents with many children would leave multiprocessors idle. Changes no bit.
    """

    gradient_tile: int = 1024
    gradient_warps: int = 4
    programs: int = 264


# By compute capability: 8 elements a thread is one 128-bit load of bfloat16 and two of float32.
# `programs` is two for each multiprocessor of the largest part sold. Not measured on any of them.
CONFIGS = {
    (8, 0): Config(programs=216),
    (9, 0): Config(programs=264),
    (10, 0): Config(programs=296),
    (12, 0): Config(programs=376),
}


@functools.cache
def config(device: torch.device) -> Config:
    """The table's entry for a device; `Config()` for an unlisted GPU and for the interpreter."""
    if device.type != "cuda":
        return Config()
    return CONFIGS.get(torch.cuda.get_device_capability(device), Config())


def finalise_width(chunks: int) -> int:
    """Chunk sums added side by side: a function of the row's length alone, as it decides bits."""
    return next(width for width in (32, 256, 1024) if chunks <= width or width == 1024)
