"""Advantages: published vectors, every scope and combination, failures, and who is credited."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from dancegrpo_fast.advantages import (
    LeafAdvantages,
    RunningRewards,
    best_and_worst,
    check_credit,
    edge_advantages,
    leaf_advantages,
    valid_samples,
)
from dancegrpo_fast.config import AdvantageConfig
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.trees.tree import (
    TreePlan,
    branch_points,
    independent_roots,
    shared_root,
    trunk_with_branches,
    window,
)

ONE = np.ones(1)
NAN = float("nan")
SCHEDULE = dance_schedule(5, 3.0)


@pytest.fixture(autouse=True)
def _no_warnings():
    """Failures are part of the contract: none may come with a NumPy warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def groups(*rewards: list[float]) -> np.ndarray:
    """[P, G, 1] float32, as rewards are gathered."""
    return np.array(rewards, dtype=np.float32)[..., None]


def values(rewards: np.ndarray, weights: np.ndarray = ONE, **settings) -> np.ndarray:
    """[P, G] advantages of one column."""
    result = leaf_advantages(rewards, weights, AdvantageConfig(**settings))
    assert result.values.shape[2] == 1 and result.values.dtype == np.float64
    return result.values[..., 0]


# ------------------------------------------------------------------ one reward


def test_published_vectors() -> None:
    rewards = np.array([[0.30, 0.34, 0.28, 0.36]])[..., None]
    expected = [-0.54772241, 0.54772241, -1.09544482, 1.09544482]
    np.testing.assert_allclose(values(rewards)[0], expected, atol=1e-8)
    expected = [-0.63046184, 0.63046184, -1.26092367, 1.26092367]
    np.testing.assert_allclose(values(rewards, std="biased", eps=1e-4)[0], expected, atol=1e-8)


def test_group_scope_normalises_each_prompt_by_itself() -> None:
    found = values(groups([0, 1, 2], [10, 30, 50]), eps=0)
    np.testing.assert_allclose(found, [[-1, 0, 1], [-1, 0, 1]], atol=1e-12)


def test_batch_scope_shares_mean_and_deviation() -> None:
    # Mean 4, squared deviations 16 + 4 + 4 + 16 = 40.
    found = values(groups([0, 2], [6, 8]), scope="batch", std="biased", eps=0)
    np.testing.assert_allclose(found, np.array([[-4, -2], [2, 4]]) / np.sqrt(10), atol=1e-12)
    found = values(groups([0, 2], [6, 8]), scope="batch", eps=0.5)
    expected = np.array([[-4, -2], [2, 4]]) / (np.sqrt(40 / 3) + 0.5)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_batch_std_takes_the_mean_from_the_group() -> None:
    found = values(groups([0, 2], [6, 8]), scope="batch_std", std="biased", eps=0)
    np.testing.assert_allclose(found, np.array([[-1, 1], [-1, 1]]) / np.sqrt(10), atol=1e-12)


def test_running_scope_uses_the_batch_until_the_history_is_long_enough() -> None:
    running = RunningRewards(window=4, min_count=3)
    config = AdvantageConfig(scope="running", std="biased", eps=0.0)

    def step(*rewards: list[float]) -> np.ndarray:
        found = leaf_advantages(groups(*rewards), ONE, config, prompts=[7, 2], running=running)
        return found.values[..., 0]

    # Two samples of each prompt are fewer than three: the batch's statistics, as in DDPO.
    first = step([0, 2], [6, 8])
    np.testing.assert_allclose(first, np.array([[-4, -2], [2, 4]]) / np.sqrt(10), atol=1e-12)
    # Prompt 7: history 0, 2, 4, 6 (mean 3, variance 5). Prompt 2: 6, 8 and one valid sample 1.
    second = step([4, 6], [1, NAN])
    np.testing.assert_allclose(second[0], np.array([1, 3]) / np.sqrt(5), atol=1e-12)
    np.testing.assert_allclose(second[1], [-4 / np.sqrt(26 / 3), 0], atol=1e-12)
    # The window keeps the newest four.
    np.testing.assert_array_equal(running.history[7], [[0], [2], [4], [6]])
    step([9, 9], [3, 3])
    np.testing.assert_array_equal(running.history[7], [[4], [6], [9], [9]])
    np.testing.assert_array_equal(running.history[2], [[8], [1], [3], [3]])


