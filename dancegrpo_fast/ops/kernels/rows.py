"""Coefficient rows of flow steps from sigmas that lie on the GPU, in one launch.

For hosts that hand over the two sigmas of a step and not a schedule, so that no table can be kept.
The maths is that of `dynamics.py`, in float64 with the library's log, sin and cos; the rows are
rounded once. `integrations/tables.py` has the same in plain torch: some fifty launches.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dancegrpo_fast.ops.kernels.launch import OPTIONS, device_guard

DYNAMICS = {"dance": 0, "flow": 1, "flow_wan": 2, "cps": 3, "ode": 4, "euler_noise": 5}
_HALF_PI = tl.constexpr(math.pi / 2)
_NORMALISER = tl.constexpr(0.5 * math.log(2 * math.pi))
_AT_ONE = tl.constexpr(1.0 - 2e-6)  # as in dynamics.py
_TILE = 128


@triton.jit
def _value(pointer, stride, i, live):
    return tl.load(pointer + i * stride, mask=live, other=0.5).to(tl.float64)


@triton.jit
def _put(out, i, column: tl.constexpr, value, valid, live):
    nan = float("nan")
    tl.store(out + i * 8 + column, tl.where(valid, value, nan).to(tl.float32), mask=live)


@triton.jit
def flow_rows_kernel(
    sigma, sigma_next, level, low, high, out, n,
    sigma_stride, next_stride, level_stride, low_stride, high_stride,
    DYNAMICS: tl.constexpr, PUBLISHED: tl.constexpr, NORMALISED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = i < n
    here = _value(sigma, sigma_stride, i, live)
    there = _value(sigma_next, next_stride, i, live)
    rate = _value(level, level_stride, i, live)
    length = here - there
    valid = (there >= 0) & (length >= 0) & (here <= 1)
    if DYNAMICS == 3:
        kept = there * tl.cos(rate * _HALF_PI)
        s = there * tl.sin(rate * _HALF_PI)
        a = (1 - there) + kept
        b = kept * (1 - here) - (1 - there) * here
    else:
        pull = length * 0
        if DYNAMICS == 1:
            top = tl.where(here > _AT_ONE, _value(high, high_stride, i, live), here)
            rate = rate * tl.sqrt(here / (1 - top))
        elif DYNAMICS == 2:
            bottom = _value(low, low_stride, i, live)
            rate = rate * (bottom + (_value(high, high_stride, i, live) - bottom) * here)
        elif DYNAMICS == 4:
            rate = pull
        if DYNAMICS < 3:
            pull = rate * rate / (2 * here)
            valid = valid & (pull - pull == 0)  # finite
        a = 1 - pull * length
        b = -length * (1 + pull * (1 - here))
        s = rate * tl.sqrt(length)
    dense = s != 0
    precision = tl.where(dense, 1 / (2 * s * s), 0.0)
    c = tl.where(dense, -tl.log(s) - _NORMALISER, 0.0)
    if PUBLISHED or not NORMALISED:
        c = c * 0
    w = precision
    if PUBLISHED:
        w = precision * 0 + 1
    _put(out, i, 0, a, valid, live)
    _put(out, i, 1, b, valid, live)
    _put(out, i, 2, s, valid, live)
    _put(out, i, 3, w, valid, live)
    _put(out, i, 4, c, valid, live)
    _put(out, i, 5, b * b * precision, valid, live)
    _put(out, i, 6, a * 0 + 1, valid, live)
    _put(out, i, 7, -here, valid, live)


def flow_rows(
    sigma: Tensor,
    sigma_next: Tensor,
    level: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    *,
    dynamics: str,
    normaliser: bool,
    published: bool,
) -> Tensor:
    """[n, 8] float32 from [1] or [n] tensors of any floating dtype on one device.

    Args:
        sigma, sigma_next: Noise levels of x and x'.
        level: eta or a.
        low, high: The last and the second sigma of the schedule ("flow_wan"; high: "flow" too).
        dynamics: A key of DYNAMICS.
        normaliser: False: c = 0.
        published: CPS' w = 1 and c = 0.

    Raises:
        ValueError: Lengths that do not fit.
    """
    values = [sigma, sigma_next, level, *(sigma if v is None else v for v in (low, high))]
    sizes = [len(value) for value in values]
    n = max(sizes)
    if set(sizes) - {1, n}:
        raise ValueError(f"sigma, sigma_next, level, ... have {sizes} elements: must be 1 or {n}")
    out = torch.empty((n, 8), dtype=torch.float32, device=sigma.device)
    strides = [0 if len(value) == 1 else value.stride(0) for value in values]
    with device_guard(sigma):
        flow_rows_kernel[(triton.cdiv(n, _TILE),)](
            *values, out, n, *strides,
            DYNAMICS=DYNAMICS[dynamics], PUBLISHED=published, NORMALISED=normaliser, TILE=_TILE,
            **OPTIONS,
        )  # fmt: skip
    return out
