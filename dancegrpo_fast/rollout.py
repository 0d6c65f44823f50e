"""Draw the trees of one iteration: one network evaluation per state, level by level.

A rank draws the states that its own leaves need. Every latent is a function of (seed, iteration,
prompt, path, step), so what one rank draws does not depend on what the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dancegrpo_fast.advantages import check_credit
from dancegrpo_fast.batching import micro_batches
from dancegrpo_fast.config import RolloutConfig, RunConfig
from dancegrpo_fast.models.conditions import Conditions
from dancegrpo_fast.models.family import DTYPES, Box, Family, evaluate
from dancegrpo_fast.models.source import Grid
from dancegrpo_fast.ops import sample_transition
from dancegrpo_fast.ops.noise import NoiseKey, keys_table, normal_batch
from dancegrpo_fast.roles import Role
from dancegrpo_fast.schedules import Schedule
from dancegrpo_fast.trajectories import Fan, Place, Trajectories
from dancegrpo_fast.transitions import coefficient_table, transition
from dancegrpo_fast.trees import candidates
from dancegrpo_fast.trees.chains import chains
from dancegrpo_fast.trees.timesteps import check_noise
from dancegrpo_fast.trees.tree import (
    ROOT_STEP,
    TreePlan,
    branch_points,
    independent_roots,
    noise_key,
    shared_root,
    trunk_with_branches,
    window,
)
from dancegrpo_fast.trees.windows import thinned, window_start, without_history_across


def plan_iteration(config: RunConfig, grid: Grid, iteration: int) -> TreePlan:
    """The tree of every prompt of an iteration, checked against the credit rule and the schedule.

    Raises:
        ValueError: Edges that the rule cannot credit, an undefined step, or a trained one without
            noise.
    """
    key, schedule = NoiseKey.from_seed(config.seed), grid.schedule(config.rollout)
    if config.loss.kind == "policy_gradient":
        plan = plan_trees(config.rollout, schedule, iteration, key.fold_in(Role.WINDOW))
    else:
        plan = chains(config, schedule, iteration, key.fold_in(Role.GRADIENT))
    check_credit(plan, config.advantage.credit)
    modules = grid.module_names(plan.schedule)
    plan = without_history_across(plan, modules)
    check_noise(plan, config)
    return carried_in_suffixes(plan, config.rollout.suffix_every, modules)


def plan_trees(
    config: RolloutConfig, schedule: Schedule, iteration: int, key: NoiseKey
) -> TreePlan:
    """The tree a recipe describes; `key` draws the window's start where it is left open."""
    tree, size = config.tree, config.group_size
    final, train_last = config.final, config.train_last
    match tree.kind:
        case "shared_root":
            return shared_root(schedule, size, final=final, train_last=train_last)
        case "independent_roots":
            return independent_roots(schedule, size, final=final, train_last=train_last)
        case "window":
            assert tree.window_size is not None
            start, solver = window_start(config, iteration, key), "ode"
            if tree.flash is not None:
                schedule = thinned(schedule, start + tree.window_size, tree.flash)
                solver = "multistep"
            return window(
                schedule, size, start, tree.window_size,
                final=final, train_last=train_last, solver=solver,
            )  # fmt: skip
        case "branch_points":
            assert tree.branches is not None
            plan = branch_points(
                schedule, tree.branch_steps, tree.branches,
                noise_scale=tree.noise_scale, final=final, train_last=train_last,
            )  # fmt: skip
            if tree.window_size is None:
                return plan
            return plan.trained_within(window_start(config, iteration, key), tree.window_size)
        case "trunk_with_branches":
            assert tree.branches is not None
            return trunk_with_branches(
                schedule, tree.branch_steps, tree.branches,
                trunks=tree.trunks, final=final, train_last=train_last,
            )  # fmt: skip
        case "search":
            return candidates.trained(config, schedule)


def carried_in_suffixes(plan: TreePlan, every: int, modules: Sequence[str]) -> TreePlan:
    """The plan whose suffixes evaluate the model at every so many states only.

    A suffix is what remains of a sample once all edges are deterministic and none is trained. Its
    first state is evaluated, each `every`-th after it, and the first one of another network (of
    `modules`); the states between move on with the output of the one before. No log-prob, and
    nothing that training reads, lies behind such an output.
    """
    if every == 1:
        return plan
    suffix = [True] * len(plan.states)
    for state in reversed(plan.states):
        if state.parent >= 0 and (state.trained or state.kind == "sde" or not suffix[state.index]):
            suffix[state.parent] = False
    run, states = [0] * len(plan.states), list(plan.states)
    for s in plan.states:
        parent = s.parent
        if parent < 0 or not plan.children[s.index] or not suffix[parent]:
            continue
        if modules[s.step] == modules[plan.states[parent].step]:
            run[s.index] = (run[parent] + 1) % every
        states[s.index] = replace(s, carried=run[s.index] > 0)
    return replace(plan, states=tuple(states))


