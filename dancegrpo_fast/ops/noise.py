"""Noise as a pure function of a key: Philox-4x32-10 and an exact Box-Muller normal.

Nothing here has a state. Element `i` of a draw is a function of the key and of `i` alone, so any
process can draw any part of any tensor and gets the bits that every other process gets.

Layout (that of PyTorch's stateless Philox, `torch.func._random`): a key is a pair of unsigned
64-bit integers (seed, offset). Block `n` is Philox-4x32-10 (Salmon et al. 2011) of the counter
`(offset + n) mod 2**64` in words 0 and 1 (words 2 and 3 are zero) under the key `seed`; its four
words become elements `4n .. 4n+3`. `fold_in(d)` is block `d` repacked as a new (seed, offset).

The numbers themselves are defined in `noise_reference.py`; the native module gives the same bits on
the CPU, and its CUDA part on GPUs (`noise_cuda.py`).
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Sequence

import numpy as np
import torch

from dancegrpo_fast.ops import native, noise_cuda, noise_reference
from dancegrpo_fast.ops.keys import DrawKey, NoiseKey, as_table, keys_table
from dancegrpo_fast.ops.noise_reference import Runs, collapse, philox

__all__ = [
    "Box",
    "DrawKey",
    "NoiseKey",
    "add_normal_",
    "implementations",
    "keys_table",
    "normal",
    "normal_batch",
    "permutation",
    "randint",
    "random_bits",
    "selected",
]

_log = logging.getLogger(__name__)

Box = Sequence[tuple[int, int]]

# torch dtype -> the number by which csrc/noise_cpu.h knows it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


# ---------------------------------------------------------------------------- choosing


def implementations(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Who can draw numbers for a device: name -> None if it can run here, else why it cannot.

    "native" and "reference" draw on the CPU; for another device the numbers are then copied.
    """
    found: dict[str, str | None] = {}
    if torch.device(device).type == "cuda":
        found["cuda"] = noise_cuda.why_not(torch.device(device))
    return found | {"native": native.why_not(), "reference": None}


def selected(implementation: str = "auto", device: torch.device | str = "cpu") -> str:
    """Which implementation a call runs: "cuda" (tensors there only), "native" or "reference".

    "auto" is the first of them that can run; falling back is warned about once.

    Raises:
        ValueError: Unknown name for this device, or one that cannot run here.
    """
    if implementation == "reference":
        return "reference"
    able = implementations(device)
    if implementation != "auto":
        if implementation not in able:
            names = ["auto", *(["cuda"] if "cuda" in able else []), "native"]
            known = f"{', '.join(map(repr, names))} or 'reference'"
            raise ValueError(f"implementation = {implementation!r}: must be {known}")
        if able[implementation] is not None:
            raise ValueError(
                f"implementation = {implementation!r}: {able[implementation]}; or use 'reference'"
            )
        return implementation
    where = torch.device(device).type
    if where != "cpu":
        reason = able.get("cuda", "no kernel for it")
        if reason is None:
            return "cuda"
        _warn_once(f"noise for {where} is drawn on the CPU and copied: {reason}")
    if able["native"] is None:
        return "native"
    _warn_once(
        f"noise is drawn by NumPy, about 30 times slower, with the same bits: {able['native']}"
    )
    return "reference"


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


# ---------------------------------------------------------------------------- drawing


def _round_to(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """float32 array -> tensor of `dtype`, rounded to nearest even."""
    if dtype == torch.bfloat16:
        bits = values.view(np.uint32)
        carry = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = ((bits + carry) >> np.uint32(16)).astype(np.uint16)
        return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)
    if dtype == torch.float16:
        return torch.from_numpy(values.astype(np.float16))
    return torch.from_numpy(values).to(dtype)


def _fill(out: torch.Tensor, keys: torch.Tensor, runs: Runs, name: str) -> None:
    """Fills contiguous CPU `out` `[n, ...]` from n keys: int64 [n, 2], contiguous, CPU."""
    if name == "native":
        native.check_plain(out)
        native.module().normal(
            out.data_ptr(), _DTYPES[out.dtype], keys.data_ptr(), len(keys),
            runs.base, runs.extents, runs.strides, torch.get_num_threads(),
        )  # fmt: skip
        return
    rows = out.view(len(keys), runs.count)
    for row, key in zip(rows, keys.numpy().view(np.uint64), strict=True):
        values = np.empty(runs.count, np.float32)
        noise_reference.fill(values, key, runs)
        row.copy_(_round_to(values, out.dtype))


