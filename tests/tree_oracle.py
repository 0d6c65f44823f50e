"""The updates of a tree, twice: by the package, and as an explicit list of transitions.

`package_updates` runs the real road (draw, advantages, schedule of micro-batches, loss of calls) on
any number of simulated ranks. `explicit_updates` writes the same updates as one row for every
(sample, trained transition) - or every edge, where the credit rule says so - with the rules taken
from their definitions and nothing shared, summed or batched by state.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
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
from dancegrpo_fast.ops.noise import permutation
from dancegrpo_fast.rollout import draw_trees
from dancegrpo_fast.trajectories import Fan, Trajectories
from dancegrpo_fast.transitions import Transition, coefficient_table, transition
from dancegrpo_fast.tree import TreePlan

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


# ------------------------------------------------------------------ the package


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
        _clear(case)
        for drawn, updates in ranks:
            divisors.add(updates[position].divisor)
            for call in updates[position].calls:
                part = call_loss(case, call, drawn, updates[position].divisor).loss
                part.backward()
                loss += float(part.detach())
        (divisor,) = divisors
        results.append(Result(loss, _gradient(case), divisor))
    return results


def _clear(case: Case) -> None:
    for network in case.networks.values():
        network.zero_grad(set_to_none=True)


def _gradient(case: Case) -> Tensor:
    flat = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for network in case.networks.values()
        for p in network.parameters()
    ]
    return torch.cat(flat).clone()


# ------------------------------------------------------------------ the explicit list


@dataclass(frozen=True)
class Term:
    """One separately clipped transition: its edge and its advantage per reward column."""

    prompt: int
    edge: int
    values: tuple[float, ...]


def walk(plan: TreePlan, leaf: int) -> list[int]:
    """Child states of the trained edges on the way to a leaf, root first."""
    found = []
    while leaf >= 0:
        found += [leaf] if plan.states[leaf].trained else []
        leaf = plan.states[leaf].parent
    return found[::-1]


def leaves_of(plan: TreePlan) -> list[int]:
    """States that are nobody's parent."""
    parents = {state.parent for state in plan.states}
    return [state.index for state in plan.states if state.index not in parents]


def normalised(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-8) with the unbiased std; 0 where nothing differs or one is left."""
    if len(rewards) < 2 or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (std + 1e-8) for reward in rewards]


def _columns(case: Case, p: int, g: int) -> list[float] | None:
    """What is normalised of one sample, signed so that more is better; None if it failed."""
    used = [(r, w) for r, w in zip(case.rewards[p, g].tolist(), case.weights, strict=True) if w]
    if any(r != r for r, _ in used):
        return None
    if case.combine == "reward":
        return [sum(w * r for r, w in used)]
    return [r if w > 0 else -r for r, w in used]


def _joined(case: Case, normal: Sequence[float]) -> tuple[float, ...]:
    """One transition's advantages, combined and clamped."""
    if case.combine == "advantage":
        used = [abs(w) for w in case.weights if w]
        normal = [sum(w * a for w, a in zip(used, normal, strict=True))]
    return tuple(max(-1.2, min(1.2, a)) for a in normal)


def _normalise_columns(rows: Mapping[int, list[float]]) -> dict[int, list[float]]:
    """Each column of some members' rewards, normalised over the members."""
    columns = [normalised(column) for column in zip(*rows.values(), strict=True)]
    return {member: [column[i] for column in columns] for i, member in enumerate(rows)}


def leaf_values(case: Case, p: int) -> dict[int, tuple[float, ...]]:
    """Advantages of the valid samples of a prompt, by leaf position."""
    group = range(len(case.plan.leaves))
    rows = {g: row for g in group if (row := _columns(case, p, g)) is not None}
    return {g: _joined(case, normal) for g, normal in _normalise_columns(rows).items()}


def edge_values(case: Case, p: int) -> dict[int, tuple[float, ...]]:
    """Advantages of the edges of a prompt under `depth` or `siblings`, by child state."""
    plan, below = case.plan, {}
    for g, leaf in enumerate(leaves_of(plan)):
        row = _columns(case, p, g)
        for edge in walk(plan, leaf) if row is not None else ():
            below.setdefault(edge, []).append(row)
    means = {e: [statistics.fmean(c) for c in zip(*rows, strict=True)] for e, rows in below.items()}
    children: dict[int, list[int]] = {}
    for state in plan.states:
        if state.trained:
            children.setdefault(state.parent, []).append(state.index)
    sets: dict[int, dict[int, list[float]]] = {}
    for edge in sorted(means):
        state = plan.states[edge]
        if case.credit == "depth":
            sets.setdefault(state.step, {})[edge] = means[edge]
        elif len(children[state.parent]) > 1:
            sets.setdefault(state.parent, {})[edge] = means[edge]
    normal = {e: row for members in sets.values() for e, row in _normalise_columns(members).items()}
    for edge in sorted(means):
        if edge not in normal:  # An only child: the edge into its parent speaks for it.
            normal[edge] = normal[plan.states[edge].parent]
    return {edge: _joined(case, row) for edge, row in normal.items()}


