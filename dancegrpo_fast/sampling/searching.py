"""Training on greedy search (`rollout.tree.kind: search`): how one rank draws and scores it.

Every rank searches whole trees, so all make the same calls at the same time. A candidate's reward
is the value of its preview; the finished samples are what was searched for, no draws of the policy,
and only looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dancegrpo_fast.advantages import leaf_advantages
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.models import Conditions, Family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.report.statistics import reward_metrics
from dancegrpo_fast.rewards import Reward
from dancegrpo_fast.rewards.scoring import score_latents
from dancegrpo_fast.sampling.pool import Scores
from dancegrpo_fast.search import (
    Found,
    Sampler,
    SearchCost,
    SearchSettings,
    search,
    training_trees,
)
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.trees.tree import ROOT_STEP, TreePlan, path_key


def searches(config: RunConfig) -> bool:
    """Whether a recipe trains on a search."""
    return config.rollout.tree.kind == "search"


def check_rewards(config: RunConfig, rewards: Sequence[Reward]) -> None:
    """Refuse rewards that a search cannot choose by."""
    for index, reward in enumerate(rewards):
        if searches(config) and getattr(reward, "groupwise", False):
            raise UserError(
                f"rewards.{index}.name = {reward.name!r}: compares the samples of a prompt, so its "
                "values at different steps are no one scale and rollout.tree.kind = search cannot "
                "choose by them; use a reward of single samples, or another tree"
            )


class SearchScoring(Scores):
    """The scores of one iteration's searches: previews level by level, then finished samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # [P] first rank of a prompt's group.
        self._speaker = self.scorer[:, 0] // self.world.sp * self.world.sp
        self._clip: tuple[str, Tensor] | None = None
        self._seconds = 0.0

    def __exit__(self, *_: object) -> None:
        """Nothing goes on: `values` returns when all is scored."""

    def values(self, latents: Tensor, prompts: Sequence[int]) -> np.ndarray:
        """[n, R] scores of latents [n, C, F, H, W] of prompts, NaN where a reward failed.

        The ranks of a sequence-parallel group share the work and all get all: a reward need not
        return the same twice, and they must go on from the same candidate.
        """
        world = self.world
        if latents.is_cuda:
            torch.cuda.synchronize(latents.device)  # What is still being drawn is no scoring.
        started = time.perf_counter()
        parts = np.array_split(np.arange(len(latents)), world.sp)
        own = parts[world.rank % world.sp].tolist()
        asked = [self.prompts[prompts[i]] for i in own]
        found = score_latents(
            latents[own],
            [prompt.text for prompt in asked],
            self.family.decode,
            self.rewards,
            batch_size=self.config.rollout.batch_size,
            groups=[prompts[i] for i in own],
            metadata=[prompt.metadata for prompt in asked],
            fps=self.config.model.fps,
        )
        reasons = zip(self._reasons, found.reasons, strict=True)
        self._reasons = tuple(first or second for first, second in reasons)
        if asked:
            self._clip = asked[0].text, found.clip  # The last call's: a finished sample.
        values = found.values
        if world.sp > 1:
            rows = world.gather_rows(values, [len(part) for part in parts] * world.data_size)
            first = world.data_rank * world.sp
            values = torch.cat(rows[first : first + world.sp])
        self._seconds += time.perf_counter() - started
        return values.numpy()

    def take(self, found: Sequence[Found], previews: np.ndarray) -> None:
        """What this rank's searches found, prompt by prompt.

        Args:
            found: One for each trunk.
            previews: [P, G, R] of its prompts.
        """
        finished = np.stack([one.scores[one.ranked[0]] for one in found])
        finished = finished.reshape(len(previews), -1, previews.shape[2])
        self._own = np.concatenate([previews, finished], axis=1)
        self._samples = previews.shape[1]
        total = SearchCost.total([one.cost for one in found])
        trees = self.world.data_size  # Equal on all ranks: so are the trees.
        self._cost = SearchCost(
            total.evaluations * trees, total.previews * trees, total.reward_calls * trees
        )

    def book(self, seconds: dict[str, float]) -> None:
        """Count the time of the scores as such, and not as sampling, in which they were made."""
        seconds["sample"] -= self._seconds
        seconds["score"] = seconds.get("score", 0.0) + self._seconds

    def due(self, drawn: Trajectories) -> int:
        """None: candidates were scored while they were drawn."""
        return 0

    def add(self, drawn: Trajectories, progress: Callable[[int], object]) -> None:
        """Nothing is left to be scored."""

    def gathered(self) -> tuple[np.ndarray, tuple[str, Tensor] | None]:
        """Previews [P, G, R] of all ranks' candidates; a prompt and a finished sample of it."""
        count, columns = self._own.shape[1:]
        rows = torch.from_numpy(self._own.reshape(-1, columns)).float()
        table = np.repeat(self._speaker[:, None], count, axis=1)
        whole = self.world.gather_rewards(rows if self.world.speaks else rows[:0], table)
        self._previews, self._finished = whole[:, : self._samples], whole[:, self._samples :]
        return self._previews, self._clip

    def metrics(self) -> dict[str, float]:
        """Of the groups of candidates, what was found, and what it cost; equal on every rank.

        A group is the candidates of one state: previews of other steps are no measure of its
        spread. What was found is no draw of the policy, and has a name of its own.
        """
        config = self.config
        weights = np.array([reward.weight for reward in config.rewards])
        width, trunks = config.rollout.tree.branches or 0, config.rollout.tree.trunks
        prompts, _, rewards = self._previews.shape
        groups = self._previews.reshape(prompts, -1, width, trunks, rewards).swapaxes(2, 3)
        groups = groups.reshape(-1, width, rewards)
        names = [reward.name for reward in self.rewards]
        advantages = leaf_advantages(groups, weights, config.advantage)
        finished = self._finished.reshape(-1, len(weights)).astype(np.float64)
        total = finished[:, weights != 0] @ weights[weights != 0]
        columns = {"mean": total} | dict(zip(names, finished.T, strict=True))
        usable = {name: values[np.isfinite(values)] for name, values in columns.items()}
        means = {f"searched/{name}": float(v.mean()) for name, v in usable.items() if len(v)}
        return reward_metrics(groups, weights, names, advantages) | means | {
            "search/evaluations": float(self._cost.evaluations),
            "search/previews": float(self._cost.previews),
            "search/scored": float(self._cost.reward_calls),
        }  # fmt: skip


