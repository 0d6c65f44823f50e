"""The ops in autograd, in eager mode. `registered.py` has the same for torch.compile.

The kernels (the native module, or `ops/kernels`) know nothing of autograd. Here they are called as
they are, inside a `torch.autograd.Function` only where a gradient is wanted: a custom operator
would cost tens of microseconds a call. Backward keeps the inputs and three numbers per child
(`scales`), nothing of latent size, and makes one gradient.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dancegrpo_fast.ops import native
from dancegrpo_fast.ops.packing import COEFFICIENTS, Box

# The arguments after model_output, in the order that the kernels take them (`policy_loss`, ...).
Arguments = tuple[Any, ...]
Threads = tuple[int, ...]  # (how many,) for the native module, () for Triton


def box_numel(model_output: Tensor, box: Box | None) -> int:
    """Elements of the action box."""
    if box is None:
        return math.prod(model_output.shape[1:])
    return math.prod([stop - start for start, stop in box])


def log_prob_scales(table: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """[children, 3] for `transition_gradient`: d log_prob / d m = 2 w b / numel times r."""
    table = table.to(dtype)
    scale = table[:, 3] * table[:, 1] * (2.0 / numel)
    return torch.nn.functional.pad(scale[:, None], (0, 2))


def nft_table(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """[states, 8]: the rows with a = 1, b = -sigma, which make r the clean latents' error."""
    sigmas = sigmas.to(dtype)
    ones = torch.ones_like(sigmas)
    rows = torch.stack((ones, -sigmas), dim=1)
    return torch.nn.functional.pad(rows, (0, COEFFICIENTS - 2))


# ------------------------------------------------------------------ functions


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, but for what a rollout in inference mode made: that is only held.

    torch refuses to save such tensors, because writes to them are not counted.
    """
    ctx.held = [t if t is not None and t.is_inference() else None for t in tensors]
    pairs = zip(tensors, ctx.held, strict=True)
    ctx.save_for_backward(*(tensor if held is None else None for tensor, held in pairs))


def _kept(ctx: Any) -> list[Any]:
    """What `_keep` got. Asks for the saved tensors once: a checkpoint gives them out once."""
    pairs = zip(ctx.saved_tensors, ctx.held, strict=True)
    return [saved if held is None else held for saved, held in pairs]


class _Final(torch.autograd.Function):
    """A gradient as it is, and an error for who differentiates it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, m: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "the kernels have no second derivative: use implementation='reference' for it"
        )


def _once(gradient_of: Callable[..., Tensor | None]) -> Callable[..., Any]:
    """A backward from the gradient of its first input; none of the other three has one.

    torch's once_differentiable would leave the second derivative out of a sum unsaid.
    """

    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        if upstream[0] is None:
            return None, None, None, None
        saved = _kept(ctx)
        gradient = gradient_of(ctx, upstream[0], *saved)
        if torch.is_grad_enabled():
            gradient = _Final.apply(gradient, saved[0])
        return gradient, None, None, None

    return backward


