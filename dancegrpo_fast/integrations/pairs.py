"""Coefficient rows for hosts that hand over the two sigmas of a step instead of a schedule."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.integrations.tables import (
    Device,
    check_flow,
    check_sigmas,
    finish,
    flow_rows,
)
from dancegrpo_fast.ops import implementations


def pair_rows(
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    dynamics: str,
    batch: int,
    level: float | Tensor = 0.0,
    normaliser: bool = True,
    exact_density: bool = False,
    sigma_min: float | Tensor | None = None,
    sigma_max: float | Tensor | None = None,
    device: Device = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Coefficient rows for hosts that pass the two sigmas of a step.

    Numbers are looked up after the first call. Tensors are computed with where they lie: on a GPU
    with Triton in one launch, else in about fifty small operations. Prefer `flow_table` wherever
    the host has the whole schedule.

    Args:
        sigma, sigma_next: Numbers, or tensors with 1 or `batch` elements.
        dynamics, normaliser, exact_density, dtype: As in `flow_table`.
        batch: B.
        level: A number, or a tensor with 1 or `batch` elements.
        sigma_min: For "flow_wan" only, required there: the last sigma of the schedule.
        sigma_max: For "flow" (where sigma can be 1) and "flow_wan": the second sigma.
        device: None: that of the first of sigma, sigma_next, level that is a tensor, else the CPU.

    Returns:
        [batch, 8]; rows that are the same share memory.

    Raises:
        ValueError: As `flow_table`; sigma_min or sigma_max missing.
    """
    check_flow(dynamics, level if isinstance(level, float | int) else 0.0)
    if dynamics == "flow_wan" and (sigma_min is None or sigma_max is None):
        raise ValueError("dynamics = 'flow_wan': needs sigma_min and sigma_max of the schedule")
    values = (sigma, sigma_next, level, sigma_min, sigma_max)
    options = (dynamics, normaliser, exact_density)
    where = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    device = torch.device(where if device is None else device)
    if not any(isinstance(value, Tensor) for value in values):
        found = _number_rows(values, options, device, dtype)
    else:
        found = _pair_rows(values, options, where, device, dtype)
    if len(found) not in (1, batch):
        raise ValueError(f"sigma has {len(found)} elements: must be 1 or {batch}, the batch")
    return found.expand(batch, 8)


def _pair_rows(
    values: Sequence[Any],
    options: tuple[str, bool, bool],
    where: torch.device,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    dynamics, normaliser, exact_density = options
    if where.type == "cuda" and dtype == torch.float32 and implementations()["triton"] is None:
        return _kernel_rows(values, options, where).to(device)
    sigma, sigma_next, level, low, high = (_as_float64(value, where) for value in values)
    check_sigmas(sigma, sigma_next)
    rows, _ = flow_rows(sigma, sigma_next, dynamics, level, low, high, exact_density)
    return finish(rows, normaliser, device, dtype)


def _kernel_rows(values: Sequence[Any], options: tuple[str, bool, bool], where: Any) -> Tensor:
    """The same by one launch of Triton's (CUDA; or its interpreter, in tests)."""
    dynamics, normaliser, exact_density = options
    given = [
        value.detach().reshape(-1).to(where, non_blocking=True)
        if isinstance(value, Tensor)
        else None if value is None else _filled(float(value), where)
        for value in values
    ]  # fmt: skip
    kernels = importlib.import_module("dancegrpo_fast.ops.kernels.rows")
    published = dynamics == "cps" and not exact_density
    found: Tensor = kernels.flow_rows(
        *given, dynamics=dynamics, normaliser=normaliser, published=published
    )
    return found


def _filled(value: float, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _fill(value, device)  # the graph's own: it holds nothing before a replay
    return _kept(value, device)


def _fill(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # As in _Tables.get.
        return torch.full((1,), value, dtype=torch.float64, device=device)


_kept = functools.lru_cache(maxsize=256)(_fill)


def _as_float64(value: float | Tensor | None, device: torch.device) -> Tensor:
    """[1] or [n]; a number is filled in on the device, for copying it there would wait."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64, non_blocking=True).reshape(-1)
    fill = math.nan if value is None else float(value)
    return torch.full((1,), fill, dtype=torch.float64, device=device)


@functools.lru_cache(maxsize=4096)
def _number_rows(values: Any, options: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # As in _Tables.get.
        return _pair_rows(values, options, torch.device("cpu"), device, dtype)
