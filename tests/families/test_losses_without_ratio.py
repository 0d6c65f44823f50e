"""One iteration of the losses without a ratio on real classes that are unlike the tests' Wan.

FLUX packs its latents and has an embedded guidance; Wan image-to-video has a first frame that is no
action; HunyuanVideo's VAE recomputes its blocks.
"""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from conformance import CPU, Case

from dancegrpo_fast.losses import forward_process, reward_gradient
from dancegrpo_fast.trainer import Trainer

CHAINS = {"rollout.tree.kind": "independent_roots", "rollout.noise_level": 0}
LOSSES = {
    "nft": {"loss.kind": "nft", "loss.kl_weight": 0.1, "rollout.solver": "multistep"},
    "awm": {"loss.kind": "awm", "loss.old_weight": 1.0, "policy.train": "lora"},
    "draft": {"loss.kind": "draft", "loss.gradient_from": [1, 2], "loss.micro_batch_size": 3},
}
CASES: dict[str, Case] = {
    case.name: case
    for file in ("case_flux", "case_wan_i2v", "case_hunyuan_video")
    for case in importlib.import_module(file).CASES
    if case.name in ("flux_dev", "wan22_ti2v") or case.family == "hunyuan_video"
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_one_iteration(name, loss, tmp_path, monkeypatch):
    case = CASES[name]
    prompts = case.made_prompts(tmp_path / "images")
    rows = [{"prompt": p.text} | ({"image": p.image.name} if p.image else {}) for p in prompts]
    file = tmp_path / "images" / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    changes = CHAINS | LOSSES[loss] | {
        "data.prompts": str(file), "rollout.group_size": 2, "model.guidance": 1.0,
        "model.guidance_2": None, "rewards": [{"name": "colourfulness"}],
    }  # fmt: skip
    seen = []
    mixed, recomputed = forward_process.mixed, reward_gradient._recomputed

    def watched(clean, noise, sigmas, box):
        latents = mixed(clean, noise, sigmas, box)
        inside = torch.zeros(clean.shape[1:], dtype=torch.bool)
        inside[... if box is None else tuple(slice(*side) for side in box)] = True
        assert torch.equal(latents[:, ~inside], clean[:, ~inside])
        assert not torch.equal(latents[:, inside], clean[:, inside])
        seen.append(bool((~inside).any()))
        return latents

    def counted(vae):
        seen.append(vae._supports_gradient_checkpointing)
        return recomputed(vae)

    monkeypatch.setattr(forward_process, "mixed", watched)
    monkeypatch.setattr(reward_gradient, "_recomputed", counted)
    with case.around():
        trainer = Trainer(case.recipe(tmp_path, case.build(tmp_path / "model"), changes), CPU)
        before = {n: p.detach().clone() for n, p in trainer.policy.trainable().items()}
        metrics = trainer.iteration()
    assert metrics["reward/failed"] == 0 and metrics["gate/applies"] == 0
    assert metrics["update/grad_norm"] > 0 and metrics["update/skipped"] == 0
    assert any(not torch.equal(p, before[n]) for n, p in trainer.policy.trainable().items())
    expected = name != "wan22_ti2v" if loss == "draft" else name == "wan22_ti2v"
    assert set(seen) == {expected}