def normal_batch(
    shape: Sequence[int],
    keys: torch.Tensor | Sequence[DrawKey],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    box: Box | None = None,
    copies: int | None = None,
    out: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Standard normals, one tensor per key.

    On a CUDA device nothing waits for the GPU, and the kernel reads the keys from the device: in a
    CUDA graph a replay draws from what the table then holds.

    Args:
        shape: Shape of each full tensor; element `i` is the row-major linear index in it.
        keys: n `DrawKey`, or int64 `[n, 2]` from `keys_table`. For numbers drawn on a GPU the table
            should lie there; another one is uploaded (not possible while a graph is captured).
        dtype: float32, bfloat16, float16 (both rounded to nearest even from the float32 value) or
            float64 (the float32 value widened). None: that of `out`, else float32.
        device: Where the result lies. None: that of `out`, else the CPU. The bits are the same
            everywhere.
        box: (start, stop) per dimension: returns this part of the full tensor, the same bits,
            without drawing the rest. None: all of it.
        copies: Write each draw this often, for a group of samples that share their initial noise:
            one draw, not `copies` of them. None: once, without the dimension.
        out: Contiguous tensor to fill.
        implementation: "auto" (CUDA for CUDA devices and native for the CPU where they are built;
            else one that can run, with one warning), "cuda", "native" or "reference"; the last two
            draw on the CPU and copy.

    Returns:
        `[n, *extent of the box]`, with copies `[n, copies, *extent of the box]`.

    Raises:
        ValueError: A bad shape, box, dtype, key table, `copies`, `out` or implementation.
        RuntimeError: CUDA refuses the launch; in its words.
    """
    shape, box = _checked_box(shape, box)
    table = as_table(keys)
    repeated = () if copies is None else (operator.index(copies),)
    if any(count < 0 for count in repeated):
        raise ValueError(f"copies = {copies}: must not be negative")
    size = (len(table), *repeated, *(stop - start for start, stop in box))
    dtype, device = _resolve_target(dtype, device, out, size)
    name = selected(implementation, device)
    runs = collapse(shape, box)
    # Devices are named because torch's default device may be another one.
    if name == "cuda":
        drawn = torch.empty(size, dtype=dtype, device=device) if out is None else out
        noise_cuda.normal(drawn, _DTYPES[dtype], table, runs, 1 if copies is None else copies)
        return drawn
    direct = device.type == "cpu"
    host = out if direct and out is not None else torch.empty(size, dtype=dtype, device="cpu")
    if host.numel():
        _fill_copies(host, table.cpu().contiguous(), runs, name, copies)
    if direct:
        return host
    return host.to(device) if out is None else out.copy_(host)


def _fill_copies(
    host: torch.Tensor, table: torch.Tensor, runs: Runs, name: str, copies: int | None
) -> None:
    if copies is None:
        _fill(host, table, runs, name)
        return
    for row, key in zip(host, table.split(1), strict=True):
        _fill(row[:1], key, runs, name)
        row[1:] = row[:1]


def normal(
    shape: Sequence[int],
    key: DrawKey,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    box: Box | None = None,
    copies: int | None = None,
    out: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Standard normals from one key: `normal_batch` without the leading dimension.

    Args:
        shape: Shape of the full tensor.
        key: The key to draw from.
        dtype: As in `normal_batch`.
        device: As in `normal_batch`.
        box: As in `normal_batch`.
        copies: As in `normal_batch`.
        out: As in `normal_batch`, without the leading dimension.
        implementation: As in `normal_batch`.

    Returns:
        A tensor of `shape`, or of the extent of `box`; with copies `[copies, ...]`.

    Raises:
        ValueError: As `normal_batch`.
    """
    batch = normal_batch(
        shape,
        [key],
        dtype=dtype,
        device=device,
        box=box,
        copies=copies,
        out=None if out is None else out.unsqueeze(0),
        implementation=implementation,
    )
    return batch[0] if out is None else out


def add_normal_(
    x: torch.Tensor,
    keys: torch.Tensor | Sequence[DrawKey],
    scale: float | torch.Tensor = 1.0,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    """x += scale * eps in place, with eps what `normal_batch(x.shape[1:], keys)` gives.

    In float32: one product, one sum, each rounded by itself, and one rounding to the dtype of x. A
    row whose scale is 0 is left alone, so not even a NaN of its noise or of x changes.

    Args:
        x: `[n, ...]`, contiguous, float32, bfloat16 or float16.
        keys: n keys, as in `normal_batch`.
        scale: A number, or one per row: floating `[n]`, used as float32. On a GPU it should lie
            there.
        implementation: As in `normal_batch`.

    Returns:
        x.

    Raises:
        ValueError: A bad x, key table, scale or implementation; x with `requires_grad`.
        RuntimeError: CUDA refuses the launch; in its words.
    """
    table = as_table(keys)
    _check_addition(x, table, scale)
    name = selected(implementation, x.device)
    shape = tuple(x.shape[1:])
    runs = collapse(shape, tuple((0, size) for size in shape))
    if name == "cuda":
        noise_cuda.add_normal(x, _DTYPES[x.dtype], table, runs, scale)
        return x
    table = table.cpu().contiguous()
    scales = torch.as_tensor(scale, dtype=torch.float32, device="cpu").expand(len(table)).tolist()
    rows = x.detach().view(len(table), runs.count)
    eps = torch.empty(1, runs.count, dtype=torch.float32, device="cpu")
    for i, s in enumerate(scales):
        if s != 0 and runs.count:
            _fill(eps, table[i : i + 1], runs, name)
            rows[i] = eps.mul_(s).add_(rows[i].to("cpu", torch.float32))[0]
    return x


def _check_addition(x: torch.Tensor, table: torch.Tensor, scale: float | torch.Tensor) -> None:
    native.check_plain(x)
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if x.dtype not in allowed or x.dim() == 0 or not x.is_contiguous():
        raise ValueError(
            f"x = {x.dtype} {list(x.shape)}, strides {x.stride()}: must be contiguous float32, "
            "bfloat16 or float16 [n, ...]; use x + scale * normal_batch(...)"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires grad: it is changed in place; pass x.detach()")
    if len(table) != len(x):
        raise ValueError(f"keys has {len(table)} rows: must be {len(x)}, one per row of x")
    if isinstance(scale, torch.Tensor) and (
        scale.shape != (len(x),) or not scale.is_floating_point()
    ):
        raise ValueError(
            f"scale = {scale.dtype} {list(scale.shape)}: must be a number or floating [{len(x)}]"
        )


def _checked_box(
    shape: Sequence[int], box: Box | None
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    shape = tuple(operator.index(size) for size in shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape = {shape}: sizes must not be negative")
    if box is None:
        return shape, tuple((0, size) for size in shape)
    box = tuple((operator.index(start), operator.index(stop)) for start, stop in box)
    if len(box) != len(shape):
        raise ValueError(f"box = {box}: needs one (start, stop) for each of the {len(shape)} dims")
    for dim, (size, (start, stop)) in enumerate(zip(shape, box, strict=True)):
        if not 0 <= start <= stop <= size:
            raise ValueError(
                f"box[{dim}] = ({start}, {stop}): must satisfy 0 <= start <= stop <= {size}"
            )
    return shape, box


def _resolve_target(
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    out: torch.Tensor | None,
    size: tuple[int, ...],
) -> tuple[torch.dtype, torch.device]:
    where = None if device is None else torch.device(device)
    if out is not None:
        if tuple(out.shape) != size or not out.is_contiguous():
            raise ValueError(
                f"out = {list(out.shape)}, strides {out.stride()}: must be contiguous {list(size)}"
            )
        agrees = where is None or (where.type, where.index or 0) == (
            out.device.type,
            out.device.index or 0,
        )
        if dtype not in (None, out.dtype) or not agrees:
            raise ValueError(
                f"out is {out.dtype} on {out.device}, but dtype = {dtype}, device = {device}: "
                "leave them out or make them agree"
            )
        dtype, where = out.dtype, out.device
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, _DTYPES))}")
    where = torch.device("cpu") if where is None else where
    if where == torch.device("cuda") and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    return dtype, where


# ---------------------------------------------------------------------------- integers


def random_bits(n: int, key: DrawKey) -> np.ndarray:
    """The first n Philox words of a key, uint32 `[n]`."""
    if n < 0:
        raise ValueError(f"n = {n}: must not be negative")
    blocks = np.arange((n + 3) // 4, dtype=np.uint64) + np.uint64(key.offset)
    return np.stack(philox(blocks, key.seed), axis=-1).reshape(-1)[:n]


def permutation(n: int, key: DrawKey) -> np.ndarray:
    """A random order of 0 .. n-1: the stable argsort of n 64-bit values, int64 `[n]`."""
    words = random_bits(2 * n, key).astype(np.uint64).reshape(-1, 2)
    return np.argsort(words[:, 0] | words[:, 1] << np.uint64(32), kind="stable")


def randint(low: int, high: int, key: DrawKey) -> int:
    """A random integer in low .. high-1: 64-bit multiply-shift, bias below (high - low) / 2**64.

    Raises:
        ValueError: An empty range, or one wider than 2**32.
    """
    if not 0 < high - low <= 1 << 32:
        raise ValueError(f"randint: low = {low}, high = {high}: needs 0 < high - low <= 2**32")
    first, second = (int(word) for word in random_bits(2, key))
    return low + ((first | second << 32) * (high - low) >> 64)
