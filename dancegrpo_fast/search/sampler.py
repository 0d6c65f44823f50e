"""How a search evaluates the model and reads its estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dancegrpo_fast.batching import micro_batches
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import Family
from dancegrpo_fast.ops import sample_transition
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.trajectories import Place
from dancegrpo_fast.transitions import coefficient_table, transition, x0_step
from dancegrpo_fast.trees.tree import TreePlan


@dataclass(frozen=True)
class Sampler:
    """How states are evaluated and moved on.

    Attributes:
        family: Answers `model_output`, latent shape and action box.
        modules: Networks by name.
        schedule: The points that are visited.
        dynamics: Of the stochastic steps, and whose deterministic step the others are.
        level: Noise level.
        batch_size: States per forward.
        final: The last step: "ode", or "x0" for the x0 estimate.
        exact_density: See `transitions.transition`.
        latent_dtype: Storage of latents.
        forwards: [steps] forwards that every rank makes at each step, as `rollout.draw_trees` takes
            them; None: as many as it needs.
    """

    family: Family
    modules: Mapping[str, nn.Module]
    schedule: Schedule
    dynamics: str
    level: float
    batch_size: int
    final: str = "ode"
    exact_density: bool = False
    latent_dtype: str = "float32"
    forwards: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.final not in ("ode", "x0"):
            raise ValueError(f"final = {self.final!r}: a search ends in 'ode' or 'x0'")

    def kind(self, step: int, stochastic: bool) -> str:
        """Kind of the edges out of a step."""
        if stochastic:
            return "sde"
        return "x0" if self.final == "x0" and step == self.schedule.steps - 1 else "ode"

    def outputs(
        self, front: Mapping[Place, Tensor], step: int, conditions: Conditions
    ) -> dict[Place, Tensor]:
        """The model's output at every state of a level."""
        name = self.family.grid.module_names(self.schedule)[step]
        kinds, found = conditions.kinds, dict[Place, Tensor]()
        timestep = torch.tensor(self.schedule.timesteps[step], dtype=torch.float32)
        batches = micro_batches(list(front), self.batch_size, lambda place: kinds[place[0]])
        owed = 0 if self.forwards is None else self.forwards[step] - len(batches)
        for batch in batches + batches[-1:] * owed:  # What others need more repeats the last.
            output = self.family.model_output(
                self.modules[name],
                torch.stack([front[place] for place in batch]),
                timestep.to(self.family.device).expand(len(batch)),
                conditions.select([tree for tree, _ in batch]),
                name,
            )
            found |= zip(batch, output, strict=True)
        return found

    def estimates(self, latents: Tensor, outputs: Tensor, step: int) -> Tensor:
        """x0 = p x + q m of n states at a step, [n, C, F, H, W]."""
        row = coefficient_table([x0_step(self.schedule, step)], device=latents.device)
        table = row.expand(len(latents), -1).contiguous()
        return sample_transition(
            outputs, latents, table, action_box=self.family.action_box
        ).next_latents

    def edge(self, step: int, kind: str) -> Tensor:
        """[1, 8] coefficients of the edges of a kind out of a step, on the device."""
        row = transition(
            self.schedule, step, step + 1, dynamics=self.dynamics, kind=kind,
            level=self.level, exact_density=self.exact_density,
        )  # fmt: skip
        return coefficient_table([row], device=self.family.device)

    def table(self, plan: TreePlan, kl: str = "exact") -> Tensor:
        """[states, 8] coefficients of the edge into each state, on the device."""
        rows = plan.transitions(
            dynamics=self.dynamics, level=self.level, kl=kl, exact_density=self.exact_density
        )
        return coefficient_table(rows, device=self.family.device)
