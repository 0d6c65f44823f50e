"""A whole run: the loop around `Trainer.iteration`, with logs, snapshots, evaluation and report."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dancegrpo_fast import checkpoint
from dancegrpo_fast.config import Interrupted, RunConfig, UserError, dump, load_config
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.faults import is_full_disk, is_lost_peer
from dancegrpo_fast.lock import FolderLock
from dancegrpo_fast.models import export
from dancegrpo_fast.parallel.stopping import SOON, StopRequested
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.evaluate import Difference, Evaluation, evaluate
from dancegrpo_fast.report.metrics import MetricsLog
from dancegrpo_fast.report.result import Outcome, write_report, write_summary
from dancegrpo_fast.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, resume: bool | Path = False) -> Path | None:
    """Run a recipe to its end; returns the report page, if there were held-out prompts.

    The run's folder gets `recipe.yaml`, `metrics.jsonl`, `tensorboard/`, `clips/`, `snapshots/`,
    `final/` (the weights, for a stock pipeline), `summary.json` and `report.html`.

    Raises:
        UserError: Anything in the recipe that does not fit, before work is done.
        Interrupted: A signal, or a process that is gone; the run continues with --resume latest.
    """
    world: World | None = None
    lock: FolderLock | None = None
    run: _Run | None = None
    try:
        world = World.from_environment(config.parallel)
        lock = FolderLock(Path(config.output), world)
        restarts = _restarts(world)
        if restarts and Trainer.has_snapshots(config):
            resume = True  # Also of a run that began at a named snapshot: it has gone on since.
        run = _Run(config, world, lock, resume or restarts > 0, fresh_is_fine=restarts > 0)
        if restarts and world.is_main:
            done = run.trainer.done
            logger.warning("torchrun restart %d: going on after iteration %d", restarts, done)
        with run.trainer.stopping.listening():
            try:
                return run.to_end()
            except StopRequested:
                raise Interrupted(run.abandon()) from None
    except KeyboardInterrupt:
        at = run.trainer.saved_iterations() if run else []
        kept = f"the newest snapshot holds {at[-1]}" if at else "there is no snapshot yet"
        raise Interrupted(f"{config.output}: interrupted at once; {kept}") from None
    except (RuntimeError, OSError, SafetensorError) as error:
        if is_lost_peer(error):
            raise Interrupted(_lost_peer_message(config, run, error)) from error
        if is_full_disk(error):
            told = f"{config.output}: {error}; make room and continue with --resume latest"
            raise UserError(told) from error
        raise
    finally:
        if lock is not None:
            lock.release()
        if world is not None:
            world.close()


def _restarts(world: World) -> int:
    """How often torchrun has restarted the processes: with several machines each counts its own."""
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    world.all_reduce(restarts, "max")
    return int(restarts)


def restore(folder: Path) -> Trainer:
    """The trainer of a run's folder, at its newest undamaged snapshot; on one process."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"run = {str(folder)!r}: holds no recipe.yaml; give the folder of a run")
    config = load_config(recipe, [])
    trainer = Trainer(config, World.from_environment(config.parallel))
    if not trainer.resume():
        raise UserError(
            f"run = {str(folder)!r}: {trainer.snapshots} holds no usable snapshot; the run must "
            "get past its first snapshot (checkpoint.every)"
        )
    return trainer


