"""The ops as `torch.ops.dancegrpo_fast.*`, for torch.compile, torch.export and AOT tracing.

Native on the CPU, Triton on CUDA; a box is flat here: start, stop, start, stop, ... Users call
`dancegrpo_fast.policy_loss` and the others, which come here while compiling, after the checks that
need no values; the native module checks values itself. Needs torch >= 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.ops.autograd import box_numel, kernels_of, log_prob_scales, nft_table
from dancegrpo_fast.ops.packing import Box, check_divisor

POLICY_VALUES, NFT_VALUES = 11, 9  # metrics


def flat(box: Box | None) -> list[int] | None:
    """(start, stop) per dimension -> start, stop, start, stop, ..."""
    return None if box is None else [bound for pair in box for bound in pair]


def _pairs(box: Sequence[int] | None) -> list[tuple[int, int]] | None:
    return None if box is None else list(zip(box[::2], box[1::2], strict=True))


def scalar(divisor: float | None) -> Tensor | None:
    """A divisor may change from update to update: as a float it would be compiled in.

    A product with a tensor is what torch.compile keeps a number variable in.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return None if divisor is None else one * divisor


def _number(divisor: Tensor | None) -> float | None:
    number = None if divisor is None else divisor.item()
    check_divisor(number)  # The wrapper's checks look at no number that may vary.
    return number


def _kernels(m: Tensor) -> tuple[Any, tuple[int, ...]]:
    return kernels_of("native" if m.is_cpu else "triton")


def _compute_dtype(*latents: Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in latents)
    return torch.float64 if wide else torch.float32


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"dancegrpo_fast::{name}", mutates_args=(), schema=schema)


# ------------------------------------------------------------------ sample_transition


@_operator(
    "sample_transition",
    "(Tensor m, Tensor x, Tensor table, Tensor? keys, Tensor? noise, Tensor? offsets, "
    "SymInt[]? box, ScalarType dtype) -> (Tensor, Tensor)",
)
def sample_transition(m, x, table, keys, noise, offsets, box, dtype):
    """(next latents, log-probs); no gradient."""
    kernels, threads = _kernels(m)
    args = (x, table, keys, noise, offsets, _pairs(box), dtype)
    return kernels.sample_transition(m, *args, *threads)


@sample_transition.register_fake
def _(m, x, table, keys, noise, offsets, box, dtype):
    children = table.shape[0]
    return (
        m.new_empty((children, *m.shape[1:]), dtype=dtype),
        m.new_empty(children, dtype=_compute_dtype(m, x)),
    )


# ------------------------------------------------------------------ transition_gradient


@_operator(
    "transition_gradient",
    "(Tensor upstream, Tensor scales, Tensor m, Tensor x, Tensor y, Tensor table, Tensor? offsets, "
    "Tensor? ref, Tensor? old, SymInt[]? box) -> Tensor",
)
def transition_gradient(upstream, scales, m, x, y, table, offsets, ref, old, box):
    """The gradient of a loss with respect to m, from three numbers per child (`scales`)."""
    kernels, threads = _kernels(m)
    args = (m, x, y, table, offsets, ref, old, _pairs(box))
    return kernels.transition_gradient(upstream, scales, *args, *threads)


@transition_gradient.register_fake
def _(upstream, scales, m, x, y, table, offsets, ref, old, box):
    return torch.empty_like(m)


# ------------------------------------------------------------------ transition_log_prob


@_operator(
    "transition_log_prob",
    "(Tensor m, Tensor x, Tensor y, Tensor table, Tensor? offsets, SymInt[]? box) -> Tensor",
)
def transition_log_prob(m, x, y, table, offsets, box):
    """Log-probs, differentiable with respect to m."""
    kernels, threads = _kernels(m)
    return kernels.transition_log_prob(m, x, y, table, offsets, _pairs(box), *threads)


@transition_log_prob.register_fake
def _(m, x, y, table, offsets, box):
    return m.new_empty(table.shape[0], dtype=_compute_dtype(m, x, y))


