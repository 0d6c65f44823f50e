"""Drawing a transition and the log-probability of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dancegrpo_fast.ops import noise as noise_ops
from dancegrpo_fast.ops import reference
from dancegrpo_fast.ops.noise import DrawKey
from dancegrpo_fast.ops.packing import Box, Packing, pack, resolve, values_readable


class SampledTransition(NamedTuple):
    """What `sample_transition` returns.

    Attributes:
        next_latents: [children, ...] in the latent dtype.
        log_prob: [children] float32 (float64 for float64 inputs), of `next_latents` as stored; 0
            where there is no density.
    """

    next_latents: Tensor
    log_prob: Tensor


@torch.no_grad()
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
        coefficients: [children, 8]: a, b, s, w, c, k, p, q (`transitions.coefficient_table`).
        keys: One noise key per child: int64 [children, 2] or `DrawKey` objects. Element i of a
            latent takes element i of its key's normal, box or no box. Children with s = 0 use none.
        noise: eps, [children, ...], instead of keys.
        child_offsets: int64 [states + 1]: state i has the children child_offsets[i] up to
            child_offsets[i + 1]. None: one child each.
        action_box: (start, stop) for each dimension of a latent. Elements outside it are copied
            from `latents` and enter no mean. None: everything.
        latent_dtype: dtype of the result; None: that of `latents`.
        implementation: "auto" or "reference".

    Returns:
        The next latents and their log-probs.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, both or neither of keys and noise
            where a child needs noise, or an implementation that is not there. On a device values
            are not read: without keys and noise, children with s > 0 come out as NaN.
    """
    resolve(implementation)
    packing = pack(model_output, latents, coefficients, child_offsets, action_box)
    table = coefficients.to(packing.dtype)
    eps = _noise_rows(packing, table, keys, noise)
    x = packing.per_child(packing.rows(latents))
    m = packing.per_child(packing.rows(model_output))
    center = reference.mean(x, m, table)
    stored = reference.add_noise(center, eps, table).to(latent_dtype or latents.dtype)
    log_prob = reference.log_prob(x, m, stored.to(packing.dtype), table)
    boxed = (packing.children, *(part.stop - part.start for part in packing.slices))
    if boxed[1:] == packing.dims:
        return SampledTransition(stored.reshape(boxed), log_prob)
    next_latents = packing.per_child(latents).to(stored.dtype, copy=True)
    next_latents[(slice(None), *packing.slices)] = stored.reshape(boxed)
    return SampledTransition(next_latents, log_prob)


def _noise_rows(
    packing: Packing,
    table: Tensor,
    keys: Tensor | Sequence[DrawKey] | None,
    noise: Tensor | None,
) -> Tensor:
    """eps as [children, numel]."""
    if keys is not None and noise is not None:
        raise ValueError("keys and noise are both given: pass one of them")
    if noise is not None:
        packing.check("noise", noise, (packing.children, *packing.dims))
        return packing.rows(noise)
    stochastic = table[:, 2] > 0
    if keys is None:
        if values_readable(table) and bool(stochastic.any()):
            raise ValueError(
                f"keys and noise are both None: child {int(stochastic.nonzero()[0])} has s > 0; "
                "pass keys (one per child) or noise"
            )
        return table.new_full((packing.children, 1), float("nan"))
    if len(keys) != packing.children:
        raise ValueError(f"keys has {len(keys)} rows: must be {packing.children}, one per child")
    keys = keys if isinstance(keys, Tensor) else noise_ops.keys_table(keys)
    # Unused keys are skipped only where looking costs nothing; drawing from them changes no value.
    used = stochastic.nonzero()[:, 0] if values_readable(table) else None
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
        implementation: "auto" or "reference".

    Returns:
        [children] float32 (or float64).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, latents or next_latents that require
            a gradient, or an implementation that is not there.
    """
    resolve(implementation)
    packing = pack(model_output, latents, coefficients, child_offsets, action_box, next_latents)
    packing.check("next_latents", next_latents, (packing.children, *packing.dims))
    refuse_gradient(latents=latents, next_latents=next_latents, coefficients=coefficients)
    return reference.log_prob(
        packing.per_child(packing.rows(latents)),
        packing.per_child(packing.rows(model_output)),
        packing.rows(next_latents),
        coefficients.to(packing.dtype),
    )


def refuse_gradient(**constants: Tensor | None) -> None:
    """Raises ValueError for the first of these arguments that asks for a gradient."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in constants.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient: only model_output is differentiated; "
                f"pass {name}.detach()"
            )
