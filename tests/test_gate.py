"""The ratio gate: what differs between rollout and training stops the run before its step.

Each plant is sized to give a gap of one to five limits, and a quarter of it must pass.
"""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import CPU, tiny_config

from dancegrpo_fast.losses.gate import RatioGateError
from dancegrpo_fast.ops import POLICY_METRICS
from dancegrpo_fast.ops.noise import NoiseKey, normal
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.updating import policy_gradient as updating

CLEAN = 1e-6  # Rounding of float32 log-probs, whatever the batch; the limits lie 50x higher.
# updates of an iteration and limit: max_log_prob_gap, or half the clip range
MODES = {"on_policy": (1, 1e-3), "recompute": (2, 1e-3), "rollout": (2, 5e-5)}


@pytest.fixture(params=MODES)
def mode(request) -> str:
    return request.param


def make_trainer(folder, model, mode, overrides=()) -> Trainer:
    defaults = {"loss.old_log_prob": mode, "loss.updates": MODES[mode][0], "policy.train": "lora"}
    return Trainer(tiny_config(folder, model, defaults | dict(overrides)), CPU)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}


def load(trainer, weights) -> None:
    for name, parameter in trainer.policy.trainable().items():
        parameter.data.copy_(weights[name])


def plant_before_training(trainer, plant) -> None:
    """Runs `plant(trainer)` after the rollout was drawn and scored."""
    score = trainer.score

    def scored(*arguments):
        rewards = score(*arguments)
        plant(trainer)
        return rewards

    trainer.score = scored


def perturb(size):
    """Adds noise to the zero-initialised half of the adapter."""

    def plant(trainer):
        for position, (name, parameter) in enumerate(trainer.policy.trainable().items()):
            if "lora_B" in name:
                key = NoiseKey.from_seed(1).fold_in(position).draw()
                parameter.data += size * normal(tuple(parameter.shape), key)

    return plant


def refused(trainer, limit, largest=5.0, steps=("0", "1", "2")) -> str:
    """Runs an iteration that the gate must stop; returns its message."""
    before: dict[str, torch.Tensor] = {}
    plant_before_training(trainer, lambda t: before.update(weights_of(t)))
    done, updates = trainer.done, trainer.policy.ema_updates
    state = [dict(o.state) for o in trainer.engine.optimizers.values()]
    with pytest.raises(RatioGateError) as caught:
        trainer.iteration()
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, before[name]), f"{name} moved before the gate spoke"
    assert state == [dict(o.state) for o in trainer.engine.optimizers.values()]
    assert (trainer.done, trainer.policy.ema_updates) == (done, updates)
    message = str(caught.value)
    mode = trainer.updater.mode
    gap = float(re.search(r"differ by up to (\S+) ", message)[1])
    assert limit < gap < largest * limit
    assert f"(limit {limit:.2e} with loss.old_log_prob = {mode})" in message
    per_step = dict(re.findall(r"(\d): (\d\.\d\de[-+]\d\d)", message.split("\n")[1]))
    assert tuple(per_step) == steps
    assert max(map(float, per_step.values())) == gap
    return message


def test_clean_run_passes(tmp_path, tiny_wan_folder, mode):
    trainer = make_trainer(tmp_path, tiny_wan_folder, mode)
    for _ in range(2):
        before = weights_of(trainer)
        assert trainer.iteration()["gate/max_gap"] < CLEAN
        assert any(not torch.equal(v, before[k]) for k, v in weights_of(trainer).items())


def test_perturbed_adapter(tmp_path, tiny_wan_folder, mode):
    limit = MODES[mode][1]
    size = 6.0 * limit
    trainer = make_trainer(tmp_path, tiny_wan_folder, mode)
    plant_before_training(trainer, perturb(size))
    message = refused(trainer, limit)
    assert "none of batch size, dtype, guidance, attention backend and mode" in message
    assert "batch shape does not explain it" in message

    trainer = make_trainer(tmp_path, tiny_wan_folder, mode)
    plant_before_training(trainer, perturb(size / 4))
    assert limit / 10 < trainer.iteration()["gate/max_gap"] < limit


def stale_sampling(trainer, old) -> None:
    """The next rollout is drawn with the weights `old`; training keeps its own."""
    sample = trainer.sample

    def sampled(*arguments):
        own = weights_of(trainer)
        load(trainer, old)
        drawn = sample(*arguments)
        load(trainer, own)
        return drawn

    trainer.sample = sampled


def test_stale_weights(tmp_path, tiny_wan_folder, mode):
    """A rollout one iteration behind: the gap is that of real AdamW steps of this learning rate."""
    limit = MODES[mode][1]

    def second_iteration(rate):
        overrides = {"optimizer.learning_rate": rate}
        trainer = make_trainer(tmp_path, tiny_wan_folder, mode, overrides)
        old = weights_of(trainer)
        trainer.iteration()
        stale_sampling(trainer, old)
        return trainer

    assert "batch shape does not explain it" in refused(second_iteration(limit), limit)
    assert limit / 10 < second_iteration(limit / 5).iteration()["gate/max_gap"] < limit


