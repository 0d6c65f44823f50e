"""One iteration of a tree as the package runs it: draw, advantages, micro-batches, loss of calls.

On any number of simulated ranks. `tree_oracle` writes the same updates as explicit lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from tree_stand_ins import KEY, LEVEL, SCHEDULE, SHAPE, Family, Net, ReferencePolicy, embeddings
from tree_stand_ins import features as network_input

from dancegrpo_fast.advantages import best_and_worst, edge_advantages, leaf_advantages
from dancegrpo_fast.batching import Call, Update, build_updates, leaf_owners
from dancegrpo_fast.config import AdvantageConfig, LossConfig
from dancegrpo_fast.losses.policy_gradient import policy_gradient_loss
from dancegrpo_fast.ops import PolicyLoss
from dancegrpo_fast.rollout import draw_trees
from dancegrpo_fast.trajectories import Fan, Trajectories
from dancegrpo_fast.transitions import Transition, coefficient_table, transition
from dancegrpo_fast.trees.tree import TreePlan

CLIP = 0.2
# Log-ratios planted on the edges in turn: twice below the clip range, inside, twice above.
LOG_RATIOS = (-0.6, -0.3, 0.05, 0.25, 0.5)
EXPERTS = ("high", "high", "low", "low", "low")

Edge = tuple[int, int]  # prompt, child state


def _networks(names: Sequence[str]) -> dict[str, Net]:
    return {name: Net(i) for i, name in enumerate(dict.fromkeys(names))}


@cache
def _draw(
    plan: TreePlan,
    prompts: int,
    names: tuple[str, ...],
    box: tuple[tuple[int, int], ...] | None,
    rank: int,
    world_size: int,
) -> Trajectories:
    """A rank's part of the trees; coefficients stay float64. Read only: cases share it."""
    rows = plan.transitions(dynamics="dance", level=LEVEL)
    return draw_trees(
        Family(names, box), _networks(names), plan, coefficient_table(rows, dtype=torch.float64),
        embeddings(prompts), key=KEY.fold_in(1),
        owner=leaf_owners(prompts, len(plan.leaves), world_size), rank=rank, batch_size=5,
    )  # fmt: skip


@dataclass
class Case:
    """One iteration: a tree, rewards and settings."""

    plan: TreePlan
    credit: str = "leaf"
    prompts: int = 2
    weights: tuple[float, ...] = (1.0,)
    combine: str = "advantage"
    failures: bool = False
    best_of_n: int | None = None
    updates: int = 1
    fraction: float = 1.0
    timesteps: str | tuple[int, ...] = "random"
    scope: str = "sample"
    step_weights: tuple[float, ...] | None = None
    micro_batch_size: int = 4
    kl_weight: float = 0.0
    box: tuple[tuple[int, int], ...] | None = None
    names: tuple[str, ...] = ("net",) * SCHEDULE.steps
    rewards: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        size = (self.prompts, len(self.plan.leaves), len(self.weights))
        self.rewards = np.random.default_rng(11).normal(size=size).astype(np.float32)
        for column in np.flatnonzero(np.array(self.weights) == 0):
            self.rewards[:, ::2, column] = np.nan  # Only logged: its failures drop nothing.
        if self.failures:
            self.rewards[0, 1::3, 0] = np.nan
            self.rewards[1] = 0.37
            self.rewards[-1] = np.nan
        self.networks = _networks(self.names)
        self.references = {name: Net(9 + i) for i, name in enumerate(self.networks)}
        self.family = Family(self.names, self.box)
        self.conditions = embeddings(self.prompts)
        self.settings = AdvantageConfig(
            combine=self.combine, credit=self.credit, best_of_n=self.best_of_n, clip=1.2
        )
        self.whole = self.draw(0, 1)
        self.planted = self._planted()

    def draw(self, rank: int, world_size: int) -> Trajectories:
        """A rank's part of the trees."""
        return _draw(self.plan, self.prompts, self.names, self.box, rank, world_size)

    def _planted(self) -> dict[Edge, Tensor]:
        """Old log-probs that put the ratios of the edges on all sides of the clip range."""
        trained = [(p, s.index) for p in range(self.prompts) for s in self.plan.states if s.trained]
        with torch.no_grad():
            now, _ = explicit_transitions(self, trained)
        turns = [3 * p + edge + self.plan.states[edge].step for p, edge in trained]
        return {
            edge: value - LOG_RATIOS[turn % len(LOG_RATIOS)]
            for edge, value, turn in zip(trained, now, turns, strict=True)
        }


@dataclass
class Result:
    """One update: loss, gradient over all networks, divisor."""

    loss: float
    gradient: Tensor
    divisor: float


def dyadic(values: np.ndarray) -> np.ndarray:
    """Multiples of 2^-12: their sums are exact in float32, in which the loss takes them."""
    return np.round(np.asarray(values, dtype=np.float64) * 4096) / 4096


@cache
def _step(child_step: int, noise_scale: float) -> Transition:
    return transition(
        SCHEDULE, child_step - 1, child_step, dynamics="dance", kind="sde", level=LEVEL,
        noise_scale=noise_scale,
    )  # fmt: skip


