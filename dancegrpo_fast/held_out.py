"""The held-out prompts of a run: drawn and scored before, during and after it."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dancegrpo_fast import checkpoint
from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.models import load_lines
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.report.evaluate import Difference, Evaluation, evaluate
from dancegrpo_fast.report.metrics import RunLog
from dancegrpo_fast.report.result import Outcome, write_report, write_summary
from dancegrpo_fast.trainer import Trainer

logger = logging.getLogger(__name__)


class HeldOut:
    """Evaluates a trainer's weights on `evaluation.prompts`; does nothing without them.

    Every process takes part; the main one logs.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.prompts: tuple[Prompt, ...] = ()
        self.base: Evaluation | None = None
        if config.evaluation.prompts:
            self.set = PromptSet.load(config.evaluation.prompts, field="evaluation.prompts")
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
        if kept.is_file():
            self.base = Evaluation.load(kept)
            return
        with trainer.untrained():
            self.base = self._evaluate(trainer, "base")
        if trainer.world.is_main:
            self.base.save(kept)
        if not trainer.done:
            self._log(trainer, log, self.base)

    def now(self, trainer: Trainer, log: RunLog) -> None:
        """Evaluate the weights there are, the average if one is kept."""
        if self.prompts:
            with trainer.policy.averaged():
                found = self._evaluate(trainer, f"iteration {trainer.done}")
            self._log(trainer, log, found)

    def report(self, trainer: Trainer, log: RunLog, final: Path) -> Path | None:
        """Evaluate the end and write summary and report; `final` is the exported pipeline."""
        if not self.prompts:
            return None
        with trainer.policy.averaged():
            trained = self._evaluate(trainer, "trained weights")
        self._log(trainer, log, trained)
        if not trainer.world.is_main:
            return None
        assert self.base is not None
        config, family = self.config, trainer.family
        outcome = Outcome(
            config,
            tuple(prompt.text for prompt in self.prompts),
            self.base,
            trained,
            {
                "base": checkpoint.weights_hash(family.source.folder),
                "trained": checkpoint.weights_hash(final),
            },
            trainer.seconds,
            load_lines(family, final, config.policy.train, config.rollout.steps),
        )
        folder = Path(config.output)
        write_summary(outcome, folder)
        total = outcome.difference()
        logger.info(
            "held-out reward %.3f -> %.3f (%+.3f +- %.3f)",
            total.base, total.trained, total.gain, total.standard_error,
        )  # fmt: skip
        return write_report(outcome, folder)

    def _digest(self) -> str:
        """Of all that the base depends on: what changes any of it must not compare with it."""
        config = self.config
        rewards = [reward.model_dump(exclude={"weight", "offload"}) for reward in config.rewards]
        rollout = config.rollout
        grid = (rollout.steps, rollout.schedule, rollout.shift, rollout.dynamics)
        made_with = (self.prompts, config.evaluation, config.model, grid, rewards)
        return hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]

    def _evaluate(self, trainer: Trainer, what: str) -> Evaluation:
        started = time.perf_counter()
        model, world = self.config.model, trainer.world
        count = len(self.prompts) * self.config.evaluation.seeds // world.data_size
        hidden = not world.is_main
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
            "evaluation/diversity": float(found.distances.mean()),
        }
        clips = [
            (f"held out {prompt.text}", torch.from_numpy(clip) / 255)
            for prompt, clip in zip(self.prompts[:4], found.clips[:4], strict=False)
        ]
        log.write(trainer.done, values, clips)