def kept_edges(case: Case, p: int, g: int) -> list[int]:
    """The trained edges of a sample that its subset of steps holds."""
    plan, key = case.plan, KEY.fold_in(2)
    way = walk(plan, leaves_of(plan)[g])
    if isinstance(case.timesteps, tuple):
        return [edge for edge in way if plan.states[edge].step - 1 in case.timesteps]
    if case.fraction == 1:
        return way
    if case.timesteps == "first":
        return way[: max(1, int(case.fraction * len(way)))]
    if case.scope == "group":
        steps = sorted({s.step for s in plan.states if s.trained})
        order = permutation(len(steps), key.fold_in(2).fold_in(p).draw())
        chosen = {steps[i] for i in order[: max(1, int(case.fraction * len(steps)))]}
        return [edge for edge in way if plan.states[edge].step in chosen]
    order = permutation(len(way), key.fold_in(1).fold_in(p).fold_in(g).draw())
    return [way[i] for i in order[: max(1, int(case.fraction * len(way)))]]


def explicit_terms(case: Case) -> list[list[Term]]:
    """The transitions of every update."""
    plan, key = case.plan, KEY.fold_in(2)
    updates: list[list[Term]] = [[] for _ in range(case.updates)]
    for p in range(case.prompts):
        leaves = leaf_values(case, p)
        weights = [abs(w) for w in case.weights if w] if case.combine == "loss" else [1.0]
        ranked = sorted(
            leaves, key=lambda g: sum(w * a for w, a in zip(weights, leaves[g], strict=True))
        )
        if case.best_of_n is not None and case.best_of_n < len(ranked):
            half = case.best_of_n // 2
            ranked = ranked[:half] + ranked[-half:]
        chosen = sorted(ranked)
        shuffled = permutation(len(chosen), key.fold_in(0).fold_in(p).draw()).tolist()
        edges = edge_values(case, p) if case.credit != "leaf" else {}
        met: set[int] = set()
        for rank, g in enumerate(chosen):
            way = walk(plan, leaves_of(plan)[g])
            kept = kept_edges(case, p, g)
            for edge in way:
                first = edge not in met
                met.add(edge)
                if edge in kept and (first or case.credit == "leaf"):
                    values = leaves[g] if case.credit == "leaf" else edges[edge]
                    term = Term(p, edge, tuple(dyadic(np.array(values)).tolist()))
                    updates[shuffled.index(rank) % case.updates].append(term)
    return updates


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


def explicit_losses(case: Case, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Loss [n] of each term before the divisor, and its ratio [n]."""
    edges = [(term.prompt, term.edge) for term in terms]
    log_prob, kl = explicit_transitions(case, edges)
    ratio = torch.exp(log_prob - torch.stack([case.planted[edge] for edge in edges]))
    values = torch.tensor([term.values for term in terms], dtype=torch.float64)
    weights = [abs(w) for w in case.weights if w] if case.combine == "loss" else [1.0]
    total = case.kl_weight * kl
    factor = torch.ones(len(terms), dtype=torch.float64)
    if case.step_weights is not None:
        steps = [case.plan.states[term.edge].step - 1 for term in terms]
        factor = torch.tensor([case.step_weights[step] for step in steps], dtype=torch.float64)
    for column, weight in enumerate(weights):
        gain = values[:, column] * ratio
        clipped = values[:, column] * ratio.clamp(1 - CLIP, 1 + CLIP)
        total = total - factor * weight * torch.minimum(gain, clipped)
    return total, ratio


def explicit_updates(case: Case) -> list[Result]:
    """Every update: the mean of its terms' losses, and its gradient."""
    results = []
    for terms in explicit_terms(case):
        _clear(case)
        loss = 0.0
        if terms:
            mean = explicit_losses(case, terms)[0].sum() / len(terms)
            mean.backward()
            loss = float(mean.detach())
        results.append(Result(loss, _gradient(case), float(len(terms))))
    return results
