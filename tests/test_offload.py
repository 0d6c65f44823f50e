"""`rollout.offload`: what waits for training stands in host memory, and changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import CPU, tiny_config

from dancegrpo_fast.models import open_family
from dancegrpo_fast.planner import Hardware, Planner
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories

NORMALISED = {
    "loss.ratio_norm": True, "loss.old_log_prob": "rollout", "loss.updates": 2,
    "loss.clip_range": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, NORMALISED], ids=["plain", "with old outputs"])
def test_weights_are_the_same_bits(tmp_path, tiny_wan_folder, changes):
    found = []
    for offload in (False, True):
        config = tiny_config(tmp_path, tiny_wan_folder, changes | {"rollout.offload": offload})
        trainer = Trainer(config, CPU)
        trainer.iteration()
        trainer.iteration()
        found.append(trainer.policy.trainable())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_stored_latents_hold_no_batch_alive(tmp_path, tiny_wan_folder):
    """They are copies of one state each: the storage of a whole level would stay on the device."""
    config = tiny_config(tmp_path, tiny_wan_folder, NORMALISED | {"rollout.offload": True})
    trainer = Trainer(config, CPU)
    conditions = trainer.embeddings.conditions(trainer.prompts.prompts[:2])
    drawn = trainer.sample(trainer.plan(0), conditions)
    assert drawn.latents and drawn.outputs
    for tensor in [*drawn.latents.values(), *drawn.outputs.values()]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_plan_counts_them_as_host_memory(tmp_path, tiny_wan_folder):
    plans = []
    for offload in (False, True):
        config = tiny_config(tmp_path, tiny_wan_folder, {"rollout.offload": offload})
        planner = Planner(config, open_family(config.model))
        plans.append(planner.estimate(Hardware(gpus=1)).memory)
    here, there = plans
    latents = here.phases["train"]["trajectories"]
    assert latents > 0 and there.phases["train"]["trajectories"] == 0
    assert there.host == here.host + latents
    assert here.total("train") - there.total("train") == pytest.approx(latents)
    # A level of 8 samples and its children are on the device while they are drawn.
    one = math.prod(open_family(config.model).latent_shape) * 4
    assert there.phases["rollout"]["passing latents"] == 16 * one


def test_a_rank_without_samples_has_none_on_the_device():
    """Whoever scores them moves rewards to where they are."""
    assert Trajectories(None, torch.zeros(1, 8, device="meta"), []).samples().device.type == "meta"
