"""Whole iterations on a GPU: `pytest -m gpu tests/test_trainer_gpu.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPES: dict[str, dict[str, Any]] = {
    "adapters": {
        "rollout.tree.kind": "branch_points", "rollout.tree.branch_steps": [0, 1],
        "rollout.tree.branches": 2, "rollout.offload": True, "loss.updates": 2,
        "loss.kl_weight": 0.1, "policy.train": "lora", "model.guidance": 3.0,
    },
    "all weights, recomputed": {"parallel.checkpointing": "selective", "policy.ema_decay": 0.9},
    "search": {
        "rollout.group_size": 12, "rollout.tree.kind": "search", "rollout.tree.branches": 3,
        "rollout.tree.branch_steps": [0, 2], "rollout.tree.trunks": 2,
        "advantage.credit": "siblings",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_iterations_are_those_of_the_cpu(name, tmp_path) -> None:
    pytest.importorskip("diffusers")  # scripts/gpu needs no more than torch.
    from tiny_models import CPU, tiny_config, tiny_wan

    from dancegrpo_fast.parallel.world import World
    from dancegrpo_fast.trainer import Trainer

    model, found = tiny_wan(tmp_path / "model"), []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for world in (CPU, World(0, 1, torch.device("cuda", 0))):
            folder = tmp_path / world.device.type
            trainer = Trainer(tiny_config(folder, model, RECIPES[name]), world)
            found.append([trainer.iteration(), trainer.iteration()])
            trainer.save()
            trainer.saver.finish()
            assert trainer.resume() and trainer.saver.newest == 2
    for cpu, gpu in zip(*found, strict=True):
        assert gpu["gate/max_gap"] < 1e-4
        # The same noise to the bit; products in another order, 1e-6 of a float32 network's output,
        # and advantages divide differences of rewards that are a hundredth of the rewards.
        for metric in ("update/grad_norm", "reward/mean"):
            assert gpu[metric] == pytest.approx(cpu[metric], rel=1e-2), metric
