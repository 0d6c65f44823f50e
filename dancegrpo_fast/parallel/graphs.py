"""Compiled blocks replayed as CUDA graphs: where that is possible, and a check that it is right.

`torch.compile(mode="reduce-overhead")` records the kernels of a block once and replays them at the
same addresses. Three things follow. Memory of a replay is used again by the next one: a new
generation is begun before each forward, but not while a backward is pending. A gradient that a
replay hands over would be overwritten by the next micro-batch: it is copied. And a replay that
reads an address whose contents have moved would be wrong in silence: the first forwards, and the
first after each of the first optimizer steps, are made again without graphs and compared.

No GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import ParallelConfig, UserError
from dancegrpo_fast.parallel.world import World

_CHECKED = 4  # Forwards, with and without gradient: warming up, recording, replaying.
_STEPS = 2  # Optimizer steps after which that begins again.
# Largest difference over the largest output. Compiled kernels round otherwise: some of the type's
# epsilon a block, 60 blocks. A replay of other inputs or weights is off by its whole size.
_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def check_graphs(parallel: ParallelConfig, world: World) -> None:
    """Refuse graphs where they cannot be, or could be wrong.

    Raises:
        UserError: Said in one line.
    """
    field = "parallel.compile = 'graphs': "
    if world.device.type != "cuda":
        raise UserError(f"{field}CUDA graphs need a GPU, this process has none; use true")
    if world.size > 1:
        raise UserError(f"{field}not verified on several processes, here {world.size}; use true")
    if parallel.checkpointing != "none" or parallel.offload_activations:
        raise UserError(
            f"{field}a backward must find what its forward left in the graph's memory; use "
            "parallel.checkpointing = none and offload_activations = false, or compile = true"
        )


class Graphs:
    """Around the networks whose blocks are replayed."""

    def __init__(self) -> None:
        self._training = self._checking = False
        self._steps, self._left = _STEPS, dict[bool, int]()
        self._own: set[int] = set()
        self._expect()

    def watch(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Begin a generation before each forward, and compare the first ones."""
        compare = partial(self._compare, limit=_LIMIT[dtype])
        module.register_forward_pre_hook(lambda *_: self._begin())
        module.register_forward_hook(compare, with_kwargs=True)

    def keep_gradients(self, module: nn.Module) -> None:
        """Copy what replays hand over; the module has its weights."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._copy)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around a forward and its backward: what any forward inside leaves lives so long."""
        self._begin()
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def stepped(self) -> None:
        """After an optimizer step."""
        if self._steps:
            self._steps -= 1
            self._expect()

    def cleared(self) -> None:
        """After gradients were dropped."""
        self._own.clear()

    def _expect(self) -> None:
        self._left = {False: _CHECKED, True: _CHECKED}

    def _begin(self) -> None:
        if not (self._training or self._checking):
            torch.compiler.cudagraph_mark_step_begin()

    def _copy(self, parameter: Tensor) -> None:
        """A first gradient is the replay's own memory; later ones are added to the copy."""
        if id(parameter) not in self._own:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clone()
            self._own.add(id(parameter))

    def _compare(
        self, module: nn.Module, inputs: Any, named: Any, output: Any, *, limit: float
    ) -> None:
        differentiated = torch.is_grad_enabled()
        if self._checking or not self._left[differentiated]:
            return
        self._left[differentiated] -= 1
        self._checking = True
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                plain = _first(module(*inputs, **named)).float()
        finally:
            self._checking = False
        # A sample may fail by itself: where it does without graphs nothing is compared.
        known = plain.isfinite()
        gap = torch.where(known, _first(output).detach().float() - plain, 0.0).abs().max()
        scale = torch.where(known, plain, 0.0).abs().max().clamp(min=torch.finfo().tiny)
        apart = float(gap / scale)
        if not apart <= limit:
            raise UserError(
                f"parallel.compile = 'graphs': a forward differs from one without graphs by "
                f"{apart:.1e} of its largest value, where {limit:g} is allowed; use true"
            )


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
