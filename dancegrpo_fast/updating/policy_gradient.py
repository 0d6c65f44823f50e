"""The update phase of the policy gradient: micro-batches, the ratio gate, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dancegrpo_fast.batching import Call, Update
from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.losses.gate import (
    RatioGate,
    RatioGateError,
    explain_gap,
    forward_settings,
    gap_limit,
    gap_report,
)
from dancegrpo_fast.losses.policy_gradient import policy_gradient_loss, recompute
from dancegrpo_fast.losses.step_ratios import StepRatios
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.models.precision import check_float8
from dancegrpo_fast.ops import POLICY_METRICS
from dancegrpo_fast.parallel.engine import Engine
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.rewards import Reward
from dancegrpo_fast.trajectories import Fan, Trajectories
from dancegrpo_fast.updating.stepping import Iteration, Stepping


class Updater(Stepping):
    """Turns an update schedule into optimizer steps of the policy gradient."""

    def __init__(
        self, config: RunConfig, family: Family, policy: Policy, engine: Engine, world: World
    ) -> None:
        super().__init__(config, family, policy, engine, world)
        self.mode = old_log_prob_mode(config)

    @classmethod
    def check(cls, config: RunConfig, family: Family, rewards: Sequence[Reward]) -> None:
        """See `Stepping.check`."""
        if config.rollout.pool_dtype == "float8_e4m3":
            check_float8(family)

    def run(
        self,
        updates: list[Update],
        given: Iteration,
        progress: Callable[[int], object] = lambda count: None,
    ) -> dict[str, float]:
        """See `Stepping.run`; the ratio gate stands before the first optimizer step."""
        drawn, conditions = given.drawn, given.conditions
        reuse, scheduled = self.config.loss.reuse_forwards, sum(len(u.calls) for u in updates)
        updates, kept = self._forwards(updates, drawn)
        gate = RatioGate(drawn.plan.schedule.steps, self.world.device)
        old, outputs = self._old_policy(updates, drawn, conditions, gate)
        totals = torch.zeros(len(POLICY_METRICS), dtype=torch.float64, device=self.world.device)
        metrics: dict[str, float] = {}
        norms: list[float] = []
        loss = self.config.loss.model_copy(update={"kl_weight": self.kl_weight})
        ratios = StepRatios(drawn.plan.schedule.steps, loss.clip_range, self.world.device)
        for position, update in enumerate(updates):
            for number, call in enumerate(update.calls):
                # Gradients of reused forwards are summed below, none in a backward.
                last = not reuse and self.last(update, number)
                with self.engine.call(call.module, last) as module:
                    result = policy_gradient_loss(
                        call, drawn, conditions, self.family, self.policy, module,
                        loss,
                        divisor=update.divisor,
                        reward_weights=given.reward_weights,
                        old_log_prob=old[position][number],
                        old_output=outputs[position][number],
                        output=kept[position][number],
                    )  # fmt: skip
                    self.engine.backward(call.module, result.loss)
                if self.world.speaks:
                    totals += result.metrics
                    ratios.record(call, drawn, result.log_prob, old[position][number])
                if position == 0:
                    gate.record(call, drawn, result.log_prob)
                if number < scheduled:
                    progress(1)
            if reuse:
                # Ranks differ in their forwards; what they ask each other, they ask equally often.
                for _ in range(scheduled - len(update.calls)):
                    progress(1)
                for name in update.modules:
                    self.engine.sum_gradients(name)
            if position == 0:
                metrics |= self._pass_gate(gate, given)
            norms += self._step(update)
        self.world.all_reduce(totals, "sum")
        means = _means(totals, loss.ratio_norm)
        if self.mode != "on_policy" and not loss.ratio_norm:  # Where 1, and another ratio's.
            means |= ratios.metrics(self.world.all_reduce)
        return metrics | self.step_metrics(norms) | means | self.steer(means["policy/kl"])

    def _forwards(
        self, updates: list[Update], drawn: Trajectories
    ) -> tuple[list[Update], list[list[Tensor | None]]]:
        """The updates as they are run, and of each call the output there is already."""
        if not self.config.loss.reuse_forwards:
            return updates, [[None] * len(update.calls) for update in updates]
        assert len(updates) == 1, "the weights change with the first update"
        update, outputs = reused(updates[0], drawn)
        return [update], [outputs]

    def _old_policy(
        self, updates: list[Update], drawn: Trajectories, conditions: Conditions, gate: RatioGate
    ) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
        """Old log-probs of every call, and with `ratio_norm` the model outputs behind them.

        The rollout's, recomputed now, or None for on-policy.
        """

        def of_call(position: int, module: str, fan: Fan) -> tuple[Tensor | None, Tensor | None]:
            if self.mode == "rollout":
                old = drawn.recorded_log_prob(fan.edges)
                return old, drawn.recorded_output(fan.places) if normalise else None
            if self.mode == "recompute" and position > 0:
                now = recompute(fan, drawn, conditions, self.family, networks[module])
                return now.log_prob, now.output if normalise else None
            return None, None

        normalise = self.config.loss.ratio_norm
        log_probs: list[list[Tensor | None]] = []
        outputs: list[list[Tensor | None]] = []
        with self.engine.by_forward() as networks:
            for position, update in enumerate(updates):
                rows = [of_call(position, c.module, Fan.of_call(c)) for c in update.calls]
                log_probs.append([values for values, _ in rows])
                outputs.append([output for _, output in rows])
                for call, values in zip(update.calls, log_probs[-1], strict=True):
                    if self.mode == "recompute" and values is not None:
                        gate.record(call, drawn, values)
        return log_probs, outputs

    def _pass_gate(self, gate: RatioGate, given: Iteration) -> dict[str, float]:
        """Stop, on every rank, if training does not see the rollout's log-probs."""
        limit = gap_limit(self.config.loss, self.mode)
        largest, mean = gate.reduce(self.world.all_reduce)
        if self.config.loss.reuse_forwards:
            # Both log-probs are of one forward: no gap says that rows fit, not that forwards agree.
            if float(largest.max()) > limit:
                raise RatioGateError(
                    f"ratio gate: log-probs of one forward differ by {float(largest.max()):.2e}: "
                    "latents or coefficients changed between rollout and training"
                )
            return {"gate/applies": 0.0}
        if float(largest.max()) > limit:
            worst = gate.worst()
            with self.engine.gathered() as networks:
                # Each rank looks at its own worst state, but all ranks gather every network.
                for name, network in networks.items():
                    if name == worst[1].module:
                        explanation = explain_gap(
                            worst, given.drawn, given.conditions, self.family, network,
                            limit=limit, mode=self.mode,
                        )  # fmt: skip
            size = self.config.loss.micro_batch_size
            now = forward_settings(self.family, self.policy, batch_size=size)
            raise gap_report(largest, limit, self.mode, given.sampled_with, now, explanation)
        return {"gate/max_gap": float(largest.max()), "gate/mean_gap": float(mean.max())}


