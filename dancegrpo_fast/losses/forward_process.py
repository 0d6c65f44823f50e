"""Losses of the forward process: clean samples, mixed with fresh noise at points of the grid.

    x_t = (1 - t) x0 + t eps,   t = sigma of the point,   velocity v = eps - x0

Nothing of the trajectory is needed, so any solver may have drawn x0. The noise is a function of
(seed, iteration, prompt, sample, point): the same on any number of ranks, and in each of an
update's forwards of one point.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.batching import Call
from dancegrpo_fast.config import LossConfig
from dancegrpo_fast.models.family import Box, Family
from dancegrpo_fast.ops import PolicyLoss, awm_loss, nft_loss
from dancegrpo_fast.ops.forward_loss import ForwardLoss, awm_weighting
from dancegrpo_fast.ops.noise import NoiseKey, keys_table, normal_batch
from dancegrpo_fast.trajectories import Place, Trajectories, harmless
from dancegrpo_fast.trees.tree import TreePlan


class Noised(NamedTuple):
    """Clean samples mixed with noise, B rows of one micro-batch.

    Attributes:
        places: B states of the plan, whose points are those of the noise levels.
        clean: x0, [B, C, F, H, W] float32.
        noise: eps, likewise.
        latents: x_t, likewise; outside the action box x0.
        sigmas: t, [B] float32.
        advantages: [B, R, 2] float64, positive and negative part.
        weights: [B] float64.
    """

    places: list[Place]
    clean: Tensor
    noise: Tensor
    latents: Tensor
    sigmas: Tensor
    advantages: Tensor
    weights: Tensor


def leaf_of_states(plan: TreePlan) -> dict[int, int]:
    """Position in `plan.leaves` of the leaf below each state, in a plan without branches."""
    return {s: g for g, leaf in enumerate(plan.leaves) for s in plan.ancestry(leaf)}


def noised(
    call: Call, drawn: Trajectories, leaf_of: dict[int, int], family: Family, key: NoiseKey
) -> Noised:
    """The samples of one call at the noise levels of its items.

    Args:
        call: Items (prompt, state): the sample is the leaf below, the noise level the state's.
        drawn: Holds the samples.
        leaf_of: Of `leaf_of_states`.
        family: For the action box.
        key: Forward key of the iteration.
    """
    plan, places = drawn.plan, [(item.prompt, item.state) for item in call.items]
    points = [(p, leaf_of[state], plan.states[state].step) for p, state in places]
    clean = harmless(drawn.samples([(p, g) for p, g, _ in points]).float(), call)
    keys = keys_table([key.fold_in(p).fold_in(g).fold_in(i).draw() for p, g, i in points])
    noise = normal_batch(
        tuple(clean.shape[1:]), keys, dtype=torch.float32, device=clean.device
    )
    sigmas = torch.tensor(
        [plan.schedule.sigmas[i] for *_, i in points], dtype=torch.float32, device=clean.device
    )
    return Noised(
        places,
        clean,
        noise,
        mixed(clean, noise, sigmas, family.action_box),
        sigmas,
        _tensor(np.concatenate([item.advantages for item in call.items]), clean.device),
        _tensor(np.concatenate([item.weights for item in call.items]), clean.device),
    )


def mixed(clean: Tensor, noise: Tensor, sigmas: Tensor, box: Box | None) -> Tensor:
    """(1 - sigma) clean + sigma noise [B, C, F, H, W] inside the action box, clean outside."""
    sigma = sigmas[:, None, None, None, None]
    whole = (1 - sigma) * clean + sigma * noise
    if box is None:
        return whole
    inside = (slice(None), *(slice(*side) for side in box))
    result = clean.clone()
    result[inside] = whole[inside]
    return result


def nft_call_loss(
    output: Tensor,
    rows: Noised,
    config: LossConfig,
    *,
    old_output: Tensor,
    reference_output: Tensor | None,
    advantage_clip: float,
    divisor: float,
    action_box: Box | None,
) -> ForwardLoss:
    """DiffusionNFT's loss of one call; see `ops.nft_loss`.

    Args:
        output: v at `rows.latents`, the only input that is differentiated.
        rows: The micro-batch; one advantage a row.
        config: beta and the weight of the KL.
        old_output: v of the old policy.
        reference_output: v of the untrained model, or None without KL.
        advantage_clip: The advantages' clamp; they become probabilities A / (2 clip) + 1/2.
        divisor: The update's, over all ranks.
        action_box: Of the family.
    """
    assert rows.advantages.shape[1] == 1, "nft takes one advantage a sample"
    return nft_loss(
        output, rows.latents, rows.clean, rows.sigmas, rows.advantages.sum((1, 2)),
        old_output=old_output, beta=config.beta, advantage_clip=advantage_clip,
        weights=rows.weights, divisor=divisor, kl_weight=config.kl_weight,
        reference_output=reference_output, action_box=action_box,
    )  # fmt: skip


def awm_call_loss(
    output: Tensor,
    rows: Noised,
    config: LossConfig,
    *,
    old_log_prob: Tensor | None,
    old_output: Tensor | None,
    reference_output: Tensor | None,
    advantage_clip: float,
    reward_weights: Tensor,
    divisor: float,
    action_box: Box | None,
) -> PolicyLoss:
    """AWM's loss of one call; see `ops.awm_loss`. Advantages are divided by their clamp.

    Args:
        output: v at `rows.latents`, the only input that is differentiated.
        rows: The micro-batch.
        config: Form, weighting, clip range, weights of KL and of the old policy.
        old_log_prob: [B] at the weights of the iteration's start; None: on-policy.
        old_output: v of the old policy, or None.
        reference_output: v of the untrained model, or None without KL.
        advantage_clip: The advantages' clamp.
        reward_weights: [R] of the separately clipped objectives.
        divisor: The update's, over all ranks.
        action_box: Of the family.
    """
    return awm_loss(
        output, rows.clean, rows.noise, rows.advantages / advantage_clip,
        weighting=awm_weighting(rows.sigmas, config.weighting), form=config.form,
        old_log_prob=old_log_prob, weights=rows.weights, reward_weights=reward_weights,
        clip_range=config.clip_range, divisor=divisor, kl_weight=config.kl_weight,
        reference_output=reference_output, ema_weight=config.old_weight, ema_output=old_output,
        action_box=action_box,
    )  # fmt: skip


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)  # The op casts to what it computes in.
