"""Plans: shapes, costs counted by hand, refusals; and noise that knows nothing but its path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tree_stand_ins import BOX, KEY, SCHEDULE, SHAPE, Drawing, draw

from dancegrpo_fast.ops.noise import normal
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.transitions import transition
from dancegrpo_fast.trees.tree import (
    Cost,
    TreePlan,
    branch_points,
    independent_roots,
    noise_key,
    shared_root,
    trunk_with_branches,
    window,
)

SIX = dance_schedule(6, 3.0)

PLANS = {
    "shared_root": shared_root(SCHEDULE, 3),
    "independent_roots": independent_roots(SCHEDULE, 3),
    "window": window(SCHEDULE, 3, 1, 2),
    "branch_points": branch_points(SCHEDULE, (0, 2), 3),
    "trunk": trunk_with_branches(SCHEDULE, (0, 1, 3), 3, trunks=2),
}


def edges(plan: TreePlan) -> list[tuple[int, int, str, bool]]:
    """(parent, step, kind, trained) of every state, in order."""
    return [(s.parent, s.step, s.kind, s.trained) for s in plan.states]


# ------------------------------------------------------------------ shapes


def test_shared_root_by_hand() -> None:
    plan = shared_root(dance_schedule(3, 1.0), 2)
    assert edges(plan) == [
        (-1, 0, "root", False),
        (0, 1, "sde", True), (0, 1, "sde", True),
        (1, 2, "sde", True), (2, 2, "sde", True),
        (3, 3, "x0", False), (4, 3, "x0", False),
    ]  # fmt: skip
    assert [s.path for s in plan.states] == [(), (), ((0, 1),), (), ((0, 1),), (), ((0, 1),)]
    assert plan.leaves == (5, 6)
    assert plan.leaf_edges == ((1, 3), (2, 4))
    assert plan.children == ((1, 2), (3,), (4,), (5,), (6,), (), ())
    assert plan.restricted_to([1]) == {0, 2, 4, 6}


def test_independent_roots_by_hand() -> None:
    plan = independent_roots(dance_schedule(2, 1.0), 2)
    assert edges(plan) == [
        (-1, 0, "root", False), (-1, 0, "root", False),
        (0, 1, "sde", True), (1, 1, "sde", True),
        (2, 2, "x0", False), (3, 2, "x0", False),
    ]  # fmt: skip
    assert [s.path for s in plan.states] == [(), ((-1, 1),)] * 3


def test_window_by_hand() -> None:
    plan = window(dance_schedule(4, 1.0), 2, 1, 1)
    assert edges(plan) == [
        (-1, 0, "root", False),
        (0, 1, "ode", False),
        (1, 2, "sde", True), (1, 2, "sde", True),
        (2, 3, "ode", False), (3, 3, "ode", False),
        (4, 4, "x0", False), (5, 4, "x0", False),
    ]  # fmt: skip
    assert [plan.states[leaf].path for leaf in plan.leaves] == [(), ((1, 1),)]


def test_branch_points_by_hand() -> None:
    plan = branch_points(dance_schedule(3, 1.0), (1, 0), 2, noise_scale=1.5)
    assert edges(plan) == [
        (-1, 0, "root", False),
        (0, 1, "sde", True), (0, 1, "sde", True),
        (1, 2, "sde", True), (1, 2, "sde", True), (2, 2, "sde", True), (2, 2, "sde", True),
        *((parent, 3, "x0", False) for parent in (3, 4, 5, 6)),
    ]  # fmt: skip
    paths = [(), ((1, 1),), ((0, 1),), ((0, 1), (1, 1))]
    assert [plan.states[leaf].path for leaf in plan.leaves] == paths
    assert plan.leaf_edges == ((1, 3), (1, 4), (2, 5), (2, 6))
    assert [s.noise_scale for s in plan.states] == [1.0] + [1.5] * 6 + [1.0] * 4
    single = branch_points(dance_schedule(3, 1.0), (1,), 2, noise_scale=1.5)
    assert [s.noise_scale for s in single.states] == [1.0, 1.0, 1.5, 1.5, 1.0, 1.0]


def test_trunk_with_branches_by_hand() -> None:
    plan = trunk_with_branches(dance_schedule(4, 1.0), (0, 2), 2)
    assert edges(plan) == [
        (-1, 0, "root", False),
        (0, 1, "ode", False), (0, 1, "sde", True), (0, 1, "sde", True),
        (2, 2, "ode", False), (3, 2, "ode", False), (1, 2, "ode", False),
        (4, 3, "ode", False), (5, 3, "ode", False), (6, 3, "sde", True), (6, 3, "sde", True),
        *((parent, 4, "x0", False) for parent in (7, 8, 9, 10)),
    ]  # fmt: skip
    # The trunk is child 0 where it goes on; at its end the first branch keeps its path.
    paths = [((0, 1),), ((0, 2),), (), ((2, 1),)]
    assert [plan.states[leaf].path for leaf in plan.leaves] == paths
    assert all(len(way) == 1 for way in plan.leaf_edges)


@pytest.mark.parametrize(
    ("final", "train_last", "kind", "trained"),
    [("x0", False, "x0", False), ("ode", False, "ode", False), ("sample", False, "sde", False),
     ("sample", True, "sde", True)],
)  # fmt: skip
def test_the_last_step(final: str, train_last: bool, kind: str, trained: bool) -> None:
    build: dict[str, Callable[..., TreePlan]] = {
        "shared": lambda **last: shared_root(SCHEDULE, 3, **last),
        "independent": lambda **last: independent_roots(SCHEDULE, 3, **last),
        "window": lambda **last: window(SCHEDULE, 3, 2, 3, **last),
        "branches": lambda **last: branch_points(SCHEDULE, (1,), 3, **last),
    }
    for make in build.values():
        plan = make(final=final, train_last=train_last)
        for leaf in plan.leaves:
            assert (plan.states[leaf].kind, plan.states[leaf].trained) == (kind, trained)
        inner = [s for s in plan.states if s.kind == "sde" and s.step < SCHEDULE.steps]
        assert all(s.trained for s in inner) and inner
    # A limb is deterministic after its branch, whatever the end.
    plan = trunk_with_branches(SCHEDULE, (1,), 3, final=final, train_last=train_last)
    ends = {plan.states[leaf].kind for leaf in plan.leaves}
    assert ends == {"x0" if final == "x0" else "ode"}


def test_a_branch_at_the_last_step_is_trained_with_train_last() -> None:
    plan = trunk_with_branches(SCHEDULE, (4,), 3, final="sample", train_last=True)
    assert [(plan.states[leaf].kind, plan.states[leaf].trained) for leaf in plan.leaves] == [
        ("sde", True)
    ] * 3


def test_transitions_belong_to_the_edge_into_each_state() -> None:
    plan = branch_points(SCHEDULE, (1,), 2, noise_scale=1.5)
    rows = plan.transitions(dynamics="flow", level=0.7, kl="v")
    assert rows[0] == (0.0,) * 8
    for state, row in zip(plan.states[1:], rows[1:], strict=True):
        assert row == transition(
            SCHEDULE, state.step - 1, state.step, dynamics="flow", kind=state.kind, level=0.7,
            noise_scale=1.5 if state.step == 2 else 1.0, kl="v",
        )  # fmt: skip


# ------------------------------------------------------------------ costs


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        # One root, then 4 chains over steps 1 to 5; the last of the 6 steps is not trained.
        (shared_root(SIX, 4), Cost(1 + 4 * 5, 1 + 4 * 4, 4 * 6, 4 * 5)),
        (shared_root(SIX, 4, final="sample", train_last=True), Cost(21, 21, 24, 24)),
        (independent_roots(SIX, 4), Cost(24, 20, 24, 20)),
        # Trunk at steps 0, 1 and the splitting state at 2, then 4 chains over 3, 4, 5.
        (window(SIX, 4, 2, 2), Cost(3 + 4 * 3, 1 + 4, 24, 8)),
        # 1, 3, 3, 9, 9, 9 states at steps 0 to 5.
        (branch_points(SIX, (0, 2), 3), Cost(34, 25, 54, 45)),
        # 4 trunk states (steps 0 to 3); limbs from steps 1, 2, 3 need 4, 3, 2 evaluations each.
        (trunk_with_branches(SIX, (1, 2, 3), 4), Cost(4 + 4 * (4 + 3 + 2), 3, 72, 12)),
        (trunk_with_branches(SIX, (1, 2, 3), 4, trunks=2), Cost(80, 6, 144, 24)),
    ],
)
def test_cost_by_hand(plan: TreePlan, expected: Cost) -> None:
    assert plan.cost() == expected


def test_rollout_only_sharing_trains_every_transition_by_itself() -> None:
    # Branch points at 0 and 2 of six steps: 34 shared rollout evaluations, 9 leaves x 5 steps.
    cost = branch_points(SIX, (0, 2), 3).cost()
    shared = cost.rollout + cost.training
    rollout_only = cost.rollout + cost.training_unshared
    nothing = cost.rollout_unshared + cost.training_unshared
    assert (shared, rollout_only, nothing) == (59, 79, 99)


def test_the_rollout_evaluates_as_often_as_the_plan_says() -> None:
    for plan in PLANS.values():
        assert draw(plan, prompts=3).family.evaluations == 3 * plan.cost().rollout


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: window(SCHEDULE, 3, 3, 3), "window of 3 steps from step 3 is outside"),
        (lambda: window(SCHEDULE, 3, -1, 2), "window of 2 steps from step -1 is outside"),
        (lambda: window(SCHEDULE, 3, 1, 0), "window of 0 steps"),
        (lambda: window(SCHEDULE, 3, 4, 1), "no trained edge"),
        (lambda: branch_points(SCHEDULE, (4,), 3), r"branch_steps = \[4\].*from 0 to 3"),
        (lambda: branch_points(SCHEDULE, (-1,), 3), r"branch_steps = \[-1\]"),
        (lambda: branch_points(SCHEDULE, (), 3), r"branch_steps = \[\]"),
        (lambda: branch_points(SCHEDULE, (1, 1), 3), "distinct"),
        (lambda: branch_points(SCHEDULE, (1,), 1), "branches = 1"),
        (lambda: trunk_with_branches(SCHEDULE, (0, 5), 3), r"branch_steps = \[0, 5\]"),
        (lambda: trunk_with_branches(SCHEDULE, (0,), 1), "branches = 1"),
        (lambda: shared_root(SCHEDULE, 3, final="mean"), "final = 'mean'.*'x0', 'ode' or 'sample'"),
        (lambda: shared_root(SCHEDULE, 3, train_last=True), "train_last = True with final = 'x0'"),
        (lambda: shared_root(dance_schedule(1, 1.0), 3), "no trained edge"),
    ],
)
def test_plans_that_cannot_be(make: Callable[[], TreePlan], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# ------------------------------------------------------------------ noise


def by_name(one: Drawing) -> dict[tuple, torch.Tensor]:
    """Stored latents by what names a state: prompt, path, step."""
    states = one.drawn.plan.states
    named = {
        (p, states[s].path, states[s].step): latents
        for (p, s), latents in one.drawn.latents.items()
    }
    assert len(named) == len(one.drawn.latents)
    return named


def assert_same_bits(some: dict[tuple, torch.Tensor], others: dict[tuple, torch.Tensor]) -> None:
    for name, latents in some.items():
        assert torch.equal(latents, others[name]), name


@pytest.mark.parametrize("name", PLANS)
def test_every_state_has_noise_of_its_own(name: str) -> None:
    plan = PLANS[name]
    keys = {
        noise_key(KEY.fold_in(p), state, plan.states[state.parent].step if state.step else -1)
        for p in range(3)
        for state in plan.states
    }
    assert len(keys) == 3 * len(plan.states)
    assert len({(state.path, state.step) for state in plan.states}) == len(plan.states)


@pytest.mark.parametrize("name", PLANS)
def test_deleting_a_branch_changes_no_other_state(name: str) -> None:
    plan = PLANS[name]
    whole = by_name(draw(plan))
    branches = [
        s for s in plan.states if sum(s.parent == other.parent for other in plan.states) > 1
    ]
    assert len(branches) >= 3
    for state in branches:
        rest = plan.without(state.index)
        below = [s for s in plan.states if state.index in plan.ancestry(s.index)]
        assert len(rest.states) == len(plan.states) - len(below)
        left = by_name(draw(rest))
        assert len(left) < len(whole)
        assert_same_bits(left, whole)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (shared_root(SCHEDULE, 2), shared_root(SCHEDULE, 5)),
        (independent_roots(SCHEDULE, 2), independent_roots(SCHEDULE, 5)),
        (branch_points(SCHEDULE, (0, 2), 2), branch_points(SCHEDULE, (0, 2), 4)),
        (trunk_with_branches(SCHEDULE, (0, 3), 2), trunk_with_branches(SCHEDULE, (0, 3), 4)),
        (trunk_with_branches(SCHEDULE, (1,), 2), trunk_with_branches(SCHEDULE, (1,), 2, trunks=3)),
    ],
)
def test_adding_siblings_changes_no_other_state(small: TreePlan, large: TreePlan) -> None:
    assert_same_bits(by_name(draw(small)), by_name(draw(large)))


@pytest.mark.parametrize("name", PLANS)
def test_batches_and_other_prompts_change_no_bit(name: str) -> None:
    whole = by_name(draw(PLANS[name], batch_size=100))
    for batch_size in (1, 3):
        parts = by_name(draw(PLANS[name], batch_size=batch_size))
        assert parts.keys() == whole.keys()
        assert_same_bits(parts, whole)
    for (p, path, step), latents in whole.items():
        assert not torch.equal(latents, whole[1 - p, path, step])


def test_first_independent_root_is_the_shared_one() -> None:
    shared, independent = (
        by_name(draw(PLANS[name])) for name in ("shared_root", "independent_roots")
    )
    for p in range(2):
        assert torch.equal(shared[p, (), 0], independent[p, (), 0])
        assert torch.equal(shared[p, (), 1], independent[p, (), 1])
        assert not torch.equal(independent[p, ((-1, 1),), 0], independent[p, (), 0])


def test_a_transition_is_its_affine_map_and_its_key() -> None:
    plan = PLANS["branch_points"]
    one = draw(plan, box=BOX)
    rows = plan.transitions(dynamics="dance", level=0.3)
    box = tuple(slice(*side) for side in BOX)
    for (p, child), stored in one.drawn.latents.items():
        state = plan.states[child]
        if state.parent < 0:
            expected = normal(SHAPE, noise_key(KEY.fold_in(p), state, -1))
            assert torch.equal(stored, expected)
            continue
        x = one.drawn.latents[p, state.parent].double()
        output = one.output(p, state.parent).double()
        row, step = rows[child], plan.states[state.parent].step
        eps = normal(SHAPE, noise_key(KEY.fold_in(p), state, step)).double()
        expected = x.clone()
        expected[box] = (row.a * x + row.b * output + row.s * eps)[box]
        torch.testing.assert_close(stored.double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_latents_are_stored_rounded_and_copied_outside_the_box() -> None:
    one = draw(PLANS["shared_root"], latent_dtype="bfloat16", box=BOX)
    outside = torch.ones(SHAPE, dtype=torch.bool)
    outside[tuple(slice(*side) for side in BOX)] = False
    for (p, child), stored in one.drawn.latents.items():
        assert stored.dtype == torch.bfloat16
        parent = one.drawn.plan.states[child].parent
        if parent >= 0:
            assert torch.equal(stored[outside], one.drawn.latents[p, parent][outside])
            assert not np.array_equal(stored.float(), one.drawn.latents[p, parent].float())
