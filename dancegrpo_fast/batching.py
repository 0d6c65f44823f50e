"""The update schedule: which rank runs which states in which micro-batch of which update.

Every rank derives the whole schedule from the gathered rewards and from keys, in canonical order
(prompt, state), so nothing but rewards, gradients and gate metrics ever crosses ranks, and an
update is the same function of (prompts, seed) on every number of ranks. Each rank makes the same
number of forward and backward calls of each module; a rank with less to do runs calls of zero
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dancegrpo_fast.advantages import LeafAdvantages
from dancegrpo_fast.ops.noise import NoiseKey, permutation
from dancegrpo_fast.trees.timesteps import timestep_subsets
from dancegrpo_fast.trees.tree import TreePlan

T = TypeVar("T")
_UPDATE = 0  # Domain below the selection key; timesteps.py has others.


@dataclass(frozen=True, slots=True)
class Item:
    """One state with its trained children: one network evaluation, K log-probs.

    Attributes:
        prompt: Position of the prompt in the iteration.
        state: Index of the state in the plan.
        children: [K] child states whose incoming edges are trained here.
        advantages: [K, C, 2] sums of positive and of negative advantages.
        weights: [K] share in the divisor and in the KL term.
    """

    prompt: int
    state: int
    children: tuple[int, ...]
    advantages: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Call:
    """One micro-batch: one forward and one backward of one module."""

    module: str
    items: tuple[Item, ...]

    @property
    def idle(self) -> bool:
        """Whether nothing in it has weight: this rank owes the others the call, and no gradient."""
        return not any(item.weights.any() for item in self.items)


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step, as one rank runs it.

    Attributes:
        calls: This rank's micro-batches; every rank has the same number per module, in this order.
        divisor: Sum over all ranks of the weights trained in this update.
        modules: Names of the modules with a trained edge on any rank; only these are stepped.
    """

    calls: tuple[Call, ...]
    divisor: float
    modules: tuple[str, ...]


@dataclass
class _Credit:
    """What one rank trains of one edge in one update."""

    advantages: np.ndarray  # [C, 2]
    weight: float = 0.0

    def add(self, values: np.ndarray, weight: float = 1.0) -> None:
        self.advantages[:, 0] += np.maximum(values, 0.0)
        self.advantages[:, 1] += np.minimum(values, 0.0)
        self.weight += weight


# A trained edge as (prompt, state, child).
Anchor = tuple[int, int, int]
# The trained edges of one rank in one update: (prompt, child state) -> credit.
Credits = dict[tuple[int, int], _Credit]


def leaf_owners(
    prompts: int, group_size: int, world_size: int, *, spread: bool = False
) -> np.ndarray:
    """[P, G] rank that draws each sample: contiguous in canonical order, or each group spread.

    What a spread group leaves over goes to other ranks with every prompt.
    """
    if spread:
        if group_size < world_size:
            raise ValueError(
                f"parallel.groups = 'spread': {group_size} samples of a prompt cannot be spread "
                f"over {world_size} processes; raise rollout.group_size, or use 'together'"
            )
        parts = np.array_split(np.arange(group_size), world_size)
        row = np.concatenate([np.full(len(part), rank) for rank, part in enumerate(parts)])
        turn = np.arange(prompts)[:, None] * (group_size % world_size)
        return (row + turn) % world_size
    if prompts * group_size < world_size:
        raise ValueError(
            f"{prompts} prompts x {group_size} samples cannot be spread over {world_size} "
            "processes; raise data.prompts_per_iteration or rollout.group_size, or start fewer"
        )
    parts = np.array_split(np.arange(prompts * group_size), world_size)
    owner = np.concatenate([np.full(len(part), rank) for rank, part in enumerate(parts)])
    return owner.reshape(prompts, group_size)