def _keep_log_prob(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, box = inputs
    ctx.save_for_backward(*tensors)
    ctx.box, ctx.dtype = box, output.dtype


def _log_prob_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    m, x, y, table, offsets = ctx.saved_tensors
    scales = log_prob_scales(table, box_numel(m, _pairs(ctx.box)), ctx.dtype)
    inputs = (m, x, y, table, offsets, None, None)
    return transition_gradient(upstream, scales, *inputs, ctx.box), *(None,) * 5


transition_log_prob.register_autograd(_log_prob_backward, setup_context=_keep_log_prob)


# ------------------------------------------------------------------ policy_loss


@_operator(
    "policy_loss",
    "(Tensor m, Tensor x, Tensor y, Tensor table, Tensor advantages, Tensor? old_log_prob, "
    "Tensor? weights, Tensor? offsets, Tensor? reward_weights, Tensor? ref, Tensor? old, "
    "float low, float high, Tensor? divisor, float kl_weight, SymInt[]? box, float power, "
    "float? old_penalty) -> (Tensor, Tensor, Tensor, Tensor)",
)
def policy_loss(m, *args):
    """(loss, log-probs, metrics, scales); the loss is differentiable with respect to m."""
    kernels, threads = _kernels(m)
    *head, divisor, kl_weight, box, power, old_penalty = args
    tail = (_number(divisor), kl_weight, _pairs(box), power, old_penalty)
    return kernels.policy_loss(m, *head, *tail, True, *threads)


@policy_loss.register_fake
def _(m, x, y, table, advantages, old_log_prob, weights, offsets, reward_weights, ref, old, *_):
    dtype, children = _compute_dtype(m, x, y, ref, old), table.shape[0]
    shapes = ((), (children,), (POLICY_VALUES,), (children, 3))
    return tuple(m.new_empty(shape, dtype=dtype) for shape in shapes)


def _keep_policy_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    m, x, y, table, _, _, _, offsets, _, ref, old, _, _, _, kl_weight, box, _, _ = inputs
    _, log_prob, metrics, scales = output
    ctx.save_for_backward(m, x, y, table, offsets, ref if kl_weight else None, old, scales)
    ctx.mark_non_differentiable(log_prob, metrics, scales)
    ctx.box = box


def _policy_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, scales = ctx.saved_tensors
    return transition_gradient(upstream, scales, *inputs, ctx.box), *(None,) * 17


policy_loss.register_autograd(_policy_loss_backward, setup_context=_keep_policy_loss)


# ------------------------------------------------------------------ nft_loss


@_operator(
    "nft_loss",
    "(Tensor m, Tensor x, Tensor y, Tensor sigmas, Tensor advantages, Tensor? weights, "
    "Tensor? ref, Tensor old, float beta, float advantage_clip, Tensor? divisor, float kl_weight, "
    "float minimum, SymInt[]? box) -> (Tensor, Tensor, Tensor)",
)
def nft_loss(m, *args):
    """(loss, metrics, scales); the loss is differentiable with respect to m."""
    kernels, threads = _kernels(m)
    *head, divisor, kl_weight, minimum, box = args
    tail = (_number(divisor), kl_weight, minimum, _pairs(box))
    return kernels.nft_loss(m, *head, *tail, True, *threads)


@nft_loss.register_fake
def _(m, x, y, sigmas, advantages, weights, ref, old, *_):
    dtype = _compute_dtype(m, x, y, ref, old)
    shapes = ((), (NFT_VALUES,), (m.shape[0], 3))
    return tuple(m.new_empty(shape, dtype=dtype) for shape in shapes)


def _keep_nft_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    m, x, y, sigmas, _, _, ref, old, _, _, _, kl_weight, _, box = inputs
    _, metrics, scales = output
    ctx.save_for_backward(m, x, y, sigmas, ref if kl_weight else None, old, scales)
    ctx.mark_non_differentiable(metrics, scales)
    ctx.box = box


def _nft_loss_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    m, x, y, sigmas, ref, old, scales = ctx.saved_tensors
    table = nft_table(sigmas, scales.dtype)
    gradient = transition_gradient(upstream, scales, m, x, y, table, None, ref, old, ctx.box)
    return gradient, *(None,) * 13


nft_loss.register_autograd(_nft_loss_backward, setup_context=_keep_nft_loss)
