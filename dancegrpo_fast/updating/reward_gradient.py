"""The update phase of ReFL and DRaFT: gradients of the rewards themselves.

Samples are drawn and scored as for every loss. Here the differentiable rewards are asked again,
with gradients, and the gradient goes back through the steps that the plan marks as trained. There
is no ratio, so nothing that the ratio gate could compare: the metric `gate/applies` is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.batching import Call, Item, Update, micro_batches
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.losses.reward_gradient import reward_gradient, step_loss
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import REWARDS, Reward, Samples, placed
from dancegrpo_fast.trajectories import Place, Trajectories
from dancegrpo_fast.trees.tree import TreePlan
from dancegrpo_fast.updating.stepping import Iteration, Stepping


class RewardUpdater(Stepping):
    """Update phase of a loss that differentiates rewards."""

    @classmethod
    def check(cls, config: RunConfig, family: Family, rewards: Sequence[Reward]) -> None:
        """See `Stepping.check`: rewards of non-zero weight need a gradient."""
        for index, (reward, given) in enumerate(zip(rewards, config.rewards, strict=True)):
            able = getattr(reward, "differentiable", False) and hasattr(reward, "gradient_scores")
            if given.weight and not able:
                raise UserError(
                    f"rewards.{index}.name = {given.name!r}: has no gradient with respect to "
                    f"pixels as it is set up, and loss.kind = {config.loss.kind!r} needs one; "
                    f"of ours {', '.join(differentiable_names())} have one (without threshold and "
                    "win_rate); a class of your own sets differentiable and gradient_scores"
                )

    def use(self, rewards: Sequence[Reward]) -> None:
        """The recipe's rewards, in order."""
        pairs = zip(rewards, self.config.rewards, strict=True)
        self.rewards: list[tuple[Any, float]] = [(r, c.weight) for r, c in pairs if c.weight]

    def schedule(
        self,
        plan: TreePlan,
        valid: np.ndarray,
        owner: np.ndarray,
        kinds: Sequence[int] | None = None,
    ) -> list[Update]:
        """The one update of an iteration, as this rank runs it; see `chain_update`."""
        return chain_update(
            plan,
            valid,
            owner=owner,
            rank=self.world.data_rank,
            modules=self.family.grid.module_names(plan.schedule),
            kinds=kinds or [0] * len(owner),
            micro_batch_size=self.config.loss.micro_batch_size,
        )

    def run(
        self,
        updates: list[Update],
        given: Iteration,
        progress: Callable[[int], object] = lambda count: None,
    ) -> dict[str, float]:
        """See `Stepping.run`; the one update of `chain_update`."""
        drawn = given.drawn
        (update,) = updates
        losses = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        gradients = self._at_samples(update, drawn, given.prompts, losses)
        first = min(drawn.plan.states[i.state].step for c in update.calls for i in c.items)
        for number, call in enumerate(update.calls):
            at_first = drawn.plan.states[call.items[0].state].step == first
            with self.engine.call(call.module, self.last(update, number)) as module:
                loss, latents = step_loss(
                    call, drawn, given.conditions, self.family, module, gradients, first=at_first
                )
                self.engine.backward(call.module, loss)
            if latents is not None:
                assert latents.grad is not None
                for item, gradient in zip(call.items, latents.grad, strict=True):
                    if item.weights[0]:
                        gradients[item.prompt, item.state] = gradient
            progress(1)
        norms = self._step(update)
        self.world.all_reduce(losses, "sum")
        total, count = losses.tolist()
        kind = self.config.loss.kind
        steps = drawn.plan.schedule.steps
        return {
            "gate/applies": 0.0,
            f"{kind}/loss": total / max(count, 1.0),
            f"{kind}/first_step": float(first),
            f"{kind}/steps": float(steps - first),
        } | self.step_metrics(norms)

    def _at_samples(
        self, update: Update, drawn: Trajectories, prompts: Sequence[Prompt], losses: Tensor
    ) -> dict[Place, Tensor]:
        """By leaf state, the gradient of the update's loss; adds [sum, count] to `losses`."""
        leaf_step = drawn.plan.schedule.steps - 1
        leaves = [
            (item.prompt, item.children[0])
            for call in update.calls
            for item in call.items
            if item.weights[0] and drawn.plan.states[item.state].step == leaf_step
        ]
        found: dict[Place, Tensor] = {}
        size = self.config.loss.micro_batch_size
        with placed([r for r, _ in self.rewards], self.world.device), self.family.vae() as vae:
            for start in range(0, len(leaves), size):
                part = leaves[start : start + size]
                given = [prompts[p] for p, _ in part]
                result = reward_gradient(
                    drawn.stack(part), self.family, vae, partial(self._score, prompts=given),
                    limit=self.config.loss.reward_limit,
                )  # fmt: skip
                found |= dict(zip(part, result.gradient / update.divisor, strict=True))
                if self.world.speaks:
                    losses[0] += result.loss.double().sum()
                    losses[1] += len(part)
        return found

    def _score(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Weighted rewards [n] of pixels [n, F, 3, H, W], differentiable."""
        samples = Samples(
            pixels,
            [prompt.text for prompt in prompts],
            self.config.model.fps,
            [prompt.metadata for prompt in prompts],
        )
        return torch.stack([r.gradient_scores(samples) * w for r, w in self.rewards]).sum(0)


def differentiable_names() -> list[str]:
    """Our rewards that have a gradient."""
    return [name for name, row in REWARDS.items() if getattr(row.load(), "differentiable", False)]


def chain_update(
    plan: TreePlan,
    valid: np.ndarray,
    *,
    owner: np.ndarray,
    rank: int,
    modules: Sequence[str],
    kinds: Sequence[int],
    micro_batch_size: int,
) -> list[Update]:
    """The one update of an iteration, as a rank runs it: the plan's trained steps, last one first.

    Every rank makes the same number of calls at each step; one with fewer samples repeats its first
    with weight 0.

    Args:
        plan: Chains; trained edges are those of the last steps.
        valid: [P, G] bool, samples whose rewards are numbers; the others have weight 0.
        owner: [P, G] rank of each sample.
        rank: This process.
        modules: [steps] name of the network of each step.
        kinds: [P] prompts of unequal kinds (text lengths) never share a micro-batch.
        micro_batch_size: States per forward and backward.
    """

    def batches_of(some_rank: int) -> list[list[tuple[int, int]]]:
        own = [(int(p), int(g)) for p, g in np.argwhere(owner == some_rank)]
        chosen = [leaf for leaf in own if valid[leaf]] or own[:1]
        return micro_batches(chosen, micro_batch_size, lambda leaf: kinds[leaf[0]])

    def item(leaf: tuple[int, int], step: int, weight: float) -> Item:
        p, g = leaf
        state, child = plan.ancestry(plan.leaves[g])[step : step + 2]
        return Item(p, state, (child,), np.zeros((1, 1, 2)), np.array([weight]))

    most = max(len(batches_of(int(r))) for r in np.unique(owner))
    own = batches_of(rank)
    first = min(plan.states[s.parent].step for s in plan.states if s.trained)
    calls = []
    for step in reversed(range(first, plan.schedule.steps)):
        rows = [[item(leaf, step, float(valid[leaf])) for leaf in batch] for batch in own]
        rows += [[item(own[0][0], step, 0.0)]] * (most - len(own))
        calls += [Call(modules[step], tuple(row)) for row in rows]
    names = tuple(dict.fromkeys(modules[first:])) if valid.any() else ()
    return [Update(tuple(calls), float(max(valid.sum(), 1)), names)]
