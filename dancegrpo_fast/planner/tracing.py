"""What one network call costs, found by running it on tensors without storage.

The real classes run under `FakeTensorMode`: every operation happens, with shapes and dtypes and no
numbers. A dispatch mode sees each tensor come and go, which gives the peak of live bytes, and the
products, counted by torch's formulas. Of blocks that are equal only two or three are run: both
quantities are linear in their number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from dancegrpo_fast.planner.convolutions import transient_bytes

CPU = torch.device("cpu")
_KEPT = 2  # Equal blocks that are run; one more of a kind shows what one of them adds.

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# The CPU's attention, which fake tensors take as well: torch's counter does not know it by itself.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

# What CUDA's autocast computes in float32 and the CPU's does not, among what networks call.
_WIDE = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.sum, Tensor.sum,
    torch.norm, Tensor.norm, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log,
    Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__, F.normalize, F.cosine_similarity,
}  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """One call of a network on a batch of states. Bytes are above weights and their gradients.

    Attributes:
        forward_flops: Of a forward without gradients.
        train_flops: Of a forward and backward, recomputation included.
        forward_peak: Most bytes alive in a forward without gradients.
        train_peak: Most bytes alive in a forward and backward, gradients already allocated.
        first_peak: The same where the backward allocates the gradients, their bytes included.
        saved: Bytes that wait for the backward.
    """

    forward_flops: float = 0.0
    train_flops: float = 0.0
    forward_peak: float = 0.0
    train_peak: float = 0.0
    first_peak: float = 0.0
    saved: float = 0.0

    def plus(self, other: Trace, factor: float) -> Trace:
        """This and `factor` times another."""
        return Trace(*(a + factor * b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers, in order."""
        return tuple(vars(self).values())


_FORMULAS = {**flop_registry, **{op: shape_wrapper(f) for op, f in ATTENTION_FLOPS.items()}}


class Counter(TorchDispatchMode):
    """Counts bytes of storages that operations inside make, while they live, and products.

    The formulas are torch's; its `FlopCounterMode` also follows modules, and with checkpointing
    what it holds on to is kept alive.

    Args:
        convolutions: Count what the CPU's convolutions need while they run.

    Attributes:
        now: Bytes alive.
        peak: Most bytes that were alive.
        flops: Of products, two for a multiplication with its addition.
    """

    def __init__(self, *, convolutions: bool = False) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._convolutions = convolutions
        self.flops = 0.0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # What is first seen here was made outside.
                self._seen.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        formula = _FORMULAS.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        if self._convolutions and function is torch.ops.aten.convolution.default:
            x, weight, _, stride, _, dilation, transposed, _, groups = args
            held = transient_bytes(x, weight, stride, dilation, transposed, groups, result)
            self.peak = max(self.peak, self.now + held)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


class _CudaAutocast(TorchFunctionMode):
    """On CPU tensors, the float32 islands of CUDA's autocast."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, args), tree_map(_widened, kwargs)
        return function(*args, **kwargs)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


@contextmanager
def without_storage() -> Iterator[FakeTensorMode]:
    """Inside, tensors have no storage; real ones (a constructor's tables) may be read."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def hollow(module: nn.Module, dtype_of: Callable[[str, Tensor], torch.dtype]) -> nn.Module:
    """The module with fake parameters and buffers in place of meta ones; inside `without_storage`.

    Args:
        module: Its parameters may be on the meta device.
        dtype_of: Type of a floating-point parameter by its name.
    """
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                dtype = dtype_of(prefix + name, parameter)
                fake = torch.empty(parameter.shape, dtype=dtype, device=CPU)
                owner._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CPU)
    return module


def measure(
    call: Callable[[], Tensor], parameters: Sequence[nn.Parameter], *, cuda: bool
) -> Trace:
    """Runs a call forward, and forward and backward; inside `without_storage`.

    Args:
        call: Makes its inputs and returns the network's output; its tensors are what is counted.
        parameters: That are trained.
        cuda: Follow CUDA's autocast rather than the CPU's.
    """
    with _counting(cuda) as count, torch.no_grad():
        output = call()
        del output
        forward = count.flops, count.peak
    if not parameters:
        return Trace(forward[0], 0.0, forward[1], 0.0, 0.0, 0.0)
    first_peak, _, _ = _backward(call, parameters, cuda)
    train_peak, saved, train_flops = _backward(call, parameters, cuda)
    for parameter in parameters:
        parameter.grad = None
    return Trace(forward[0], train_flops, forward[1], train_peak, first_peak, saved)


def _backward(
    call: Callable[[], Tensor], parameters: Sequence[nn.Parameter], cuda: bool
) -> tuple[int, int, float]:
    """(peak, bytes that waited, FLOPs) of a forward and backward with the gradients there are."""
    given = any(parameter.grad is not None for parameter in parameters)
    with _counting(cuda) as count:
        if given:
            for parameter in parameters:
                # Made anew, so that the mode knows them: it replaces a gradient when adding to it.
                parameter.grad = torch.empty_like(parameter)
        start = count.now
        output = call()
        saved = count.now - start
        # Not `output.backward`: inside it function modes are off, and recomputation needs ours.
        gradient = torch.empty_like(output)
        _engine_run_backward(
            (output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        return count.peak - start, saved, count.flops


@contextmanager
def _counting(cuda: bool) -> Iterator[Counter]:
    with _CudaAutocast() if cuda else nullcontext(), Counter(convolutions=not cuda) as count:
        yield count


def kinds_of_blocks(module: nn.Module, lists: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Blocks that are equal up to their weights' values: (list's name, positions)."""
    found: list[tuple[str, list[int]]] = []
    for name in lists:
        kinds: dict[Any, list[int]] = {}
        for position, block in enumerate(getattr(module, name)):
            shapes = tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())
            kinds.setdefault((type(block), shapes), []).append(position)
        found += [(name, positions) for positions in kinds.values()]
    return found


def trace(
    make: Callable[[], nn.Module],
    call: Callable[[nn.Module], Tensor],
    dtype_of: Callable[[str, Tensor], torch.dtype],
    lists: Sequence[str],
    *,
    prepare: Callable[[nn.Module], object] = lambda module: None,
    backward: bool = True,
    cuda: bool = True,
) -> Trace:
    """A network's trace, from its first blocks of each kind.

    Args:
        make: Builds the network on the meta device, adapters included.
        call: Calls it on inputs of its own making.
        dtype_of: Type of a parameter by its name.
        lists: Names of its lists of blocks.
        prepare: Applied to the network before it runs (checkpointing).
        backward: False: only forwards without gradients, the other numbers are 0.
        cuda: As in `measure`.
    """
    kinds = kinds_of_blocks(make(), lists)

    def run(extra: int | None) -> Trace:
        module = make()
        for name in lists:
            kept = {
                position
                for number, (own, positions) in enumerate(kinds)
                if own == name
                for position in positions[: _KEPT + (number == extra)]
            }
            blocks = [b for i, b in enumerate(getattr(module, name)) if i in kept]
            setattr(module, name, nn.ModuleList(blocks))
        with without_storage():
            hollow(module, dtype_of)
            prepare(module)
            parameters = [p for p in module.parameters() if p.requires_grad and backward]
            return measure(lambda: call(module), parameters, cuda=cuda)

    least = total = run(None)
    for number, (_, positions) in enumerate(kinds):
        if len(positions) > _KEPT:
            one = run(number).plus(least, -1.0)
            total = total.plus(one, len(positions) - _KEPT)
    return total