class _Run:
    def __init__(
        self,
        config: RunConfig,
        world: World,
        lock: FolderLock,
        resume: bool | Path,
        *,
        fresh_is_fine: bool = False,
    ) -> None:
        self.config, self.world, self.folder = config, world, Path(config.output)
        self.held_out: tuple[Prompt, ...] = ()
        if config.evaluation.prompts:
            held_out = PromptSet.load(config.evaluation.prompts, field="evaluation.prompts")
            self.held_out = held_out.prompts
        started = time.perf_counter()
        self.trainer = Trainer(config, world)
        if self.held_out and self.trainer.family.needs_image:
            held_out.need_images("evaluation.prompts")
        lock.take()  # The recipe is sound: from here on the run writes.
        named = resume if isinstance(resume, Path) else None
        if named is not None:
            self._may_branch(named)
        if resume and not self.trainer.resume(named):
            begun = (self.folder / "metrics.jsonl").is_file()
            if (not begun and not fresh_is_fine) or self.trainer.saved_iterations():
                raise UserError(
                    f"--resume latest: {self.trainer.snapshots} holds no usable snapshot; start "
                    "the run without --resume"
                    + (" in another output folder" if begun else "")
                )
            # Stopped before its first snapshot: nothing else could ever continue this folder.
            if world.is_main:
                logger.warning("%s: no snapshot yet, starting at iteration 0", self.folder)
        done = self.trainer.done
        self.log: MetricsLog | None = None
        if world.is_main:
            if resume:
                recipe = (named.parents[1] if named else self.folder) / "recipe.yaml"
                if recipe.is_file():
                    _tell_changes(recipe, config)
            self.log = MetricsLog(self.folder, resumed=done if resume else None)
            (self.folder / "recipe.yaml").write_text(dump(config), encoding="utf-8")
        self._spend("load", started)
        self.base: Evaluation | None = None

    def _may_branch(self, named: Path) -> None:
        """Refuse to leave snapshots of another continuation behind, where `latest` finds them."""
        newest = self.trainer.saved_iterations()[-1:]
        if newest and named.name != f"iteration-{newest[0]:06d}":
            raise UserError(
                f"--resume {named}: {self.trainer.snapshots} holds iteration {newest[0]}, which "
                "would be mixed up with the new ones; add output=ANOTHER_FOLDER to branch off, or "
                "use --resume latest"
            )

    def to_end(self) -> Path | None:
        with self.log or nullcontext(), logging_redirect_tqdm():
            self._evaluate_base()
            self._iterate()
            self.trainer.stopping.settle()
            final = self.folder / "final"
            started = time.perf_counter()
            export(self.trainer.family, self.trainer.policy, final, main=self.world.is_main)
            self._spend("export", started)
            if self.world.is_main:
                logger.info("weights for a stock pipeline: %s", final)
            self.world.barrier()
            return self._report(final) if self.held_out else None

    def _iterate(self) -> None:
        trainer, config = self.trainer, self.config
        bar = tqdm(
            total=config.iterations,
            initial=trainer.done,
            desc="iterations",
            disable=not self.world.is_main,
        )
        with bar:
            while trainer.done < config.iterations:
                metrics = trainer.iteration()
                trainer.saver.finish()  # Begun before this iteration: it had all of it to be done.
                self._log_iteration(metrics, bar)
                last = trainer.done == config.iterations
                if last or trainer.done % config.checkpoint.every == 0:
                    started = time.perf_counter()
                    trainer.save()
                    if last:
                        trainer.saver.finish()
                    self._spend("snapshot", started)
                every = config.evaluation.every
                if every and trainer.done % every == 0 and not last:
                    self._evaluate_now()
                trainer.stopping.ask(until=SOON)

    def abandon(self) -> str:
        """Leave the run, all processes at one place.

        The start of an iteration is saved where the weights still are its start's: between
        iterations, in the rollout and while scoring. In a begun update phase they are not.
        """
        trainer = self.trainer
        trainer.stopping.settle()
        trainer.saver.finish()
        if trainer.current != "update" and trainer.done not in trainer.saved_iterations()[-1:]:
            trainer.save()
            trainer.saver.finish()
        saved = trainer.saved_iterations()
        why = trainer.stopping.told_by or "another process's signal"
        if not saved:
            return (
                f"{self.folder}: interrupted by {why} before a snapshot; --resume latest starts "
                "again"
            )
        late = (
            "; the grace period ended inside an update phase, which is lost"
            if trainer.current == "update"
            else ""
        )
        return (
            f"{self.folder}: interrupted by {why} after {trainer.done} iterations{late}; the "
            f"newest snapshot holds {saved[-1]}; continue with --resume latest"
        )

    def _log_iteration(self, metrics: dict[str, float], bar: tqdm) -> None:
        trainer = self.trainer
        if self.log is None:
            return
        with self._full_disk_survived():
            self.log.write(trainer.done, metrics)
            every = self.config.checkpoint.every
            if trainer.clip and (trainer.done == 1 or trainer.done % every == 0):
                self.log.add_clip(trainer.clip[0], trainer.clip[1], trainer.done)
        shown = {"reward": metrics["reward/mean"], "gap": metrics["gate/max_gap"]}
        bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        bar.update()

    @contextmanager
    def _full_disk_survived(self) -> Iterator[None]:
        """Inside, the log is written; a disk that is full costs a picture, not the run."""
        assert self.log is not None
        try:
            yield
        except OSError as error:
            if not is_full_disk(error) or self.config.checkpoint.on_failure == "stop":
                raise
            logger.error(
                "%s: iteration %d could not be logged (%s); the run goes on "
                "(checkpoint.on_failure = continue)",
                self.folder, self.trainer.done, error,
            )  # fmt: skip
            self.log.recover()

    # ---- evaluation ----------------------------------------------------------------------------

    def _evaluate_base(self) -> None:
        """The untrained model; kept beside the run for a resumed one."""
        if not self.held_out:
            return
        config, trainer = self.config, self.trainer
        rewards = [reward.model_dump(exclude={"weight", "offload"}) for reward in config.rewards]
        rollout = config.rollout
        grid = (rollout.steps, rollout.schedule, rollout.shift, rollout.dynamics)
        made_with = (self.held_out, config.evaluation, config.model, grid, rewards)
        # Named by all it depends on: a resumed run that changes any of it must not compare with it.
        digest = hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]
        kept = self.folder / f"evaluation-base-{digest}.npz"
        if kept.is_file():
            self.base = Evaluation.load(kept)
            return
        with trainer.untrained():
            self.base = self._evaluate("base")
        if self.world.is_main:
            self.base.save(kept)
        if not trainer.done:
            self._log_evaluation(self.base, 0)

    def _evaluate_now(self) -> None:
        if self.held_out:
            with self.trainer.policy.averaged():
                found = self._evaluate(f"iteration {self.trainer.done}")
            self._log_evaluation(found, self.trainer.done)

    def _evaluate(self, what: str) -> Evaluation:
        """The weights there are now, on the held-out prompts; every process takes part."""
        started = time.perf_counter()
        trainer, model = self.trainer, self.config.model
        count = len(self.held_out) * self.config.evaluation.seeds // self.world.data_size
        hidden = not self.world.is_main
        with (
            tqdm(total=count, desc=f"evaluate {what}", leave=False, disable=hidden) as bar,
            trainer.engine.gathered() as modules,
        ):
            found = evaluate(
                lambda prompts, latents: trainer.draw(modules, prompts, latents),
                self.held_out,
                trainer.rewards,
                self.config.evaluation,
                latent_shape=trainer.family.latent_shape,
                sample_shape=(model.frames, 3, model.height, model.width),
                world=self.world,
                fps=model.fps,
                progress=bar.update,
            )
        self._spend("evaluate", started)
        return found

    def _log_evaluation(self, found: Evaluation, iteration: int) -> None:
        if self.log is None:
            return
        assert self.base is not None
        weights = [reward.weight for reward in self.config.rewards]
        difference = Difference.of(self.base.total(weights), found.total(weights))
        values = {
            "evaluation/reward": difference.trained,
            "evaluation/standard_error": difference.standard_error,
            "evaluation/diversity": float(found.distances.mean()),
        }
        with self._full_disk_survived():
            self.log.write(iteration, values)
            for prompt, clip in zip(self.held_out[:4], found.clips[:4], strict=False):
                clip = torch.from_numpy(clip) / 255
                self.log.add_clip(f"held out {prompt.text}", clip, iteration)

    def _report(self, final: Path) -> Path | None:
        with self.trainer.policy.averaged():
            trained = self._evaluate("trained weights")
        self._log_evaluation(trained, self.trainer.done)
        if not self.world.is_main:
            return None
        assert self.base is not None
        outcome = Outcome(
            self.config,
            tuple(prompt.text for prompt in self.held_out),
            self.base,
            trained,
            {
                "base": checkpoint.weights_hash(self.trainer.family.source.folder),
                "trained": checkpoint.weights_hash(final),
            },
            self.trainer.seconds,
            self.trainer.family.load_lines(
                final, self.config.policy.train, self.config.rollout.steps
            ),
        )
        write_summary(outcome, self.folder)
        total = outcome.difference()
        logger.info(
            "held-out reward %.3f -> %.3f (%+.3f +- %.3f)",
            total.base, total.trained, total.gain, total.standard_error,
        )  # fmt: skip
        return write_report(outcome, self.folder)

    def _spend(self, stage: str, started: float) -> None:
        seconds = self.trainer.seconds
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def _tell_changes(recipe: Path, config: RunConfig) -> None:
    """Say which fields a resumed run changes: legal, but never silent."""
    before, after = (_flat(c.model_dump()) for c in (load_config(recipe, []), config))
    for field in sorted(before | after):
        if before.get(field) != after.get(field):
            logger.warning(
                "resumed with another %s: %s -> %s", field, before.get(field), after.get(field)
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested sections by dotted path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _lost_peer_message(config: RunConfig, run: _Run | None, error: Exception) -> str:
    where = "while loading"
    if run is not None:
        stage = run.trainer.current or "between iterations"
        where = f"in iteration {run.trainer.done} ({stage})"
    return (
        f"{config.output}: process {os.environ['RANK']} got no answer from the others {where}: "
        f"{' '.join(str(error).split())[:200]}; a process died or hangs (its own output says "
        f"more), or needs longer than parallel.timeout_seconds = "
        f"{config.parallel.timeout_seconds:g}; continue with --resume latest"
    )
