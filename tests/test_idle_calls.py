"""Calls of zero weight: what a rank owes the others must not spoil their gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import CPU, tiny_config

from dancegrpo_fast.batching import Call, Item
from dancegrpo_fast.losses.policy_gradient import policy_gradient_loss
from dancegrpo_fast.trainer import Trainer

MODES = {
    "on policy": {},
    "old log-probs of the rollout": {"loss.old_log_prob": "rollout", "loss.updates": 2},
    "normalised": {"loss.ratio_norm": True},
}


@pytest.mark.parametrize("changes", MODES.values(), ids=MODES)
def test_idle_call_of_a_rank_whose_samples_are_all_nan_adds_nothing(
    tmp_path, tiny_wan_folder, changes
):
    """It has no other states to make the call with, and 0 x NaN would skip everybody's update."""
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, changes), CPU)
    conditions = trainer.embeddings.conditions(trainer.prompts.prompts[:2])
    drawn = trainer.sample(trainer.plan(0), conditions)
    for stored in (drawn.latents, drawn.log_prob):
        for place in stored:
            stored[place] = torch.full_like(stored[place], torch.nan)
    edge = drawn.plan.leaf_edges[0][0]
    item = Item(0, drawn.plan.states[edge].parent, (edge,), np.zeros((1, 1, 2)), np.zeros(1))
    call = Call("transformer", (item,))
    old = torch.full((1,), torch.nan) if changes.get("loss.old_log_prob") else None
    result = policy_gradient_loss(
        call, drawn, conditions, trainer.family, trainer.policy,
        trainer.policy.modules["transformer"], trainer.config.loss,
        divisor=4.0, reward_weights=np.ones(1), old_log_prob=old,
    )  # fmt: skip
    result.loss.backward()
    gradients = [p.grad for p in trainer.policy.trainable().values() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)
    assert result.metrics.isfinite().all()
