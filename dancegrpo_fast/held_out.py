"""The held-out prompts of a run: drawn and scored before, during and after it."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dancegrpo_fast import checkpoint
from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.models import load_lines
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.evaluate import Difference, Evaluation, evaluate
from dancegrpo_fast.report.log import RunLog
from dancegrpo_fast.report.result import (
    HeldOutResult,
    Outcome,
    write_audit,
    write_still,
    write_summary,
)
from dancegrpo_fast.trainer import Trainer

logger = logging.getLogger(__name__)


class HeldOut:
    """Evaluates a trainer's weights on `evaluation.prompts`, and reports the end of a run.

    Without prompts nothing is evaluated.

    Every process takes part; the main one logs.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.prompts: tuple[Prompt, ...] = ()
        self.base: Evaluation | None = None
        if config.evaluation.prompts:
            self.set = PromptSet.held_out(config)
            self.prompts = self.set.prompts

    def check(self, trainer: Trainer) -> None:
        """Refuse prompts without the image that the family needs."""
        if self.prompts and trainer.family.needs_image:
            self.set.need_images("evaluation.prompts")

    def untrained(self, trainer: Trainer, log: RunLog) -> None:
        """Evaluate the base; kept beside the run for a resumed one."""
        if not self.prompts:
            return
        kept = Path(self.config.output) / f"evaluation-base-{self._digest()}.npz"
        # Measured by all where one cannot see it: another machine's folder may lag behind.
        absent = torch.tensor(int(not kept.is_file()))
        trainer.world.all_reduce(absent, "max")
        if not absent:
            self.base = Evaluation.load(kept)
            log.evaluation(0, self.base, self._texts())
            return
        with trainer.untrained():
            self.base = self._evaluate(trainer, "base")
        if trainer.world.is_main:
            self.base.save(kept)
        if trainer.done:
            log.evaluation(0, self.base, self._texts())
        else:
            self._log(trainer, log, self.base)

    def now(self, trainer: Trainer, log: RunLog) -> None:
        """Evaluate the weights there are, the average if one is kept."""
        if self.prompts:
            with trainer.policy.averaged():
                found = self._evaluate(trainer, f"iteration {trainer.done}")
            self._log(trainer, log, found)

    def missed(self, trainer: Trainer, log: RunLog) -> None:
        """Make the evaluation at the snapshot a resumed run stands at, if a kill prevented it."""
        every, done = self.config.evaluation.every, trainer.done
        if every is None or not done or done % every or done >= self.config.iterations:
            return
        scores = Path(self.config.output) / "evaluations" / f"{done:06d}" / "scores.json"
        # One process looks for all: what a folder lists may differ between machines for a while.
        absent = torch.tensor(int(trainer.world.is_main and not scores.is_file()))
        trainer.world.all_reduce(absent, "max")
        if absent:
            self.now(trainer, log)

    def report(self, trainer: Trainer, log: RunLog, final: Path) -> Path | None:
        """Evaluate the end and write summary and report; `final` is the exported pipeline."""
        result = None
        if self.prompts:
            with trainer.policy.averaged():
                trained = self._evaluate(trainer, "trained weights")
            self._log(trainer, log, trained)
            assert self.base is not None
            weights = tuple(reward.weight for reward in self.config.rewards)
            result = HeldOutResult(self._texts(), self.base, trained, weights)
        if not trainer.world.is_main:
            return None
        config, family = self.config, trainer.family
        hashes = {
            "base": checkpoint.weights_hash(family.source.folder),
            "trained": checkpoint.weights_hash(final),
        }
        lines = load_lines(family, final, config.policy.train, config.rollout.steps)
        folder = Path(config.output)
        if result is not None:
            started = time.perf_counter()
            flagged = [finding.name for finding in write_audit(result, folder) if finding.flagged]
            trainer.spend("audit", started)
            if flagged:
                logger.warning("audit: look at %s (report.html says why)", ", ".join(flagged))
        write_summary(Outcome(config, hashes, trainer.seconds, lines, result), folder)
        if result is not None:
            total = result.difference()
            logger.info(
                "held-out reward %.3f -> %.3f (%+.3f +- %.3f)",
                total.base, total.trained, total.gain, total.standard_error,
            )  # fmt: skip
            write_still(result, folder)
        return log.page(trainer.done)

    def _texts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.prompts)

    def _digest(self) -> str:
        """Of all that the base depends on: what changes any of it must not compare with it."""
        config = self.config
        rewards = [reward.model_dump(exclude={"weight", "offload"}) for reward in config.rewards]
        rollout = config.rollout
        grid = (rollout.steps, rollout.schedule, rollout.shift, rollout.dynamics)
        # Of images the names alone: where a table's images are kept differs between machines.
        prompts = [(p.text, p.image and p.image.name, p.metadata) for p in self.prompts]
        made_with = (prompts, config.evaluation, config.model, grid, rewards)
        return hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]

    def _evaluate(self, trainer: Trainer, what: str) -> Evaluation:
        started = time.perf_counter()
        model, world = self.config.model, trainer.world
        count = len(self.prompts) * self.config.evaluation.seeds // world.data_size
        hidden = None if world.is_main else True  # None: shown on a terminal only.
        with (
            tqdm(total=count, desc=f"evaluate {what}", leave=False, disable=hidden) as bar,
            trainer.engine.gathered() as modules,
            trainer.family.vae(),
        ):
            found = evaluate(
                lambda prompts, latents: trainer.draw(modules, prompts, latents),
                self.prompts,
                trainer.rewards,
                self.config.evaluation,
                latent_shape=trainer.family.latent_shape,
                sample_shape=(model.frames, 3, model.height, model.width),
                world=world,
                fps=model.fps,
                progress=bar.update,
            )
        trainer.spend("evaluate", started)
        return found

    def _log(self, trainer: Trainer, log: RunLog, found: Evaluation) -> None:
        assert self.base is not None
        weights = [reward.weight for reward in self.config.rewards]
        difference = Difference.of(self.base.total(weights), found.total(weights))
        values = {
            "evaluation/reward": difference.trained,
            "evaluation/standard_error": difference.standard_error,
            "evaluation/diversity": found.diversity,
        }
        for column, name in enumerate(found.names):
            scores = found.scores[..., column]
            if np.isfinite(scores).any():
                values[f"evaluation/reward/{name}"] = float(np.nanmean(scores))
        clips = [
            (f"held out {prompt.text}", torch.from_numpy(clip) / 255)
            for prompt, clip in zip(self.prompts[:4], found.clips[:4], strict=False)
        ]
        log.write(trainer.done, values, clips)
        log.evaluation(trainer.done, found, self._texts())
