"""What `benchmarks/algorithms.py` compares: groups of algorithms, each on one model and one reward.

Rows of a group are comparable, rows of different groups are not: model, reward, base and budget
differ. Each algorithm is its group's recipe with the fields below changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timing

from dancegrpo_fast.config import RunConfig, load_config

TARGET = 0.03  # Gain over the base whose cost is reported as "seconds to".


@dataclass(frozen=True)
class Group:
    """Algorithms that start from one model and learn one reward.

    Attributes:
        title: Model and reward, above its table.
        recipe: File in `recipes/`.
        judge: Reward of the held-out samples.
        budget: Model evaluations of a run, scoring included: of the table, and of the short check.
        scoring: To decode and score a sample, in model evaluations.
        gradient: To do so once more with gradients and go back to the latent (ReFL, DRaFT).
        algorithms: Name -> overrides of the recipe.
    """

    title: str
    recipe: Path
    judge: str
    budget: tuple[int, int]
    scoring: float
    algorithms: Mapping[str, tuple[str, ...]]
    gradient: float = 0.0

    def config(self, name: str, seed: int, output: str) -> RunConfig:
        """The recipe of an algorithm; `output` is scratch."""
        changes = self.algorithms[name]
        return load_config(self.recipe, [*changes, f"seed={seed}", f"output={output}"])

    def price(self, config: RunConfig) -> float:
        """Model evaluations of a sample outside the network."""
        differentiated = config.loss.kind in ("refl", "draft")
        return self.scoring + self.gradient * differentiated

    def hash(self, name: str, budget: float) -> str:
        """Of all that a row depends on but its seed: fields that are given, budget and prices."""
        given = self.config(name, 0, "scratch").model_dump(mode="json", exclude_unset=True)
        told = [given, budget, self.scoring, *([self.gradient] if self.gradient else [])]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


CHAINS = "rollout.tree={kind: independent_roots}"
FLOW_GRPO = (
    "rollout.dynamics=flow", CHAINS, "rollout.final=sample", "advantage.std=biased",
    "advantage.scope=batch_std",
)  # fmt: skip
DEMO: dict[str, tuple[str, ...]] = {
    "DanceGRPO": (
        "rollout.dynamics=dance", "rollout.noise_level=0.3", "rollout.tree={kind: shared_root}",
        "loss.timestep_fraction=0.6",
    ),
    "best-of-n": ("advantage.best_of_n=8",),
    "GDPO": (
        "rewards=[{name: benchmarks/algorithms.py:Colour}, "
        "{name: benchmarks/algorithms.py:Direction}, {name: benchmarks/algorithms.py:Shape}]",
        "advantage.batch_normalise=true",
    ),
    "Flow-GRPO": (*FLOW_GRPO, "loss.kl_weight=0.04", "loss.kl=flow_image"),
    "Flow-GRPO-Fast": (
        "rollout.dynamics=flow", "rollout.noise_level=0.8", "rollout.final=ode",
        "advantage.std=biased", "advantage.scope=batch_std",
    ),
    "Flow-CPS": (),
    "GRPO-Guard": (*FLOW_GRPO, "loss.ratio_norm=true", "loss.timestep_weights=inverse_dt"),
    "MixGRPO": (
        "rollout.dynamics=flow", "rollout.final=ode",
        "rollout.tree={kind: window, window_size: 4, window_order: progressive, "
        "window_iterations: 2}",
    ),
    "MixGRPO-Flash": (
        "rollout.dynamics=flow", "rollout.final=ode",
        "rollout.tree={kind: window, window_size: 4, window_order: progressive, "
        "window_iterations: 2, flash: 0.4}",
    ),
    "TempFlow-GRPO": (
        "rollout.dynamics=flow", "rollout.final=ode",
        "rollout.tree={kind: trunk_with_branches, trunks: 2, branches: 4, "
        "branch_steps: [0, 2, 4, 6]}",
        "advantage.std=biased", "advantage.credit=siblings", "loss.timestep_weights=std",
    ),
    "BranchGRPO": (
        "rollout.dynamics=dance", "rollout.noise_level=0.3",
        "rollout.tree={kind: branch_points, branches: 2, branch_steps: [0, 1, 2, 3, 4], "
        "noise_scale: 4.0}",
        "advantage.credit=depth",
    ),
    "Greedy search": (
        "rollout.tree={kind: search, trunks: 2, branches: 4, branch_steps: [0, 2, 4, 6]}",
        "advantage.credit=siblings",
    ),
    "DiffusionNFT": (
        "rollout.noise_level=0", CHAINS, "loss.kind=nft", "loss.timestep_fraction=0.3",
    ),
    "AWM": (
        "rollout.noise_level=0", CHAINS, "loss.kind=awm", "loss.old_weight=1.0",
        "loss.timestep_fraction=0.3",
    ),
}  # fmt: skip

SOFT = "rewards=[{name: examples/demo/soft_shape.py:SoftShape}]"
# A gradient compares no samples, so that 64 prompts an iteration have one each (ReFL's batch).
GRADIENT = (
    SOFT, CHAINS, "rollout.noise_level=0", "rollout.group_size=1", "data.prompts_per_iteration=64",
)  # fmt: skip
SOFT_DEMO: dict[str, tuple[str, ...]] = {
    "ReFL": (*GRADIENT, "loss.kind=refl"),
    "DRaFT-1": (*GRADIENT, "loss.kind=draft"),
    "DRaFT": (*GRADIENT, "loss.kind=draft", "loss.gradient_from=[0, 1]"),
    "Flow-CPS, soft reward": (SOFT,),
}
STILL: dict[str, tuple[str, ...]] = {
    "DDIM window": (),
    "DDPO": (
        CHAINS, "advantage.scope=running", "advantage.std=biased", "advantage.eps=1e-6",
        "loss.updates=2", "loss.old_log_prob=rollout",
    ),
    "DPOK": (CHAINS, "loss.kl_weight=1e-4", "loss.kl=v", "loss.updates=5"),
    "DanceGRPO, VP-SDE": (
        "rollout.dynamics=vp", "rollout.noise_level=0.3", "rollout.tree={kind: shared_root}",
        "loss.timestep_fraction=0.6",
    ),
}  # fmt: skip

RECIPES = timing.ROOT / "recipes"
# Prices: benchmarks/algorithm_prices.py, that of the first group benchmarks/search.py.
GROUPS: tuple[Group, ...] = (
    Group(
        "Rectified flow, the demo's reward: recipes/demo.yaml",
        RECIPES / "demo.yaml", "moving_shape", (36_000, 5_000), 2.35, DEMO,
    ),
    Group(
        "Rectified flow, a soft form of the demo's reward; judged by the demo's: recipes/demo.yaml",
        RECIPES / "demo.yaml", "moving_shape", (36_000, 5_000), 2.42, SOFT_DEMO, gradient=4.8,
    ),
    Group(
        "Epsilon prediction (UNet, DDIM), stills: recipes/demo_sd.yaml",
        RECIPES / "demo_sd.yaml", "examples/demo/stills.py:StillShape", (144_000, 20_000), 1.17,
        STILL,
    ),
)  # fmt: skip


def group_of(name: str) -> Group:
    """The group of an algorithm; names are unique."""
    (group,) = (group for group in GROUPS if name in group.algorithms)
    return group
