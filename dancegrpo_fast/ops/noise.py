"""Noise as a pure function of a key: Philox-4x32-10 and an exact Box-Muller normal.

Nothing here has a state. Element `i` of a draw is a function of the key and of `i` alone, so any
process can draw any part of any tensor and gets the bits that every other process gets.

Layout (that of PyTorch's stateless Philox, `torch.func._random`): a key is a pair of unsigned
64-bit integers (seed, offset). Block `n` is Philox-4x32-10 (Salmon et al. 2011) of the counter
`(offset + n) mod 2**64` in words 0 and 1 (words 2 and 3 are zero) under the key `seed`; its four
words become elements `4n .. 4n+3`. `fold_in(d)` is block `d` repacked as a new (seed, offset).

The numbers themselves are defined in `noise_reference.py`; the native module gives the same bits.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dancegrpo_fast.ops import native, noise_reference
from dancegrpo_fast.ops.noise_reference import MASK32, Runs, collapse, philox, philox_scalar

_log = logging.getLogger(__name__)

Box = Sequence[tuple[int, int]]

_MASK64 = 0xFFFFFFFFFFFFFFFF
# fold_in takes data below 2**63; the upper half of the blocks is for keys that are drawn from.
_FOLD_LIMIT = 1 << 63
_DRAW_BLOCK = _MASK64

# torch dtype -> the number by which csrc/bindings.cpp knows it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


# ---------------------------------------------------------------------------- keys


def _set_u64(key: object, name: str) -> None:
    """Checks a field of a frozen key and makes it a Python integer (NumPy's would overflow)."""
    value = operator.index(getattr(key, name))
    if not 0 <= value <= _MASK64:
        where = f"{type(key).__name__}.{name}"
        raise ValueError(f"{where} = {value}: must be in 0 .. 2**64 - 1; take it modulo 2**64")
    object.__setattr__(key, name, value)


def _child(seed: int, offset: int, block: int) -> tuple[int, int]:
    counter = (offset + block) & _MASK64
    x0, x1, x2, x3 = philox_scalar((counter & MASK32, counter >> 32, 0, 0), seed)
    return x0 | x1 << 32, x2 | x3 << 32


@dataclass(frozen=True)
class NoiseKey:
    """A key that other keys are derived from; never drawn from itself.

    Attributes:
        seed: Philox key, unsigned 64 bits.
        offset: Counter of block 0, unsigned 64 bits.

    Raises:
        ValueError: A value outside 0 .. 2**64 - 1.
    """

    seed: int
    offset: int

    def __post_init__(self) -> None:
        _set_u64(self, "seed")
        _set_u64(self, "offset")

    @classmethod
    def from_seed(cls, seed: int) -> NoiseKey:
        """The root key of a run: (seed, 0)."""
        return cls(seed, 0)

    def fold_in(self, data: int) -> NoiseKey:
        """The child key numbered `data`.

        Args:
            data: 0 .. 2**63 - 1, for example a role, a prompt index or a step.

        Returns:
            A key that is statistically independent of this one and of its other children.

        Raises:
            ValueError: `data` out of range.
        """
        number = operator.index(data)
        if not 0 <= number < _FOLD_LIMIT:
            raise ValueError(f"fold_in: data = {data}: must be in 0 .. 2**63 - 1")
        return NoiseKey(*_child(self.seed, self.offset, number))

    def draw(self) -> DrawKey:
        """The key to draw this key's numbers from: the child `2**64 - 1`.

        `fold_in` cannot reach that child. So a `NoiseKey` may be folded and asked for its
        `DrawKey` without any block of Philox being both a key and a number: the rule "folded or
        drawn from, never both" holds by construction.
        """
        return DrawKey(*_child(self.seed, self.offset, _DRAW_BLOCK))


@dataclass(frozen=True)
class DrawKey:
    """A key that numbers are drawn from; it has no `fold_in`.

    Use one `DrawKey` for one tensor: two draws from one key repeat each other's bits.

    Attributes:
        seed: Philox key, unsigned 64 bits.
        offset: Counter of block 0, unsigned 64 bits.

    Raises:
        ValueError: A value outside 0 .. 2**64 - 1.
    """

    seed: int
    offset: int

    def __post_init__(self) -> None:
        _set_u64(self, "seed")
        _set_u64(self, "offset")


def keys_table(keys: Sequence[DrawKey]) -> torch.Tensor:
    """Packs keys for `normal_batch`.

    Args:
        keys: n keys.

    Returns:
        int64 `[n, 2]` on the CPU: the bit patterns of (seed, offset).
    """
    return torch.from_numpy(_key_array(keys).view(np.int64))


def _key_array(keys: torch.Tensor | Sequence[DrawKey]) -> np.ndarray:
    """uint64 [n, 2], contiguous."""
    if isinstance(keys, torch.Tensor):
        if keys.dtype != torch.int64 or keys.dim() != 2 or keys.shape[1] != 2:
            raise ValueError(
                f"keys = {keys.dtype} {list(keys.shape)}: must be int64 [n, 2]; use keys_table()"
            )
        return np.ascontiguousarray(keys.detach().cpu().numpy()).view(np.uint64)
    for key in keys:
        if not isinstance(key, DrawKey):
            raise ValueError(f"keys: {key!r} is not a DrawKey; call .draw() on a NoiseKey")
    return np.array([(k.seed, k.offset) for k in keys], dtype=np.uint64).reshape(-1, 2)


# ---------------------------------------------------------------------------- drawing


def implementations() -> dict[str, str | None]:
    """The implementations of the draw: name -> None if it can run here, else why it cannot."""
    return {"native": native.why_not(), "reference": None}


def selected(implementation: str = "auto") -> str:
    """Which implementation a call with this argument runs: "native" or "reference".

    Raises:
        ValueError: Unknown name, or "native" where the module is missing.
    """
    if implementation == "reference":
        return "reference"
    if implementation not in ("auto", "native"):
        raise ValueError(
            f"implementation = {implementation!r}: must be 'auto', 'native' or 'reference'"
        )
    reason = native.why_not()
    if reason is None:
        return "native"
    if implementation == "native":
        raise ValueError(f"implementation = 'native': {reason}; or use 'reference'")
    _warn_once(f"noise is drawn by NumPy, about 30 times slower, with the same bits: {reason}")
    return "reference"


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


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


def _fill(out: torch.Tensor, keys: np.ndarray, runs: Runs, name: str) -> None:
    """Fills contiguous CPU `out` `[n, ...]` from n keys."""
    if name == "native":
        native.check_plain(out)
        native.module().normal(
            out.data_ptr(), _DTYPES[out.dtype], keys.ctypes.data, len(keys),
            runs.base, runs.extents, runs.strides, torch.get_num_threads(),
        )  # fmt: skip
        return
    rows = out.view(len(keys), runs.count)
    for row, key in zip(rows, keys, strict=True):
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
    out: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Standard normals, one tensor per key.

    Args:
        shape: Shape of each full tensor; element `i` is the row-major linear index in it.
        keys: n `DrawKey`, or int64 `[n, 2]` from `keys_table`.
        dtype: float32, bfloat16, float16 (both rounded to nearest even from the float32 value) or
            float64 (the float32 value widened). None: that of `out`, else float32.
        device: Where the result lies. None: that of `out`, else the CPU. On another device the
            numbers are drawn on the CPU and copied; the bits are the same.
        box: (start, stop) per dimension: returns this part of the full tensor, the same bits,
            without drawing the rest. None: all of it.
        out: Contiguous tensor to fill.
        implementation: "auto" (native where it is built, else the reference, with one warning),
            "native" or "reference".

    Returns:
        `[n, *extent of the box]`.

    Raises:
        ValueError: A bad shape, box, dtype, key table, `out` or implementation.
    """
    name = selected(implementation)
    shape = tuple(operator.index(size) for size in shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape = {shape}: sizes must not be negative")
    whole = tuple((0, size) for size in shape)
    box = whole if box is None else tuple((operator.index(a), operator.index(b)) for a, b in box)
    _check_box(shape, box)
    table = _key_array(keys)
    size = (len(table), *(stop - start for start, stop in box))
    dtype, device = _resolve_target(dtype, device, out, size)
    direct = device.type == "cpu"
    if not direct:
        _warn_once(f"noise for {device.type} is drawn on the CPU and copied: no kernel for it yet")
    # The device is named because torch's default device may be another one.
    host = out if direct and out is not None else torch.empty(size, dtype=dtype, device="cpu")
    if host.numel():
        _fill(host, table, collapse(shape, box), name)
    if direct:
        return host
    return host.to(device) if out is None else out.copy_(host)


def normal(
    shape: Sequence[int],
    key: DrawKey,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    box: Box | None = None,
    out: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Standard normals from one key: `normal_batch` without the leading dimension.

    Args:
        shape: Shape of the full tensor.
        key: The key to draw from.
        dtype, device, box, out, implementation: As in `normal_batch`.

    Returns:
        A tensor of `shape`, or of the extent of `box`.

    Raises:
        ValueError: As `normal_batch`.
    """
    batch = normal_batch(
        shape,
        [key],
        dtype=dtype,
        device=device,
        box=box,
        out=None if out is None else out.unsqueeze(0),
        implementation=implementation,
    )
    return batch[0] if out is None else out


def _check_box(shape: Sequence[int], box: Box) -> None:
    if len(box) != len(shape):
        raise ValueError(f"box = {box}: needs one (start, stop) for each of the {len(shape)} dims")
    for dim, (size, (start, stop)) in enumerate(zip(shape, box, strict=True)):
        if not 0 <= start <= stop <= size:
            raise ValueError(
                f"box[{dim}] = ({start}, {stop}): must satisfy 0 <= start <= stop <= {size}"
            )


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
    return dtype, torch.device("cpu") if where is None else where


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