@torch.no_grad()
def draw_trees(
    family: Family,
    modules: Mapping[str, nn.Module],
    plan: TreePlan,
    coefficients: Tensor,
    conditions: Conditions,
    *,
    key: NoiseKey,
    owner: np.ndarray,
    rank: int,
    batch_size: int,
    latent_dtype: str = "float32",
    keep: Literal["all", "samples", "training"] = "all",
    keep_outputs: bool = False,
    keep_graphs: bool = False,
    offload: bool = False,
    forwards: Sequence[int] | None = None,
    progress: Callable[[int], object] = lambda count: None,
    at_step: Callable[[], object] = lambda: None,
) -> Trajectories:
    """Draw this rank's part of P trees.

    Args:
        family: Answers `model_output`, latent shape and action box.
        modules: Networks by name (unwrapped: nothing here needs gradients).
        plan: The tree of every prompt.
        coefficients: [states, 8] of `plan.transitions`, on the device.
        conditions: Of the P prompts.
        key: Latent key of the iteration; the prompt's position is folded in here.
        owner: [P, G] rank of each leaf, -1 of one that nobody draws now.
        rank: This process.
        batch_size: States per forward.
        latent_dtype: Storage of latents; the network and the log-prob see the rounded values.
        keep: What is stored: the final latents (`samples`), what training reads (`training`, which
            ends with the last trained step), or both.
        keep_outputs: Store the model's output at states with a trained child.
        keep_graphs: Keep the autograd graph of forwards with such a state.
        offload: Keep what is stored in host memory.
        forwards: [steps] forwards that every rank makes at each step (`forwards_per_step`); a rank
            with fewer repeats its last. None: each makes what it needs.
        progress: Called with the number of states after each forward.
        at_step: Called before each denoising step.
    """
    leaves = [(int(p), int(g)) for p, g in np.argwhere(owner == rank)]
    held = held_states(plan, leaves)
    keys = {p: key.fold_in(p) for p in held}
    names = family.grid.module_names(plan.schedule)
    drawn = Trajectories(plan, coefficients, leaves, device=family.device if offload else None)
    kinds = conditions.kinds
    front = _draw_roots(family, plan, held, keys, conditions, DTYPES[latent_dtype])
    histories = _Histories(drawn, family.action_box)
    second_order = any(state.history for state in plan.states)
    carried: dict[Place, Tensor] = {}  # Model outputs for states of the next level.
    samples_only = keep == "samples"
    for step in range(steps_kept(plan, keep)):
        at_step()
        drawn.keep(front, samples_only=samples_only)
        following: dict[Place, Tensor] = {}
        made = 0
        for batch in _batches(plan, front, batch_size, kinds):
            fan = Fan.of(batch, [[c for c in plan.children[s] if c in held[p]] for p, s in batch])
            latents = torch.stack([front[place] for place in batch])
            if batch[0] in carried:
                output = torch.stack([carried.pop(place) for place in batch])
            else:
                differentiated = keep_graphs and any(_trained(plan, state) for _, state in batch)
                with torch.set_grad_enabled(differentiated):
                    given = plan, conditions, batch, latents
                    output = evaluate(family, modules[names[step]], *given)
                drawn.batches.append(batch)
                if differentiated:
                    drawn.graphs.append((batch, output))
                    output = output.detach()
                made += 1
            sampled = sample_transition(
                output,
                latents,
                drawn.edge_coefficients(fan.edges),
                keys=keys_table([noise_key(keys[p], plan.states[c], step) for p, c in fan.edges]),
                child_offsets=fan.offsets.to(latents.device, non_blocking=True),
                action_box=family.action_box,
                latent_dtype=DTYPES[latent_dtype],
            )
            for row, edge in enumerate(fan.edges):
                following[edge] = sampled.next_latents[row]
                if plan.states[edge[1]].kind == "sde":
                    drawn.log_prob[edge] = sampled.log_prob[row]
            for row, place in enumerate(batch):
                if keep_outputs and _trained(plan, place[1]):
                    drawn.keep_output(place, output[row])
                if second_order:
                    histories.step(place, latents[row], output[row], following)
                for child in plan.children[place[1]]:
                    if plan.states[child].carried and child in held[place[0]]:
                        carried[place[0], child] = output[row]
            progress(len(batch))
        for _ in range(0 if forwards is None else forwards[step] - made):
            evaluate(family, modules[names[step]], plan, conditions, batch, latents)
        front = following
        histories.next_level()
    drawn.keep(front, samples_only=samples_only)
    return drawn


def _batches(
    plan: TreePlan, front: Mapping[Place, Tensor], size: int, kinds: Sequence[int]
) -> list[list[Place]]:
    """The states of a level by forward, then those that take their parents' outputs."""

    def kind(place: Place) -> tuple[bool, int]:
        return plan.states[place[1]].carried, kinds[place[0]]

    order = sorted(front, key=lambda place: (plan.states[place[1]].carried, place))
    return micro_batches(order, size, kind)


def _trained(plan: TreePlan, state: int) -> bool:
    """Whether a trained edge leaves a state."""
    return any(plan.states[child].trained for child in plan.children[state])


def steps_kept(plan: TreePlan, keep: str) -> int:
    """Steps that are drawn for what is stored: nothing is trained beyond the last trained edge."""
    if keep != "training":
        return plan.schedule.steps
    return max(state.step for state in plan.states if state.trained)


