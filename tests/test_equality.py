"""Loss and gradient of every tree equal an explicit list of transitions, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tree_case import (
    CLIP,
    EXPERTS,
    Case,
    call_loss,
    explicit_transitions,
    package_updates,
    schedule_updates,
)
from tree_oracle import explicit_losses, explicit_terms, explicit_updates
from tree_stand_ins import BOX, SCHEDULE, draw

from dancegrpo_fast.losses.policy_gradient import recompute_log_prob
from dancegrpo_fast.trajectories import Fan
from dancegrpo_fast.trees.tree import (
    TreePlan,
    branch_points,
    independent_roots,
    shared_root,
    trunk_with_branches,
    window,
)

TREES = {
    "shared_root": shared_root(SCHEDULE, 5),
    "independent_roots": independent_roots(SCHEDULE, 5),
    "window": window(SCHEDULE, 6, 1, 2),
    "flash": window(SCHEDULE, 6, 0, 2, solver="multistep"),
    "branch_points": branch_points(SCHEDULE, (1, 2), 3, noise_scale=1.3),
    "trunk": trunk_with_branches(SCHEDULE, (1,), 6),
    "trunk_three_steps": trunk_with_branches(SCHEDULE, (0, 1, 3), 3, trunks=2),
    "train_last": window(SCHEDULE, 5, 2, 3, final="sample", train_last=True),
}
# `siblings` refuses an only child as first trained edge: no chains, and branches from step 0 on.
SIBLING_TREES = {
    **{name: plan for name, plan in TREES.items() if name != "independent_roots"},
    "branch_points": branch_points(SCHEDULE, (0, 2), 3, noise_scale=1.3),
}
RULES = [
    *((name, rule) for name in TREES for rule in ("leaf", "depth")),
    *((name, "siblings") for name in SIBLING_TREES),
]
TWO_REWARDS = (0.75, 0.0, -0.5)
SETTINGS = {
    "plain": {"prompts": 3},
    "one_state_a_call": {"micro_batch_size": 1},
    "failures": {"failures": True, "prompts": 4},
    "best_of_n": {"best_of_n": 2, "failures": True, "prompts": 3, "micro_batch_size": 100},
    "two_updates": {"updates": 2, "micro_batch_size": 3},
    "three_updates_of_subsets": {"updates": 3, "fraction": 0.6, "failures": True, "prompts": 4},
    "rewards_in_the_loss": {"weights": TWO_REWARDS, "combine": "loss"},
    "rewards_in_the_advantage": {"weights": TWO_REWARDS},
    "rewards_summed": {"weights": TWO_REWARDS, "combine": "reward"},
    "first_steps_weighted": {
        "fraction": 0.5, "timesteps": "first", "step_weights": (2.0, 0.5, 1.25, 3.0, 0.75),
        "kl_weight": 0.07,
    },
    "steps_of_a_group": {"fraction": 0.5, "scope": "group", "updates": 2, "failures": True,
                         "prompts": 4},
    "listed_steps": {"timesteps": (0, 1, 2), "weights": TWO_REWARDS, "combine": "loss",
                     "step_weights": (0.25, 4.0, 1.5, 1.0, 2.0)},
    "kl_and_box": {"kl_weight": 0.07, "box": BOX, "fraction": 0.6},
    "everything": {
        "kl_weight": 0.07, "box": BOX, "updates": 2, "fraction": 0.6, "best_of_n": 4,
        "failures": True, "prompts": 4, "weights": TWO_REWARDS, "combine": "loss",
        "names": EXPERTS,
    },
}  # fmt: skip


def make(tree: str, rule: str, settings: str) -> Case:
    plan = (SIBLING_TREES if rule == "siblings" else TREES)[tree]
    return Case(plan, credit=rule, **SETTINGS[settings])


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("tree", "rule"), RULES)
def test_updates_equal_the_explicit_list(tree: str, rule: str, settings: str) -> None:
    case = make(tree, rule, settings)
    ours, explicit = package_updates(case), explicit_updates(case)
    assert len(ours) == len(explicit) == case.updates
    assert any(largest(update.gradient) > 1e-3 for update in explicit)
    for one, other in zip(ours, explicit, strict=True):
        assert one.divisor == other.divisor
        assert one.loss == pytest.approx(other.loss, rel=1e-10, abs=1e-10)
        scale = max(largest(other.gradient), 1e-3)
        assert largest(one.gradient - other.gradient) <= 1e-10 * scale


@pytest.mark.parametrize("tree", TREES)
def test_the_planted_ratios_and_signs_meet_every_case(tree: str) -> None:
    case = make(tree, "leaf", "plain")
    terms = [term for update in explicit_terms(case) for term in update]
    _, ratio = explicit_losses(case, terms)
    sign = torch.tensor([np.sign(term.values[0]) for term in terms])
    for side in (ratio < 1 - CLIP, ratio > 1 + CLIP, (ratio - 1).abs() < CLIP):
        assert (side & (sign > 0)).any() and (side & (sign < 0)).any()


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("settings", ["three_updates_of_subsets", "everything"])
@pytest.mark.parametrize(
    ("tree", "rule"),
    [("window", "leaf"), ("branch_points", "leaf"), ("branch_points", "depth"),
     ("branch_points", "siblings"), ("trunk_three_steps", "siblings"), ("train_last", "depth")],
)  # fmt: skip
def test_ranks_add_up_to_one_process(tree: str, rule: str, settings: str, world_size: int) -> None:
    assert_ranks_add_up(make(tree, rule, settings), world_size)


@pytest.mark.parametrize("names", [("net",) * SCHEDULE.steps, EXPERTS])
@pytest.mark.parametrize("best_of_n", [None, 2])
@pytest.mark.parametrize("rule", ["leaf", "depth"])
def test_one_prompt_split_over_four_ranks(
    rule: str, best_of_n: int | None, names: tuple[str, ...]
) -> None:
    case = Case(
        trunk_with_branches(SCHEDULE, (0, 3), 3), credit=rule, prompts=1, best_of_n=best_of_n,
        names=names, micro_batch_size=1,
    )  # fmt: skip
    assert_ranks_add_up(case, 4)
    shared = Case(
        branch_points(SCHEDULE, (1, 2), 3), credit=rule, prompts=1, best_of_n=best_of_n,
        names=names, updates=2, fraction=0.6, micro_batch_size=2,
    )  # fmt: skip
    assert_ranks_add_up(shared, 4)


def assert_ranks_add_up(case: Case, world_size: int) -> None:
    alone, together = package_updates(case), package_updates(case, world_size)
    for one, other in zip(alone, together, strict=True):
        assert one.divisor == other.divisor
        assert other.loss == pytest.approx(one.loss, rel=1e-12, abs=1e-14)
        scale = max(largest(one.gradient), 1e-3)
        assert largest(one.gradient - other.gradient) <= 1e-12 * scale
    schedules = [schedule_updates(case, rank, world_size) for rank in range(world_size)]
    for updates in zip(*schedules, strict=True):
        assert len({update.divisor for update in updates}) == 1
        assert len({update.modules for update in updates}) == 1
        modules = [tuple(call.module for call in update.calls) for update in updates]
        assert len(set(modules)) == 1
        assert set(modules[0]) == set(updates[0].modules)


@pytest.mark.parametrize("tree", ["branch_points", "flash"])
def test_ranks_draw_the_bits_of_one_process(tree: str) -> None:
    case = make(tree, "leaf", "kl_and_box")
    seen = set()
    for rank in range(4):
        part = case.draw(rank, 4)
        ways = {(p, s) for p, g in part.leaves for s in case.plan.ancestry(case.plan.leaves[g])}
        assert set(part.latents) == ways & set(case.whole.latents)
        for place, latents in part.latents.items():
            assert torch.equal(latents, case.whole.latents[place])
        seen |= set(part.latents)
    assert seen == set(case.whole.latents)


@pytest.mark.parametrize("rule", ["leaf", "depth"])
def test_a_rank_with_nothing_to_train_adds_exactly_nothing(rule: str) -> None:
    # One sample of each sign is kept: at least two of four ranks have none. On two experts a rank
    # whose samples branch in one expert's steps must also call the other.
    case = Case(
        trunk_with_branches(SCHEDULE, (0, 3), 3), credit=rule, prompts=1, best_of_n=2,
        names=EXPERTS, kl_weight=0.1, box=BOX,
    )  # fmt: skip
    idle = 0
    for rank in range(4):
        drawn = replace(case.draw(rank, 4), log_prob=case.planted)
        for call in schedule_updates(case, rank, 4)[0].calls:
            if any(item.weights.any() for item in call.items):
                continue
            idle += 1
            loss = call_loss(case, call, drawn, 2.0).loss
            network = case.networks[call.module]
            gradients = torch.autograd.grad(loss, tuple(network.parameters()))
            assert float(loss.detach()) == 0.0 and all(not g.any() for g in gradients)
    assert idle >= 4


# ------------------------------------------------------------------ the update schedule


def test_updates_split_each_group_evenly_and_subsets_keep_their_share() -> None:
    case = Case(independent_roots(SCHEDULE, 8), updates=3, fraction=0.6, prompts=3)
    met = np.zeros((3, 8), dtype=int)
    assignments = []
    for update in schedule_updates(case):
        edges: dict[tuple[int, int], int] = {}
        for call in update.calls:
            for item in call.items:
                (child,) = item.children  # Chains: a state belongs to one sample.
                leaf = next(
                    g for g, leaf in enumerate(case.plan.leaves)
                    if child in case.plan.ancestry(leaf)
                )  # fmt: skip
                edges[item.prompt, leaf] = edges.get((item.prompt, leaf), 0) + 1
        assert set(edges.values()) == {2}  # int(0.6 x 4)
        assert update.divisor == 2 * len(edges)
        for p in range(3):
            assert sum(prompt == p for prompt, _ in edges) in (2, 3)
        assignments.append({p: {g for q, g in edges if q == p} for p in range(3)})
        for place in edges:
            met[place] += 1
    assert (met == 1).all()
    assert any(assignment[0] != assignment[1] for assignment in assignments)


def test_an_update_without_a_valid_sample_has_no_calls() -> None:
    case = Case(shared_root(SCHEDULE, 3), prompts=1)
    case.rewards[:] = np.nan
    (update,) = schedule_updates(case)
    assert (update.calls, update.divisor, update.modules) == ((), 0.0, ())


def test_the_first_selected_valid_leaf_decides_under_edge_credit() -> None:
    # The first edge is shared by all nine leaves; leaf 0 failed, so leaf 1 takes it.
    case = Case(branch_points(SCHEDULE, (1, 2), 3), credit="depth", prompts=1, updates=9)
    case.rewards[0, 0] = np.nan
    alone = Case(branch_points(SCHEDULE, (1, 2), 3), prompts=1, updates=9)
    alone.rewards[0, 0] = np.nan
    leaf_1 = next(s.index for s in case.plan.states if s.path == ((2, 1),) and s.step == 4)
    first_edge = case.plan.leaf_edges[0][0]

    def update_of(some: Case, edge: int) -> list[int]:
        return [
            position
            for position, update in enumerate(schedule_updates(some))
            if any(edge in item.children for call in update.calls for item in call.items)
        ]

    assert update_of(case, first_edge) == update_of(alone, leaf_1)
    assert len(update_of(alone, first_edge)) == 8


# ------------------------------------------------------------------ leaf credit


def test_leaf_credit_is_two_signed_sums_and_not_their_mean() -> None:
    case = make("branch_points", "leaf", "plain")
    (terms,) = explicit_terms(case)
    loss, ratio = explicit_losses(case, terms)
    together: dict[tuple[int, int], list[int]] = {}
    for i, term in enumerate(terms):
        together.setdefault((term.prompt, term.edge), []).append(i)
    apart_outside = 0
    for members in together.values():
        values = [terms[i].values[0] for i in members]
        mean = float(np.mean(values))
        pooled = (
            len(members) * explicit_losses(case, [replace(terms[members[0]], values=(mean,))])[0]
        )
        separate = float(loss[members].sum().detach())
        outside = abs(float(ratio[members[0]].detach()) - 1) > CLIP
        if outside and min(values) < 0 < max(values):
            assert abs(pooled.item() - separate) > 1e-2
            apart_outside += 1
        else:  # Inside the range, or with one sign, the mean would do.
            assert pooled.item() == pytest.approx(separate, abs=1e-12)
    assert apart_outside >= 4
    # And the package's items carry the two sums and the count.
    for update in schedule_updates(case):
        for call in update.calls:
            for item in call.items:
                for child, sums, weight in zip(
                    item.children, item.advantages, item.weights, strict=True
                ):
                    found = [terms[i].values[0] for i in together[item.prompt, child]]
                    assert sums[0, 0] == sum(a for a in found if a > 0)
                    assert sums[0, 1] == sum(a for a in found if a < 0)
                    assert weight == len(found)


def test_a_negative_weight_clips_as_a_negated_reward() -> None:
    case = Case(TREES["shared_root"], weights=(1.0, -0.5), combine="loss")
    mirrored = Case(TREES["shared_root"], weights=(1.0, 0.5), combine="loss")
    mirrored.rewards = case.rewards * np.array([1, -1], dtype=np.float32)
    (one,), (other,) = package_updates(case), package_updates(mirrored)
    assert one.loss == other.loss and torch.equal(one.gradient, other.gradient)


# ------------------------------------------------------------------ the ratio


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize("tree", TREES)
def test_the_ratio_is_exactly_one_before_the_first_step(
    tree: str, box: tuple[tuple[int, int], ...] | None, latent_dtype: str
) -> None:
    plan: TreePlan = TREES[tree]
    one = draw(plan, box=box, latent_dtype=latent_dtype)
    inner = [(p, s) for p in range(2) for s in range(len(plan.states)) if plan.children[s]]
    kids = [[c for c in plan.children[s] if plan.states[c].trained] for _, s in inner]
    fan = Fan.of(
        [place for place, own in zip(inner, kids, strict=True) if own],
        [own for own in kids if own],
    )
    new = recompute_log_prob(fan, one.drawn, one.conditions, one.family, one.network)
    old = one.drawn.recorded_log_prob(fan.edges)
    assert old.dtype == new.dtype == torch.float32
    assert torch.equal(new, old) and torch.isfinite(old).all()
    assert old.unique().numel() == len(fan.edges)  # No two edges share a recorded value.


def test_rollout_log_prob_is_that_of_the_stored_sample() -> None:
    case = make("trunk_three_steps", "leaf", "kl_and_box")
    edges = [edge for edge in case.planted if edge in case.whole.log_prob]
    with torch.no_grad():
        explicit, _ = explicit_transitions(case, edges)
    assert len(edges) == 2 * 18
    torch.testing.assert_close(
        case.whole.recorded_log_prob(edges), explicit, rtol=1e-12, atol=1e-12
    )
