"""What all kinds of loss share in their update phase: optimizer steps, and the weight of the KL."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dancegrpo_fast.batching import Update
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.losses.gate import ForwardSettings
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.parallel.engine import Engine
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import Reward
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.trees.tree import TreePlan

logger = logging.getLogger(__name__)
MAX_SKIPPED = 3  # Updates in a row without a finite gradient before the run gives up.


@dataclass(frozen=True)
class Iteration:
    """What an update phase is told of its iteration.

    Attributes:
        number: Counted from 0.
        prompts: P prompts.
        conditions: Theirs.
        drawn: What this rank drew.
        reward_weights: [C] of the separately clipped objectives.
        sampled_with: The settings of the rollout's forwards.
    """

    number: int
    prompts: Sequence[Prompt]
    conditions: Conditions
    drawn: Trajectories
    reward_weights: np.ndarray
    sampled_with: ForwardSettings


class Stepping(ABC):
    """What all kinds of loss share: optimizer steps, and the weight of the KL.

    Attributes:
        skipped: Updates in a row that had no finite gradient.
        skipped_total: All such updates of the run.
        kl_weight: The weight of the KL now.
        kl_average: With `loss.kl_target`: the smoothed KL; None before the first iteration.
        mode: Where the rollout's log-probs come from; empty for losses without them.
    """

    mode = ""

    def __init__(
        self, config: RunConfig, family: Family, policy: Policy, engine: Engine, world: World
    ) -> None:
        self.config, self.family, self.policy = config, family, policy
        self.engine, self.world = engine, world
        self.skipped = self.skipped_total = 0
        self.kl_weight = config.loss.kl_weight
        self.kl_average: float | None = None

    @classmethod
    def check(cls, config: RunConfig, family: Family, rewards: Sequence[Reward]) -> None:
        """Refuse a model or rewards that this kind of loss cannot train.

        Args:
            config: The recipe.
            family: Opened, not loaded.
            rewards: The recipe's, in order.

        Raises:
            UserError: One does not fit.
        """
        return  # Ratios train whatever a family draws, and need scores alone.

    @abstractmethod
    def run(
        self,
        updates: list[Update],
        given: Iteration,
        progress: Callable[[int], object] = lambda count: None,
    ) -> dict[str, float]:
        """Run every update of this rank's schedule; returns metrics.

        Args:
            updates: The update schedule of this rank.
            given: The iteration.
            progress: Called with 1 after each call.
        """

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the networks hold the weights that the loss wants samples of."""
        yield

    def trained(self, plan: TreePlan) -> TreePlan:
        """The plan as the update schedule reads it: which edges are trained."""
        return plan

    def state(self) -> dict[str, Any]:
        """What a snapshot holds of this, as JSON."""
        state = {"skipped": self.skipped, "skipped_total": self.skipped_total}
        if self.config.loss.kl_target is None:
            return state  # A resumed run may begin to steer, or have another weight.
        return state | {"kl_weight": self.kl_weight, "kl_average": self.kl_average}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.skipped, self.skipped_total = state["skipped"], state["skipped_total"]
        if self.config.loss.kl_target is not None and "kl_weight" in state:
            self.kl_weight, self.kl_average = state["kl_weight"], state["kl_average"]

    def steer(self, kl: float) -> dict[str, float]:
        """Move the KL's weight after an iteration whose mean KL was `kl`; returns metrics.

            average <- (1 - smoothing) average + smoothing kl
            weight  <- weight exp((average / target - 1) / horizon), within its range

        Source: Pref-GRPO's public trainers of Wan.
        """
        loss = self.config.loss
        if loss.kl_target is None:
            return {}
        if not math.isfinite(kl):
            return {"update/kl_weight": self.kl_weight}  # Of an update that was skipped.
        if self.kl_average is None:
            self.kl_average = kl
        self.kl_average += loss.kl_smoothing * (kl - self.kl_average)
        # Cut before the exponential: a KL far beyond its target must not overflow it.
        change = min((self.kl_average / loss.kl_target - 1) / loss.kl_horizon, 50.0)
        low, high = loss.kl_range
        self.kl_weight = min(max(self.kl_weight * math.exp(change), low), high)
        return {"update/kl_weight": self.kl_weight}

    def last(self, update: Update, number: int) -> bool:
        """Whether the call at a position is its network's last of the update."""
        following = update.calls[number + 1 :]
        return not any(later.module == update.calls[number].module for later in following)

    def step_metrics(self, norms: Sequence[float]) -> dict[str, float]:
        """Of the iteration's optimizer steps."""
        return {
            "update/grad_norm": float(np.mean(norms)) if norms else 0.0,
            "update/skipped": float(self.skipped),
            "update/skipped_total": float(self.skipped_total),
        }

    def _step(self, update: Update) -> list[float]:
        """Clip and step every trained module unless a gradient is not finite; returns norms."""
        norms = [self.engine.clip_grad_norm(name) for name in update.modules]
        if np.isfinite(norms).all():
            self.skipped = 0
            for name in update.modules:
                self.engine.step(name)
            if update.modules:
                self.policy.update_ema()
        else:
            # The norms are those of the summed gradients: every rank takes this branch together.
            self.skipped += 1
            self.skipped_total += 1
            if self.world.is_main:
                logger.warning("gradient norm %s is not finite: update skipped", norms)
            if self.skipped >= MAX_SKIPPED:
                raise UserError(
                    f"optimizer.learning_rate = {self.config.optimizer.learning_rate}: "
                    f"{MAX_SKIPPED} updates in a row had no finite gradient; lower the learning "
                    "rate or optimizer.max_grad_norm, and resume from the last snapshot"
                )
        for name in update.modules:
            self.engine.clear(name)
        return norms