def test_wrong_guidance(tmp_path, tiny_wan_folder, mode):
    limit = MODES[mode][1]
    off = 180 * limit

    def trained_with(guidance):
        trainer = make_trainer(tmp_path, tiny_wan_folder, mode, {"model.guidance": 1.5})
        plant_before_training(trainer, lambda t: t.family.guidance.update(transformer=guidance))
        return trainer

    message = refused(trained_with(1.5 + off), limit)
    assert f"  guidance: rollout 1.5, training {1.5 + off}" in message.split("\n")
    assert "batch shape does not explain it" in message
    assert limit / 10 < trained_with(1.5 + off / 4).iteration()["gate/max_gap"] < limit


def test_changed_conditions(tmp_path, tiny_wan_folder, mode):
    """Other text in training than in the rollout: no setting differs, and the message says so."""
    trainer = make_trainer(tmp_path, tiny_wan_folder, mode)
    encode, seen = trainer.family.encode, []
    trainer.family.encode = lambda prompts: seen.append(encode(prompts)) or seen[-1]
    limit = MODES[mode][1]

    def other_text(trainer):
        for row in seen[-1].rows:
            row.positive["text"].mul_(1 + 120 * limit)

    plant_before_training(trainer, other_text)
    message = refused(trainer, limit)
    assert "the weights or the conditions changed between rollout and training" in message


def test_batch_shape_is_said_to_explain_a_gap(tmp_path, tiny_wan_folder, mode):
    """A network whose result depends on the batch size, as fast kernels' do."""
    limit = MODES[mode][1]
    trainer = make_trainer(tmp_path, tiny_wan_folder, mode, {"loss.micro_batch_size": 2})
    velocity = trainer.family.model_output

    def uneven(module, latents, *rest):
        return velocity(module, latents, *rest) * (1 + 3 * limit * len(latents))

    trainer.family.model_output = uneven
    # Step 0 has one state a prompt: its two states are a batch of 2 in the rollout as well.
    message = refused(trainer, limit, steps=("1", "2"))
    assert "  batch_size: rollout 8, training 2" in message.split("\n")
    assert "the batch shape explains it: with the rollout's batch of" in message
    other = "loss.old_log_prob = recompute" if mode == "rollout" else "loss.max_log_prob_gap above "
    assert f"set loss.micro_batch_size = rollout.batch_size, or {other}" in message


def test_recompute_measures_the_transitions_of_later_updates(tmp_path, tiny_wan_folder):
    """A gap that only the second update would see stops the run before the first."""
    limit = MODES["recompute"][1]
    for mode, stops in (("recompute", True), ("rollout", False)):
        trainer = make_trainer(tmp_path, tiny_wan_folder, mode, {"loss.max_log_prob_gap": limit})
        update = trainer.update

        def planted(updates, drawn, conditions, advantages, prompts, update=update):
            first, second = ({(i.prompt, c) for k in u.calls for i in k.items for c in i.children}
                             for u in updates)  # fmt: skip
            assert first and second and not first & second
            edge = min(second)
            drawn.log_prob[edge] = drawn.log_prob[edge] + 2 * limit
            return update(updates, drawn, conditions, advantages, prompts)

        trainer.update = planted
        if stops:
            with pytest.raises(RatioGateError, match="with loss.old_log_prob = recompute"):
                trainer.iteration()
        else:
            assert trainer.iteration()["gate/max_gap"] < CLEAN


def test_nan_is_an_infinite_gap(tmp_path, tiny_wan_folder, mode):
    trainer = make_trainer(tmp_path, tiny_wan_folder, mode)
    plant_before_training(trainer, perturb(float("nan")))
    with pytest.raises(RatioGateError, match="differ by up to inf"):
        trainer.iteration()


def test_the_ratio_compares_with_the_policy_of_the_rollout(
    tmp_path, tiny_wan_folder, mode, monkeypatch
):
    """In every call of every update; in the second update that policy is one step behind."""
    trainer = make_trainer(tmp_path, tiny_wan_folder, mode, {"optimizer.learning_rate": 1e-3})
    loss, gaps = updating.policy_gradient_loss, []

    def checked(call, drawn, *arguments, **options):
        result = loss(call, drawn, *arguments, **options)
        edges = [(item.prompt, child) for item in call.items for child in item.children]
        weights = torch.tensor([float(weight) for item in call.items for weight in item.weights])
        gap = result.log_prob - drawn.recorded_log_prob(edges)
        ratios = dict(zip(POLICY_METRICS, result.metrics.tolist(), strict=True))["ratio"]
        assert ratios == pytest.approx(float(gap.exp()[weights > 0].sum()), rel=CLEAN)
        gaps.append(float(gap.abs().max()))
        return result

    monkeypatch.setattr(updating, "policy_gradient_loss", checked)
    trainer.iteration()
    assert gaps[0] < CLEAN
    if MODES[mode][0] > 1:
        assert gaps[-1] > 100 * CLEAN  # Else any other old log-prob would pass as well.
