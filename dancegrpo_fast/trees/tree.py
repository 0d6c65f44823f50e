"""A rollout is a tree: which states are visited, by which edges, and which edges are trained.

A plan describes the tree of *one* prompt; every prompt of an iteration follows the same plan. Each
state except a root has exactly one incoming edge, so the edge table is stored with the states. The
builders at the end make the static plans: `shared_root`, `independent_roots`, `window`,
`branch_points` and `trunk_with_branches`.

The network is evaluated once per state. Chains that would be identical (an ODE trunk before the
first stochastic step) are one chain of states, so sharing needs no special case anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dancegrpo_fast.ops.noise import DrawKey, NoiseKey
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.transitions import Transition, dpmpp_2m, transition

ROOT_STEP = -1  # Roots are the children of step -1: their noise is the initial latent.

Path = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class State:
    """One point of the tree, with its incoming edge.

    Attributes:
        index: Position in `TreePlan.states`; a parent's index is smaller than its children's.
        parent: Index of the parent state, or -1 for a root.
        step: Index of the state's point in the schedule: sigma = `schedule.sigmas[step]`.
        path: The (step, child index) pairs with index > 0 on the way here; names the state's noise.
        kind: How the edge into this state moves: "root", "sde", "ode", "multistep" or "x0".
        trained: Whether the edge into this state carries a policy-gradient term.
        noise_scale: Multiplier on the noise of the edge into this state.
        history: Whether a "multistep" edge uses the x0 estimate of the state before its parent.
        carried: Whether the model's output is taken from the parent instead of evaluated here.
    """

    index: int
    parent: int
    step: int
    path: Path
    kind: str
    trained: bool = False
    noise_scale: float = 1.0
    history: bool = False
    carried: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """Model evaluations of one prompt, counted on its plan.

    "unshared" counts one evaluation per leaf and step, as trainers without a tree do; sharing in
    the rollout only is `rollout + training_unshared`. Training counts every trained edge once (one
    update, all steps).
    """

    rollout: int
    training: int
    rollout_unshared: int
    training_unshared: int


@dataclass(frozen=True)
class TreePlan:
    """The tree of one prompt.

    Attributes:
        schedule: Sigma grid; it belongs to the plan because a plan may re-space it.
        states: All states, parents before children, level by level.
    """

    schedule: Schedule
    states: tuple[State, ...]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Child state indices of every state, in canonical order."""
        lists: list[list[int]] = [[] for _ in self.states]
        for state in self.states:
            if state.parent >= 0:
                lists[state.parent].append(state.index)
        return tuple(tuple(entry) for entry in lists)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """States without children: one clip each; their count is the group size G."""
        return tuple(s.index for s in self.states if not self.children[s.index])

    @cached_property
    def leaf_edges(self) -> tuple[tuple[int, ...], ...]:
        """For each leaf, the child states of the trained edges on its way from the root."""
        return tuple(
            tuple(index for index in self.ancestry(leaf) if self.states[index].trained)
            for leaf in self.leaves
        )

    def ancestry(self, index: int) -> tuple[int, ...]:
        """State indices from the root down to and including `index`."""
        chain = [index]
        while self.states[chain[-1]].parent >= 0:
            chain.append(self.states[chain[-1]].parent)
        return tuple(reversed(chain))

    def restricted_to(self, leaf_positions: Sequence[int]) -> frozenset[int]:
        """States a rank needs for some leaves (positions in `leaves`): those leaves' ancestors."""
        needed: set[int] = set()
        for position in leaf_positions:
            needed.update(self.ancestry(self.leaves[position]))
        return frozenset(needed)

    def without(self, index: int) -> TreePlan:
        """The plan with a state and everything below it removed; other states keep their paths."""
        gone = {index}
        for state in self.states:
            if state.parent in gone:
                gone.add(state.index)
        kept = [state for state in self.states if state.index not in gone]
        position = {state.index: new for new, state in enumerate(kept)} | {-1: -1}
        return TreePlan(
            self.schedule,
            tuple(
                replace(state, index=position[state.index], parent=position[state.parent])
                for state in kept
            ),
        )

    def transitions(
        self,
        *,
        dynamics: str,
        level: float,
        kl: str = "exact",
        exact_density: bool = False,
    ) -> tuple[Transition, ...]:
        """The affine Gaussian transition of the edge into each state (zeros for roots), float64."""

        def into(state: State) -> Transition:
            if state.parent < 0:
                return Transition(*(0.0,) * 8)
            if state.kind == "multistep":
                return self._multistep(state)[0]
            return transition(
                self.schedule,
                self.states[state.parent].step,
                state.step,
                dynamics=dynamics,
                kind=state.kind,
                level=level,
                noise_scale=state.noise_scale,
                kl=kl,
                exact_density=exact_density,
            )

        return tuple(into(state) for state in self.states)

    @cached_property
    def history_factors(self) -> tuple[float, ...]:
        """Factor of the x0 estimate of the state before the parent, of the edge into each state."""
        return tuple(self._multistep(s)[1] if s.history else 0.0 for s in self.states)

    def _multistep(self, state: State) -> tuple[Transition, float]:
        parent, sigmas = self.states[state.parent], self.schedule.sigmas
        before = sigmas[self.states[parent.parent].step] if state.history else None
        return dpmpp_2m(sigmas[parent.step], sigmas[state.step], before)

    def trained_within(self, start: int, size: int) -> TreePlan:
        """The plan with only the edges out of steps start .. start + size - 1 trained."""
        inside = range(start, start + size)
        states = tuple(
            replace(s, trained=s.trained and self.states[s.parent].step in inside)
            for s in self.states
        )
        return replace(self, states=states)

    def cost(self) -> Cost:
        """Count model evaluations per prompt, with and without sharing."""
        inner = [index for index, kids in enumerate(self.children) if kids]
        trained = [i for i in inner if any(self.states[c].trained for c in self.children[i])]
        return Cost(
            rollout=sum(not self.states[i].carried for i in inner),
            training=len(trained),
            rollout_unshared=sum(len(self.ancestry(leaf)) - 1 for leaf in self.leaves),
            training_unshared=sum(len(edges) for edges in self.leaf_edges),
        )


