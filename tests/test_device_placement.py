"""Where tensors lie: whole iterations on a pretended GPU (pretended_gpu.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
SEARCH = {
    "rollout.group_size": 12, "rollout.tree.kind": "search", "rollout.tree.branches": 3,
    "rollout.tree.branch_steps": [0, 2], "rollout.tree.trunks": 2, "advantage.credit": "siblings",
}  # fmt: skip
RECIPES = [
    {
        "rollout.tree.kind": "branch_points", "rollout.tree.branch_steps": [0, 1],
        "rollout.tree.branches": 2, "rollout.offload": True, "loss.ratio_norm": True,
        "loss.old_log_prob": "rollout", "loss.updates": 2, "loss.kl_weight": 0.1,
        "policy.train": "lora", "model.guidance": 3.0,
    },
    SEARCH,
    {
        "loss.kind": "nft", "rollout.tree.kind": "independent_roots", "rollout.noise_level": 0,
        "rollout.solver": "multistep", "rewards": [{"name": "colourfulness"}],
    },
]  # fmt: skip


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices written in Python",
)
def test_an_iteration_is_the_same_on_a_gpu_and_mixes_no_devices() -> None:
    command = [sys.executable, str(HERE / "pretended_gpu.py"), *map(json.dumps, RECIPES)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(RECIPES)
    for cpu, gpu in found:
        assert cpu.keys() == gpu.keys() and cpu["update/grad_norm"] > 0
        # The CPU runs the native ops, which add up in another order: 1e-6 of a log-prob, and ratios
        # and rewards of samples that differ by as little.
        for name in ("update/grad_norm", "reward/mean"):
            assert gpu[name] == pytest.approx(cpu[name], rel=1e-3), name
