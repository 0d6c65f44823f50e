"""How the arguments of the ops are checked and laid out, and which implementation runs a call.

A batch holds *states* (leading dimension of model output and latents) and their *children*
(leading dimension of next latents, coefficients and everything per transition), packed one state
after the other: the children of state i are rows child_offsets[i] to child_offsets[i + 1].
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from dancegrpo_fast.ops import native

_log = logging.getLogger(__name__)

COEFFICIENTS = 8  # a, b, s, w, c, k, p, q
IMPLEMENTATIONS = ("reference", "native", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Box = Sequence[tuple[int, int]]

OLDEST_TRITON = (3, 6)  # that the kernels were compiled with


def _triton_missing() -> str | None:
    """Looks for Triton without importing it, which takes a second."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # any folder of that name on the path is a package
        return "Triton is not installed: pip install triton"
    for distribution in ("triton", "pytorch-triton"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
            return f"Triton {version} is older than 3.6: use torch 2.10 or later, which brings it"
    return None


# Why an implementation cannot be loaded, or None. Found out while importing, because torch.compile
# cannot trace a search for modules.
_MISSING = {"native": native.why_not(), "triton": _triton_missing()}


# ------------------------------------------------------------------ which implementation


def implementations() -> dict[str, str | None]:
    """The implementations of the ops: name -> None if it can be loaded, else why it cannot."""
    return {**_MISSING, "reference": None}


def resolve(implementation: str, *tensors: Tensor | None) -> str:
    """The implementation that a call with this argument runs: the only place that chooses.

    "auto" is native on the CPU and Triton on CUDA, each where it can be loaded (else the reference,
    with one warning), and the reference for float64 on CUDA and on every other device.

    Args:
        implementation: "auto" or one of IMPLEMENTATIONS.
        tensors: The latent-sized inputs of the call, model_output first.

    Raises:
        ValueError: Unknown, or one that cannot run this call; another is never taken in its place.
    """
    if implementation == "reference":
        return implementation
    if implementation == "auto":
        device = _device_of(tensors)
        if device == "cpu":
            return "native" if _loads("native") else "reference"
        narrow = device == "cuda" and not _any_float64(tensors)
        return "triton" if narrow and _loads("triton") else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation = {implementation!r}: not available; there is "
            f"{', '.join(IMPLEMENTATIONS)}; use one of these or 'auto'"
        )
    reason = _MISSING[implementation] or _does_not_fit(implementation, tensors)
    if reason is not None:
        raise ValueError(
            f"implementation = {implementation!r}: {reason}; or use 'auto' or 'reference'"
        )
    return implementation


def _device_of(tensors: Sequence[Tensor | None]) -> str:
    first = tensors[0] if tensors else None
    if first is None or first.is_cpu:  # is_cpu: a third of the cost of device.type
        return "cpu"
    return first.device.type


def _any_float64(tensors: Sequence[Tensor | None]) -> bool:
    return any(t is not None and t.dtype == torch.float64 for t in tensors)