def test_a_short_window_is_used_once_it_is_full() -> None:
    """It never holds DDPO's 16 samples, and would be the batch's statistics for good."""
    running = RunningRewards(window=4)
    config = AdvantageConfig(scope="running", running_window=4, std="biased", eps=0.0)
    for rewards in ([0.0, 2.0], [4.0, 6.0]):
        found = leaf_advantages(groups(rewards, [9, 9]), ONE, config, prompts=[7, 2],
                                running=running)  # fmt: skip
    # History 0, 2, 4, 6: mean 3, variance 5.
    np.testing.assert_allclose(found.values[0, :, 0], np.array([1, 3]) / np.sqrt(5), atol=1e-12)


@pytest.mark.parametrize("scope", ["group", "batch", "batch_std"])
@pytest.mark.parametrize("std", ["unbiased", "biased"])
def test_failures_enter_no_statistic(scope: str, std: str) -> None:
    with_failures = groups([0.1, NAN, 0.5, 0.9], [NAN, 2.0, NAN, 1.0], [NAN] * 4)
    found = leaf_advantages(with_failures, ONE, AdvantageConfig(scope=scope, std=std))
    assert found.valid.tolist() == [
        [True, False, True, True],
        [False, True, False, True],
        [False] * 4,
    ]
    assert not found.values[~found.valid].any()
    pool = [np.float32([0.1, 0.5, 0.9]), np.float32([2.0, 1.0])]
    every = np.concatenate(pool).astype(np.float64)
    for p, group in enumerate(pool):
        own = group.astype(np.float64)
        mean = every if scope == "batch" else own
        spread = own if scope == "group" else every
        expected = (own - mean.mean()) / (spread.std(ddof=std == "unbiased") + 1e-8)
        np.testing.assert_allclose(found.values[p, found.valid[p], 0], expected, rtol=1e-12)


def test_infinite_rewards_are_failures() -> None:
    found = leaf_advantages(groups([1, 2, np.inf], [-np.inf, 3, 5]), ONE, AdvantageConfig())
    assert found.valid.tolist() == [[True, True, False], [False, True, True]]
    assert np.isfinite(found.values).all()


@pytest.mark.parametrize("reward", [0.0, 0.37, 1e8, -3e-9])
@pytest.mark.parametrize("std", ["unbiased", "biased"])
def test_equal_rewards_carry_no_signal(reward: float, std: str) -> None:
    result = leaf_advantages(groups([reward] * 3, [0, 1, 2]), ONE, AdvantageConfig(std=std))
    assert not result.values[0].any() and result.values[1].any()
    assert result.zero_variance == 0.5


def test_zero_variance_is_relative_to_the_rewards() -> None:
    spread = np.array([0.0, 1.0, 2.0])  # Unbiased deviation 1.
    for scale in (1e-12, 1.0, 1e12):
        differ, equal = 1e5 + spread, 1e7 + spread  # Deviation over magnitude: 1e-5 and 1e-7.
        found = values(scale * np.stack([differ, equal])[..., None], eps=0)
        np.testing.assert_allclose(found[0], [-1, 0, 1], atol=1e-9)
        assert not found[1].any()
    assert values((1e7 + spread)[None, :, None], zero_variance=0.0).any()


@pytest.mark.parametrize("std", ["unbiased", "biased"])
def test_one_valid_sample_has_advantage_zero(std: str) -> None:
    for rewards in (groups([0.4]), groups([NAN, 0.4, NAN])):
        result = leaf_advantages(rewards, ONE, AdvantageConfig(std=std))
        assert not result.values.any() and result.zero_variance == 1.0


def test_advantages_are_clamped() -> None:
    # One of 10: unbiased deviation 1/sqrt(10), so (1 - .1) sqrt(10) = 2.846.
    rewards = groups([1] + [0] * 9)
    assert values(rewards)[0, 0] == pytest.approx(0.9 * np.sqrt(10), rel=1e-6)
    assert values(rewards, clip=2.0)[0, 0] == 2.0
    assert values(-rewards, clip=2.0)[0, 0] == -2.0


