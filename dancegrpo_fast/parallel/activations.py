"""Activations that wait for their backward: recomputed, or kept in host memory; compiled blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dancegrpo_fast.config import ParallelConfig

_ATEN = torch.ops.aten
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
_GRAPHS = 64
_MATMULS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default}


def prepare_blocks(module: Any, parallel: ParallelConfig, blocks: tuple[str, ...]) -> None:
    """Checkpoint and compile the blocks of a diffusers network, as the recipe asks.

    Recomputing never changes a value: there is no dropout, and blocks are functions of their
    inputs.

    Args:
        module: The network; its own `gradient_checkpointing` points are used.
        parallel: The recipe's section.
        blocks: Names of its lists of blocks.
    """
    if parallel.checkpointing != "none":
        contexts = _selective if parallel.checkpointing == "selective" else None
        module.enable_gradient_checkpointing(_recompute(contexts))
    if parallel.compile:
        # Of a class of blocks, all together: with gradients and without, adapters on and off, a
        # first block whose inputs need none, batches and their rest. Beyond the limit, which is 8,
        # torch would run what is new uncompiled.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, _GRAPHS)
        for name in blocks:
            for block in getattr(module, name):
                block.compile(mode="reduce-overhead" if parallel.compile == "graphs" else None)


def kept_activations(parallel: ParallelConfig) -> AbstractContextManager[object]:
    """Where a forward inside keeps what its backward needs."""
    if not parallel.offload_activations:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def _recompute(contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    extra: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    function: Callable[..., Any] = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, **extra
    )
    return lambda block, *inputs: function(
        block.__call__ if isinstance(block, nn.Module) else block, *inputs
    )


def _selective() -> Any:
    """Keep attention's outputs and every second matrix product; recompute the rest of a block."""
    seen: Counter[bool] = Counter()

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operator in _MATMULS:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
