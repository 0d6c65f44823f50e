"""The ratio gate: before the first optimizer step, training must see the rollout's log-probs.

A gap between the two is a ratio that is wrong before anything was learned: another batch shape,
stale weights, other guidance, a perturbed adapter. The gate measures it on the forwards that update
1 runs anyway, and stops the run before its step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dancegrpo_fast.batching import Call, Item
from dancegrpo_fast.config import LossConfig, UserError
from dancegrpo_fast.losses.policy_gradient import recompute_log_prob
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.trajectories import Fan, Trajectories


class RatioGateError(UserError):
    """Rollout and training disagree about the log-probs of the same samples."""


@dataclass(frozen=True)
class ForwardSettings:
    """What may make two forwards of the same weights differ."""

    batch_size: int
    dtype: str
    guidance: str
    attention: str
    mode: str


def forward_settings(family: Family, policy: Policy, *, batch_size: int) -> ForwardSettings:
    """The settings in force now; taken once at rollout and once at training."""
    modules = list(policy.modules.values())
    backends = {
        str(getattr(part.processor, "_attention_backend", None) or "default")
        for module in modules
        for part in module.modules()
        if hasattr(part, "processor")
    }
    return ForwardSettings(
        batch_size=batch_size,
        dtype=str(family.dtype),
        guidance=", ".join(f"{scale:g}" for scale in family.guidance.values()),
        attention=", ".join(sorted(backends)) or "none",
        mode="train" if any(module.training for module in modules) else "eval",
    )


def gap_limit(config: LossConfig, mode: str) -> float:
    """Largest |rollout - training| log-prob allowed in a mode."""
    return config.clip_range / 2 if mode == "rollout" else config.max_log_prob_gap


class RatioGate:
    """Collects |rollout - training| log-prob per step over the calls of one iteration."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._max = torch.zeros(steps, device=device)
        self._sums = torch.zeros(2, steps, device=device)  # gap, count
        self._calls: list[tuple[Tensor, Call]] = []

    def record(self, call: Call, drawn: Trajectories, log_prob: Tensor) -> None:
        """Add the edges of one call; `log_prob` [children] is what training computed."""
        old = drawn.recorded_log_prob(Fan.of_call(call).edges)
        # A NaN is an infinite gap: MAX over ranks would otherwise lose it.
        gap = (old - log_prob).abs().float().nan_to_num(nan=torch.inf)
        # Work of zero weight trains nothing; it may even be another expert's state.
        weights = [float(weight) for item in call.items for weight in item.weights]
        counted = (torch.tensor(weights, device=gap.device) > 0).float()
        gap = torch.where(counted > 0, gap, 0.0)
        steps = torch.tensor(
            [drawn.plan.states[item.state].step for item in call.items for _ in item.children],
            device=gap.device,
        )
        self._max.scatter_reduce_(0, steps, gap, "amax")
        self._sums[0].index_add_(0, steps, gap)
        self._sums[1].index_add_(0, steps, counted)
        self._calls.append((gap, call))

    def reduce(self, all_reduce: Callable[[Tensor, str], None]) -> tuple[Tensor, Tensor]:
        """Maximum and mean gap per step over all ranks, [steps] each (0 where not measured)."""
        all_reduce(self._max, "max")
        all_reduce(self._sums, "sum")
        return self._max, self._sums[0] / self._sums[1].clamp(min=1)

    def worst(self) -> tuple[float, Call, Item]:
        """This rank's largest gap, the call it was measured in, and the state."""
        gaps, call = max(self._calls, key=lambda entry: float(entry[0].max()))
        items = [item for item in call.items for _ in item.children]
        return float(gaps.max()), call, items[int(gaps.argmax())]


def gap_report(
    per_step: Tensor,
    limit: float,
    mode: str,
    sampled: ForwardSettings,
    trained: ForwardSettings,
    explanation: str,
) -> RatioGateError:
    """The error with the gap per step and every setting that differs."""
    gaps = "  ".join(f"{step}: {gap:.2e}" for step, gap in enumerate(per_step.tolist()) if gap > 0)
    there, here = asdict(sampled), asdict(trained)
    differing = [
        f"  {name}: rollout {there[name]}, training {here[name]}"
        for name in there
        if there[name] != here[name]
    ] or ["  none of batch size, dtype, guidance, attention backend and mode"]
    largest = float(per_step.max())
    lines = [
        f"ratio gate: rollout and training log-probs differ by up to {largest:.2e} (limit "
        f"{limit:.2e} with loss.old_log_prob = {mode}); stopped before the optimizer step",
        f"  largest gap per step: {gaps}",
        "settings that differ:",
        *differing,
        explanation,
    ]
    return RatioGateError("\n".join(lines))


def explain_gap(
    worst: tuple[float, Call, Item],
    drawn: Trajectories,
    conditions: Conditions,
    family: Family,
    network: nn.Module,
    *,
    limit: float,
    mode: str,
) -> str:
    """Re-run the state of the largest gap in the rollout's batch shape: is that the reason?"""
    largest, call, item = worst
    if largest <= limit:
        return f"this process measured {largest:.2e} at most; the gap is in another one's samples"
    plan = drawn.plan
    batch = next(batch for batch in drawn.batches if (item.prompt, item.state) in batch)
    drawn_children = [[c for c in plan.children[s] if (p, c) in drawn.log_prob] for p, s in batch]
    fan = Fan.of(batch, drawn_children)
    new = recompute_log_prob(fan, drawn, conditions, family, network)
    gaps = (drawn.recorded_log_prob(fan.edges) - new).abs().nan_to_num(nan=torch.inf)
    gap = float(gaps.max())
    shapes = f"batch of {len(batch)} states instead of {len(call.items)}"
    if gap <= limit:
        # Outside `rollout` the old log-probs are training's own already.
        other = "loss.old_log_prob = recompute"
        if mode != "rollout":
            other = f"loss.max_log_prob_gap above {largest:.2e}"
        return (
            f"the batch shape explains it: with the rollout's {shapes} the gap is {gap:.2e}; set "
            f"loss.micro_batch_size = rollout.batch_size, or {other}"
        )
    return (
        f"the batch shape does not explain it: with the rollout's {shapes} the gap is still "
        f"{gap:.2e}; the weights or the conditions changed between rollout and training"
    )
