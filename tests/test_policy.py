"""Policy and optimizer steps: average, adapters, dtypes, and gradients that are not finite."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tiny_models import CPU, tiny_config, tiny_wan

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models import load_family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.trainer import Trainer

KEY = NoiseKey.from_seed(3)
LORA = {"policy.train": "lora"}


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory):
    return tiny_wan(tmp_path_factory.mktemp("models") / "wan2", experts=2)


def make_policy(tmp_path, folder, overrides=(), key=KEY) -> Policy:
    config = tiny_config(tmp_path, folder, dict(overrides))
    family = load_family(config.model, CPU.device)
    policy = Policy(
        family.modules, config.policy,
        lora_targets=family.lora_targets, key=key, needs_reference=False,
    )  # fmt: skip
    policy.initialise_adapters(CPU.device)
    policy.start_average()
    return policy


def weights_of(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


# ---- average ------------------------------------------------------------------------------------


def test_average_follows_the_formula(tmp_path, tiny_wan_folder):
    """e <- d e + (1 - d) w with d = min(decay, (1 + n) / (10 + n)) at the n-th update."""
    policy = make_policy(tmp_path, tiny_wan_folder, {"policy.ema_decay": 0.3})
    name, parameter = next(iter(policy.trainable().items()))
    by_hand = parameter.detach().double().clone()
    decays = []
    for n in range(1, 6):
        parameter.data += 0.1 * n
        policy.update_ema()
        decays.append(min(0.3, (1 + n) / (10 + n)))
        by_hand = decays[-1] * by_hand + (1 - decays[-1]) * parameter.detach().double()
    assert decays[:3] == [2 / 11, 3 / 12, 0.3]  # The warm-up ends after two updates.
    assert policy.ema is not None and policy.ema_updates == 5
    torch.testing.assert_close(policy.ema[name].double(), by_hand, rtol=1e-6, atol=1e-7)
    others = [k for k in policy.ema if k != name]
    assert all(torch.equal(policy.ema[k], policy.trainable()[k]) for k in others)


def test_averaged_weights_are_there_only_inside(tmp_path, tiny_wan_folder):
    policy = make_policy(tmp_path, tiny_wan_folder, {"policy.ema_decay": 0.9})
    start = weights_of(policy)
    for parameter in policy.trainable().values():
        parameter.data += 1.0
    moved = weights_of(policy)
    with pytest.raises(RuntimeError, match="inside"):
        with policy.averaged():
            assert all(torch.equal(v, start[k]) for k, v in weights_of(policy).items())
            raise RuntimeError("inside")
    assert all(torch.equal(v, moved[k]) for k, v in weights_of(policy).items())


def test_training_updates_the_average(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, LORA | {"policy.ema_decay": 0.9})
    trainer = Trainer(config, CPU)
    before = weights_of(trainer.policy)
    trainer.iteration()
    ema = trainer.policy.ema
    assert ema is not None and trainer.policy.ema_updates == 1
    for name, after in weights_of(trainer.policy).items():
        expected = 2 / 11 * before[name] + 9 / 11 * after
        torch.testing.assert_close(ema[name], expected, rtol=1e-5, atol=1e-7)


# ---- adapters and dtypes ------------------------------------------------------------------------


def test_adapters_start_from_a_key(tmp_path, two_experts):
    """The same bits whatever torch's own generator did; scale 1 / rank; experts differ."""
    overrides = LORA | {"policy.lora_rank": 8}
    torch.manual_seed(1)
    first = weights_of(make_policy(tmp_path, two_experts, overrides))
    torch.manual_seed(2)
    again = weights_of(make_policy(tmp_path, two_experts, overrides))
    other = weights_of(make_policy(tmp_path, two_experts, overrides, NoiseKey.from_seed(4)))
    down = [name for name in first if "lora_A" in name]
    assert len(down) == 2 * 2 * 2 * 4  # experts, layers, attentions, targets
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert ("lora_A" in name) == bool(value.any()) == (not torch.equal(value, other[name]))
    drawn = torch.cat([first[name].flatten() for name in down])
    assert len(drawn.unique()) > 0.999 * len(drawn), "two layers drew the same numbers"
    # Standard error of a standard deviation: sigma / sqrt(2 n); five of them.
    assert abs(drawn.std() * 8 - 1) < 5 / math.sqrt(2 * len(drawn))