class _Histories:
    """The x0 estimates that second-order steps take from the state before."""

    def __init__(self, drawn: Trajectories, box: Box | None) -> None:
        self.drawn = drawn
        self.inside = tuple(slice(*side) for side in box) if box is not None else ...
        self.before: dict[Place, Tensor] = {}  # By state: estimate at its parent.
        self.here: dict[Place, Tensor] = {}  # The same for the next level.

    def step(
        self, place: Place, latents: Tensor, output: Tensor, following: dict[Place, Tensor]
    ) -> None:
        """Use and leave histories at one state.

        Args:
            place: The state.
            latents: [C, F, H, W] x of the state, as stored.
            output: [C, F, H, W] m at the state.
            following: The next level's latents; those behind an edge with a history are replaced.
        """
        plan = self.drawn.plan
        for child in plan.children[place[1]]:
            edge = (place[0], child)
            if edge not in following or plan.states[child].kind != "multistep":
                continue  # Another process draws it, or nothing behind it has a history.
            a, b, *_, p, q = self.drawn.coefficients[child]
            x, m = latents.float(), output.float()
            if any(plan.states[grandchild].history for grandchild in plan.children[child]):
                self.here[edge] = p * x + q * m
            if plan.states[child].history:
                # Not from the op's step, which is rounded to the storage dtype already.
                moved = a * x + b * m + plan.history_factors[child] * self.before[place]
                following[edge] = latents.clone()
                following[edge][self.inside] = moved[self.inside].to(latents.dtype)

    def next_level(self) -> None:
        """What was left here is what the next level uses."""
        self.before, self.here = self.here, {}


def forwards_per_step(
    plan: TreePlan, owner: np.ndarray, kinds: Sequence[int], batch_size: int
) -> list[int]:
    """[steps] the most forwards that any rank needs at each step; no rank draws owner -1."""
    most = [0] * plan.schedule.steps
    for rank in np.unique(owner[owner >= 0]):
        held = held_states(plan, [(int(p), int(g)) for p, g in np.argwhere(owner == rank)])
        places: list[list[Place]] = [[] for _ in most]
        for p, states in sorted(held.items()):
            for state in sorted(states):
                if plan.children[state] and not plan.states[state].carried:
                    places[plan.states[state].step].append((p, state))
        for step, row in enumerate(places):
            batches = micro_batches(row, batch_size, lambda place: kinds[place[0]])
            most[step] = max(most[step], len(batches))
    return most


@torch.no_grad()
def denoise(
    family: Family,
    modules: Mapping[str, nn.Module],
    schedule: Schedule,
    dynamics: str,
    conditions: Conditions,
    latents: Tensor,
) -> Tensor:
    """Deterministic samples [B, C, F, H, W]: what the model draws without exploration.

    Args:
        family: Answers `model_output`.
        modules: Networks by name.
        schedule: The points that are visited.
        dynamics: Whose deterministic step is taken.
        conditions: Of B prompts; unequal text lengths run apart.
        latents: [B, C, F, H, W] initial noise.
    """
    names = family.grid.module_names(schedule)
    samples = family.begin(latents, conditions)
    rows = list(range(len(samples)))
    batches = micro_batches(rows, len(rows), lambda row: conditions.kinds[row])
    for i in range(schedule.steps):
        step = transition(schedule, i, i + 1, dynamics=dynamics, kind="ode", level=0.0)
        table = coefficient_table([step], device=latents.device)
        timestep = torch.tensor(schedule.timesteps[i], dtype=torch.float32, device=latents.device)
        done = []
        for batch in batches:
            x = samples[batch]
            output = family.model_output(
                modules[names[i]], x, timestep.expand(len(x)), conditions.select(batch), names[i]
            )
            coefficients = table.expand(len(x), -1).contiguous()
            done.append(
                sample_transition(
                    output, x, coefficients, action_box=family.action_box, noise=None
                ).next_latents
            )
        samples = torch.cat(done)
    return samples


def held_states(plan: TreePlan, leaves: list[tuple[int, int]]) -> dict[int, frozenset[int]]:
    """For each prompt, the states that some (prompt, leaf position) pairs need."""
    positions: dict[int, list[int]] = {}
    for p, g in leaves:
        positions.setdefault(p, []).append(g)
    return {p: plan.restricted_to(own) for p, own in positions.items()}


def _draw_roots(
    family: Family,
    plan: TreePlan,
    held: Mapping[int, frozenset[int]],
    keys: Mapping[int, NoiseKey],
    conditions: Conditions,
    dtype: torch.dtype,
) -> dict[Place, Tensor]:
    places = [(p, s) for p in held for s in sorted(held[p]) if plan.states[s].parent < 0]
    draws = keys_table([noise_key(keys[p], plan.states[s], ROOT_STEP) for p, s in places])
    noise = normal_batch(family.latent_shape, draws, dtype=dtype, device=family.device)
    roots = family.begin(noise, conditions.select([p for p, _ in places]))
    return dict(zip(places, roots, strict=True))
