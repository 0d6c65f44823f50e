"""How the arguments of the ops are checked and laid out.

A batch holds *states* (leading dimension of model output and latents) and their *children*
(leading dimension of next latents, coefficients and everything per transition), packed one state
after the other: the children of state i are rows child_offsets[i] to child_offsets[i + 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COEFFICIENTS = 8  # a, b, s, w, c, k, p, q
IMPLEMENTATIONS = ("reference",)

Box = Sequence[tuple[int, int]]


def resolve(implementation: str) -> str:
    """The implementation that a call with this argument runs.

    Raises:
        ValueError: One that is not there; another is never taken in its place.
    """
    if implementation == "auto":
        return "reference"
    if implementation in IMPLEMENTATIONS:
        return implementation
    raise ValueError(
        f"implementation = {implementation!r}: not available; there is "
        f"{', '.join(IMPLEMENTATIONS)}; use one of these or 'auto'"
    )


def values_readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: not on a device (it would wait), not while compiling."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def shape_error(name: str, tensor: Tensor, expected: object) -> ValueError:
    """The error for an argument whose shape does not fit."""
    return ValueError(f"{name} has shape {list(tensor.shape)}: must be {expected}")


@dataclass(frozen=True)
class Packing:
    """The checked layout of one call.

    Attributes:
        states: Number of states.
        children: Number of children.
        dims: Shape of one latent.
        slices: The action box as an index over `dims`.
        numel: Elements of the action box.
        parent: int64 [children], the state of each child; None where each state has one child.
        dtype: What everything is computed in: float64 if a latent-sized input is, else float32.
        device: Where all tensors lie.
    """

    states: int
    children: int
    dims: tuple[int, ...]
    slices: tuple[slice, ...]
    numel: int
    parent: Tensor | None
    dtype: torch.dtype
    device: torch.device

    def rows(self, tensor: Tensor) -> Tensor:
        """[n, *dims] -> [n, numel]: the action box, flat, in the compute dtype."""
        return tensor[(slice(None), *self.slices)].to(self.dtype).reshape(-1, self.numel)

    def per_child(self, tensor: Tensor) -> Tensor:
        """[states, ...] -> [children, ...]."""
        return tensor if self.parent is None else tensor.index_select(0, self.parent)

    def check(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns `tensor` if it has this shape, lies on the device and is floating.

        Raises:
            ValueError: Names the argument, what it is and what it must be.
        """
        if tensor.shape != torch.Size(shape):
            raise shape_error(name, tensor, list(shape))
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {self.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: must be a floating dtype")
        return tensor


def pack(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    child_offsets: Tensor | None,
    action_box: Box | None,
    *more: Tensor | None,
) -> Packing:
    """Checks the arguments that all ops share; `more` are latent-sized inputs, for the dtype.

    Raises:
        ValueError: A shape, dtype, device, offset or box that does not fit.
    """
    if model_output.dim() < 2:
        raise shape_error("model_output", model_output, "[states, ...] with at least 2 dimensions")
    states, dims = model_output.shape[0], tuple(model_output.shape[1:])
    if coefficients.dim() != 2 or coefficients.shape[1] != COEFFICIENTS:
        raise shape_error("coefficients", coefficients, f"[children, {COEFFICIENTS}]")
    children = coefficients.shape[0]
    sizes = [t.dtype for t in (model_output, latents, *more) if t is not None]
    slices = _slices(dims, action_box)
    packing = Packing(
        states=states,
        children=children,
        dims=dims,
        slices=slices,
        numel=math.prod([part.stop - part.start for part in slices]),
        parent=_parents(states, children, child_offsets, model_output.device),
        dtype=torch.float64 if torch.float64 in sizes else torch.float32,
        device=model_output.device,
    )
    packing.check("model_output", model_output, (states, *dims))
    packing.check("latents", latents, (states, *dims))
    packing.check("coefficients", coefficients, (children, COEFFICIENTS))
    return packing


def _slices(dims: tuple[int, ...], action_box: Box | None) -> tuple[slice, ...]:
    box = tuple((0, size) for size in dims) if action_box is None else tuple(action_box)
    if len(box) != len(dims):
        raise ValueError(
            f"action_box = {box}: needs one (start, stop) for each of the {len(dims)} dimensions "
            f"{list(dims)} of a latent"
        )
    for dim, (size, (start, stop)) in enumerate(zip(dims, box, strict=True)):
        if not 0 <= start < stop <= size:
            raise ValueError(
                f"action_box[{dim}] = ({start}, {stop}): must satisfy 0 <= start < stop <= {size}"
            )
    return tuple(slice(start, stop) for start, stop in box)


def _parents(
    states: int, children: int, offsets: Tensor | None, device: torch.device
) -> Tensor | None:
    if offsets is None:
        if children != states:
            raise ValueError(
                f"coefficients has {children} rows for {states} states: without child_offsets each "
                "state has one child"
            )
        return None
    if offsets.dtype != torch.int64 or offsets.shape != (states + 1,):
        raise ValueError(
            f"child_offsets is {offsets.dtype} {list(offsets.shape)}: must be int64 "
            f"[{states + 1}], states + 1"
        )
    if offsets.device != device:
        raise ValueError(f"child_offsets is on {offsets.device}: must be on {device}")
    counts = offsets.diff()
    if values_readable(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != children or bool((counts < 0).any()):
            raise ValueError(
                f"child_offsets runs from {first} to {last}: must rise from 0 to {children}, the "
                "number of children"
            )
    # With output_size the result's shape is known without asking the device.
    index = torch.arange(states, device=device)
    return torch.repeat_interleave(index, counts, output_size=children)
