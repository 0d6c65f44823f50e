"""What every launcher does around a launch."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# Kernels that compute a residual must agree bit for bit, so nothing is fused anywhere.
OPTIONS = {"enable_fp_fusion": False}


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current one."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def vector(values: Tensor) -> Tensor:
    """A table or per-child vector as contiguous float32; itself where it already is."""
    return values.to(torch.float32).contiguous()


def optional(values: Tensor | None) -> Tensor | None:
    """`vector`, or None."""
    return None if values is None else vector(values)


def parts(programs: int, states: int, children: int, wanted: int) -> int:
    """Programs among which the children of one state are dealt out."""
    most = -(-children // max(states, 1))
    return max(1, min(most, wanted // max(programs, 1)))
