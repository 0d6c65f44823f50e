"""The update phase of losses of the forward process: DiffusionNFT and AWM.

There is no log-prob of the rollout, so nothing that the ratio gate could compare: the metric
`gate/applies` is 0. What must hold instead is that the networks see each (sample, noise level,
noise) equally in all forwards of an iteration, which the keys of the noise guarantee.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dancegrpo_fast.batching import Call, Update
from dancegrpo_fast.config import LossConfig, RunConfig, UserError
from dancegrpo_fast.losses.forward_process import (
    Noised,
    awm_call_loss,
    leaf_of_states,
    nft_call_loss,
    noised,
)
from dancegrpo_fast.models.family import Family, evaluate
from dancegrpo_fast.ops import NFT_METRICS, POLICY_METRICS, PolicyLoss
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.parallel.engine import Engine
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.rewards import Reward
from dancegrpo_fast.roles import Role
from dancegrpo_fast.trees.chains import trained_at
from dancegrpo_fast.trees.tree import TreePlan
from dancegrpo_fast.updating.policy_gradient import old_log_prob_mode
from dancegrpo_fast.updating.stepping import Iteration, Stepping


class Fixed(NamedTuple):
    """What the loss of a call compares with.

    Attributes:
        old_output: [B, C, F, H, W] of the old policy.
        old_log_prob: [B] at the iteration's start; None: on-policy.
        reference: [B, C, F, H, W] of the untrained model.
    """

    old_output: Tensor | None = None
    old_log_prob: Tensor | None = None
    reference: Tensor | None = None


class ForwardUpdater(Stepping):
    """Update phase of a loss on noised samples.

    Attributes:
        keeps_old: Whether the policy has a slow copy that the loss looks at.
    """

    keeps_old = True
    metric_names: tuple[str, ...]

    def __init__(
        self, config: RunConfig, family: Family, policy: Policy, engine: Engine, world: World
    ) -> None:
        super().__init__(config, family, policy, engine, world)
        self.key = NoiseKey.from_seed(config.seed).fold_in(Role.FORWARD)
        if self.keeps_old:
            policy.start_old()

    @classmethod
    def check(cls, config: RunConfig, family: Family, rewards: Sequence[Reward]) -> None:
        """See `Stepping.check`: only flow models."""
        prediction = family.grid.schedule(config.rollout).prediction
        if prediction != "flow_prediction":
            raise UserError(
                f"loss.kind = {config.loss.kind!r}: mixes samples with noise as flow models do, "
                f"and family {config.model.family} predicts {prediction}; use policy_gradient, "
                "refl or draft"
            )

    def trained(self, plan: TreePlan) -> TreePlan:
        """Every point of `loss.timestep_range`."""
        return trained_at(plan, self.config.loss.timestep_range)

    def run(
        self,
        updates: list[Update],
        given: Iteration,
        progress: Callable[[int], object] = lambda count: None,
    ) -> dict[str, float]:
        """See `Stepping.run`; afterwards the old policy follows."""
        self.drawn, self.conditions = given.drawn, given.conditions
        self.leaf_of = leaf_of_states(given.drawn.plan)
        self.noise_key = self.key.fold_in(given.number)
        self.reward_weights = torch.from_numpy(given.reward_weights).to(self.world.device)
        self.loss = self.config.loss.model_copy(update={"kl_weight": self.kl_weight})
        compared = self._before(updates)
        totals = torch.zeros(len(self.metric_names), dtype=torch.float64, device=self.world.device)
        norms: list[float] = []
        for position, update in enumerate(updates):
            for number, call in enumerate(update.calls):
                rows = self.rows(call)
                fixed = compared[position][number]._replace(reference=self._reference(call, rows))
                with self.engine.call(call.module, self.last(update, number)) as module:
                    output = self._output(module, rows)
                    loss, metrics = self.call_loss(output, rows, fixed, update.divisor)
                    self.engine.backward(call.module, loss)
                if self.world.speaks:
                    totals += metrics
                progress(1)
            norms += self._step(update)
        if self.keeps_old:
            self.policy.update_old(old_decay(self.config.loss, given.number))
        self.world.all_reduce(totals, "sum")
        means = self._means(totals)
        steered = self.steer(means[f"{self.config.loss.kind}/kl"])
        return {"gate/applies": 0.0} | self.step_metrics(norms) | means | steered

    @abstractmethod
    def call_loss(
        self, output: Tensor, rows: Noised, fixed: Fixed, divisor: float
    ) -> tuple[Tensor, Tensor]:
        """Loss and additive metrics of one call."""

    def rows(self, call: Call) -> Noised:
        """The noised samples of a call."""
        return noised(call, self.drawn, self.leaf_of, self.family, self.noise_key)

    def _before(self, updates: list[Update]) -> list[list[Fixed]]:
        """What the loss of every call compares with.

        Before the first step, in one go: the old weights are put in place once, and the log-probs
        of later updates are those of the iteration's start.
        """
        found = [[Fixed() for _ in update.calls] for update in updates]
        every = [(p, n, c) for p, update in enumerate(updates) for n, c in enumerate(update.calls)]
        if self.keeps_old:
            with torch.no_grad(), self.policy.as_old(), self.engine.by_forward() as networks:
                for position, number, call in every:
                    output = self._output(networks[call.module], self.rows(call))
                    found[position][number] = Fixed(old_output=output)
        if self.recomputes():
            with self.engine.by_forward() as networks:
                for position, number, call in every:
                    if position > 0:
                        log_prob = self.log_prob(call, networks[call.module])
                        before = found[position][number]
                        found[position][number] = before._replace(old_log_prob=log_prob)
        return found

    def recomputes(self) -> bool:
        """Whether later updates compare with log-probs of the iteration's start."""
        return False

    def log_prob(self, call: Call, module: nn.Module) -> Tensor:
        """[B] as of now."""
        raise NotImplementedError

    def _output(self, module: nn.Module, rows: Noised) -> Tensor:
        return evaluate(
            self.family, module, self.drawn.plan, self.conditions, rows.places, rows.latents
        )

    @torch.no_grad()
    def _reference(self, call: Call, rows: Noised) -> Tensor | None:
        if not self.kl_weight:
            return None
        with self.policy.reference() as untrained:
            return self._output(untrained[call.module], rows)

    def _means(self, totals: Tensor) -> dict[str, float]:
        """Means over the trained (sample, noise level) pairs."""
        count, *sums = totals.tolist()
        names = self.metric_names[1:]
        kind = self.config.loss.kind
        return {
            f"{kind}/{name}": value / max(count, 1.0)
            for name, value in zip(names, sums, strict=True)
        }


