"""Drawing a transition and the log-probability of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.ops import autograd, native, reference, registered
from dancegrpo_fast.ops import noise as noise_ops
from dancegrpo_fast.ops.noise import DrawKey
from dancegrpo_fast.ops.packing import (
    DTYPES,
    Box,
    Packing,
    explain,
    pack,
    refuse_gradient,
    resolve,
    savable,
    values_readable,
)


class SampledTransition(NamedTuple):
    """What `sample_transition` returns.

    Attributes:
        next_latents: [children, ...] in the latent dtype.
        log_prob: [children] float32 (float64 for float64 inputs), of `next_latents` as stored; 0
            where there is no density.
    """

    next_latents: Tensor
    log_prob: Tensor


def sample_transition(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    *,
    keys: Tensor | Sequence[DrawKey] | None = None,
    noise: Tensor | None = None,
    child_offsets: Tensor | None = None,
    action_box: Box | None = None,
    latent_dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> SampledTransition:
    """Draws x' = a x + b m + s eps for every child, and its log-probability.

    x' is rounded to `latent_dtype` first and the log-prob is that of the rounded value, computed as
    `transition_log_prob` does: the same model output gives the same bits there. No gradient.

    Args:
        model_output: m, [states, ...], any floating dtype; computed with in float32 (float64 if
            model_output or latents is float64).
        latents: x, the same shape.
        coefficients: [children, 8]: a, b, s, w, c, k, p, q (`transitions.coefficient_table`); s at
            least 0.
        keys: One noise key per child: int64 [children, 2] or `DrawKey` objects. Element i of a
            latent takes element i of its key's normal, box or no box. Children with s = 0 use none.
            For Triton upload the table once: a CPU table is copied in every call.
        noise: eps, [children, ...], instead of keys.
        child_offsets: int64 [states + 1]: state i has the children child_offsets[i] up to
            child_offsets[i + 1]. None: one child each.
        action_box: (start, stop) for each dimension of a latent. Elements outside it are copied
            from `latents` and enter no mean. None: everything.
        latent_dtype: dtype of the result; None: that of `latents`.
        implementation: "auto", "native", "triton" or "reference" (`ops.selected`).

    Returns:
        The next latents and their log-probs.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, both or neither of keys and noise
            where a child needs noise, or an implementation that is not there. On a device values
            are not read: without keys and noise, children with s > 0 come out as NaN.
    """
    dtype = latent_dtype or latents.dtype
    if not (keys is None or isinstance(keys, Tensor)):
        keys = noise_ops.keys_table(keys)
    args = (latents, coefficients, keys, noise, child_offsets, action_box, dtype)
    name = resolve(implementation, model_output, latents)
    if name == "native" and not torch.compiler.is_compiling():
        kernels, threads = autograd.eager_kernels(name)
        try:
            return SampledTransition(*kernels.sample_transition(model_output, *args, *threads))
        except kernels.Refused as error:
            refused = error
        explain(refused, lambda: _check_sample(model_output, *args), model_output, *args[:5])
    packing = _check_sample(model_output, *args)
    with torch.no_grad():
        if name == "reference":
            return _sample(packing, model_output, *args)
        if keys is not None:
            keys = keys.to(model_output.device)
        inputs = (latents, coefficients, keys, noise, child_offsets)
        if torch.compiler.is_compiling():
            box = registered.flat(action_box)
            drawn = registered.sample_transition(model_output, *inputs, box, dtype)
        else:
            kernels, _ = autograd.eager_kernels(name)
            drawn = kernels.sample_transition(model_output, *inputs, action_box, dtype)
        return SampledTransition(*drawn)


def _check_sample(
    m: Tensor,
    x: Tensor,
    coefficients: Tensor,
    keys: Tensor | None,
    noise: Tensor | None,
    child_offsets: Tensor | None,
    action_box: Box | None,
    dtype: torch.dtype,
) -> Packing:
    packing = pack(m, x, coefficients, child_offsets, action_box)
    if keys is not None and noise is not None:
        raise ValueError("keys and noise are both given: pass one of them")
    packing.check("noise", noise, (packing.children, *packing.dims))
    if keys is not None:
        if keys.dtype != torch.int64 or keys.dim() != 2 or keys.shape[1] != 2:
            raise ValueError(
                f"keys = {keys.dtype} {list(keys.shape)}: must be int64 [children, 2]; "
                "use keys_table()"
            )
        if len(keys) != packing.children:
            raise ValueError(
                f"keys has {len(keys)} rows: must be {packing.children}, one per child"
            )
    stochastic = coefficients[:, 2] > 0
    if keys is None and noise is None and values_readable(stochastic) and bool(stochastic.any()):
        raise ValueError(
            f"keys and noise are both None: child {int(stochastic.nonzero()[0])} has s > 0; "
            "pass keys (one per child) or noise"
        )
    if dtype not in DTYPES:
        raise ValueError(f"latent_dtype = {dtype}: must be one of {', '.join(map(str, DTYPES))}")
    return packing


def _sample(
    packing: Packing,
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    keys: Tensor | None,
    noise: Tensor | None,
    child_offsets: Tensor | None,
    action_box: Box | None,
    dtype: torch.dtype,
) -> SampledTransition:
    """The reference."""
    table = coefficients.to(packing.dtype)
    eps = _noise_rows(packing, table, keys, noise)
    x = packing.per_child(packing.rows(latents))
    m = packing.per_child(packing.rows(model_output))
    center = reference.center(x, m, table)
    stored = reference.add_noise(center, eps, table).to(dtype)
    log_prob = reference.log_prob(x, m, stored.to(packing.dtype), table)
    boxed = (packing.children, *(part.stop - part.start for part in packing.slices))
    if boxed[1:] == packing.dims:
        return SampledTransition(stored.reshape(boxed), log_prob)
    next_latents = packing.per_child(latents).to(stored.dtype, copy=True)
    next_latents[(slice(None), *packing.slices)] = stored.reshape(boxed)
    return SampledTransition(next_latents, log_prob)


def _noise_rows(
    packing: Packing, table: Tensor, keys: Tensor | None, noise: Tensor | None
) -> Tensor:
    """eps as [children, numel]."""
    if noise is not None:
        return packing.rows(noise)
    if keys is None:
        return table.new_full((packing.children, 1), float("nan"))
    # Unused keys are skipped only where looking costs nothing; drawing from them changes no value.
    used = (table[:, 2] > 0).nonzero()[:, 0] if values_readable(table) else None
    drawn = noise_ops.normal_batch(
        packing.dims,
        keys if used is None else keys[used.to(keys.device)],
        dtype=packing.dtype,
        device=packing.device,
        box=[(part.start, part.stop) for part in packing.slices],
    ).reshape(-1, packing.numel)
    if used is None or len(used) == packing.children:
        return drawn
    return table.new_zeros(packing.children, packing.numel).index_copy(0, used, drawn)


def transition_log_prob(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    coefficients: Tensor,
    *,
    child_offsets: Tensor | None = None,
    action_box: Box | None = None,
    implementation: str = "auto",
) -> Tensor:
    """log p(x'|x) = -w mean((x' - (a x + b m))^2) + c for every child.

    Differentiable with respect to `model_output` only: x and x' are constants of the loss.

    Args:
        model_output: m, [states, ...], any floating dtype; computed with in float32 (float64 if a
            latent-sized input is float64).
        latents: x, the same shape.
        next_latents: x', [children, ...].
        coefficients: [children, 8]: a, b, s, w, c, k, p, q.
        child_offsets: int64 [states + 1]; None: one child each.
        action_box: (start, stop) for each dimension of a latent; only these elements enter the
            mean. None: everything.
        implementation: "auto", "native", "triton" or "reference" (`ops.selected`).

    Returns:
        [children] float32 (or float64).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, latents or next_latents that require
            a gradient, or an implementation that is not there.
    """
    if torch.is_grad_enabled():
        refuse_gradient(latents=latents, next_latents=next_latents, coefficients=coefficients)
    args = (latents, next_latents, coefficients, child_offsets, action_box)
    name = resolve(implementation, model_output, latents, next_latents)
    if name == "native" and not torch.compiler.is_compiling():
        try:
            return autograd.transition_log_prob(name, model_output, args)
        except native.module().Refused as error:
            refused = error
        explain(refused, lambda: _check_log_prob(model_output, *args), model_output, *args[:4])
    packing = _check_log_prob(model_output, *args)
    if name == "reference":
        return reference.log_prob(
            packing.per_child(packing.rows(latents)),
            packing.per_child(packing.rows(model_output)),
            packing.rows(next_latents),
            savable(coefficients).to(packing.dtype),
        )
    if torch.compiler.is_compiling():
        box = registered.flat(action_box)
        return registered.transition_log_prob(model_output, *args[:4], box)
    return autograd.transition_log_prob(name, model_output, args)


def _check_log_prob(
    m: Tensor,
    x: Tensor,
    y: Tensor,
    coefficients: Tensor,
    child_offsets: Tensor | None,
    action_box: Box | None,
) -> Packing:
    return pack(m, x, coefficients, child_offsets, action_box, y)


def transition_mean(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    *,
    child_offsets: Tensor | None = None,
    action_box: Box | None = None,
) -> Tensor:
    """a x + b m of every child: where the transition points to, without its noise.

    Plain torch on any device, differentiable with respect to `model_output` and `latents`. It takes
    the same roundings as `sample_transition`.

    Args:
        model_output: m, [states, ...].
        latents: x, the same shape.
        coefficients: [children, 8]: a, b, s, w, c, k, p, q.
        child_offsets: int64 [states + 1]; None: one child each.
        action_box: (start, stop) for each dimension of a latent; outside it the result is x.

    Returns:
        [children, ...] float32 (float64 if an input is).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    packing = pack(model_output, latents, coefficients, child_offsets, action_box)
    return _affine(packing, model_output, latents, savable(coefficients)[:, 0:2])


def x0_estimate(
    model_output: Tensor,
    latents: Tensor,
    coefficients: Tensor,
    *,
    child_offsets: Tensor | None = None,
    action_box: Box | None = None,
) -> Tensor:
    """p x + q m of every child: the clean latents that the model predicts.

    Arguments, result and errors as `transition_mean`.
    """
    packing = pack(model_output, latents, coefficients, child_offsets, action_box)
    return _affine(packing, model_output, latents, savable(coefficients)[:, 6:8])


def _affine(packing: Packing, m: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """factors[:, 0] x + factors[:, 1] m inside the box, x outside: [children, ...]."""
    of_x, of_m = (
        column.to(packing.dtype).reshape(-1, *(1 for _ in packing.dims))
        for column in factors.unbind(1)
    )
    x, m = packing.per_child(x), packing.per_child(m)
    if packing.numel == math.prod(packing.dims):
        return of_x * x + of_m * m  # the factors carry the dtype
    x = x.to(packing.dtype)
    inside = (slice(None), *packing.slices)
    result = x.clone()
    result[inside] = of_x * x[inside] + of_m * m.to(packing.dtype)[inside]
    return result
