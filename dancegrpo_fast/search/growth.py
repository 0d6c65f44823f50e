"""The search itself: all trees grow level by level, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.batching import micro_batches
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import DTYPES
from dancegrpo_fast.ops import sample_transition
from dancegrpo_fast.ops.noise import DrawKey, NoiseKey, keys_table, normal_batch
from dancegrpo_fast.search.sampler import Sampler
from dancegrpo_fast.search.settings import Found, SearchCost, SearchSettings
from dancegrpo_fast.trajectories import Fan, Place
from dancegrpo_fast.trees.tree import ROOT_STEP, State, TreePlan, noise_key

# (latents [n, C, F, H, W], tree of each) -> values [n, R], NaN where a reward failed
Score = Callable[[Tensor, Sequence[int]], np.ndarray]


@torch.no_grad()
def search(
    sampler: Sampler,
    conditions: Conditions,
    keys: Sequence[NoiseKey],
    score: Score,
    settings: SearchSettings,
    *,
    weights: Sequence[float] = (1.0,),
    roots: Tensor | None = None,
    preview_all: bool = False,
    keep_going: bool = False,
    before_step: Callable[[int], object] = lambda states: None,
) -> list[Found]:
    """Search in T trees side by side.

    Args:
        sampler: How states are evaluated and moved on.
        conditions: Of the T trees' prompts.
        keys: [T] what each tree's noise is drawn below.
        score: Values [n, R] of latents, called once per search step and once at the end.
        settings: What is searched.
        weights: [R] of the rewards; their weighted sum ranks. One of weight 0 decides nothing.
        roots: [T, n, C, F, H, W] initial noise, n = width if step -1 is searched and else 1; None
            draws it below `keys`.
        preview_all: Preview also the candidates that all go on: training wants every value.
        keep_going: Where all candidates or samples of a tree failed (NaN), take them in order
            instead of ending: other trees have something to be trained on.
        before_step: Called before each denoising step with the number of states it evaluates.

    Raises:
        ValueError: Settings that do not fit the schedule or the noise, no weight that ranks, values
            of another shape, or without `keep_going` a tree in which all failed.
    """
    settings.check(sampler.schedule)
    if not any(weights):
        raise ValueError(f"weights = {list(weights)}: all are 0; give one that ranks a weight")
    if sampler.level == 0 and settings.steps[-1] > ROOT_STEP:
        raise ValueError(
            "noise_level = 0: every candidate of a state would be the same; set it above 0"
        )
    growth = _Growth(
        sampler, conditions, score, settings, np.asarray(weights, float), preview_all, list(keys),
        keep_going,
    )  # fmt: skip
    front = growth.roots(roots)
    for step in range(sampler.schedule.steps):
        before_step(len(front))
        outputs = growth.evaluate(front, step)
        if step - 1 in settings.steps:
            front = growth.prune(front, outputs, step)
        front = growth.move(front, outputs, step)
    return growth.finish(front)


@dataclass
class _Tree:
    """One tree while it grows."""

    key: NoiseKey
    states: list[State] = field(default_factory=list)
    latents: dict[int, Tensor] = field(default_factory=dict)
    log_prob: dict[int, Tensor] = field(default_factory=dict)
    previews: dict[int, np.ndarray] = field(default_factory=dict)
    cost: SearchCost = field(default_factory=SearchCost)

    def add(self, parent: int, step: int, child: int, kind: str) -> int:
        """A child of `parent` by the edge out of `step`; returns its index."""
        path = self.states[parent].path if parent >= 0 else ()
        path += ((step, child),) if child else ()
        state = State(len(self.states), parent, step + 1, path, kind, trained=kind == "sde")
        self.states.append(state)
        return state.index


@dataclass
class _Growth:
    """The steps of a search on all trees; a front maps (tree, state) to latents."""

    sampler: Sampler
    conditions: Conditions
    score: Score
    settings: SearchSettings
    weights: np.ndarray
    preview_all: bool
    keys: list[NoiseKey]
    keep_going: bool

    def __post_init__(self) -> None:
        self.trees = [_Tree(key) for key in self.keys]
        assert len(self.trees) == len(self.conditions.rows)

    def roots(self, given: Tensor | None) -> dict[Place, Tensor]:
        """The states at step 0."""
        family, dtype = self.sampler.family, DTYPES[self.sampler.latent_dtype]
        count = self.settings.width if ROOT_STEP in self.settings.steps else 1
        places = [
            (t, tree.add(-1, ROOT_STEP, child, "root"))
            for t, tree in enumerate(self.trees)
            for child in range(count)
        ]
        if given is None:
            table = keys_table([self._noise(t, root, ROOT_STEP) for t, root in places])
            noise = normal_batch(family.latent_shape, table, dtype=dtype, device=family.device)
        elif given.shape[:2] == (len(self.trees), count):
            noise = given.flatten(0, 1).to(family.device, dtype)
        else:
            raise ValueError(
                f"roots = {list(given.shape)}: must be [{len(self.trees)}, {count}, C, F, H, W]"
            )
        begun = family.begin(noise, self.conditions.select([t for t, _ in places]))
        return dict(zip(places, begun, strict=True))

    def evaluate(self, front: dict[Place, Tensor], step: int) -> dict[Place, Tensor]:
        """The model's output at every state of a level."""
        for t, _ in front:
            self.trees[t].cost.evaluations += 1
        return self.sampler.outputs(front, step, self.conditions)

    def prune(
        self, front: dict[Place, Tensor], outputs: dict[Place, Tensor], step: int
    ) -> dict[Place, Tensor]:
        """What goes on of the candidates at `step`."""
        of_tree = [[place for place in front if place[0] == t] for t in range(len(self.trees))]
        rivals = [len(places) > self.settings.kept for places in of_tree]
        shown = [place for place in front if self.preview_all or rivals[place[0]]]
        if shown:
            x, m = (torch.stack([found[place] for place in shown]) for found in (front, outputs))
            values = self._scored(self.sampler.estimates(x, m, step), shown)
            for (t, state), row in zip(shown, values, strict=True):
                self.trees[t].previews[state] = row
                self.trees[t].cost.previews += 1
        kept: list[Place] = []
        for t, places in enumerate(of_tree):
            if rivals[t]:
                rows = np.stack([self.trees[t].previews[state] for _, state in places])
                best = self._best(rows, f"previews of tree {t} at step {step}") or range(len(rows))
                # In the order of the paths: the rank of a state decides nothing further on.
                places = [places[i] for i in sorted(best[: int(self.settings.kept)])]
            kept += places
        return {place: front[place] for place in kept}

    def move(
        self, front: dict[Place, Tensor], outputs: dict[Place, Tensor], step: int
    ) -> dict[Place, Tensor]:
        """The next level: candidates at a search step, else one deterministic child each."""
        sampler, places = self.sampler, list(front)
        stochastic = step in self.settings.steps
        count, kind = self.settings.width if stochastic else 1, sampler.kind(step, stochastic)
        table = sampler.edge(step, kind)
        following: dict[Place, Tensor] = {}
        for batch in micro_batches(places, sampler.batch_size, lambda place: 0):
            kids = [
                [self.trees[t].add(s, step, child, kind) for child in range(count)]
                for t, s in batch
            ]
            fan = Fan.of(batch, kids)
            moved = sample_transition(
                torch.stack([outputs[place] for place in batch]),
                torch.stack([front[place] for place in batch]),
                table.expand(len(fan.edges), -1).contiguous(),
                keys=[self._noise(t, child, step) for t, child in fan.edges],
                child_offsets=fan.offsets.to(sampler.family.device, non_blocking=True),
                action_box=sampler.family.action_box,
            )
            following |= zip(fan.edges, moved.next_latents, strict=True)
            if stochastic:
                self._record(front, fan, moved.next_latents, moved.log_prob)
        return following

    def finish(self, front: dict[Place, Tensor]) -> list[Found]:
        """Score the finished samples and rank them."""
        places = list(front)
        values = self._scored(torch.stack(list(front.values())), places)
        scored = dict(zip(places, values, strict=True))
        found = []
        for t, tree in enumerate(self.trees):
            own = [state for p, state in places if p == t]
            rows = np.stack([scored[t, state] for state in own])
            usable = self._best(rows, f"finished samples of tree {t}")
            order = usable + [i for i in range(len(own)) if i not in usable]
            tree.latents |= {state: front[t, state] for state in own}
            plan = TreePlan(self.sampler.schedule, tuple(tree.states))
            found.append(
                Found(
                    plan, tree.latents, tree.log_prob, tree.previews,
                    {state: scored[t, state] for state in own},
                    tuple(own[i] for i in order), tree.cost,
                )
            )  # fmt: skip
        return found

    def _noise(self, tree: int, state: int, parent_step: int) -> DrawKey:
        return noise_key(self.trees[tree].key, self.trees[tree].states[state], parent_step)

    def _record(
        self, front: dict[Place, Tensor], fan: Fan, latents: Tensor, log_prob: Tensor
    ) -> None:
        for t, state in fan.places:
            self.trees[t].latents[state] = front[t, state]
        for (t, state), x, value in zip(fan.edges, latents, log_prob, strict=True):
            self.trees[t].latents[state] = x
            self.trees[t].log_prob[state] = value

    def _scored(self, latents: Tensor, places: Sequence[Place]) -> np.ndarray:
        values = np.asarray(self.score(latents, [t for t, _ in places]), dtype=np.float64)
        if values.shape != (len(places), len(self.weights)):
            raise ValueError(
                f"score returned {values.shape} for {len(places)} samples and "
                f"{len(self.weights)} rewards; it must return [samples, rewards]"
            )
        for t, _ in places:
            self.trees[t].cost.reward_calls += 1
        return values

    def _best(self, rows: np.ndarray, what: str) -> list[int]:
        """Positions with a score, best first; equal ones in order. None only if it keeps going."""
        used = self.weights != 0
        usable = np.flatnonzero(np.isfinite(rows[:, used]).all(axis=1))
        if not len(usable) and not self.keep_going:
            raise ValueError(
                f"all {len(rows)} {what} have no score (NaN): nothing can be chosen; mend the "
                "reward, or search at later steps, where previews look like samples"
            )
        totals = rows[usable][:, used] @ self.weights[used]
        return [int(i) for i in usable[np.argsort(-totals, kind="stable")]]
