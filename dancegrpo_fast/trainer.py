"""The training loop. Start reading at `Trainer.iteration`: sample, score, advantages, update."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import nvtx
import torch
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm import tqdm

from dancegrpo_fast import checkpoint
from dancegrpo_fast.advantages import (
    LeafAdvantages,
    RunningRewards,
    edge_advantages,
    leaf_advantages,
)
from dancegrpo_fast.batching import Update, build_updates, leaf_owners
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.data import Draws, PromptSet
from dancegrpo_fast.losses.gate import forward_settings
from dancegrpo_fast.models import Conditions, open_family
from dancegrpo_fast.models.embeddings import Embeddings, embeddings_folder
from dancegrpo_fast.networks import assemble, base_weights, check
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.parallel.stopping import NOW, SOON, Stopping
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.statistics import reward_metrics
from dancegrpo_fast.rewards import load_rewards
from dancegrpo_fast.rewards.scoring import check_whole_groups, waits
from dancegrpo_fast.roles import Role
from dancegrpo_fast.rollout import denoise, plan_iteration
from dancegrpo_fast.sampling import pool
from dancegrpo_fast.sampling.drawing import draw_part
from dancegrpo_fast.sampling.searching import SearchScoring, check_rewards, searches
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.trees.candidates import walk
from dancegrpo_fast.trees.timesteps import edge_weights
from dancegrpo_fast.trees.tree import TreePlan
from dancegrpo_fast.updating import Iteration, RewardUpdater, check_loss, make_updater

logger = logging.getLogger(__name__)


class Trainer:
    """One process of a run.

    Everything an iteration draws or decides is a function of (config, iteration number), so the
    trainer's only state is what a snapshot holds: weights, average, optimizers, reward history and
    `done`, the number of finished iterations.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.key = NoiseKey.from_seed(config.seed)
        self.prompts = PromptSet.of(config.data)
        self.draws = Draws(self.prompts, config.data, config.seed)
        self.reward_weights = np.array([reward.weight for reward in config.rewards])
        pool.check_frames(config)
        prompts, group_size = config.data.prompts_per_iteration, config.rollout.group_size
        try:
            spread = config.parallel.groups == "spread"
            self.owner = leaf_owners(prompts, group_size, world.data_size, spread=spread)
            self.family = open_family(config.model, world.device)
            walk(config.rollout, plan_iteration(config, self.family.grid, 0), self.owner)
            check(config, self.family, world)
            if self.family.needs_image:
                self.prompts.need_images("data.prompts")
        except ValueError as error:  # The core's own words, before anything large is loaded.
            raise UserError(str(error)) from error
        limit = config.parallel.timeout_seconds if world.size > 1 else None
        self.rewards = load_rewards(config.rewards, world.device, timeout_seconds=limit)
        check_loss(config, self.family, self.rewards)
        check_rewards(config, self.rewards)
        self.embeddings = Embeddings(self.family, embeddings_folder(config), world)
        # A search asks for scores between its steps, so its samples have no parts.
        waiting = any(map(waits, self.rewards)) and not searches(config)
        self.chunks = pool.chunks(config.rollout, self.owner, waiting=waiting)
        self.scorer = pool.scorers_of(self.chunks, self.owner, world.sp)
        check_whole_groups(self.rewards, self.scorer)
        adapter_key = self.key.fold_in(Role.ADAPTER)
        self.policy, self.engine = assemble(config, self.family, world, adapter_key)
        self.updater = make_updater(
            config, self.family, self.policy, self.engine, world, self.rewards
        )
        self.stopping = Stopping(world, config.checkpoint.grace_seconds)
        self.saver = checkpoint.Saver(self.snapshots, config.checkpoint, world)
        self.running = RunningRewards(config.advantage.running_window)
        self.searching: SearchScoring | None = None  # Of an iteration that searches.
        self.done = 0
        self.seconds: dict[str, float] = {}
        self.current = ""  # Stage that is running: tells an interrupted run what it may save.
        self.clip: tuple[str, torch.Tensor] | None = None  # The last (prompt, sample) to look at.

    def iteration(self) -> dict[str, float]:
        """Sample, score, advantages, update; returns metrics that are equal on every rank."""
        plan = self.plan(self.done)
        batch = self.draws.batch(self.done)
        prompts = [prompt for _, prompt in batch]

        with self.stage("sample"):
            conditions = self.embeddings.conditions(prompts)
        drawn, rewards = self.sample_and_score(plan, conditions, prompts)
        advantages = leaf_advantages(
            rewards,
            self.reward_weights,
            self.config.advantage,
            prompts=[index for index, _ in batch],
            running=self.running,
        )
        with self.stage("update"):
            if drawn is None:
                drawn = self.redraw(plan, conditions, advantages)
            updates = self.schedule_updates(plan, rewards, advantages, conditions.kinds)
            metrics = self.update(updates, drawn, conditions, advantages, prompts)

        self.done += 1
        credited = self.edge_values(plan, rewards) if self.draws.epochs else None
        # Where edges are credited, samples may differ and those that are compared be equal.
        values = advantages.values if credited is None else credited
        silent = (advantages.valid.sum(axis=1) > 1) & ~values.any(axis=(1, 2))
        skipped = self.draws.finish(silent.tolist())
        names = [reward.name for reward in self.rewards]
        told = reward_metrics(rewards, self.reward_weights, names, advantages)
        if self.searching is not None:
            told = self.searching.metrics()  # Its groups are not the prompts.
        return told | metrics | skipped

    # ---- the stages of an iteration ------------------------------------------------------------

    def plan(self, iteration: int) -> TreePlan:
        """The tree of every prompt of an iteration."""
        return plan_iteration(self.config, self.family.grid, iteration)

    def sample_and_score(
        self, plan: TreePlan, conditions: Conditions, prompts: Sequence[Prompt]
    ) -> tuple[Trajectories | None, np.ndarray]:
        """Part by part, so that rewards which wait score one while the next is drawn.

        Returns what is kept for training (None with `rollout.redraw`), and the rewards.
        """
        kept: Trajectories | None = None
        self.clip = None
        kind: type[pool.Scores] = SearchScoring if searches(self.config) else pool.PartScoring
        with kind(
            prompts, self.scorer, self.rewards, self.family, self.config, self.world
        ) as self.scoring:
            self.searching = self.scoring if isinstance(self.scoring, SearchScoring) else None
            for owner in self.chunks:
                with self.stage("sample"):
                    drawn = self.sample(plan, conditions, owner)
                if self.searching is not None:
                    self.searching.book(self.seconds)
                if not self.config.rollout.redraw:
                    kept = drawn if kept is None else kept.joined(drawn)
                if owner is not self.chunks[-1]:
                    with self.stage("score"):
                        self.hand_over(drawn)
                    del drawn  # Its latents must not live beside the next part's.
            with self.stage("score"):
                rewards = self.score(drawn, prompts)
        return kept, rewards

    def sample(
        self,
        plan: TreePlan,
        conditions: Conditions,
        owner: np.ndarray | None = None,
        *,
        again: bool = False,
    ) -> Trajectories:
        """Draw this rank's part of the trees.

        Args:
            plan: The tree of every prompt.
            conditions: Of the prompts.
            owner: [P, G] rank that draws each sample, -1 if none does; None: all are drawn.
            again: For training, after `rollout.redraw` let go of them.
        """
        rollout, normalises = self.config.rollout, self.config.loss.ratio_norm
        keep: Literal["all", "samples", "training"] = "all"
        if rollout.redraw:
            keep = "training" if again else "samples"
        self.sampled_with = forward_settings(
            self.family, self.policy, batch_size=rollout.batch_size
        )
        with self.updater.sampling(), pool.arithmetic(self.family, rollout, keep):
            return draw_part(
                self.config,
                self.family,
                self.engine,
                self.world,
                plan,
                conditions,
                self.owner if owner is None else owner,
                key=self.key.fold_in(Role.LATENTS).fold_in(self.done),
                searching=self.searching,
                keep=keep,
                keep_outputs=normalises and self.updater.mode == "rollout" and keep != "samples",
                keep_graphs=self.config.loss.reuse_forwards and keep != "samples",
                bar=lambda count: self.bar("sample", count),
                # Drawing again is part of the update phase, which is finished if time allows.
                at_step=lambda: self.stopping.ask(until=NOW if again else SOON),
            )

    def redraw(
        self, plan: TreePlan, conditions: Conditions, advantages: LeafAdvantages
    ) -> Trajectories:
        """What training reads of the samples it trains on, drawn again from their noise."""
        _, owner = pool.selection(self.config, self.owner, advantages)
        return self.sample(plan, conditions, owner, again=True)

    def hand_over(self, drawn: Trajectories) -> None:
        """Decode samples that are new, and score them or have it begun."""
        self.stopping.ask(until=SOON)
        with self.bar("score", self.scoring.due(drawn)) as bar, self.family.vae():
            self.scoring.add(drawn, bar.update)

    def score(self, drawn: Trajectories, prompts: Sequence[Prompt]) -> np.ndarray:
        """Decode and score this rank's last samples; returns every rank's rewards [P, G, R]."""
        self.hand_over(drawn)
        rewards, self.clip = self.scoring.gathered()
        for _ in range(2):  # The first is answered by the second, before an update phase begins.
            self.stopping.ask(until=SOON)
        if failure := self.scoring.failure(rewards, self.done):
            self.save()
            self.saver.finish()  # Every rank holds the same rewards: all of them come here.
            raise UserError(failure)
        return rewards

    def draw(
        self, modules: Mapping[str, nn.Module], prompts: Sequence[Prompt], latents: Tensor
    ) -> Tensor:
        """Pixels [B, F, 3, H, W] in [0, 1] drawn deterministically from initial noise."""
        rollout = self.config.rollout
        samples = denoise(
            self.family,
            modules,
            self.family.grid.schedule(rollout),
            rollout.dynamics,
            self.embeddings.alone(prompts),
            latents,
        )
        return self.family.decode(samples)

    def edge_values(self, plan: TreePlan, rewards: np.ndarray) -> np.ndarray | None:
        """[P, states, C] advantages where a rule credits edges; None where samples have them."""
        rule = self.config.advantage
        if rule.credit == "leaf":
            return None
        return edge_advantages(plan, rewards, self.reward_weights, rule)[0]

    def schedule_updates(
        self,
        plan: TreePlan,
        rewards: np.ndarray,
        advantages: LeafAdvantages,
        kinds: Sequence[int] | None = None,
    ) -> list[Update]:
        """Which states this rank trains in which micro-batch of which update."""
        config = self.config
        if isinstance(self.updater, RewardUpdater):
            return self.updater.schedule(plan, advantages.valid, self.owner, kinds)
        plan = self.updater.trained(plan)
        selected, owner = pool.selection(config, self.owner, advantages)
        return build_updates(
            plan,
            advantages,
            selected,
            key=self.key.fold_in(Role.SELECTION).fold_in(self.done),
            modules=self.family.grid.module_names(plan.schedule),
            rank=self.world.data_rank,
            world_size=self.world.data_size,
            owner=owner,
            updates=config.loss.updates,
            timestep_fraction=config.loss.timestep_fraction,
            timesteps=config.loss.timesteps,
            timestep_scope=config.loss.timestep_scope,
            micro_batch_size=config.loss.micro_batch_size,
            edge_values=self.edge_values(plan, rewards),
            edge_weights=edge_weights(plan, self.family.grid.schedule(config.rollout), config),
            kinds=kinds,
        )

    def update(
        self,
        updates: list[Update],
        drawn: Trajectories,
        conditions: Conditions,
        advantages: LeafAdvantages,
        prompts: Sequence[Prompt],
    ) -> dict[str, float]:
        """Run the update schedule."""
        with self.bar("update", sum(len(update.calls) for update in updates)) as bar:

            def after_call(count: int) -> None:
                bar.update(count)
                self.stopping.ask(until=NOW)  # A begun update phase is finished if time allows.

            given = Iteration(
                self.done, prompts, conditions, drawn, advantages.weights, self.sampled_with
            )
            return self.updater.run(updates, given, after_call)

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """Inside, the networks are the base's."""
        if not self.done:
            yield
        elif self.config.policy.train == "lora":
            with self.policy.reference():
                yield
        else:
            with self.policy.replaced(base_weights(self.family, self.policy)):
                yield

    # ---- bookkeeping ---------------------------------------------------------------------------

    @property
    def snapshots(self) -> Path:
        """Folder of the run's snapshots."""
        return Path(self.config.output) / "snapshots"

    def saved_iterations(self) -> list[int]:
        """Iterations of the snapshots there are, damaged or not, in order."""
        folders = self.snapshots.glob(checkpoint.PATTERN)
        return sorted(int(folder.name.removeprefix("iteration-")) for folder in folders)

    @staticmethod
    def has_snapshots(config: RunConfig) -> bool:
        """Whether the run's folder holds any."""
        return any((Path(config.output) / "snapshots").glob(checkpoint.PATTERN))

    def save(self) -> None:
        """Begin to write a snapshot of the last finished iteration; `saver.finish` waits for it."""
        tensors = checkpoint.collect(self.policy, self.engine.optimizers)
        extra = {
            "ema_updates": self.policy.ema_updates,
            "updater": self.updater.state(),
            "seconds": self.seconds,
            "running": {str(p): h.tolist() for p, h in self.running.history.items()},
            "draws": self.draws.state,
        }
        self.saver.save(checkpoint.Snapshot(self.done, tensors, extra))

    def resume(self, named: Path | None = None) -> bool:
        """Continue from a snapshot, or the newest undamaged one; False if there is none."""
        tensors = checkpoint.collect(self.policy, self.engine.optimizers)
        snapshot: checkpoint.Snapshot | None
        if named is not None:
            snapshot = checkpoint.load_one(named, tensors, self.world)
        else:
            snapshot = checkpoint.load(self.snapshots, tensors, self.world)
        if snapshot is None:
            return False
        self.done = snapshot.iteration
        if named is None:
            self.saver.newest = self.done
        self.policy.ema_updates = snapshot.extra["ema_updates"]
        self.updater.restore(snapshot.extra["updater"])
        self.seconds = snapshot.extra["seconds"]
        self.draws.state = snapshot.extra.get("draws", self.draws.state)  # Older ones have none.
        running = snapshot.extra["running"]  # Lists are empty where all samples failed.
        self.running.history = {int(p): np.array(h, np.float64) for p, h in running.items() if h}
        return True

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add to the run's seconds of a stage, and say which one is running."""
        start = time.perf_counter()
        self.current = name  # Left standing by an exception: an interrupted run asks for it.
        with nvtx.annotate(f"dancegrpo_fast.{name}"), record_function(f"dancegrpo_fast.{name}"):
            yield
        self.current = ""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.spend(name, start)

    def spend(self, name: str, started: float) -> None:
        """Add the time since `started` (of `time.perf_counter`) to the run's seconds of a stage."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def bar(self, name: str, total: int) -> tqdm:
        """A progress bar with ETA inside an iteration: on the main process, on a terminal."""
        hidden = None if self.world.is_main else True
        return tqdm(total=total, desc=f"  {name}", position=1, leave=False, disable=hidden)
