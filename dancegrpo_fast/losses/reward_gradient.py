"""Rewards that are differentiated: through the decoder, and back through the last steps.

Loss of a sample: minus its weighted reward, or max(0, limit - reward) (ReFL, AlignProp). The steps'
Jacobians are applied one at a time, last step first: each is one forward at a stored state and one
backward with the gradient of the state behind it. That is checkpointing of every step, with
nothing kept but latents, and in calls as every other loss makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dancegrpo_fast.batching import Call
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import Family, evaluate
from dancegrpo_fast.ops import transition_mean
from dancegrpo_fast.trajectories import Fan, Place, Trajectories, harmless


class RewardGradient(NamedTuple):
    """What the rewards of n samples say.

    Attributes:
        gradient: [n, C, F, H, W], of the sum of the losses in the latents; float32, or float64 if
            they are.
        loss: [n], detached.
    """

    gradient: Tensor
    loss: Tensor


def reward_gradient(
    latents: Tensor,
    family: Family,
    vae: Any,
    score: Callable[[Tensor], Tensor],
    *,
    limit: float | None = None,
) -> RewardGradient:
    """Decode samples, reward them, and go back to their latents.

    The decoder's activations are recomputed block by block where diffusers offers it.

    Args:
        latents: [n, C, F, H, W] final latents.
        family: Decodes.
        vae: Its VAE, on the device until this returns.
        score: Weighted rewards [n] of pixels [n, F, 3, H, W] in [0, 1], differentiable.
        limit: Reward beyond which nothing is gained; None: none.
    """
    with torch.enable_grad(), _recomputed(vae):
        x = _wide(latents.detach()).requires_grad_(True)
        totals = score(family.pixels(x, vae))
        losses = -totals if limit is None else (limit - totals).clamp(min=0)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return RewardGradient(gradient, losses.detach())


def step_loss(
    call: Call,
    drawn: Trajectories,
    conditions: Conditions,
    family: Family,
    module: nn.Module,
    gradients: dict[Place, Tensor],
    *,
    first: bool,
) -> tuple[Tensor, Tensor | None]:
    """A scalar whose gradient is the loss's, through one step of some chains.

    <gradient, x'> with x' = a x + b m(x) + s eps: what it is differentiated by, the network's
    weights and x, gets what the loss behind x' gives it. The noise is a constant.

    Args:
        call: States of one step with one child each; those of weight 0 have no gradient.
        drawn: Holds the states.
        conditions: Of all prompts.
        family: For the network call and the action box.
        module: The network to differentiate, possibly wrapped by an engine.
        gradients: By state: the loss's gradient [C, F, H, W] at the children, which is taken out:
            nothing asks for it again.
        first: Whether the gradient ends here; else x is returned to ask it for `x.grad`.

    Returns:
        The scalar, and x [n, C, F, H, W] or None.
    """
    fan = Fan.of_call(call)
    latents = harmless(_wide(drawn.stack(fan.places)), call)
    if not first:
        latents.requires_grad_(True)
    output = evaluate(family, module, drawn.plan, conditions, fan.places, latents)
    mean = transition_mean(
        output, latents, drawn.edge_coefficients(fan.edges), action_box=family.action_box
    )
    weights = [float(item.weights[0]) for item in call.items]
    behind = torch.stack(
        [
            gradients.pop(edge) if weight else torch.zeros_like(mean[row])
            for row, (edge, weight) in enumerate(zip(fan.edges, weights, strict=True))
        ]
    )
    return (behind * mean).sum(), None if first else latents


def _wide(latents: Tensor) -> Tensor:
    """At least float32; a copy or not."""
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


@contextmanager
def _recomputed(vae: Any) -> Iterator[None]:
    """Inside, the VAE keeps the inputs of its blocks only, if its class can do so.

    Wan's and Qwen-Image's cannot: their decoders keep all activations of a micro-batch.
    """
    if not getattr(vae, "_supports_gradient_checkpointing", False):
        yield
        return
    vae.enable_gradient_checkpointing()
    try:
        yield
    finally:
        vae.disable_gradient_checkpointing()
