"""A whole run: the loop around `Trainer.iteration`, with logs, snapshots, evaluation and report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.contrib.logging import logging_redirect_tqdm

from dancegrpo_fast.config import Interrupted, RunConfig, UserError, dump, load_config
from dancegrpo_fast.config.presets import preset_lines
from dancegrpo_fast.faults import is_full_disk, is_lost_peer
from dancegrpo_fast.held_out import HeldOut
from dancegrpo_fast.models import export
from dancegrpo_fast.parallel.lock import FolderLock
from dancegrpo_fast.parallel.stopping import SOON, StopRequested, ending_at_once
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.profiling import Profile
from dancegrpo_fast.report.log import RunLog
from dancegrpo_fast.report.metrics import check_folder, check_new
from dancegrpo_fast.report.terminal import Terminal
from dancegrpo_fast.report.trackers import check_trackers
from dancegrpo_fast.trainer import Trainer

logger = logging.getLogger(__name__)
BESIDE = ("evaluate", "snapshot", "report", "load")  # Stages that draw no training samples.


def train(
    config: RunConfig, *, resume: bool | Path = False, profile: int | None = None
) -> Path | None:
    """Run a recipe to its end; returns the report page, on the main process.

    The run's folder gets `recipe.yaml`, `metrics.jsonl`, `times.jsonl`, `tensorboard/`, `clips/`,
    `evaluations/`, `snapshots/`, `report.html` from the first snapshot on, and at the end `final/`
    (the weights, for a stock pipeline) and `summary.json`.

    Args:
        config: The recipe.
        resume: Continue from the newest undamaged snapshot, or from a named one.
        profile: Iteration that is profiled on the main process, counted from 1; None: none.

    Raises:
        UserError: Anything in the recipe that does not fit, before work is done.
        Interrupted: A signal, or a process that is gone; the run continues with --resume latest.
    """
    world: World | None = None
    lock: FolderLock | None = None
    run: _Run | None = None
    try:
        with ending_at_once():
            world = World.from_environment(config.parallel)
            lock = FolderLock(Path(config.output), world)
            restarts = _restarts(world)
            seen = torch.tensor(int(restarts and Trainer.has_snapshots(config)))
            world.all_reduce(seen, "max")  # Another machine's folder may lag behind.
            if seen:
                resume = True  # Also of a run that began at a named snapshot: it has gone on since.
            run = _Run(config, world, lock, resume or restarts > 0, fresh_is_fine=restarts > 0)
            run.profile.number = profile if world.is_main else None
            if world.is_main and profile is not None and profile <= run.trainer.done:
                logger.warning("--profile %d: that iteration is behind the snapshot", profile)
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
    # However many processes the weights were spread over, and wherever the folder was then.
    alone = config.parallel.model_copy(update={"dp_replicate": 1, "dp_shard": None, "sp": 1})
    config = config.model_copy(update={"parallel": alone, "output": str(folder)})
    trainer = Trainer(config, World.from_environment(alone))
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
        self.held_out = HeldOut(config)
        check_trackers(config.logging)
        if world.is_main:  # Loading may take minutes.
            check_folder(config.output)
            if not resume:
                check_new(self.folder / "metrics.jsonl")
        started = time.perf_counter()
        self.trainer = Trainer(config, world)
        self.held_out.check(self.trainer)
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
        if resume and world.is_main:
            recipe = (named.absolute().parents[1] if named else self.folder) / "recipe.yaml"
            if recipe.is_file():
                _tell_changes(recipe, config)
        self.log = RunLog(config, world.is_main, resumed=done if resume else None)
        if world.is_main:
            partial = self.folder / "recipe.yaml.partial"  # A full disk leaves the one before.
            partial.write_text(dump(config), encoding="utf-8")
            os.replace(partial, self.folder / "recipe.yaml")
            for line in preset_lines(config):
                logger.info("algorithm %s: %s", config.algorithm, line)
        self.profile = Profile(self.folder / "profile", None, world.device)
        self.trainer.spend("load", started)

    def _may_branch(self, named: Path) -> None:
        """Refuse to leave snapshots of another continuation behind, where `latest` finds them."""
        newest = self.trainer.saved_iterations()[-1:]
        own = self.trainer.snapshots / f"iteration-{newest[0]:06d}" if newest else named
        # What is no snapshot is told so when it is loaded.
        if named.name.startswith("iteration-") and named.is_dir() and not named.samefile(own):
            raise UserError(
                f"--resume {named}: {self.trainer.snapshots} holds iteration {newest[0]}, which "
                "would be mixed up with the new ones; add output=ANOTHER_FOLDER to branch off, or "
                "use --resume latest"
            )

    def to_end(self) -> Path | None:
        trainer = self.trainer
        with self.log, logging_redirect_tqdm():
            self.held_out.untrained(trainer, self.log)
            self.held_out.missed(trainer, self.log)
            self._iterate()
            trainer.stopping.settle()
            final = self.folder / "final"
            started = time.perf_counter()
            export(trainer.family, trainer.policy, final, main=self.world.is_main)
            trainer.spend("export", started)
            if self.world.is_main:
                logger.info("weights for a stock pipeline: %s", final)
            self.world.barrier()
            return self.held_out.report(trainer, self.log, final)

    def _iterate(self) -> None:
        trainer, config = self.trainer, self.config
        before = dict(trainer.seconds)
        with Terminal(config.iterations, trainer.done, shown=self.world.is_main) as view:
            while trainer.done < config.iterations:
                with self.profile.of(trainer.done + 1, trainer.seconds):
                    metrics = trainer.iteration()
                trainer.saver.finish()  # Begun before this iteration: it had all of it to be done.
                self._log_iteration(metrics)
                last = trainer.done == config.iterations
                saves = last or trainer.done % config.checkpoint.every == 0
                if saves:
                    started = time.perf_counter()
                    trainer.save()
                    if last:
                        trainer.saver.finish()
                    trainer.spend("snapshot", started)
                every = config.evaluation.every
                measures = every is not None and trainer.done % every == 0 and not last
                if measures:
                    self.held_out.now(trainer, self.log)
                spent, before = self._spent(before), dict(trainer.seconds)
                self.log.spent(trainer.done, spent)
                view.show(metrics, spent)
                if (saves or measures) and not last:  # The last page follows the last evaluation.
                    started = time.perf_counter()
                    self.log.page(trainer.done)
                    trainer.spend("report", started)
                trainer.stopping.ask(until=SOON)

    def _spent(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each stage since `before`, samples per second, and memory."""
        config, device = self.config, self.world.device
        seconds = {name: s - before.get(name, 0.0) for name, s in self.trainer.seconds.items()}
        samples = config.data.prompts_per_iteration * config.rollout.group_size
        working = sum(s for name, s in seconds.items() if name not in BESIDE)
        spent = {f"time/{name}": s for name, s in seconds.items() if s > 0}
        spent["speed/samples_per_second"] = samples / working
        if device.type == "cuda":
            spent["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return spent

    def abandon(self) -> str:
        """Leave the run, all processes at one place.

        The start of an iteration is saved where the weights still are its start's: between
        iterations, in the rollout and while scoring. In a begun update phase they are not.
        """
        trainer = self.trainer
        trainer.stopping.settle()
        trainer.saver.finish()
        if trainer.current != "update" and trainer.done != trainer.saver.newest:
            trainer.save()
            trainer.saver.finish()
        newest = trainer.saver.newest
        why = trainer.stopping.told_by or "another process's signal"
        if newest is None:
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
            f"newest snapshot holds {newest}; continue with --resume latest"
        )

    def _log_iteration(self, metrics: dict[str, float]) -> None:
        trainer, every = self.trainer, self.config.checkpoint.every
        clips = []
        if trainer.clip and (trainer.done == 1 or trainer.done % every == 0):
            clips = [trainer.clip]
        self.log.write(trainer.done, metrics, clips)


def _tell_changes(recipe: Path, config: RunConfig) -> None:
    """Say which fields a resumed run changes: legal, but never silent."""
    try:
        known = load_config(recipe, [])
    except UserError as error:  # Cut off, or of another version: the recipe that was given counts.
        logger.warning("%s; what changes on resume is not known", str(error).split("\n")[0])
        return
    before, after = (_flat(c.model_dump()) for c in (known, config))
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