def path_key(base: NoiseKey, path: Path) -> NoiseKey:
    """Key of a path below `base` (seed, role, iteration and prompt already folded in)."""
    key = base
    for step, child in path:
        key = key.fold_in(step - ROOT_STEP).fold_in(child)
    return key


def noise_key(base: NoiseKey, state: State, parent_step: int) -> DrawKey:
    """Key of the noise on the edge into `state`; `parent_step` is ROOT_STEP for a root."""
    return path_key(base, state.path).fold_in(parent_step - ROOT_STEP).draw()


class _Builder:
    """Grows a plan level by level; the only mutable form of a tree."""

    def __init__(self, schedule: Schedule, *, final: str, train_last: bool) -> None:
        if final not in ("x0", "ode", "sample"):
            raise ValueError(f"final = {final!r}: choose 'x0', 'ode' or 'sample'")
        if train_last and final != "sample":
            raise ValueError(
                f"train_last = True with final = {final!r}: a transition without noise has no "
                "density; set final = 'sample' to train the last transition"
            )
        self.schedule = schedule
        self.last = schedule.steps - 1
        self.final = final
        self.train_last = train_last
        self.states: list[State] = []

    def root(self, child: int = 0) -> State:
        return self._add(-1, 0, (((ROOT_STEP, child),) if child else ()), "root", False, 1.0)

    def stochastic(self, parent: State, child: int = 0, *, noise_scale: float = 1.0) -> State:
        """An SDE edge out of `parent`, trained unless it is the last transition."""
        if parent.step == self.last and self.final != "sample":
            return self.deterministic(parent)
        trained = parent.step != self.last or self.train_last
        return self._extend(parent, child, "sde", trained, noise_scale)

    def deterministic(self, parent: State) -> State:
        kind = "x0" if parent.step == self.last and self.final == "x0" else "ode"
        return self._extend(parent, 0, kind, False, 1.0)

    def multistep(self, parent: State) -> State:
        """A DPM-Solver++ 2M step, second order behind another one."""
        state = replace(
            self._extend(parent, 0, "multistep", False, 1.0),
            history=parent.kind == "multistep",
        )
        self.states[-1] = state
        return state

    def _extend(
        self, parent: State, child: int, kind: str, trained: bool, noise_scale: float
    ) -> State:
        path = parent.path + (((parent.step, child),) if child else ())
        return self._add(parent.index, parent.step + 1, path, kind, trained, noise_scale)

    def _add(
        self, parent: int, step: int, path: Path, kind: str, trained: bool, noise_scale: float
    ) -> State:
        state = State(len(self.states), parent, step, path, kind, trained, noise_scale)
        self.states.append(state)
        return state

    def plan(self) -> TreePlan:
        plan = TreePlan(self.schedule, tuple(self.states))
        if not any(state.trained for state in plan.states):
            raise ValueError(
                f"no trained edge in a plan of {self.schedule.steps} steps: the only stochastic "
                "step is the last; use more steps, or final = 'sample' with train_last = True"
            )
        return plan


def shared_root(
    schedule: Schedule, group_size: int, *, final: str = "x0", train_last: bool = False
) -> TreePlan:
    """One initial noise per prompt, `group_size` stochastic chains from it (DanceGRPO)."""
    return window(schedule, group_size, 0, schedule.steps, final=final, train_last=train_last)