def explicit_transitions(case: Case, edges: Sequence[Edge]) -> tuple[Tensor, Tensor]:
    """Log-prob and KL of some edges, one network row for each: [n] each."""
    inside = torch.zeros(SHAPE, dtype=torch.bool)
    inside[tuple(slice(*side) for side in case.box or [(0, size) for size in SHAPE])] = True
    log_prob, kl = [None] * len(edges), [None] * len(edges)
    names = [case.names[case.plan.states[case.plan.states[e].parent].step] for _, e in edges]
    for name in case.networks:
        rows = [i for i, other in enumerate(names) if other == name]
        if not rows:
            continue
        states = [case.plan.states[edges[i][1]] for i in rows]
        parents = [(edges[i][0], s.parent) for i, s in zip(rows, states, strict=True)]
        x = torch.stack([case.whole.latents[parent] for parent in parents])
        y = torch.stack([case.whole.latents[edges[i]] for i in rows]).double()
        times = torch.tensor([SCHEDULE.timesteps[s.step - 1] for s in states])
        asked = case.conditions.select([edges[i][0] for i in rows])
        inputs = network_input(x, times, asked.positive()["text"])
        m = case.networks[name](inputs).reshape(y.shape)
        with torch.no_grad():
            reference = case.references[name](inputs).reshape(y.shape)
        steps = [_step(state.step, state.noise_scale) for state in states]
        a, b, w, c, k = torch.tensor(
            [(t.a, t.b, t.w, t.c, t.k) for t in steps], dtype=torch.float64
        ).T.reshape(5, -1, 1, 1, 1, 1)
        residual = (y - a * x.double() - b * m)[:, inside].square().mean(1)
        drift = (m - reference)[:, inside].square().mean(1)
        for row, i in enumerate(rows):
            log_prob[i] = c.flatten()[row] - w.flatten()[row] * residual[row]
            kl[i] = k.flatten()[row] * drift[row]
    return torch.stack(log_prob), torch.stack(kl)


def schedule_updates(case: Case, rank: int = 0, world_size: int = 1) -> list[Update]:
    """The update schedule of a rank."""
    weights = np.array(case.weights)
    advantages = leaf_advantages(case.rewards, weights, case.settings)
    # Failed samples are selected too: the schedule drops them.
    selected, edges = np.ones_like(advantages.valid), None
    if case.best_of_n is not None:
        selected = best_and_worst(advantages, case.best_of_n)
    if case.credit != "leaf":
        edges = dyadic(edge_advantages(case.plan, case.rewards, weights, case.settings)[0])
    return build_updates(
        case.plan,
        replace(advantages, values=dyadic(advantages.values)),
        selected,
        key=KEY.fold_in(2),
        modules=case.names,
        rank=rank,
        world_size=world_size,
        updates=case.updates,
        timestep_fraction=case.fraction,
        timesteps=case.timesteps,
        timestep_scope=case.scope,
        edge_weights=None if case.step_weights is None else np.array(
            [case.step_weights[s.step - 1] if s.trained else 0.0 for s in case.plan.states]
        ),
        micro_batch_size=case.micro_batch_size,
        edge_values=edges,
    )


def call_loss(case: Case, call: Call, drawn: Trajectories, divisor: float) -> PolicyLoss:
    """The loss of one micro-batch, with the planted old log-probs."""
    column_weights = leaf_advantages(case.rewards, np.array(case.weights), case.settings).weights
    return policy_gradient_loss(
        call, drawn, case.conditions, case.family,
        ReferencePolicy(case.references), case.networks[call.module],
        LossConfig(clip_range=CLIP, kl_weight=case.kl_weight, micro_batch_size=1),
        divisor=divisor,
        reward_weights=column_weights,
        old_log_prob=drawn.recorded_log_prob(Fan.of_call(call).edges),
    )  # fmt: skip


def package_updates(case: Case, world_size: int = 1) -> list[Result]:
    """Every update, summed over its calls and over ranks."""
    ranks = []
    for rank in range(world_size):
        drawn = case.whole if world_size == 1 else case.draw(rank, world_size)
        drawn = replace(drawn, log_prob=case.planted)
        ranks.append((drawn, schedule_updates(case, rank, world_size)))
    results = []
    for position in range(case.updates):
        loss, divisors = 0.0, set()
        clear(case)
        for drawn, updates in ranks:
            divisors.add(updates[position].divisor)
            for call in updates[position].calls:
                part = call_loss(case, call, drawn, updates[position].divisor).loss
                part.backward()
                loss += float(part.detach())
        (divisor,) = divisors
        results.append(Result(loss, gradient_of(case), divisor))
    return results


def clear(case: Case) -> None:
    """Forget gradients."""
    for network in case.networks.values():
        network.zero_grad(set_to_none=True)


def gradient_of(case: Case) -> Tensor:
    """The gradient over all networks, flat."""
    flat = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for network in case.networks.values()
        for p in network.parameters()
    ]
    return torch.cat(flat).clone()
