"""The training loop. Start reading at `Trainer.iteration`: sample, score, advantages, update."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import nvtx
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dancegrpo_fast import checkpoint
from dancegrpo_fast.advantages import (
    LeafAdvantages,
    RunningRewards,
    best_and_worst,
    edge_advantages,
    leaf_advantages,
)
from dancegrpo_fast.batching import Update, build_updates, leaf_owners
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.losses.gate import forward_settings
from dancegrpo_fast.models import Conditions, open_family
from dancegrpo_fast.models.embeddings import Embeddings, embeddings_folder
from dancegrpo_fast.networks import assemble, base_weights, check
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.parallel.stopping import NOW, SOON, Stopping
from dancegrpo_fast.parallel.world import World, scorers
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import load_rewards
from dancegrpo_fast.rewards.scoring import check_whole_groups, score_latents
from dancegrpo_fast.roles import Role
from dancegrpo_fast.rollout import (
    denoise,
    draw_trees,
    forwards_per_step,
    held_states,
    plan_iteration,
)
from dancegrpo_fast.timesteps import edge_weights
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.tree import TreePlan
from dancegrpo_fast.updating import Updater

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
        self.prompts = PromptSet.load(config.data.prompts)
        self.rewards = load_rewards(config.rewards, world.device)
        self.reward_weights = np.array([reward.weight for reward in config.rewards])
        prompts, group_size = config.data.prompts_per_iteration, config.rollout.group_size
        try:
            spread = config.parallel.groups == "spread"
            self.owner = leaf_owners(prompts, group_size, world.data_size, spread=spread)
            self.family = open_family(config.model, world.device)
            plan_iteration(config, self.family.grid, 0)
            check(config, self.family, world)
            if self.family.needs_image:
                self.prompts.need_images("data.prompts")
        except ValueError as error:  # The core's own words, before anything large is loaded.
            raise UserError(str(error)) from error
        self.embeddings = Embeddings(self.family, embeddings_folder(config), world)
        self.scorer = scorers(self.owner, world.sp)
        check_whole_groups(self.rewards, self.scorer)
        adapter_key = self.key.fold_in(Role.ADAPTER)
        self.policy, self.engine = assemble(config, self.family, world, adapter_key)
        self.updater = Updater(config, self.family, self.policy, self.engine, world)
        self.stopping = Stopping(world, config.checkpoint.grace_seconds)
        self.saver = checkpoint.Saver(self.snapshots, config.checkpoint, world)
        self.running = RunningRewards(config.advantage.running_window)
        self.done = 0
        self.seconds: dict[str, float] = {}
        self.current = ""  # Stage that is running: tells an interrupted run what it may save.
        self.clip: tuple[str, torch.Tensor] | None = None  # The last (prompt, sample) to look at.

    def iteration(self) -> dict[str, float]:
        """Sample, score, advantages, update; returns metrics that are equal on every rank."""
        plan = self.plan(self.done)
        batch = self.prompts.batch(self.done, self.config.seed, len(self.owner))
        prompts = [prompt for _, prompt in batch]

        with self.stage("sample"):
            conditions = self.embeddings.conditions(prompts)
            drawn = self.sample(plan, conditions)
        with self.stage("score"):
            rewards = self.score(drawn, prompts)
        advantages = leaf_advantages(
            rewards,
            self.reward_weights,
            self.config.advantage,
            prompts=[index for index, _ in batch],
            running=self.running,
        )
        with self.stage("update"):
            updates = self.schedule_updates(plan, rewards, advantages, conditions.kinds)
            metrics = self.update(updates, drawn, conditions, advantages)

        self.done += 1
        return self.reward_metrics(rewards, advantages) | metrics

    # ---- the stages of an iteration ------------------------------------------------------------

    def plan(self, iteration: int) -> TreePlan:
        """The tree of every prompt of an iteration."""
        return plan_iteration(self.config, self.family.grid, iteration)

    def sample(self, plan: TreePlan, conditions: Conditions) -> Trajectories:
        """Draw this rank's part of the trees."""
        rollout = self.config.rollout
        self.sampled_with = forward_settings(
            self.family, self.policy, batch_size=rollout.batch_size
        )
        transitions = plan.transitions(
            dynamics=rollout.dynamics,
            level=rollout.noise_level,
            kl=self.config.loss.kl,
            exact_density=rollout.exact_density,
        )
        rank = self.world.data_rank
        held = held_states(plan, [(int(p), int(g)) for p, g in np.argwhere(self.owner == rank)])
        count = sum(bool(plan.children[s]) for states in held.values() for s in states)
        forwards = None
        if self.engine.rollout_calls_agree:
            forwards = forwards_per_step(plan, self.owner, conditions.kinds, rollout.batch_size)
        networks = nullcontext(self.engine.modules) if forwards else self.engine.gathered()
        with self.bar("sample", count) as bar, networks as modules:
            return draw_trees(
                self.family,
                modules,
                plan,
                coefficient_table(transitions, device=self.world.device),
                conditions,
                key=self.key.fold_in(Role.LATENTS).fold_in(self.done),
                owner=self.owner,
                rank=rank,
                batch_size=rollout.batch_size,
                latent_dtype=rollout.latent_dtype,
                keep_outputs=self.config.loss.ratio_norm and self.updater.mode == "rollout",
                forwards=forwards,
                progress=bar.update,
                at_step=lambda: self.stopping.ask(until=SOON),
            )

    def score(self, drawn: Trajectories, prompts: Sequence[Prompt]) -> np.ndarray:
        """Decode and score this rank's samples; returns every rank's rewards [P, G, R]."""
        self.stopping.ask(until=SOON)
        leaves = [leaf for leaf in drawn.leaves if self.scorer[leaf] == self.world.rank]
        texts = [prompts[p].text for p, _ in leaves]
        with self.bar("score", len(texts)) as bar:
            own = score_latents(
                drawn.samples(leaves),
                texts,
                self.family.decode,
                self.rewards,
                batch_size=self.config.rollout.batch_size,
                groups=[p for p, _ in leaves],
                metadata=[prompts[p].metadata for p, _ in leaves],
                fps=self.config.model.fps,
                progress=bar.update,
            )
        self.clip = (texts[0], own.clip) if leaves else None
        rewards = self.world.gather_rewards(own.values, self.scorer)
        for _ in range(2):  # The first is answered by the second, before an update phase begins.
            self.stopping.ask(until=SOON)
        for column, reward in enumerate(self.config.rewards):
            if reward.weight and not np.isfinite(rewards[..., column]).any():
                self.save()
                self.saver.finish()  # Every rank holds the same rewards: all of them come here.
                raise UserError(
                    f"rewards.{column}.name = {reward.name!r}: all {self.owner.size} samples of "
                    f"iteration {self.done} failed ({own.first_error or 'it returned NaN'}); the "
                    "weights are untouched: mend the reward and continue with --resume latest"
                )
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

    def schedule_updates(
        self,
        plan: TreePlan,
        rewards: np.ndarray,
        advantages: LeafAdvantages,
        kinds: Sequence[int] | None = None,
    ) -> list[Update]:
        """Which states this rank trains in which micro-batch of which update."""
        config = self.config
        selected, edge_values = advantages.valid, None
        rule = config.advantage
        if rule.best_of_n is not None:
            selected = best_and_worst(advantages, rule.best_of_n, rule.keep)
        if rule.credit != "leaf":
            edge_values, _ = edge_advantages(plan, rewards, self.reward_weights, rule)
        return build_updates(
            plan,
            advantages,
            selected,
            key=self.key.fold_in(Role.SELECTION).fold_in(self.done),
            modules=self.family.grid.module_names(plan.schedule),
            rank=self.world.data_rank,
            world_size=self.world.data_size,
            owner=self.owner,
            updates=config.loss.updates,
            timestep_fraction=config.loss.timestep_fraction,
            timesteps=config.loss.timesteps,
            timestep_scope=config.loss.timestep_scope,
            micro_batch_size=config.loss.micro_batch_size,
            edge_values=edge_values,
            edge_weights=edge_weights(plan, self.family.grid.schedule(config.rollout), config),
            kinds=kinds,
        )

    def update(
        self,
        updates: list[Update],
        drawn: Trajectories,
        conditions: Conditions,
        advantages: LeafAdvantages,
    ) -> dict[str, float]:
        """Run the update schedule."""
        with self.bar("update", sum(len(update.calls) for update in updates)) as bar:

            def after_call(count: int) -> None:
                bar.update(count)
                self.stopping.ask(until=NOW)  # A begun update phase is finished if time allows.

            return self.updater.run(
                updates, drawn, conditions, advantages.weights, self.sampled_with, after_call
            )

    def reward_metrics(self, rewards: np.ndarray, advantages: LeafAdvantages) -> dict[str, float]:
        """Statistics of the iteration's rewards; failed samples enter none."""
        used = self.reward_weights != 0
        total = (rewards[..., used] @ self.reward_weights[used])[advantages.valid]
        groups = [rewards[p, v][:, used] for p, v in enumerate(advantages.valid) if v.any()]
        spreads = [float((group @ self.reward_weights[used]).std()) for group in groups]
        metrics = {
            "reward/mean": float(total.mean()) if total.size else float("nan"),
            "reward/std_in_group": float(np.mean(spreads)) if spreads else float("nan"),
            "reward/failed": float(np.isnan(rewards).any(axis=-1).mean()),
            "reward/zero_variance": advantages.zero_variance,
        }
        for column, reward in enumerate(self.rewards):
            scores = rewards[..., column]
            if np.isfinite(scores).any():
                metrics[f"reward/{reward.name}"] = float(np.nanmean(scores))
        return metrics

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
        folders = self.snapshots.glob("iteration-??????")
        return sorted(int(folder.name.removeprefix("iteration-")) for folder in folders)

    @staticmethod
    def has_snapshots(config: RunConfig) -> bool:
        """Whether the run's folder holds any."""
        return any((Path(config.output) / "snapshots").glob("iteration-??????"))

    def save(self) -> None:
        """Begin to write a snapshot of the last finished iteration; `saver.finish` waits for it."""
        tensors = checkpoint.collect(self.policy, self.engine.optimizers)
        extra = {
            "ema_updates": self.policy.ema_updates,
            "skipped": [self.updater.skipped, self.updater.skipped_total],
            "seconds": self.seconds,
            "running": {str(p): h.tolist() for p, h in self.running.history.items()},
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
        self.policy.ema_updates = snapshot.extra["ema_updates"]
        self.updater.skipped, self.updater.skipped_total = snapshot.extra["skipped"]
        self.seconds = snapshot.extra["seconds"]
        self.running.history = {
            int(p): np.array(h, dtype=np.float64) for p, h in snapshot.extra["running"].items()
        }
        return True

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add to the run's seconds of a stage, and say which one is running."""
        start = time.perf_counter()
        self.current = name  # Left standing by an exception: an interrupted run asks for it.
        with nvtx.annotate(f"dancegrpo_fast.{name}"):
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
