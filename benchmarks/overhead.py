"""What a call costs apart from its work: the cases that `benchmarks/kernels.py` times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast import ops
from dancegrpo_fast.ops import native, registered
from dancegrpo_fast.ops.noise import NoiseKey, keys_table
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.transitions import coefficient_table, transition


class _Empty(torch.autograd.Function):
    """Takes, saves and returns what the policy loss does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, m, x, y, table, advantages, old, outputs):
        ctx.save_for_backward(m, x, y, table, outputs[2])
        return tuple(torch.empty_like(outputs[i]) for i in (0, 1, 3))

    @staticmethod
    def backward(ctx: Any, upstream, *_: Tensor):
        m = ctx.saved_tensors[0]
        return torch.empty_like(m), None, None, None, None, None, None


def cases() -> dict[str, Callable[[], Any]]:
    """Name -> call, on 4 x 64 elements."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(4, 64, generator=generator).bfloat16()
    x = torch.randn(4, 64, generator=generator)
    grid = dance_schedule(16, 3.0)
    rows = [transition(grid, 5, 6, dynamics="dance", kind="sde", level=0.3)] * 4
    table = coefficient_table(rows)
    keys = keys_table([NoiseKey.from_seed(1).fold_in(i).draw() for i in range(4)])
    y, old = ops.sample_transition(m, x, table, keys=keys)
    advantages = torch.linspace(-1, 1, 4)
    trained = m.clone().requires_grad_()
    outputs = (torch.zeros(()), torch.zeros(4), torch.zeros(4, 3), torch.zeros(11))
    module = native.module()
    raw_loss = (
        m, x, y, table, advantages, old, None, None, None, None, None, 1e-4, 1e-4, None, 0.0,
        None, 1.0, None, False, 1,
    )  # fmt: skip

    def loss(output: Tensor) -> ops.PolicyLoss:
        return ops.policy_loss(output, x, y, table, advantages, old_log_prob=old)

    def operator(output: Tensor) -> Tensor:
        args = (None, None, None, None, None, 1e-4, 1e-4, None, 0.0, None, 1.0, None)
        return registered.policy_loss(output, x, y, table, advantages, old, *args)[0]

    def empty() -> Any:
        value = _Empty.apply(trained, x, y, table, advantages, old, outputs)[0]
        return torch.autograd.grad(value, trained)

    return {
        "policy_loss, no gradient": lambda: loss(m),
        "  the raw native call": lambda: module.policy_loss(*raw_loss),
        "sample_transition": lambda: ops.sample_transition(m, x, table, keys=keys),
        "  the raw native call ": lambda: module.sample_transition(
            m, x, table, keys, None, None, None, torch.float32, 1
        ),
        "transition_log_prob, no gradient": lambda: ops.transition_log_prob(m, x, y, table),
        "  the raw native call  ": lambda: module.transition_log_prob(
            m, x, y, table, None, None, 1
        ),
        "policy_loss, forward and backward": lambda: torch.autograd.grad(
            loss(trained).loss, trained
        ),
        "  an empty autograd.Function": empty,
        "policy_loss as a registered operator, no gradient": lambda: operator(m),
        "policy_loss as a registered operator, forward and backward": lambda: torch.autograd.grad(
            operator(trained), trained
        ),
    }
