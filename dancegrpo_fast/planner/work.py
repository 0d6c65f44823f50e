"""What one iteration asks of the networks: states, calls and stored latents of each process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dancegrpo_fast.advantages import RunningRewards, edge_advantages, leaf_advantages
from dancegrpo_fast.batching import Call, Update, build_updates, leaf_owners, micro_batches
from dancegrpo_fast.config import RunConfig, UserError
from dancegrpo_fast.models import Family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.roles import Role
from dancegrpo_fast.rollout import forwards_per_step, held_states, plan_iteration, steps_kept
from dancegrpo_fast.sampling import pool
from dancegrpo_fast.trajectories import Place
from dancegrpo_fast.trees.candidates import walk
from dancegrpo_fast.trees.tree import TreePlan
from dancegrpo_fast.updating import old_log_prob_mode


@dataclass(frozen=True)
class Work:
    """One iteration of the busiest process (rank 0). Calls are by network.

    A sample's reward is not known ahead: the scores are drawn, every sample is valid.

    Attributes:
        plan: The tree of every prompt.
        rollout: Batch sizes of the forwards of a rollout without gradients, samples that are drawn
            again included.
        pool: Those of them whose samples are only scored (`rollout.redraw`).
        gathers: How often a rollout gathers the weights: once for each part that is drawn.
        agreed: Forwards a rollout makes where every rank must make the same number.
        training: Of each update, the batch sizes of its forwards and backwards.
        recomputed: Batch sizes of the forwards that recompute old log-probs.
        children: Most trained transitions in one forward and backward.
        stored: Latents that are kept to the end of the iteration.
        decoded: Latents that are kept while samples are decoded and scored.
        passing: Most latents that live besides the stored ones while a level is drawn.
        level: Most latents of a level with its children; what passes where others are stored. A
            search stores none before its end: what is kept is counted, too.
        outputs: Model outputs that are kept for `loss.ratio_norm`.
        graphs: Batch sizes of the rollout's forwards whose graphs `loss.reuse_forwards` keeps;
            `training` is then those of them that have a trained state, and backwards only.
        samples: Samples to decode and score.
    """

    plan: TreePlan
    rollout: dict[str, list[int]]
    pool: dict[str, list[int]]
    gathers: dict[str, int]
    agreed: dict[str, int]
    training: tuple[dict[str, list[int]], ...]
    recomputed: dict[str, list[int]]
    children: int
    stored: int
    decoded: int
    passing: int
    level: int
    outputs: int
    graphs: dict[str, list[int]]
    samples: int


def work_of(
    config: RunConfig, family: Family, processes: int, sp: int = 1, *, iteration: int = 0
) -> Work:
    """The work of an iteration on a number of processes.

    Raises:
        UserError: The samples cannot be spread over them.
    """
    ranks = processes // sp
    prompts, size = config.data.prompts_per_iteration, config.rollout.group_size
    spread = config.parallel.groups == "spread"
    try:
        plan = plan_iteration(config, family.grid, iteration)
        owner = leaf_owners(prompts, size, ranks, spread=spread)
        walked, walker = walk(config.rollout, plan, owner)
    except ValueError as error:
        raise UserError(str(error)) from error
    modules = family.grid.module_names(plan.schedule)
    updates, owner_again = _updates(config, plan, owner, modules, ranks, iteration)
    training = tuple(_batches(update.calls) for update in updates)
    recomputed: dict[str, list[int]] = {}
    mode = old_log_prob_mode(config)
    if mode == "recompute":
        for update in training[1:]:
            for name, batches in update.items():
                recomputed.setdefault(name, []).extend(batches)
    draws = _draws(config, walked, walker, owner_again, modules)
    stored = draws[-1].kept if config.rollout.redraw else sum(draw.kept for draw in draws)
    outputs = 0
    if config.loss.ratio_norm and mode != "on_policy":
        recomputes = sum(sum(batches) for batches in recomputed.values())
        sources = draws[-1:] if config.rollout.redraw else draws
        outputs = recomputes if mode == "recompute" else sum(d.sources for d in sources)
    graphs: list[tuple[str, list[Place]]] = []
    if config.loss.reuse_forwards:
        graphs = [g for d in (draws[-1:] if config.rollout.redraw else draws) for g in d.graphs]
        due = {(item.prompt, item.state) for u in updates for c in u.calls for item in c.items}
        training = (_sizes(graph for graph in graphs if not due.isdisjoint(graph[1])),)
    most = max((sum(len(i.children) for i in c.items) for u in updates for c in u.calls), default=0)
    return Work(
        plan=plan,
        rollout=_joined(draw.forwards for draw in draws),
        pool=_joined(draw.forwards for draw in draws[:-1] if config.rollout.redraw),
        gathers=dict(Counter(name for draw in draws for name in draw.forwards)),
        agreed=dict(sum((draw.agreed for draw in draws), Counter())),
        training=training,
        recomputed=recomputed,
        children=most,
        stored=stored,
        decoded=max(d.kept for d in draws[:-1]) if config.rollout.redraw else stored,
        passing=_most_alive(draws, config.rollout.redraw) - stored,
        level=max(draw.level for draw in draws),
        outputs=outputs,
        graphs=_sizes(graphs),
        samples=-(-int((walker == 0).sum()) // sp),
    )


@dataclass(frozen=True)
class _Draw:
    """One call of `rollout.draw_trees`.

    Attributes:
        forwards: Batch sizes by network.
        agreed: Forwards that every rank makes, by network.
        kept: Latents that are kept.
        alive: Most latents alive at once, kept ones included.
        level: Most latents of a level with its children.
        sources: States with a trained child.
        graphs: Network and states of each forward with such a one.
    """

    forwards: dict[str, list[int]]
    agreed: Counter[str]
    kept: int
    alive: int
    level: int
    sources: int
    graphs: list[tuple[str, list[Place]]]


def _draws(
    config: RunConfig, plan: TreePlan, owner: np.ndarray, again: np.ndarray, modules: Sequence[str]
) -> list[_Draw]:  # fmt: skip
    """What rank 0 draws: the parts of its samples, and those that are drawn again."""
    rollout, batch_size = config.rollout, config.rollout.batch_size
    # Which reward of a user's waits is not known here; a number alone is no mistake then.
    asked = any((reward.path or "").startswith("http") for reward in config.rewards)
    searching = rollout.tree.kind == "search"
    waiting = (asked or rollout.chunk is not None) and not searching
    tables = [
        (part, "samples" if rollout.redraw else "search" if searching else "all")
        for part in pool.chunks(rollout, owner, waiting=waiting)
    ]
    if rollout.redraw:
        tables.append((again, "training"))
    draws = []
    for table, keep in tables:
        leaves = [(int(p), int(g)) for p, g in np.argwhere(table == 0)]
        steps = steps_kept(plan, keep)
        agreed: Counter[str] = Counter()
        most = forwards_per_step(plan, table, [0] * len(table), batch_size)
        for name, count in zip(modules[:steps], most, strict=False):
            agreed[name] += count
        held = held_states(plan, leaves)
        draws.append(_draw(plan, held, modules[:steps], batch_size, keep, agreed))
    return draws


def _draw(
    plan: TreePlan, held: dict[int, frozenset[int]], modules: Sequence[str], batch_size: int,
    keep: str, agreed: Counter[str],
) -> _Draw:  # fmt: skip
    steps = len(modules)
    levels: list[list[Place]] = [[] for _ in range(steps + 1)]
    for p, own in sorted(held.items()):
        for state in sorted(own):
            if plan.states[state].step <= steps:
                levels[plan.states[state].step].append((p, state))

    def kept(place: Place) -> bool:  # As `Trajectories.keep`.
        state = place[1]
        kids = plan.children[state]
        trained = any(plan.states[s].trained for s in (state, *kids))
        if keep == "search":  # Its leaves are previews, and finished samples to look at.
            return trained
        return not kids or (trained and keep != "samples")

    forwards: dict[str, list[int]] = {}
    graphs: list[tuple[str, list[Place]]] = []
    most = widest = before = 0
    for step, name in enumerate(modules):
        inner = [(p, s) for p, s in levels[step] if plan.children[s] and not plan.states[s].carried]
        batches = micro_batches(inner, batch_size, lambda place: 0)
        graphs += [(name, batch) for batch in batches if any(_trains(plan, s) for _, s in batch)]
        forwards.setdefault(name, []).extend(len(batch) for batch in batches)
        # A level and its children are alive, and what is kept of the levels before.
        level = len(levels[step]) + len(levels[step + 1])
        if keep == "search":  # Outputs of a level wait for the scores of its previews.
            kids = [c for _, s in levels[step] for c in plan.children[s]]
            shown = sum(not plan.children[c] for c in kids)
            level = 2 * len(levels[step]) + max(shown, len(kids) - shown)
        most, widest = max(most, before + level), max(widest, level)
        before += sum(map(kept, levels[step]))
    stored = [place for level in levels for place in level if kept(place)]
    sources = [s for level in levels for _, s in level if _trains(plan, s)]
    if keep == "search":
        widest = most
    return _Draw(forwards, agreed, len(stored), most, widest, len(sources), graphs)


def _trains(plan: TreePlan, state: int) -> bool:
    return any(plan.states[child].trained for child in plan.children[state])


def _most_alive(draws: Sequence[_Draw], redraw: bool) -> int:
    """Most latents alive in any draw; where all are kept, so are those of the draws before."""
    most = before = 0
    for draw in draws:
        most = max(most, before + draw.alive)
        before += 0 if redraw else draw.kept
    return max(most, before)


def _joined(parts: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    whole: dict[str, list[int]] = {}
    for part in parts:
        for name, sizes in part.items():
            whole.setdefault(name, []).extend(sizes)
    return whole


def _updates(
    config: RunConfig, plan: TreePlan, owner: np.ndarray, modules: Sequence[str], ranks: int,
    iteration: int,
) -> tuple[list[Update], np.ndarray]:  # fmt: skip
    """The update schedule of rank 0, and the rank that holds each sample for it."""
    prompts, size = owner.shape
    weights = np.array([reward.weight for reward in config.rewards])
    drawn = np.random.default_rng(0).standard_normal((prompts, size, len(weights)))
    running = RunningRewards(config.advantage.running_window)
    advantages = leaf_advantages(
        drawn, weights, config.advantage, prompts=range(prompts), running=running
    )
    selected, owner = pool.selection(config, owner, advantages)
    edges = None
    if config.advantage.credit != "leaf":
        edges, _ = edge_advantages(plan, drawn, weights, config.advantage)
    key = NoiseKey.from_seed(config.seed).fold_in(Role.SELECTION)  # As the trainer's.
    updates = build_updates(
        plan, advantages, selected, key=key.fold_in(iteration), modules=modules, rank=0,
        world_size=ranks, owner=owner, updates=config.loss.updates,
        timestep_fraction=config.loss.timestep_fraction,
        timesteps=config.loss.timesteps, timestep_scope=config.loss.timestep_scope,
        micro_batch_size=config.loss.micro_batch_size, edge_values=edges,
    )  # fmt: skip
    return updates, owner


def _sizes(graphs: Iterable[tuple[str, list[Place]]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, places in graphs:
        found.setdefault(name, []).append(len(places))
    return found


def _batches(calls: Sequence[Call]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for call in calls:
        found.setdefault(call.module, []).append(len(call.items))
    return found
