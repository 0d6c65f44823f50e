"""The clipped policy-gradient loss of one micro-batch of states with their trained children."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dancegrpo_fast.batching import Call
from dancegrpo_fast.config import LossConfig
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import Family, evaluate
from dancegrpo_fast.ops import PolicyLoss, policy_loss, transition_log_prob
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.trajectories import Fan, Trajectories, harmless


def policy_gradient_loss(
    call: Call,
    drawn: Trajectories,
    conditions: Conditions,
    family: Family,
    policy: Policy,
    module: nn.Module,
    config: LossConfig,
    *,
    divisor: float,
    reward_weights: np.ndarray,
    old_log_prob: Tensor | None,
    old_output: Tensor | None = None,
    output: Tensor | None = None,
) -> PolicyLoss:
    """Loss of one call; its gradient, summed over calls and ranks, is the update's.

    Args:
        call: States and their trained children, with advantages and weights.
        drawn: Stored latents and coefficients.
        conditions: Of all prompts of the iteration.
        family: For the network call and the action box.
        policy: For the reference, when `config.kl_weight` is not 0.
        module: The network to differentiate, possibly wrapped by an engine.
        config: Clip range and KL.
        divisor: The update's divisor, over all ranks.
        reward_weights: [C].
        old_log_prob: [children], or None for the on-policy ratio exp(lp - lp.detach()).
        old_output: [states, C, F, H, W] model output behind `old_log_prob`, for
            `config.ratio_norm`.
        output: [states, C, F, H, W] model output with its graph; None evaluates `module`.
    """
    fan = Fan.of_call(call)
    latents = harmless(drawn.stack(fan.places), call)
    following = harmless(drawn.stack(fan.edges), call)
    if old_log_prob is not None:
        old_log_prob = harmless(old_log_prob, call)
    if old_output is not None:
        old_output = harmless(old_output, call)
    if output is None:
        output = evaluate(family, module, drawn.plan, conditions, fan.places, latents)
    reference = None
    if config.kl_weight:
        with torch.no_grad(), policy.reference() as untrained:
            network = untrained[call.module]
            reference = evaluate(family, network, drawn.plan, conditions, fan.places, latents)
    if config.ratio_norm and old_log_prob is None:
        # The op's own on-policy ratio is the plain one; normalised, its gradient is s times that.
        old_output = output.detach()
        old_log_prob = harmless(_log_prob(fan, drawn, family, latents, old_output), call)
    assert config.ratio_norm == (old_output is not None)
    device = latents.device
    return policy_loss(
        output,
        latents,
        following,
        drawn.edge_coefficients(fan.edges),
        _tensor(np.concatenate([item.advantages for item in call.items]), device),
        old_log_prob=old_log_prob,
        weights=_tensor(np.concatenate([item.weights for item in call.items]), device),
        child_offsets=fan.offsets.to(device, non_blocking=True),
        reward_weights=_tensor(reward_weights, device),
        clip_range=config.clip_range,
        divisor=divisor,
        kl_weight=config.kl_weight,
        reference_output=reference,
        old_output=old_output,
        action_box=family.action_box,
    )


class Recomputed(NamedTuple):
    """Log-prob [children] of drawn transitions and model output [states, C, F, H, W], as of now."""

    log_prob: Tensor
    output: Tensor


@torch.no_grad()
def recompute(
    fan: Fan, drawn: Trajectories, conditions: Conditions, family: Family, module: nn.Module
) -> Recomputed:
    """Evaluate some states again, in this batch composition."""
    latents = drawn.stack(fan.places)
    output = evaluate(family, module, drawn.plan, conditions, fan.places, latents)
    return Recomputed(_log_prob(fan, drawn, family, latents, output), output)


def recompute_log_prob(
    fan: Fan, drawn: Trajectories, conditions: Conditions, family: Family, module: nn.Module
) -> Tensor:
    """Log-prob [children] of some edges under the current weights, in this batch composition."""
    return recompute(fan, drawn, conditions, family, module).log_prob


def _log_prob(
    fan: Fan, drawn: Trajectories, family: Family, latents: Tensor, output: Tensor
) -> Tensor:
    """[children] log-prob of a fan's edges, given the model output at its states."""
    return transition_log_prob(
        output,
        latents,
        drawn.stack(fan.edges),
        drawn.edge_coefficients(fan.edges),
        child_offsets=fan.offsets.to(latents.device, non_blocking=True),
        action_box=family.action_box,
    )


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)  # The op casts to what it computes in.