def _does_not_fit(name: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why these tensors cannot go to an implementation that is there."""
    device = _device_of(tensors)
    if name == "native":
        return None if device == "cpu" else f"it takes CPU tensors, and these are on {device}"
    if _any_float64(tensors):
        return "Triton computes in float32, and an input is float64"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and not torch.compiler.is_compiling()
    if device == "cuda" or (device == "cpu" and interpreted):
        return None
    return (
        f"it takes CUDA tensors, and these are on {device} (its interpreter, TRITON_INTERPRET=1 "
        "set before Triton is imported, takes CPU tensors outside torch.compile)"
    )


def _loads(name: str) -> bool:
    """Whether "auto" may take it; says once what is missing."""
    reason = _MISSING[name]
    if reason is not None and not torch.compiler.is_compiling():
        _warn_once(f"the ops run their slower reference in plain torch: {reason}")
    return reason is None


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def explain(
    refused: ValueError, check: Callable[[], object], *tensors: Tensor | None
) -> NoReturn:
    """Words what the native module refused: by the checks of Python, else by its own line.

    Raises:
        ValueError: Always.
    """
    for tensor in tensors:
        if tensor is not None:
            native.check_plain(tensor)
    check()
    raise refused


def refuse_gradient(**constants: Tensor | None) -> None:
    """Raises ValueError for the first of these arguments that asks for a gradient."""
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient: only model_output is differentiated; "
                f"pass {name}.detach()"
            )


# ------------------------------------------------------------------ layout and checks


def values_readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: not on a device (it would wait), not while compiling."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def shape_error(name: str, tensor: Tensor, expected: object) -> ValueError:
    """The error for an argument whose shape does not fit."""
    return ValueError(f"{name} has shape {list(tensor.shape)}: must be {expected}")


def check_divisor(divisor: float | None) -> None:
    """Refuses a divisor that is not a positive number."""
    if divisor is not None and not 0 < divisor < math.inf:
        raise ValueError(f"divisor = {divisor}: must be a positive number")


def savable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of what a rollout in inference mode made: autograd cannot save that."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


@dataclass(frozen=True)
class Packing:
    """The checked layout of one call.

    Attributes:
        states: Number of states.
        children: Number of children.
        dims: Shape of one latent.
        slices: The action box as an index over `dims`.
        numel: Elements of the action box.
        offsets: int64 [states + 1]; None where each state has one child.
        dtype: What everything is computed in: float64 if a latent-sized input is, else float32.
        device: Where all tensors lie.
        names: What a public function calls an argument, where it is not its name here.
    """

    states: int
    children: int
    dims: tuple[int, ...]
    slices: tuple[slice, ...]
    numel: int
    offsets: Tensor | None
    dtype: torch.dtype
    device: torch.device
    names: Mapping[str, str] = field(default_factory=dict)

    def rows(self, tensor: Tensor) -> Tensor:
        """[n, *dims] -> [n, numel]: the action box, flat, in the compute dtype."""
        tensor = savable(tensor)
        return tensor[(slice(None), *self.slices)].to(self.dtype).reshape(-1, self.numel)

    def per_child(self, tensor: Tensor) -> Tensor:
        """[states, ...] -> [children, ...]."""
        if self.offsets is None:
            return tensor
        # With output_size the result's shape is known without asking the device.
        index = torch.arange(self.states, device=self.device)
        parents = torch.repeat_interleave(index, self.offsets.diff(), output_size=self.children)
        return tensor.index_select(0, parents)

    def vector(self, values: Tensor | None, count: int) -> Tensor:
        """[count] in the compute dtype; ones for None."""
        if values is None:
            return torch.ones(count, dtype=self.dtype, device=self.device)
        return savable(values).to(self.dtype)

    def check(self, name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
        """Checks that `tensor` has this shape, lies on the device and is floating; None passes.

        Raises:
            ValueError: Names the argument, what it is and what it must be.
        """
        if tensor is None:
            return
        name = self.names.get(name, name)
        if tuple(tensor.shape) != tuple(shape):
            raise shape_error(name, tensor, list(shape))
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {self.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: must be a floating dtype")


def pack(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor | None,
    child_offsets: Tensor | None,
    action_box: Box | None,
    next_latents: Tensor | None = None,
    reference_output: Tensor | None = None,
    old_output: Tensor | None = None,
    names: Mapping[str, str] | None = None,
) -> Packing:
    """Checks the arguments that all ops share; without coefficients each state has one child.

    Raises:
        ValueError: A shape, dtype, device, offset or box that does not fit.
    """
    if model_output.dim() < 2:
        raise shape_error("model_output", model_output, "[states, ...] with at least 2 dimensions")
    states, dims = model_output.shape[0], tuple(model_output.shape[1:])
    children = states
    if coefficients is not None:
        if coefficients.dim() != 2 or coefficients.shape[1] != COEFFICIENTS:
            raise shape_error("coefficients", coefficients, f"[children, {COEFFICIENTS}]")
        children = coefficients.shape[0]
    sized = (model_output, latents, next_latents, reference_output, old_output)
    slices = _slices(dims, action_box)
    _check_offsets(states, children, child_offsets, model_output.device)
    packing = Packing(
        states=states,
        children=children,
        dims=dims,
        slices=slices,
        numel=math.prod([part.stop - part.start for part in slices]),
        offsets=child_offsets,
        dtype=torch.float64 if _any_float64(sized) else torch.float32,
        device=model_output.device,
        names=names or {},
    )
    packing.check("model_output", model_output, (states, *dims))
    packing.check("latents", latents, (states, *dims))
    packing.check("coefficients", coefficients, (children, COEFFICIENTS))
    packing.check("next_latents", next_latents, (children, *dims))
    packing.check("reference_output", reference_output, (states, *dims))
    packing.check("old_output", old_output, (states, *dims))
    return packing


def _slices(dims: tuple[int, ...], action_box: Box | None) -> tuple[slice, ...]:
    if 0 in dims:
        raise ValueError(f"a latent of shape {list(dims)} has no elements: there is no mean of it")
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


def _check_offsets(
    states: int, children: int, offsets: Tensor | None, device: torch.device
) -> None:
    if offsets is None:
        if children != states:
            raise ValueError(
                f"coefficients has {children} rows for {states} states: without child_offsets each "
                "state has one child"
            )
        return
    if offsets.dtype != torch.int64 or offsets.shape != (states + 1,):
        raise ValueError(
            f"child_offsets is {offsets.dtype} {list(offsets.shape)}: must be int64 "
            f"[{states + 1}], states + 1"
        )
    if offsets.device != device:
        raise ValueError(f"child_offsets is on {offsets.device}: must be on {device}")
    if not values_readable(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != children or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"child_offsets runs from {first} to {last}: must rise from 0 to {children}, the "
            "number of children"
        )
