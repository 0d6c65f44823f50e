"""The learning gate: four algorithms must learn from the demo's start, and unlearn with its sign.

Three iterations on the demo's model and prompts, judged as a run is: the same held-out prompts and
initial noise before and after, paired, standard error over the 64 prompts: without an effect, more
than 3 standard errors are a chance of 1 in 500. The same budget with the gradient's sign flipped
must not pass: what passes is the direction of the update, not that weights move.

All of a run is a function of its seed, so on one machine the gains are constants. Those of seeds 0
(here), 1 and 2 and of the flipped sign stand beside each algorithm, in standard errors: 5.1 is the
least, so that another machine's rounding does not decide.

Cheaper and quicker to learn than the demo's recipe: 5 steps at equal distances (the early ones,
which decide the motion, are longer than on the model's own grid), more prompts an iteration and
smaller groups, so that an update is not about a few prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dancegrpo_fast.config import load_config
from dancegrpo_fast.data import PromptSet
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.report.evaluate import Difference, evaluate
from dancegrpo_fast.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    f"model.path={ROOT / 'examples/demo/model'}",
    f"data.prompts={ROOT / 'examples/demo/train_prompts.txt'}",
    f"evaluation.prompts={ROOT / 'examples/demo/heldout_prompts.txt'}",
    "iterations=3",
    "data.prompts_per_iteration=16",
    "rollout.group_size=12",
    "rollout.steps=5",
    "rollout.schedule=dance",
    "rollout.shift=1.0",
)
ALGORITHMS = {
    "DanceGRPO": (  # 5.6, 6.9, 6.3; flipped -12.
        "rollout.dynamics=dance",
        "rollout.tree={kind: shared_root}",
        "loss.timesteps=first",
        "loss.timestep_fraction=0.5",
    ),
    "MixGRPO": (  # 6.5, 5.8, 5.8; flipped -27.
        "rollout.dynamics=flow",
        "rollout.tree={kind: window, window_size: 2, window_order: progressive}",
    ),
    "BranchGRPO": (  # 5.8, 5.9, 5.5; flipped -34.
        "rollout.dynamics=dance",
        "rollout.noise_level=0.3",
        "rollout.tree={kind: branch_points, branch_steps: [0, 1], branches: 3, noise_scale: 4.0, "
        "window_size: 2, window_start: 0}",
        "rollout.group_size=9",
        "advantage.credit=depth",
    ),
    "DiffusionNFT": (  # 5.7, 6.4, 5.1; flipped -48.
        "rollout.noise_level=0",
        "rollout.tree={kind: independent_roots}",
        "loss.kind=nft",
        "loss.timestep_fraction=0.4",
        "loss.old_decay_limit=0",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all runs: the prompts are embedded once."""
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def base(folder: Path) -> np.ndarray:
    """Scores of the untrained model, which are every algorithm's: they share the sampling grid."""
    return held_out(begin("DanceGRPO", folder))


def begin(name: str, folder: Path) -> Trainer:
    overrides = (*COMMON, *ALGORITHMS[name], f"output={folder}")
    config = load_config(ROOT / "recipes" / "demo.yaml", overrides)
    return Trainer(config, World(0, 1, torch.device("cpu")))


def held_out(trainer: Trainer) -> np.ndarray:
    """Scores [prompts, seeds] of the weights there are."""
    config, model, family = trainer.config.evaluation, trainer.config.model, trainer.family
    assert config.prompts is not None
    with trainer.engine.gathered() as modules, family.vae():
        found = evaluate(
            lambda prompts, latents: trainer.draw(modules, prompts, latents),
            PromptSet.load(config.prompts, field="evaluation.prompts").prompts,
            trainer.rewards,
            config,
            latent_shape=family.latent_shape,
            sample_shape=(model.frames, 3, model.height, model.width),
            world=trainer.world,
        )
    return found.scores[..., 0]


def learns(trainer: Trainer, base: np.ndarray) -> bool:
    """Train, and say whether the held-out gain is more than 3 standard errors."""
    for _ in range(trainer.config.iterations):
        trainer.iteration()
    found = Difference.of(base, held_out(trainer))
    print(f"gain {found.gain:+.4f}, standard error {found.standard_error:.4f}")
    return found.gain > 3 * found.standard_error


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learns(name: str, folder: Path, base: np.ndarray) -> None:
    assert learns(begin(name, folder), base)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_does_not_learn_with_the_sign_flipped(
    name: str, folder: Path, base: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begin(name, folder)
    backward = trainer.engine.backward
    monkeypatch.setattr(trainer.engine, "backward", lambda network, loss: backward(network, -loss))
    assert not learns(trainer, base)
