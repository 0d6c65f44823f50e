"""Stand-ins for a network, its family and the policy, for tests of trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.models.conditions import Condition, Conditions
from dancegrpo_fast.models.family import evaluate
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.rollout import draw_trees
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.trees.tree import TreePlan

SCHEDULE = dance_schedule(5, 3.0)
SHAPE = (2, 3, 2, 2)
BOX = ((0, 2), (1, 3), (0, 2), (0, 1))
LEVEL = 0.3
KEY = NoiseKey.from_seed(5)


class Net(nn.Module):
    """A small network of one latent, its time and its prompt."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = ((6, 24 + 1 + 3), (24, 6))
        self.weights = nn.ParameterList(
            (torch.randn(*size, generator=generator) * size[1] ** -0.5).to(dtype) for size in sizes
        )

    def forward(self, features: Tensor) -> Tensor:
        first, second = self.weights
        return torch.tanh(features @ first.T) @ second.T


class Family:
    """Stand-in for a model family; rows are evaluated one by one, so batches change no bit."""

    device = torch.device("cpu")
    latent_shape = SHAPE

    def __init__(self, names: Sequence[str], box: tuple[tuple[int, int], ...] | None) -> None:
        self.action_box = box
        self.evaluations = 0
        self.grid = SimpleNamespace(module_names=lambda schedule: tuple(names))

    def begin(self, latents: Tensor, conditions: Conditions) -> Tensor:
        return latents

    def model_output(
        self,
        module: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        name: str,
    ) -> Tensor:
        self.evaluations += len(latents)
        dtype = next(module.parameters()).dtype
        rows = features(latents, timesteps, conditions.positive()["text"], dtype)
        return torch.stack([module(row) for row in rows]).reshape(latents.shape)


def features(
    latents: Tensor, timesteps: Tensor, embeds: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[n, 28] input rows of `Net`."""
    parts = (latents.flatten(1), timesteps[:, None] / 1000, embeds.flatten(1))
    return torch.cat([part.to(dtype) for part in parts], 1)


def embeddings(prompts: int) -> Conditions:
    """What the network is told about some prompts."""
    embeds = torch.linspace(-1, 1, 3 * prompts, dtype=torch.float64)
    rows = embeds.reshape(prompts, 1, 3)
    return Conditions.of([Condition({"text": row}) for row in rows])


class ReferencePolicy:
    """Stand-in for the policy: the loss asks it for the reference networks only."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._networks = networks

    @contextmanager
    def reference(self) -> Iterator[Mapping[str, nn.Module]]:
        yield self._networks


@dataclass
class Drawing:
    """Trees drawn in float32, as a run draws them, with what is needed to train on them."""

    drawn: Trajectories
    family: Family
    network: Net
    conditions: Conditions

    def output(self, prompt: int, state: int) -> Tensor:
        """The network's output at one stored state."""
        place = (prompt, state)
        latents = self.drawn.stack([place])
        plan = self.drawn.plan
        return evaluate(self.family, self.network, plan, self.conditions, [place], latents)[
            0
        ].detach()


def draw(
    plan: TreePlan,
    *,
    prompts: int = 2,
    batch_size: int = 4,
    latent_dtype: str = "float32",
    box: tuple[tuple[int, int], ...] | None = None,
) -> Drawing:
    """Draw the trees of some prompts on one rank."""
    family, network = Family(("net",) * plan.schedule.steps, box), Net(0, torch.float32)
    drawn = draw_trees(
        family, {"net": network}, plan,
        coefficient_table(plan.transitions(dynamics="dance", level=LEVEL)),
        embeddings(prompts), key=KEY, owner=leaf_owners(prompts, len(plan.leaves), 1),
        rank=0, batch_size=batch_size, latent_dtype=latent_dtype,
    )  # fmt: skip
    return Drawing(drawn, family, network, embeddings(prompts))