def draw_searches(
    config: RunConfig,
    family: Family,
    modules: Mapping[str, nn.Module],
    plan: TreePlan,
    conditions: Conditions,
    scoring: SearchScoring,
    *,
    key: NoiseKey,
    prompts: Sequence[int],
    forwards: Sequence[int] | None,
    before_step: Callable[[int], object],
) -> Trajectories:
    """Draw and score the searches of some prompts, side by side.

    Args:
        config: The recipe.
        family: Draws and decodes.
        modules: Networks by name.
        plan: Of the iteration (`candidates.trained`).
        conditions: Of all prompts.
        scoring: Takes the scores.
        key: Latent key of the iteration; the prompt's position is folded in here.
        prompts: Positions of this rank's.
        forwards: [steps] forwards that every rank makes at each step; None: as it needs.
        before_step: Called before each denoising step with the number of states it evaluates.
    """
    rollout, tree = config.rollout, config.rollout.tree
    assert tree.branches is not None
    sampler = Sampler(
        family, modules, plan.schedule, rollout.dynamics, rollout.noise_level, rollout.batch_size,
        final=rollout.final, exact_density=rollout.exact_density,
        latent_dtype=rollout.latent_dtype, forwards=forwards,
    )  # fmt: skip
    of = [p for p in prompts for _ in range(tree.trunks)]
    roots = [((ROOT_STEP, j),) if j else () for _ in prompts for j in range(tree.trunks)]
    trees = conditions.select(of)
    with family.vae():  # Brought once, for the previews of all levels.
        found = search(
            sampler,
            trees,
            [path_key(key.fold_in(p), root) for p, root in zip(of, roots, strict=True)],
            lambda latents, shown: scoring.values(latents, [of[t] for t in shown]),
            SearchSettings("greedy", tree.branches, tuple(tree.branch_steps)),
            weights=[reward.weight for reward in config.rewards],
            keep_going=True,
            before_step=before_step,
        )
    drawn, previews = training_trees(
        found, sampler, prompts=prompts, trunks=tree.trunks, kinds=trees.kinds,
        kl=config.loss.kl, device=family.device if rollout.offload else None,
    )  # fmt: skip
    scoring.take(found, previews)
    return drawn