def micro_batches(
    items: Sequence[T], size: int, kind: Callable[[T], Hashable]
) -> list[list[T]]:
    """Cut items, in order, into batches of at most `size`; unequal kinds never share one."""
    batches: list[list[T]] = []
    for item in items:
        if batches and len(batches[-1]) < size and kind(batches[-1][0]) == kind(item):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def build_updates(
    plan: TreePlan,
    advantages: LeafAdvantages,
    selected: np.ndarray,
    *,
    key: NoiseKey,
    modules: Sequence[str],
    rank: int,
    world_size: int,
    updates: int = 1,
    timestep_fraction: float = 1.0,
    timesteps: str | Sequence[int] = "random",
    timestep_scope: str = "sample",
    micro_batch_size: int = 1,
    edge_values: np.ndarray | None = None,
    edge_weights: np.ndarray | None = None,
    kinds: Sequence[Hashable] | None = None,
    owner: np.ndarray | None = None,
) -> list[Update]:
    """The update schedule of one iteration for one rank.

    Args:
        plan: The tree of every prompt.
        advantages: Of the leaves; `values` [P, G, C].
        selected: [P, G] bool, the samples trained on (best-of-n); invalid ones are dropped here.
        key: Selection key of the iteration.
        modules: [steps] name of the module that evaluates each step.
        rank: This process.
        world_size: Number of processes.
        updates: Optimizer steps per iteration (U).
        timestep_fraction: Share of a sample's trained steps that enter its update.
        timesteps: Which these are: "random", "first", or the steps themselves.
        timestep_scope: Whether a "sample" or a "group" has random steps of its own.
        micro_batch_size: States per forward and backward.
        edge_values: [P, states, C] for edge-wise credit (`depth`, `siblings`); None credits leaves.
        edge_weights: [states] positive factor of the policy term of each trained edge, outside the
            divisor and the KL (`timesteps.edge_weights`); None: 1.
        owner: [P, G] rank of each sample; None is `leaf_owners`.
        kinds: [P] prompts of unequal kinds (text lengths) never share a micro-batch; None: all may.
    """
    prompts, group_size, columns = advantages.values.shape
    if owner is None:
        owner = leaf_owners(prompts, group_size, world_size)
    chosen = selected & advantages.valid
    update_of = _update_of_leaves(chosen, key, updates)
    steps_of = timestep_subsets(
        plan, chosen, key, fraction=timestep_fraction, timesteps=timesteps, scope=timestep_scope
    )

    table: list[list[Credits]] = [[{} for _ in range(world_size)] for _ in range(updates)]
    taken: set[tuple[int, int]] = set()
    for p, g in zip(*np.nonzero(chosen), strict=True):
        p, g = int(p), int(g)
        for edge in plan.leaf_edges[g]:
            first_leaf = (p, edge) not in taken
            taken.add((p, edge))
            if plan.states[plan.states[edge].parent].step not in steps_of[p, g]:
                continue
            if edge_values is None:
                values = advantages.values[p, g]
            elif first_leaf:
                values = edge_values[p, edge]
            else:
                continue  # Edge-wise credit: an edge belongs wholly to its first leaf's update.
            if edge_weights is not None:
                values = values * edge_weights[edge]
            credits = table[update_of[p, g]][owner[p, g]]
            credits.setdefault((p, edge), _Credit(np.zeros((columns, 2)))).add(values)

    anchor = _anchors(plan, owner, advantages.valid, world_size)
    return [
        _update_for_rank(
            plan, ranks, anchor, modules, rank, micro_batch_size, columns, kinds or [0] * prompts
        )
        for ranks in table
    ]


def _update_of_leaves(chosen: np.ndarray, key: NoiseKey, updates: int) -> np.ndarray:
    """[P, G] update of each chosen sample: position in its group's shuffled list, modulo U."""
    result = np.zeros(chosen.shape, dtype=int)
    for p in range(chosen.shape[0]):
        members = np.flatnonzero(chosen[p])
        order = permutation(len(members), key.fold_in(_UPDATE).fold_in(p).draw())
        result[p, members[order]] = np.arange(len(members)) % updates
    return result


def _anchors(
    plan: TreePlan, owner: np.ndarray, valid: np.ndarray, world_size: int
) -> list[list[Anchor]]:
    """Per rank, the trained edges of its leaves: the work of its zero-weight calls."""
    found: list[list[Anchor]] = []
    for rank in range(world_size):
        own = np.argwhere(owner == rank)
        # Valid leaves if there are any: latents of a failed one may be NaN, and 0 x NaN is NaN.
        usable = own[valid[tuple(own.T)]]
        found.append(
            [
                (int(p), plan.states[edge].parent, edge)
                for p, g in (usable if len(usable) else own)
                for edge in plan.leaf_edges[g]
            ]
        )
    return found


def _update_for_rank(
    plan: TreePlan,
    ranks: list[Credits],
    anchors: list[list[Anchor]],
    modules: Sequence[str],
    rank: int,
    micro_batch_size: int,
    columns: int,
    kinds: Sequence[Hashable],
) -> Update:
    items_of = [_items_by_module(plan, credits, modules) for credits in ranks]
    names = [name for name in dict.fromkeys(modules) if any(name in items for items in items_of)]

    def batches_of(items: dict[str, list[Item]], name: str) -> list[list[Item]]:
        return micro_batches(items.get(name, []), micro_batch_size, lambda i: kinds[i.prompt])

    calls: list[Call] = []
    for name in names:
        most = max(len(batches_of(items, name)) for items in items_of)
        batches = batches_of(items_of[rank], name)
        padding = _idle_item(plan, anchors[rank], modules, name, columns)
        batches += [[padding]] * (most - len(batches))
        calls += [Call(name, tuple(batch)) for batch in batches]
    divisor = sum(credit.weight for credits in ranks for credit in credits.values())
    return Update(tuple(calls), float(divisor), tuple(names))


def _items_by_module(
    plan: TreePlan, credits: Credits, modules: Sequence[str]
) -> dict[str, list[Item]]:
    children: dict[tuple[int, int], list[int]] = {}
    for p, edge in sorted(credits):
        children.setdefault((p, plan.states[edge].parent), []).append(edge)
    grouped: dict[str, list[Item]] = {}
    for (p, state), edges in sorted(children.items()):
        found = [credits[p, edge] for edge in edges]
        item = Item(
            p,
            state,
            tuple(edges),
            np.stack([credit.advantages for credit in found]),
            np.array([credit.weight for credit in found]),
        )
        grouped.setdefault(modules[plan.states[state].step], []).append(item)
    return grouped


def _idle_item(
    plan: TreePlan,
    anchors: list[Anchor],
    modules: Sequence[str],
    name: str,
    columns: int,
) -> Item:
    """A zero-weight item for `name`; its edge is one the rank sampled, so nothing is made up."""
    fitting = [a for a in anchors if modules[plan.states[a[1]].step] == name]
    # A rank that holds no edge of this module makes the calls it owes with any state it has.
    prompt, state, edge = (fitting or anchors)[0]
    return Item(prompt, state, (edge,), np.zeros((1, columns, 2)), np.zeros(1))