# ------------------------------------------------------------------ several rewards

SEVERAL = np.array([[[0, 4, NAN], [1, 2, 9], [2, 0, NAN]]], dtype=np.float32)
WEIGHTS = np.array([2.0, -0.5, 0.0])


def test_combined_as_advantages() -> None:
    # Normalised columns: [-1, 0, 1] and [1, 0, -1]; 2 x first - .5 x second.
    found = values(SEVERAL, WEIGHTS, combine="advantage", eps=0)
    np.testing.assert_allclose(found, [[-2.5, 0, 2.5]], atol=1e-12)
    # Clamped once, after the sum.
    assert values(SEVERAL, WEIGHTS, combine="advantage", clip=2.25)[0].tolist() == [-2.25, 0, 2.25]


def test_sums_are_normalised_over_the_iteration() -> None:
    """GDPO: groups first, then the batch; failures and groups without a spread take no part."""
    rewards = np.array(
        [
            [[0, 0], [1, 0], [2, 3], [NAN, 1]],
            [[5, 1], [5, 4], [9, 1], [1, 2]],
            [[3, 3], [3, 3], [3, 3], [3, 3]],
        ],
        dtype=np.float32,
    )
    weights = np.array([1.0, 0.5])

    def normalised(v: np.ndarray) -> np.ndarray:
        return (v - v.mean()) / v.std(ddof=1)

    groups = [rewards[0, :3].astype(float), rewards[1].astype(float)]
    sums = [normalised(g[:, 0]) + 0.5 * normalised(g[:, 1]) for g in groups]
    expected = normalised(np.concatenate(sums))
    found = values(rewards, weights, batch_normalise=True, eps=0.0)
    np.testing.assert_allclose(np.concatenate([found[0, :3], found[1]]), expected, atol=1e-12)
    assert found[0, 3] == 0 and not found[2].any()
    plain = values(rewards, weights, eps=0.0)
    assert np.abs(plain - found).max() > 0.1


def test_combined_as_rewards() -> None:
    # Sums -2, 1, 4: mean 1, deviation 3.
    found = values(SEVERAL, WEIGHTS, combine="reward", eps=0)
    np.testing.assert_allclose(found, [[-1, 0, 1]], atol=1e-12)


def test_combined_in_the_loss() -> None:
    config = AdvantageConfig(combine="loss", eps=0.0, clip=0.75)
    result = leaf_advantages(SEVERAL, WEIGHTS, config)
    # A negative weight turns its advantage round: the clipped objective is not odd in it.
    np.testing.assert_allclose(result.values[0, :, 0], [-0.75, 0, 0.75], atol=1e-12)
    np.testing.assert_allclose(result.values[0, :, 1], [-0.75, 0, 0.75], atol=1e-12)
    assert result.weights.tolist() == [2.0, 0.5]


