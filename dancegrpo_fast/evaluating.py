"""One evaluation: several models on the same prompts and noise, spread over processes.

A sample is drawn in a batch that depends on the prompts and seeds alone, not on the number of
processes or on what is there already, so that every process number gives the same pixels.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dancegrpo_fast.checkpoint import weights_hash
from dancegrpo_fast.config import RewardConfig, RunConfig
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.models import open_family
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.report.audit import TRAITS, TRAITS_VERSION, Finding, findings, traits
from dancegrpo_fast.report.evaluate import as_in_training, not_finite
from dancegrpo_fast.report.store import Asked, Store, digest, initial_latents, reward_digest
from dancegrpo_fast.rewards import Samples, load_rewards, placed
from dancegrpo_fast.rewards.scoring import attempt

logger = logging.getLogger(__name__)

Job = tuple[int, int]  # Position of a prompt, and a seed.


@dataclass(frozen=True)
class Model:
    """What is evaluated.

    Attributes:
        name: In tables.
        config: Its recipe.
        weights: Folder of what was exported; None is the base.
    """

    name: str
    config: RunConfig
    weights: Path | None

    @property
    def train(self) -> str:
        """Whether the weights are a LoRA or a whole pipeline."""
        lora = self.weights and (self.weights / "pytorch_lora_weights.safetensors").is_file()
        return "lora" if lora else "full"


class Evaluating:
    """The work of one call; every process takes part.

    Args:
        models: M models; the first is what others are compared with.
        rewards: R rewards.
        asked: P prompts.
        seeds: Samples of a prompt, S.
        root: Root seed of their noise.
        steps: Denoising steps; None is each recipe's number.
        store: What is there already.
        world: The processes.
    """

    def __init__(
        self,
        models: Sequence[Model],
        rewards: Sequence[RewardConfig],
        asked: Sequence[Asked],
        *,
        seeds: int,
        root: int,
        steps: int | None,
        store: Store,
        world: World,
    ) -> None:
        self.models, self.rewards, self.asked = models, rewards, asked
        self.seeds, self.root, self.steps = seeds, root, steps
        self.store, self.world = store, world
        self.ids = [self._digest(model) for model in models]
        self.reward_ids = [reward_digest(reward) for reward in rewards]

    # ---- samples -------------------------------------------------------------------------------

    def draw(self) -> int:
        """Draw what is missing; returns how many samples that were, over all processes."""
        drawn = 0
        for model, name in zip(self.models, self.ids, strict=True):
            batches = [
                batch
                for batch in self._batches(model.config.evaluation.batch_size)
                if not all(self._file(model, name, job).is_file() for job in batch)
            ]
            if batches:
                drawn += self._draw(model, name, batches)
                gc.collect()
        return self._sum(drawn)

    def _draw(self, model: Model, name: str, batches: Sequence[Sequence[Job]]) -> int:
        world, drawn = self.world, 0
        family = open_family(model.config.model, world.device)
        family.source.check(family.unused)
        if family.needs_image:
            PromptSet(tuple(asked.prompt for asked in self.asked)).need_images("--prompts")
        pipeline = family.stock_pipeline(model.weights, model.train)
        with self._bar(f"draw {model.name}", sum(map(len, batches))) as bar:
            for batch in batches:
                jobs = [(self.asked[p], s) for p, s in batch]
                latents = initial_latents(jobs, self.root, family.latent_shape, world.device)
                prompts = [asked.prompt for asked, _ in jobs]
                pixels = family.draw(pipeline, prompts, latents, self._steps(model))
                videos = (pixels * 255).round().clamp(0, 255).to("cpu", torch.uint8)
                bad = not_finite(pixels).tolist()
                for job, video, broken in zip(batch, videos, bad, strict=True):
                    file = self._file(model, name, job)
                    if not file.is_file():
                        if broken:  # Noted first: a file that is there is taken for sound.
                            self.store.add({self._broken(name, job): 1.0})
                            text = self.asked[job[0]].prompt.text
                            logger.warning(
                                "%s, seed %d of %r: has no score: pixels are not finite",
                                model.name, job[1], text,
                            )  # fmt: skip
                        self.store.write(file, video, model.config.model.fps or 16)
                        drawn += 1
                bar.update(len(batch))
        return drawn

    def _batches(self, size: int) -> list[list[Job]]:
        """This process's batches of all (prompt, seed) pairs."""
        jobs = [(p, s) for p in range(len(self.asked)) for s in range(self.seeds)]
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        return batches[self.world.rank :: self.world.size]

    def _sample(self, name: str, job: Job) -> str:
        return self.store.sample(name, self.asked[job[0]].drawn, self.root, job[1])

    def _broken(self, name: str, job: Job) -> str:
        """Name of the note that a sample had pixels that were no numbers: it has no score."""
        return f"not finite {self._sample(name, job)}"

    def _file(self, model: Model, name: str, job: Job) -> Path:
        return self.store.file(name, self._sample(name, job), model.config.model.frames)

    def videos(self, m: int, jobs: Sequence[Job]) -> Tensor:
        """[n, F, 3, H, W] uint8 of some samples of a model."""
        files = [self._file(self.models[m], self.ids[m], job) for job in jobs]
        return torch.stack([self.store.read(file) for file in files])

    # ---- scores --------------------------------------------------------------------------------

    def score(self) -> int:
        """Score what is missing; returns how many scores that were, over all processes."""
        self._meet()  # Samples of other processes are read below, where groups are scored.
        found = 0
        for r, config in enumerate(self.rewards):
            missing = self._missing(r)
            if missing:
                found += self._score(r, config, missing)
        return self._sum(found)

    def _missing(self, r: int) -> list[tuple[int, list[Job]]]:
        """(model, batch) with something to score: this process's batches as they were drawn.

        A reward that compares the samples of a prompt takes the prompts that begin in them.
        """
        found = []
        for m, model in enumerate(self.models):
            batches = self._batches(model.config.evaluation.batch_size)
            if self._groupwise(r) in self.store.values:
                first = [p for batch in batches for p, s in batch if s == 0]
                batches = [[(p, s) for s in range(self.seeds)] for p in first]
            found += [(m, b) for b in batches if any(np.isnan(self._value(m, r, j)) for j in b)]
        return found

    def _score(
        self, r: int, config: RewardConfig, missing: Sequence[tuple[int, Sequence[Job]]]
    ) -> int:
        (reward,) = load_rewards([config], self.world.device)
        if getattr(reward, "groupwise", False):
            self.store.add({self._groupwise(r): 1.0})
            missing = self._missing(r)
        found = 0
        total = sum(len(batch) for _, batch in missing)
        with placed([reward], self.world.device), self._bar(reward.name, total) as bar:
            for m, batch in missing:
                prompts = [self.asked[p].prompt for p, _ in batch]
                samples = Samples(
                    self.videos(m, batch),
                    [prompt.text for prompt in prompts],
                    self.models[m].config.model.fps,
                    [prompt.metadata for prompt in prompts],
                    [p for p, _ in batch],
                )
                (there,) = as_in_training([reward], samples, self.world.device)
                values = attempt(reward, there).values.tolist()
                for row, job in enumerate(batch):
                    if self._broken(self.ids[m], job) in self.store.values:
                        values[row] = math.nan
                names = [self._score_name(m, r, job) for job in batch]
                self.store.add(dict(zip(names, values, strict=True)))
                found += len(batch)
                bar.update(len(batch))
        return found

    def _score_name(self, m: int, r: int, job: Job) -> str:
        told = self.asked[job[0]].told
        among = self.seeds if self._groupwise(r) in self.store.values else 0
        return digest(self._sample(self.ids[m], job), told, self.reward_ids[r], among)

    def _groupwise(self, r: int) -> str:
        """Name of the note that a reward's scores depend on how many samples there are."""
        return f"groupwise {self.reward_ids[r]}"

    def _value(self, m: int, r: int, job: Job) -> float:
        return self.store.values.get(self._score_name(m, r, job), np.nan)

    def scores(self) -> np.ndarray:
        """[M, P, S, R] of all processes; a collective."""
        self._meet()
        shape = (len(self.models), len(self.asked), self.seeds, len(self.rewards))
        found = np.empty(shape)
        for m, p, s, r in np.ndindex(*shape):
            found[m, p, s, r] = self._value(m, r, (p, s))
        return found

    # ---- the audit -----------------------------------------------------------------------------

    def measure(self) -> None:
        """Take the traits that are missing, a prompt's samples at a time; a collective."""
        self.world.barrier()
        for m, model in enumerate(self.models):
            own = range(self.world.rank, len(self.asked), self.world.size)
            missing = [p for p in own if self._trait_name(m, (p, 0)) not in self.store.values]
            with self._bar(f"audit {model.name}", len(missing)) as bar:
                for p in missing:
                    jobs = [(p, s) for s in range(self.seeds)]
                    found = traits(self.videos(m, jobs))
                    for s, job in enumerate(jobs):
                        name = self._trait_name(m, job)
                        rows = {f"{name} {k}": float(v[s]) for k, v in found.items()}
                        self.store.add(rows | {name: 1.0})
                    bar.update()
        self._meet()

    def _trait_name(self, m: int, job: Job) -> str:
        return digest(self._sample(self.ids[m], job), "traits", TRAITS_VERSION, self.seeds)

    def findings(self, scores: np.ndarray) -> dict[str, list[Finding]]:
        """The audit of each model but the first, from measured traits and scores [M, P, S, R]."""
        told = [self._traits(m) for m in range(len(self.models))]
        found = {}
        for m, model in enumerate(self.models[1:], 1):
            pairs = {
                reward.name: (scores[0, ..., r], scores[m, ..., r])
                for r, reward in enumerate(self.rewards)
            }
            trained_on = [reward.name for reward in model.config.rewards if reward.weight]
            found[model.name] = findings(told[0], told[m], scores=pairs, trained_on=trained_on)
        return found

    def _traits(self, m: int) -> dict[str, np.ndarray]:
        jobs = [[(p, s) for s in range(self.seeds)] for p in range(len(self.asked))]
        values = self.store.values
        stored = [[self._trait_name(m, job) for job in row] for row in jobs]
        return {
            trait: np.array([[values.get(f"{n} {trait}", np.nan) for n in row] for row in stored])
            for trait in TRAITS
        }

    # ---- processes -----------------------------------------------------------------------------

    def _digest(self, model: Model) -> str:
        """Of all that a model's samples depend on, computed by the main process."""
        found = torch.zeros(16, dtype=torch.int64)
        if self.world.is_main:
            config, family = model.config, open_family(model.config.model)
            settings = config.model.model_dump(mode="json", exclude={"path", "revision"})
            folders = [family.source.folder] + ([model.weights] if model.weights else [])
            if model.weights and model.train == "full":
                folders = folders[1:]
            parts = [(weights_hash(folder), _json_hashes(folder)) for folder in folders]
            name = digest(parts, settings, self._steps(model))
            found = torch.tensor(list(bytes.fromhex(name)))
        self.world.all_reduce(found, "sum")
        return bytes(found.tolist()).hex()

    def _steps(self, model: Model) -> int:
        return self.steps or model.config.rollout.steps

    def _sum(self, count: int) -> int:
        total = torch.tensor(count)
        self.world.all_reduce(total, "sum")
        return int(total)

    def _meet(self) -> None:
        self.world.barrier()
        self.store.reload()

    def _bar(self, name: str, total: int) -> Any:
        return tqdm(total=total, desc=name, leave=False, disable=not self.world.is_main)


def _json_hashes(folder: Path) -> list[tuple[str, str]]:
    """Names and contents of a pipeline's configurations: its scheduler, its vocabularies."""
    files = sorted(file for file in folder.rglob("*.json") if file.is_file())
    return [(str(f.relative_to(folder)), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
