"""Keys of random numbers: what is folded, what is drawn from, and tables of them.

The layout is described in `noise.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dancegrpo_fast.ops.noise_reference import MASK32, philox_scalar

_MASK64 = 0xFFFFFFFFFFFFFFFF
# fold_in takes data below 2**63; the upper half of the blocks is for keys that are drawn from.
_FOLD_LIMIT = 1 << 63
_DRAW_BLOCK = _MASK64


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

    Raises:
        ValueError: A key that is not a `DrawKey`.
    """
    for key in keys:
        if not isinstance(key, DrawKey):
            raise ValueError(f"keys: {key!r} is not a DrawKey; call .draw() on a NoiseKey")
    table = np.array([(k.seed, k.offset) for k in keys], dtype=np.uint64).reshape(-1, 2)
    return torch.from_numpy(table.view(np.int64))


def as_table(keys: torch.Tensor | Sequence[DrawKey]) -> torch.Tensor:
    """What `keys_table` gives, or the table that was given, checked.

    Raises:
        ValueError: A table that is not int64 `[n, 2]`, or a key that is not a `DrawKey`.
    """
    if isinstance(keys, torch.Tensor):
        if keys.dtype != torch.int64 or keys.dim() != 2 or keys.shape[1] != 2:
            raise ValueError(
                f"keys = {keys.dtype} {list(keys.shape)}: must be int64 [n, 2]; use keys_table()"
            )
        return keys.detach()
    return keys_table(keys)
