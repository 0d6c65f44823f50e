"""What every family must do, stated once; `test_conformance.py` runs it on each `case_*.py`.

A case is a tiny random pipeline of the real diffusers classes, the recipe that trains it, and how
its stock pipeline is asked for the same thing. The stock pipeline's scheduler is replaced by the
one whose deterministic step we implement (`Case.scheduler`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import CPU, tiny_config  # noqa: E402

from dancegrpo_fast.config import RunConfig  # noqa: E402
from dancegrpo_fast.models import Family, load_family  # noqa: E402
from dancegrpo_fast.ops.noise import NoiseKey, normal  # noqa: E402
from dancegrpo_fast.policy import Policy  # noqa: E402
from dancegrpo_fast.prompt import Prompt  # noqa: E402
from dancegrpo_fast.rollout import draw_trees  # noqa: E402
from dancegrpo_fast.transitions import coefficient_table  # noqa: E402
from dancegrpo_fast.trees.tree import ROOT_STEP, State, TreePlan, noise_key  # noqa: E402

KEY = NoiseKey.from_seed(5)
STEPS = 4
TOLERANCE = 1e-5  # Issue's limit: fp32, a few steps of a tiny network, values of order 1.


@dataclass(frozen=True)
class Case:
    """One family's tiny twin.

    Attributes:
        name: Of the case; unique.
        family: `model.family`.
        build: Saves a tiny pipeline of the real classes into a folder.
        model: The recipe's model section beside family and path, guidance on where the model has
            it. Sizes are tiny.
        rollout: Overrides of the recipe's rollout section ("dynamics": "ddim" ...).
        prompts: Two prompts of different lengths (images are made by `images`).
        images: Writes the images that `prompts` need into a folder; returns the prompts.
        scheduler: Replaces the scheduler of a stock pipeline by the one we implement.
        breaks: Name -> overrides of the recipe ("model.guidance": ...) or a function of a family,
            each of which must break the equality with the stock pipeline by over 100 tolerances:
            guidance, shift, timestep scale, VAE scale.
        around: Holds while the case runs: what makes the stock pipeline itself small.
        trees: Overrides of `rollout.tree` beside the shared root.
        grids: (steps, expected sigmas) of the published scheduler configuration are tested in the
            case's own file.
    """

    name: str
    family: str
    build: Callable[[Path], Path]
    model: dict[str, Any]
    rollout: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, str] = ("a red square", "two green lines on a blue one")
    images: Callable[[Path, Sequence[str]], list[Prompt]] | None = None
    scheduler: Callable[[Any], None] = lambda pipeline: None
    breaks: dict[str, dict[str, Any] | Callable[[Family], None]] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def overrides(self) -> dict[str, Any]:
        """The case's recipe over `tiny_recipe`."""
        changes: dict[str, Any] = {"model.family": self.family, "model.max_text_length": None}
        changes |= {f"model.{key}": value for key, value in self.model.items()}
        changes |= {f"rollout.{key}": value for key, value in self.rollout.items()}
        return changes

    def recipe(
        self, folder: Path, model: Path, changes: dict[str, Any] | None = None
    ) -> RunConfig:
        """The recipe that trains the twin."""
        return tiny_config(folder, model, self.overrides() | (changes or {}))

    def made_prompts(self, folder: Path) -> list[Prompt]:
        """The case's prompts, with their images."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.images is not None:
            return self.images(folder, self.prompts)
        return [Prompt(text) for text in self.prompts]


def family_of(config: RunConfig) -> Family:
    """The loaded family of a recipe."""
    return load_family(config.model, CPU.device)


def deterministic(config: RunConfig, family: Family) -> TreePlan:
    """One chain of ODE steps."""
    chain = [State(i + 1, i, i + 1, (), "ode") for i in range(config.rollout.steps)]
    root = State(0, -1, 0, (), "root")
    return TreePlan(family.grid.schedule(config.rollout), (root, *chain))


def rolled_out(
    config: RunConfig, family: Family, prompts: Sequence[Prompt], modules: Any = None
) -> Tensor:
    """Final latents of prompts by our rollout, deterministically."""
    plan = deterministic(config, family)
    drawn = draw_trees(
        family,
        modules or family.modules,
        plan,
        coefficient_table(plan.transitions(dynamics=config.rollout.dynamics, level=0.3)),
        family.encode(prompts),
        key=KEY,
        owner=np.zeros((len(prompts), 1), int),
        rank=0,
        batch_size=len(prompts),
    )
    return drawn.samples()


def initial(family: Family, count: int) -> Tensor:
    """The noise that `rolled_out` starts from."""
    root = State(0, -1, 0, (), "root")
    draws = [noise_key(KEY.fold_in(p), root, ROOT_STEP) for p in range(count)]
    return torch.stack([normal(family.latent_shape, draw) for draw in draws])


def stock_pixels(
    case: Case, config: RunConfig, family: Family, pipeline: Any, prompts: Sequence[Prompt]
) -> Tensor:
    """[B, F, 3, H, W] of the stock pipeline from the noise that `rolled_out` starts from."""
    case.scheduler(pipeline)
    return family.draw(pipeline, prompts, initial(family, len(prompts)), config.rollout.steps)


def policy_of(config: RunConfig, family: Family) -> Policy:
    """The policy of a recipe."""
    policy = Policy(
        family.modules, config.policy,
        lora_targets=family.lora_targets, key=KEY, needs_reference=False,
    )  # fmt: skip
    policy.initialise_adapters(CPU.device)
    return policy


def move(policy: Policy, size: float) -> None:
    """Change every trainable weight, as training would."""
    for position, parameter in enumerate(policy.trainable().values()):
        noise = normal(tuple(parameter.shape), KEY.fold_in(9).fold_in(position).draw())
        parameter.data += size * noise
