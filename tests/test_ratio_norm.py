"""GRPO-Guard's ratio: the right old output in every mode, and the ties to the plain ratio."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import CPU, tiny_config
from torch import Tensor
from tree_case import Case, schedule_updates
from tree_stand_ins import SCHEDULE, ReferencePolicy

from dancegrpo_fast.batching import Call
from dancegrpo_fast.config import LossConfig
from dancegrpo_fast.losses.policy_gradient import policy_gradient_loss, recompute
from dancegrpo_fast.ops import POLICY_METRICS, PolicyLoss
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Fan
from dancegrpo_fast.trees.tree import branch_points, shared_root
from dancegrpo_fast.updating import policy_gradient as updating

CLIP = 0.2
PLANS = {
    "shared_root": shared_root(SCHEDULE, 5),
    "branch_points": branch_points(SCHEDULE, (1, 2), 3, noise_scale=1.3),
}


def loss_of(case: Case, call: Call, *, ratio_norm: bool, **old: Tensor | None) -> PolicyLoss:
    return policy_gradient_loss(
        call, case.whole, case.conditions, case.family, ReferencePolicy(case.references),
        case.networks["net"],
        LossConfig(clip_range=CLIP, micro_batch_size=1, ratio_norm=ratio_norm),
        divisor=7.0, reward_weights=np.ones(1), **{"old_log_prob": None, **old},
    )  # fmt: skip


def gradient(case: Case, loss: PolicyLoss) -> Tensor:
    parameters = tuple(case.networks["net"].parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.loss, parameters)])


@pytest.mark.parametrize("plan", PLANS)
def test_on_policy_it_is_the_plain_gradient_times_each_steps_noise(plan: str) -> None:
    """Equal weights: every ratio is exactly 1; d rho_norm = s d log p."""
    case = Case(PLANS[plan])
    rows = case.plan.transitions(dynamics="dance", level=0.3)
    for call in schedule_updates(case)[0].calls:
        normalised = loss_of(case, call, ratio_norm=True)
        ratios = dict(zip(POLICY_METRICS, normalised.metrics.tolist(), strict=True))
        assert ratios["ratio"] == ratios["children"] and ratios["ratio_deviation"] == 0
        scaled = tuple(
            replace(
                item,
                advantages=item.advantages
                * np.array([rows[child].s for child in item.children])[:, None, None],
            )
            for item in call.items
        )
        plain = loss_of(case, replace(call, items=scaled), ratio_norm=False)
        expected = gradient(case, plain)
        assert torch.allclose(gradient(case, normalised), expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_off_policy_it_is_the_published_formula(plan: str) -> None:
    """max(-A rho, -A clip(rho)), rho = exp(mean(change of the mean x noise)), in float64."""
    case = Case(PLANS[plan])
    (update,) = schedule_updates(case)
    now = [recompute_call(case, call) for call in update.calls]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in case.networks["net"].parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 0.5 * noise
    ratios = []
    for call, (log_prob, output) in zip(update.calls, now, strict=True):
        loss = loss_of(case, call, ratio_norm=True, old_log_prob=log_prob, old_output=output)
        fan = Fan.of_call(call)
        x = case.whole.stack(fan.places).double()
        m = recompute_call(case, call).output
        total = 0.0
        for place, item in enumerate(call.items):
            for child, advantage in zip(item.children, item.advantages, strict=True):
                a, b, s = case.whole.coefficients[child, :3].double()
                mean_old = a * x[place] + b * output[place]
                eps = (case.whole.latents[item.prompt, child].double() - mean_old) / s
                rho = ((a * x[place] + b * m[place] - mean_old) * eps).mean().exp()
                for part in advantage[0].tolist():
                    total += max(-part * rho, -part * rho.clamp(1 - CLIP, 1 + CLIP))
                ratios.append(float(rho))
        assert float(loss.loss.detach()) == pytest.approx(float(total) / 7.0, rel=1e-9, abs=1e-12)
    assert min(ratios) < 0.999 and max(ratios) > 1.001


def recompute_call(case: Case, call: Call):
    module = case.networks["net"]
    return recompute(Fan.of_call(call), case.whole, case.conditions, case.family, module)


MODES = {"on_policy": 1, "recompute": 2, "rollout": 2}


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_compares_with_the_output_of_the_rollout(
    tmp_path, tiny_wan_folder, mode, monkeypatch
) -> None:
    """In every call; in the second update the weights have moved and the old output has not."""
    overrides = {
        "loss.old_log_prob": mode, "loss.updates": MODES[mode], "loss.ratio_norm": True,
        "policy.train": "lora", "loss.timestep_weights": "inverse_dt",
    }  # fmt: skip
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, overrides), CPU)
    loss, drifts, outputs = updating.policy_gradient_loss, [], {}
    draw = updating.Updater.run

    def run(self, updates, given, *rest):
        # What the rollout saw, asked again with the weights of the rollout.
        for update in updates:
            for call in update.calls:
                fan = Fan.of_call(call)
                module = self.engine.modules[call.module]
                now = recompute(fan, given.drawn, given.conditions, self.family, module)
                outputs.update(zip(fan.places, now.output, strict=True))
        return draw(self, updates, given, *rest)

    def checked(call, drawn, *arguments, **options):
        result = loss(call, drawn, *arguments, **options)
        if options["old_log_prob"] is None:
            assert options["old_output"] is None
        else:
            own = torch.stack([outputs[place] for place in Fan.of_call(call).places])
            # The same weights in another batch composition: float32 rounding only.
            assert torch.allclose(options["old_output"], own, rtol=1e-4, atol=1e-5)
        drifts.append(float(result.metrics[POLICY_METRICS.index("old_distance")]))
        return result

    monkeypatch.setattr(updating.Updater, "run", run)
    monkeypatch.setattr(updating, "policy_gradient_loss", checked)
    metrics = trainer.iteration()
    assert metrics["gate/max_gap"] < 1e-5 and metrics["update/grad_norm"] > 0
    assert "policy/old_distance" in metrics
    assert drifts[0] < 1e-9
    if MODES[mode] > 1:
        assert drifts[-1] > 1e-6