def independent_roots(
    schedule: Schedule, group_size: int, *, final: str = "x0", train_last: bool = False
) -> TreePlan:
    """`group_size` stochastic chains, each from its own initial noise (Flow-GRPO)."""
    builder = _Builder(schedule, final=final, train_last=train_last)
    front = [builder.root(child) for child in range(group_size)]
    for _ in range(schedule.steps):
        front = [builder.stochastic(state) for state in front]
    return builder.plan()


def window(
    schedule: Schedule,
    group_size: int,
    start: int,
    size: int,
    *,
    final: str = "x0",
    train_last: bool = False,
    solver: str = "ode",
) -> TreePlan:
    """A deterministic trunk that splits into `group_size` chains at step `start`.

    The chains are stochastic for `size` steps and deterministic afterwards (MixGRPO,
    Flow-GRPO-Fast): Euler or DDIM steps with solver "ode", DPM-Solver++ 2M ones with "multistep"
    (MixGRPO-Flash; the schedule then has the points that it shall visit).
    """
    if start < 0 or size < 1 or start + size > schedule.steps:
        raise ValueError(
            f"window of {size} steps from step {start} is outside the schedule of "
            f"{schedule.steps} steps; it must lie within steps 0 to {schedule.steps - 1}"
        )
    builder = _Builder(schedule, final=final, train_last=train_last)
    front = [builder.root()]
    for step in range(schedule.steps):
        if step == start:
            front = [builder.stochastic(front[0], child) for child in range(group_size)]
        elif start < step < start + size:
            front = [builder.stochastic(state) for state in front]
        elif solver == "multistep" and step >= start:
            front = [builder.multistep(state) for state in front]
        else:
            front = [builder.deterministic(state) for state in front]
    return builder.plan()


def branch_points(
    schedule: Schedule,
    branch_steps: Sequence[int],
    branches: int,
    *,
    noise_scale: float = 1.0,
    final: str = "x0",
    train_last: bool = False,
) -> TreePlan:
    """One stochastic chain that splits into `branches` at each of `branch_steps` (BranchGRPO).

    `noise_scale` multiplies the noise of the edges made by a split; their log-prob knows of it.
    """
    _check_steps("branch_steps", branch_steps, schedule, final, train_last)
    if branches < 2:
        raise ValueError(f"branches = {branches}: a branch point needs at least 2 children")
    builder = _Builder(schedule, final=final, train_last=train_last)
    front = [builder.root()]
    for step in range(schedule.steps):
        if step in branch_steps:
            front = [
                builder.stochastic(state, child, noise_scale=noise_scale)
                for state in front
                for child in range(branches)
            ]
        else:
            front = [builder.stochastic(state) for state in front]
    return builder.plan()


def trunk_with_branches(
    schedule: Schedule,
    branch_steps: Sequence[int],
    branches: int,
    *,
    trunks: int = 1,
    final: str = "x0",
    train_last: bool = False,
) -> TreePlan:
    """Deterministic trunks with `branches` stochastic children at each of `branch_steps`.

    Every branch goes on deterministically to its leaf (TempFlow-GRPO). A trunk ends at its last
    branch step: nothing would use it beyond.
    """
    _check_steps("branch_steps", branch_steps, schedule, final, train_last)
    if branches < 2:
        raise ValueError(f"branches = {branches}: a branch point needs at least 2 children")
    builder = _Builder(schedule, final=final, train_last=train_last)
    last_branch = max(branch_steps)
    trunk = [builder.root(child) for child in range(trunks)]
    limbs: list[State] = []
    for step in range(schedule.steps):
        next_trunk, next_limbs = [], [builder.deterministic(state) for state in limbs]
        for state in trunk:
            first = 0
            if step < last_branch:
                next_trunk.append(builder.deterministic(state))
                first = 1  # Child 0 is the trunk: it keeps the path, so branches never move it.
            if step in branch_steps:
                kids = range(first, first + branches)
                next_limbs += [builder.stochastic(state, child) for child in kids]
        trunk, limbs = next_trunk, next_limbs
    return builder.plan()


def _check_steps(
    name: str, steps: Sequence[int], schedule: Schedule, final: str, train_last: bool
) -> None:
    end = schedule.steps if final == "sample" and train_last else schedule.steps - 1
    outside = [step for step in steps if not 0 <= step < end]
    if not steps or outside or len(set(steps)) != len(steps):
        raise ValueError(
            f"{name} = {list(steps)}: give distinct steps from 0 to {end - 1} "
            f"(the last trainable step of a schedule of {schedule.steps})"
        )