class NftUpdater(ForwardUpdater):
    """DiffusionNFT (arXiv 2509.16117): samples come from the old policy, which follows slowly."""

    metric_names = NFT_METRICS

    @contextmanager
    def sampling(self) -> Iterator[None]:
        with self.policy.as_old():
            yield

    def call_loss(
        self, output: Tensor, rows: Noised, fixed: Fixed, divisor: float
    ) -> tuple[Tensor, Tensor]:
        assert fixed.old_output is not None
        return nft_call_loss(
            output, rows, self.loss,
            old_output=fixed.old_output, reference_output=fixed.reference, divisor=divisor,
            advantage_clip=self.config.advantage.clip, action_box=self.family.action_box,
        )  # fmt: skip


class AwmUpdater(ForwardUpdater):
    """Advantage-weighted matching (arXiv 2509.25050): a ratio of matching errors."""

    metric_names = POLICY_METRICS

    def __init__(
        self, config: RunConfig, family: Family, policy: Policy, engine: Engine, world: World
    ) -> None:
        self.keeps_old = config.loss.old_weight > 0
        super().__init__(config, family, policy, engine, world)

    def recomputes(self) -> bool:
        return old_log_prob_mode(self.config) == "recompute"

    @torch.no_grad()
    def log_prob(self, call: Call, module: nn.Module) -> Tensor:
        rows = self.rows(call)
        output = self._output(module, rows)
        return self._loss(output, rows, Fixed(), 1.0, kl_weight=0.0, old_weight=0.0).log_prob

    def call_loss(
        self, output: Tensor, rows: Noised, fixed: Fixed, divisor: float
    ) -> tuple[Tensor, Tensor]:
        result = self._loss(output, rows, fixed, divisor)
        return result.loss, result.metrics

    def _loss(
        self,
        output: Tensor,
        rows: Noised,
        fixed: Fixed,
        divisor: float,
        **changes: float,
    ) -> PolicyLoss:
        return awm_call_loss(
            output, rows, self.loss.model_copy(update=changes),
            old_log_prob=fixed.old_log_prob, old_output=fixed.old_output,
            reference_output=fixed.reference, reward_weights=self.reward_weights, divisor=divisor,
            advantage_clip=self.config.advantage.clip, action_box=self.family.action_box,
        )  # fmt: skip


def old_decay(loss: LossConfig, iteration: int) -> float:
    """Share of itself that the old policy keeps after an iteration (counted from 0).

    DiffusionNFT's schedules are (rate, start, limit) = (any, any, 0), (0.001, 0, 0.5) and
    (0.0075, 75, 0.999); AWM's is (0.001, 0, 0.3). They count optimizer steps.
    """
    done = (iteration + 1) * loss.updates
    return min(max(done - loss.old_decay_start, 0) * loss.old_decay_rate, loss.old_decay_limit)