def test_a_reward_of_weight_zero_drops_nothing() -> None:
    assert valid_samples(SEVERAL, WEIGHTS).all()
    assert valid_samples(SEVERAL, np.ones(3)).tolist() == [[False, True, False]]
    failed = SEVERAL.copy()
    failed[0, 0, 1] = NAN
    result = leaf_advantages(failed, WEIGHTS, AdvantageConfig(combine="loss", eps=0.0))
    assert result.valid.tolist() == [[False, True, True]]
    # The failed sample's good first reward enters no statistic: 1, 2 -> -+ 1/sqrt(2).
    np.testing.assert_allclose(result.values[0, :, 0], [0, -np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-12)


def test_zero_variance_counts_groups_without_any_signal() -> None:
    rewards = np.array([[[1, 0], [1, 5]], [[1, 3], [1, 3]]], dtype=np.float32)
    result = leaf_advantages(rewards, np.ones(2), AdvantageConfig())
    assert result.zero_variance == 0.5


# ------------------------------------------------------------------ best of n


def scored(*rows: list[float]) -> LeafAdvantages:
    found = np.array(rows)
    return LeafAdvantages(np.nan_to_num(found)[..., None], ONE, np.isfinite(found), 0.0)


def test_best_and_worst_of_the_full_pool() -> None:
    pool = scored([0.5, -2, 0, 3, 1, -1], [NAN, 1, NAN, 2, NAN, NAN], [NAN] * 6)
    assert best_and_worst(pool, 4).tolist() == [
        [False, True, False, True, True, True],
        [False, True, False, True, False, False],  # Fewer than n are valid: all of them.
        [False] * 6,
    ]


def test_the_best_alone() -> None:
    kept = best_and_worst(scored([0.1, 0.9, 0.5, 0.7]), 2, "best")
    assert kept.tolist() == [[False, True, False, True]]
    failed = best_and_worst(scored([0.1, 0.9, NAN, 0.7]), 4, "best")
    assert failed.tolist() == [[True, True, False, True]]  # Fewer are left than were asked for.


def test_ties_keep_canonical_order() -> None:
    assert best_and_worst(scored([0, 0, 0, 0]), 2).tolist() == [[True, False, False, True]]


def test_best_of_n_keeps_the_advantages_of_the_full_pool() -> None:
    rewards = groups([0, 1, 2, 3, 10])
    result = leaf_advantages(rewards, ONE, AdvantageConfig(eps=0.0))
    kept = result.values[best_and_worst(result, 2)][:, 0]
    full = np.array([0, 1, 2, 3, 10.0])
    np.testing.assert_allclose(kept, ([0, 10] - full.mean()) / full.std(ddof=1), rtol=1e-12)


@pytest.mark.parametrize("combine", ["advantage", "loss"])
def test_best_of_n_ranks_what_the_clamp_makes_equal(combine: str) -> None:
    """All but 3 of these advantages end at the clamp; the best and the worst are still known."""
    rewards = np.array([[[1.0], [2], [10], [0], [5.1], [5.2], [8], [9]]])
    pool = leaf_advantages(rewards, ONE, AdvantageConfig(clip=0.2, combine=combine))
    assert (np.abs(pool.values) == 0.2).sum() >= 6
    assert np.flatnonzero(best_and_worst(pool, 2)).tolist() == [2, 3]
    assert np.flatnonzero(best_and_worst(pool, 2, "best")).tolist() == [2, 7]


def test_best_of_n_ranks_by_the_weighted_sum() -> None:
    columns = np.array([[[1, 0], [0, 3], [0, 0], [-1, 1]]], dtype=float)
    pool = LeafAdvantages(columns, np.array([2.0, 1.0]), np.ones((1, 4), dtype=bool), 0.0)
    # Sums 2, 3, 0, -1.
    assert best_and_worst(pool, 2).tolist() == [[False, True, False, True]]


# ------------------------------------------------------------------ credit of edges


def edge_vector(plan: TreePlan, rewards: np.ndarray, credit: str, **settings) -> np.ndarray:
    config = AdvantageConfig(credit=credit, eps=0.0, **settings)
    found, weights = edge_advantages(plan, rewards, ONE, config)
    assert found.shape == (len(rewards), len(plan.states), 1) and weights.tolist() == [1.0]
    return found[..., 0]


def test_depth_credit_by_hand() -> None:
    # Root 0; edges 1, 2 (step 1); 3, 4, 5, 6 (step 2); leaves 7 to 10 by an untrained step.
    plan = branch_points(dance_schedule(3, 1.0), (0, 1), 2)
    found = edge_vector(plan, groups([0, 2, 5, 9], [0, NAN, NAN, NAN]), "depth")
    half = np.sqrt(0.5)
    # Step 1: means 1 and 7. Step 2: 0, 2, 5, 9 with mean 4.
    expected = np.array([-4, -2, 1, 5]) / np.std([0, 2, 5, 9], ddof=1)
    np.testing.assert_allclose(found[0], [0, -half, half, *expected, 0, 0, 0, 0], atol=1e-12)
    assert not found[1].any()  # One edge a step is left: nothing to compare with.


def test_depth_credit_drops_failed_leaves_from_the_means() -> None:
    plan = branch_points(dance_schedule(3, 1.0), (0, 1), 2)
    found = edge_vector(plan, groups([0, NAN, 5, 9]), "depth")
    half = np.sqrt(0.5)
    three = np.array([0, 5, 9]) - 14 / 3
    three = three / np.std([0, 5, 9], ddof=1)
    expected = [0, -half, half, three[0], 0, three[1], three[2], 0, 0, 0, 0]
    np.testing.assert_allclose(found[0], expected, atol=1e-12)


def test_sibling_credit_by_hand() -> None:
    # Edges 1, 2, 3 from the root; 4 to 12 below them; leaves 13 to 21.
    plan = branch_points(dance_schedule(3, 1.0), (0, 1), 3)
    rewards = [0, 1, 2, 10, 30, 50, 7, 7, 7]
    found = edge_vector(plan, groups(rewards), "siblings")[0]
    means = np.array([1, 30, 7.0])
    np.testing.assert_allclose(found[1:4], (means - means.mean()) / means.std(ddof=1), atol=1e-12)
    np.testing.assert_allclose(found[4:13], [-1, 0, 1, -1, 0, 1, 0, 0, 0], atol=1e-12)
    assert not found[13:].any() and found[0] == 0


def test_an_only_child_takes_the_advantage_of_the_edge_into_its_parent() -> None:
    plan = window(SCHEDULE, 3, 1, 3)  # Splits at step 1; only children at steps 2 and 3.
    found = edge_vector(plan, groups([0, 1, 2], [5, NAN, 6]), "siblings")
    half = np.sqrt(0.5)
    for position, way in enumerate(plan.leaf_edges):
        assert len(way) == 3
        np.testing.assert_allclose(found[0, list(way)], [position - 1] * 3, atol=1e-12)
        np.testing.assert_allclose(
            found[1, list(way)], [[-half, 0, half][position]] * 3, atol=1e-12
        )


def test_siblings_of_a_trunk_are_compared_at_their_own_step() -> None:
    plan = trunk_with_branches(SCHEDULE, (0, 1, 3), 3)
    rewards = np.arange(9, dtype=np.float32) ** 2
    found = edge_vector(plan, rewards[None, :, None], "siblings")[0]
    by_step: dict[int, list[int]] = {}
    for position, (edge,) in enumerate(plan.leaf_edges):
        by_step.setdefault(plan.states[edge].step, []).append(position)
    assert sorted(by_step) == [1, 2, 4]
    for members in by_step.values():
        own = rewards[members].astype(np.float64)
        edges = [plan.leaf_edges[position][0] for position in members]
        np.testing.assert_allclose(found[edges], (own - own.mean()) / own.std(ddof=1), rtol=1e-12)


@pytest.mark.parametrize("combine", ["advantage", "loss", "reward"])
def test_edges_combine_rewards_as_leaves_do(combine: str) -> None:
    # In one trained step with one leaf an edge, depth credit is leaf credit.
    plan = window(SCHEDULE, 3, 1, 1)
    config = AdvantageConfig(combine=combine, credit="depth", clip=0.9)
    leaves = leaf_advantages(SEVERAL, WEIGHTS, config)
    found, weights = edge_advantages(plan, SEVERAL, WEIGHTS, config)
    assert weights.tolist() == leaves.weights.tolist()
    edges = [way[0] for way in plan.leaf_edges]
    np.testing.assert_allclose(found[:, edges], leaves.values, rtol=1e-12)


def test_sibling_credit_refuses_what_it_cannot_compare() -> None:
    for plan in (branch_points(SCHEDULE, (0,), 2), trunk_with_branches(SCHEDULE, (1,), 2)):
        with pytest.raises(ValueError, match="2 trained children.*3 or more branches"):
            check_credit(plan, "siblings")
    for plan in (independent_roots(SCHEDULE, 4), branch_points(SCHEDULE, (1,), 3)):
        with pytest.raises(ValueError, match="only child.*step 0.*credit = leaf"):
            check_credit(plan, "siblings")
    for plan in (
        shared_root(SCHEDULE, 3),
        branch_points(SCHEDULE, (0, 2), 3),
        trunk_with_branches(SCHEDULE, (1, 2), 3, trunks=2),
    ):
        check_credit(plan, "siblings")
    for rule in ("leaf", "depth"):
        check_credit(independent_roots(SCHEDULE, 2), rule)