def test_trainable_weights_are_float32_and_frozen_ones_stay(tmp_path, tiny_wan_folder):
    bfloat16 = {"model.dtype": "bfloat16"}
    module = make_policy(tmp_path, tiny_wan_folder, LORA | bfloat16).modules["transformer"]
    base = load_family(tiny_config(tmp_path, tiny_wan_folder, bfloat16).model, CPU.device)
    stored = {k: p.dtype for k, p in base.modules["transformer"].named_parameters()}
    assert torch.bfloat16 in stored.values()
    for name, parameter in module.named_parameters():
        if "lora" in name:
            assert parameter.requires_grad and parameter.dtype == torch.float32
        else:
            assert not parameter.requires_grad
            assert parameter.dtype == stored[name.replace(".base_layer", "")], name
    full = make_policy(tmp_path, tiny_wan_folder, bfloat16)
    assert len(full.trainable()) == len(stored)
    assert {p.dtype for p in full.trainable().values()} == {torch.float32}


def test_bfloat16_trains(tmp_path, tiny_wan_folder):
    """Frozen storage in bfloat16: the gate passes and the adapter moves."""
    trainer = Trainer(
        tiny_config(tmp_path, tiny_wan_folder, LORA | {"model.dtype": "bfloat16"}), CPU
    )
    before = weights_of(trainer.policy)
    assert trainer.iteration()["gate/max_gap"] < 1e-3
    assert any(not torch.equal(v, before[k]) for k, v in weights_of(trainer.policy).items())


def test_unknown_adapter_targets_are_refused(tmp_path, tiny_wan_folder):
    overrides = LORA | {"policy.lora_targets": ["to_z"]}
    with pytest.raises(UserError, match=r"policy.lora_targets = \['to_z'\]: no such layers"):
        make_policy(tmp_path, tiny_wan_folder, overrides)


def test_expert_without_trained_steps_is_not_stepped(tmp_path, two_experts):
    """AdamW would move it by weight decay alone."""
    overrides = {
        "rollout.tree.kind": "window", "rollout.tree.window_size": 1,
        "rollout.tree.window_start": 2, "optimizer.weight_decay": 0.5,
    }  # fmt: skip
    trainer = Trainer(tiny_config(tmp_path, two_experts, overrides), CPU)
    before = weights_of(trainer.policy)
    trainer.iteration()
    after = weights_of(trainer.policy)
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"transformer_2"}
    assert not trainer.engine.optimizers["transformer"].state


# ---- gradients that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_update_without_a_finite_gradient_is_skipped(tmp_path, tiny_wan_folder, caplog, bad):
    """One element is enough; the third in a row stops the run; a good one starts the count anew."""
    config = tiny_config(tmp_path, tiny_wan_folder, LORA | {"policy.ema_decay": 0.9})
    trainer = Trainer(config, CPU)
    spoiled = list(trainer.policy.trainable().values())[3]
    broken = {"now": True}

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[5] = bad if broken["now"] else gradient.view(-1)[5]
        return gradient

    spoiled.register_hook(spoil)
    before = weights_of(trainer.policy)

    def skipped(count) -> None:
        with caplog.at_level(logging.WARNING, logger="dancegrpo_fast.updating"):
            metrics = trainer.iteration()
        assert metrics["update/skipped"] == count
        assert "is not finite: update skipped" in caplog.text

    skipped(1)
    skipped(2)
    assert all(torch.equal(v, before[k]) for k, v in weights_of(trainer.policy).items())
    assert trainer.policy.ema_updates == 0
    assert not any(o.state for o in trainer.engine.optimizers.values())
    assert all(p.grad is None for p in trainer.policy.trainable().values())

    broken["now"] = False
    assert trainer.iteration()["update/skipped"] == 0
    good = weights_of(trainer.policy)
    assert any(not torch.equal(v, before[k]) for k, v in good.items())
    assert trainer.policy.ema_updates == 1

    broken["now"] = True
    skipped(1)
    skipped(2)
    with pytest.raises(UserError, match="3 updates in a row had no finite gradient; lower the"):
        trainer.iteration()
    assert all(torch.equal(v, good[k]) for k, v in weights_of(trainer.policy).items())