class _LogProb(torch.autograd.Function):
    """transition_log_prob of kernels; arguments after them: x, y, table, offsets, box."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, kernels: Any, threads: Threads, args: Arguments) -> Any:
        x, y, table, offsets, box = args
        log_prob = kernels.transition_log_prob(m, *args, *threads)
        _keep(ctx, m, x, y, table, offsets)
        ctx.kernels, ctx.threads, ctx.box, ctx.dtype = kernels, threads, box, log_prob.dtype
        return log_prob

    @staticmethod
    @_once
    def backward(
        ctx: Any, upstream: Tensor, m: Tensor, x: Tensor, y: Tensor, table: Tensor, offsets: Any
    ) -> Tensor:
        scales = log_prob_scales(table, box_numel(m, ctx.box), ctx.dtype)
        return ctx.kernels.transition_gradient(
            upstream, scales, m, x, y, table, offsets, None, None, ctx.box, *ctx.threads
        )


class _PolicyLoss(torch.autograd.Function):
    """policy_loss of kernels without its scales; arguments as the kernels take them."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, kernels: Any, threads: Threads, args: Arguments) -> Any:
        x, y, table, _, _, _, offsets, _, ref, old, _, _, _, kl_weight, box, _, _ = args
        loss, log_prob, metrics, scales = kernels.policy_loss(m, *args, True, *threads)
        # A reference that is only measured has no gradient: it is not kept.
        _keep(ctx, m, x, y, table, offsets, ref if kl_weight else None, old, scales)
        ctx.kernels, ctx.threads, ctx.box = kernels, threads, box
        ctx.mark_non_differentiable(log_prob, metrics)
        ctx.set_materialize_grads(False)
        return loss, log_prob, metrics

    @staticmethod
    @_once
    def backward(ctx: Any, upstream: Tensor, *saved: Any) -> Tensor:
        *inputs, scales = saved
        return ctx.kernels.transition_gradient(upstream, scales, *inputs, ctx.box, *ctx.threads)


class _NftLoss(torch.autograd.Function):
    """nft_loss of kernels without its scales; arguments as the kernels take them."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, kernels: Any, threads: Threads, args: Arguments) -> Any:
        x, y, sigmas, _, _, ref, old, _, _, _, kl_weight, _, box = args
        loss, metrics, scales = kernels.nft_loss(m, *args, True, *threads)
        _keep(ctx, m, x, y, sigmas, ref if kl_weight else None, old, scales)
        ctx.kernels, ctx.threads, ctx.box = kernels, threads, box
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @_once
    def backward(ctx: Any, upstream: Tensor, *saved: Any) -> Tensor:
        m, x, y, sigmas, ref, old, scales = saved
        table = nft_table(sigmas, scales.dtype)
        return ctx.kernels.transition_gradient(
            upstream, scales, m, x, y, table, None, ref, old, ctx.box, *ctx.threads
        )


# ------------------------------------------------------------------ calls


def kernels_of(name: str) -> tuple[Any, Threads]:
    """The kernels "native" or "triton", and what the native ones take besides."""
    if name == "native":
        return native.module(), (torch.get_num_threads(),)
    return importlib.import_module("dancegrpo_fast.ops.kernels"), ()


def eager_kernels(name: str) -> tuple[Any, Threads]:
    """`kernels_of` for a call from outside of torch's tracers.

    Raises:
        ValueError: A torch.func transform is active. Its tensors have no memory, and not all say so
            (functionalize: reading one would be a crash).
    """
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"implementation = {name!r} under a torch.func transform (vmap, grad, jvp, "
            "functionalize, ...): the kernels have no rule for it; call the op outside of it"
        )
    return kernels_of(name)


def _wants_gradient(m: Tensor) -> bool:
    # In forward mode torch itself refuses a Function without jvp; a plain call would drop tangents.
    return (m.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def transition_log_prob(name: str, m: Tensor, args: Arguments) -> Tensor:
    """Log-probs [children] by eager kernels; args: x, y, table, offsets, box."""
    kernels, threads = eager_kernels(name)
    if _wants_gradient(m):
        return _LogProb.apply(m, kernels, threads, args)
    return kernels.transition_log_prob(m, *args, *threads)


def policy_loss(name: str, m: Tensor, args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-probs, metrics) by eager kernels."""
    kernels, threads = eager_kernels(name)
    if _wants_gradient(m):
        return _PolicyLoss.apply(m, kernels, threads, args)
    loss, log_prob, metrics, _ = kernels.policy_loss(m, *args, False, *threads)
    return loss, log_prob, metrics


def nft_loss(name: str, m: Tensor, args: Arguments) -> tuple[Tensor, Tensor]:
    """(loss, metrics) by eager kernels."""
    kernels, threads = eager_kernels(name)
    if _wants_gradient(m):
        return _NftLoss.apply(m, kernels, threads, args)
    loss, metrics, _ = kernels.nft_loss(m, *args, False, *threads)
    return loss, metrics
