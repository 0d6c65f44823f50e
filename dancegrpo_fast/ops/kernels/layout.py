"""How the host lays out a call for the kernels: dimensions merged as far as every tensor allows.

A contiguous batch without a box becomes one dimension of unit stride: no division in the kernel.
Plans are cached by shapes, strides and box; nothing here looks at a value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

CHUNK = 4096  # elements of one partial sum; see tiles.py. A constant: it decides bits.

_INT32 = 1 << 31

Box = Sequence[tuple[int, int]]
Strides = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A row as the kernels see it.

    Attributes:
        extents: Merged dimensions, outermost first; at least one.
        strides: Per tensor (start, row, one for each dimension): offset of the box, stride from
            row to row (0 where there is one row), strides inside, in elements.
        index: The same for the row-major index in the full latent, which numbers the noise.
        bounds: (start, stop) of the box in each dimension, flat; all of it where the box is what
            is indexed.
        cut: Bit d is set where the box cuts dimension d.
        numel: Elements of a row.
        vector: V of `tiles.py`: neighbours of which only the first is divided out.
        wide: An index or offset inside a row needs 64 bits.
        aligned: Blocks of four noise elements lie in neighbouring elements of a row.
    """

    extents: tuple[int, ...]
    strides: tuple[Strides, ...]
    index: Strides
    bounds: tuple[int, ...]
    cut: int
    numel: int
    vector: int
    wide: bool
    aligned: bool

    @property
    def chunks(self) -> int:
        """Partial sums of a row."""
        return -(-self.numel // CHUNK)

    @property
    def even(self) -> bool:
        """A mask at the end of a row falls between vectors of 16 elements."""
        return self.numel % 16 == 0

    @property
    def fours(self) -> int:
        """V where a thread is to hold four neighbours, which are one block of noise."""
        unit = all(strides[-1] == 1 for strides in self.strides)
        return min(self.vector, 4) if unit or len(self.extents) > 1 else self.vector

    def in_blocks(self) -> tuple[tuple[int, ...], Strides]:
        """(extents, index) counted in blocks of four elements; of an aligned layout only."""
        assert self.aligned
        start, _, *steps, _ = self.index
        extents = (*self.extents[:-1], max(self.extents[-1] // 4, 1))
        return extents, (start // 4, 0, *(step // 4 for step in steps), 1)


def layout(*tensors: Tensor, box: Box | None, whole: bool = False) -> Layout:
    """The layout of rows of these tensors, [rows, *dims] with the same dims.

    Args:
        tensors: 2 to 6 dimensions, any strides.
        box: (start, stop) per dimension of dims. None: everything.
        whole: Index all of dims and say by `bounds` what lies in the box, instead of indexing the
            box.
    """
    rows = tuple((t.shape[0], *t.stride()) for t in tensors)
    ranges = None if box is None else tuple((int(a), int(b)) for a, b in box)
    return _layout(tuple(tensors[0].shape[1:]), rows, ranges, whole)


@functools.lru_cache(maxsize=1024)
def _layout(
    dims: tuple[int, ...],
    rows: tuple[tuple[int, ...], ...],
    box: tuple[tuple[int, int], ...] | None,
    whole: bool,
) -> Layout:
    box = tuple((0, size) for size in dims) if box is None else box
    full = [math.prod(dims[d + 1 :]) for d in range(len(dims))]
    inner = [*(list(row[2:]) for row in rows), full]
    starts = [0 if whole else _dot((b[0] for b in box), s) for s in inner]
    kept = box if whole else tuple((0, stop - start) for start, stop in box)
    sizes = list(dims) if whole else [stop for _, stop in kept]
    extents, strides, bounds = _merge(sizes, inner, kept)
    # One row needs no stride, and 0 is a multiple of 16: the kernel may keep its vector loads.
    row_strides = [0 if row[0] == 1 else row[1] for row in rows] + [0]
    packed = tuple(zip(starts, row_strides, *strides, strict=True))
    last = extents[-1]
    vector = 16 if len(extents) == 1 else next(v for v in (16, 4, 1) if last % v == 0)
    reach = max(_dot((e - 1 for e in extents), s[2:]) for s in packed)
    aligned = all(part % 4 == 0 for part in packed[-1][:-1]) and packed[-1][-1] == 1
    return Layout(
        extents=tuple(extents),
        strides=packed[:-1],
        index=packed[-1],
        bounds=tuple(value for pair in bounds for value in pair),
        cut=sum(1 << d for d, pair in enumerate(bounds) if pair != (0, extents[d])),
        numel=math.prod(extents),
        vector=vector,
        # A tile may begin in the last chunk and index one chunk beyond.
        wide=max(reach, math.prod(extents) + CHUNK) >= _INT32,
        aligned=aligned and (len(extents) == 1 or vector > 1),
    )


def _dot(left: object, right: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(left, right, strict=True))  # type: ignore[call-overload]


def _merge(
    sizes: list[int], strides: list[list[int]], box: tuple[tuple[int, int], ...]
) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, int]]]:
    """Merges neighbours; strides come back per dimension, one entry for each tensor."""
    extents: list[int] = []
    merged: list[tuple[int, ...]] = []
    bounds: list[tuple[int, int]] = []
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        steps = tuple(s[d] for s in strides)
        reach = tuple(size * step for step in steps)
        if extents and box[d] == (0, size) and merged[-1] == reach:
            extents[-1] *= size
            merged[-1] = steps
            bounds[-1] = (bounds[-1][0] * size, bounds[-1][1] * size)
        else:
            extents.append(size)
            merged.append(steps)
            bounds.append(box[d])
    if not extents:
        return [1], [(1,) * len(strides)], [(0, 1)]
    return extents, merged, bounds