def reused(update: Update, drawn: Trajectories) -> tuple[Update, list[Tensor | None]]:
    """An update whose calls are the rollout's forwards, with the outputs of their states.

    The gradient of the sum over all calls is that of the schedule's: each trained state stands in
    one call, with its advantages and weights. Calls of zero weight are left out, nothing is
    exchanged in a backward. A state that two parts of the rollout drew is trained in the first.
    Rows without a trained edge get a gradient of zero; where one of them is not finite (0 x NaN is
    NaN) the trained rows are evaluated anew.

    Args:
        update: As scheduled.
        drawn: Its `graphs` are taken out: those of states that are not trained end here.

    Returns:
        The update, in canonical order of each call's first state; and of every call the output
        [states, C, F, H, W] with its graph, or None.
    """
    due = {
        (item.prompt, item.state): (call.module, item)
        for call in update.calls
        for item in call.items
        if item.weights.any()
    }
    graphs, drawn.graphs = drawn.graphs, []
    finite = torch.tensor([])
    if graphs:
        finite = torch.stack([output.detach().isfinite().all() for _, output in graphs])
    found: list[tuple[Call, Tensor | None]] = []
    for (places, output), usable in zip(graphs, finite.tolist(), strict=True):
        rows = [row for row, place in enumerate(places) if place in due]
        if not rows:
            continue
        named = [due.pop(places[row]) for row in rows]
        call = Call(named[0][0], tuple(item for _, item in named))
        if len(rows) == len(places):
            found.append((call, output))
        else:
            found.append((call, output[rows] if usable else None))
    assert not due, f"no forward of the rollout holds the states {sorted(due)}"
    found.sort(key=lambda pair: (pair[0].items[0].prompt, pair[0].items[0].state))
    calls = tuple(call for call, _ in found)
    return replace(update, calls=calls), [output for _, output in found]


def old_log_prob_mode(config: RunConfig) -> str:
    """`loss.old_log_prob` with `auto` resolved."""
    mode = config.loss.old_log_prob
    if mode == "auto":
        return "on_policy" if config.loss.updates == 1 else "recompute"
    return mode


def _means(totals: Tensor, ratio_norm: bool) -> dict[str, float]:
    """Means over trained transitions of the additive sums that `policy_loss` returns.

    What enters with a weight, the number of samples that share a transition, is a mean over those
    samples, as in the loss: a steered KL must not depend on how much of a tree is shared.
    """
    sums = dict(zip(POLICY_METRICS, totals.tolist(), strict=True))
    count, weight = max(sums.pop("children"), 1.0), sums["weight"] or 1.0
    if not ratio_norm:
        del sums["old_distance"]  # Without an old output it is always 0.
    weighted = ("policy", "kl", "old_distance")
    return {
        f"policy/{name}": value / (weight if name in weighted else count)
        for name, value in sums.items()
    }
