"""Search: what is kept, on which bits, at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from search_cases import LAST, alike, by_path, made_sampler, score, searched
from torch import Tensor
from tree_stand_ins import BOX, KEY, LEVEL, SCHEDULE, SHAPE, Net, embeddings, features

from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.ops.noise import normal
from dancegrpo_fast.rollout import denoise, draw_trees
from dancegrpo_fast.search import SearchCost, SearchSettings, search
from dancegrpo_fast.transitions import coefficient_table, transition, x0_step
from dancegrpo_fast.trees.tree import ROOT_STEP, TreePlan, noise_key, shared_root, window

# ------------------------------------------------------------------ special cases


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["brute", "greedy"])
@pytest.mark.parametrize(
    ("steps", "plan"),
    [((0, 1, 2, 3), shared_root(SCHEDULE, 1)), ((1, 2), window(SCHEDULE, 1, 1, 2))],
)
def test_one_candidate_is_plain_sampling(steps, plan: TreePlan, method: str, latent_dtype) -> None:
    sampler = made_sampler(latent_dtype=latent_dtype)
    found = searched(SearchSettings(method, 1, steps), sampler=sampler)
    drawn = draw_trees(
        sampler.family, sampler.modules, plan,
        coefficient_table(plan.transitions(dynamics="dance", level=LEVEL)), embeddings(2),
        key=KEY, owner=leaf_owners(2, 1, 1), rank=0, batch_size=2, latent_dtype=latent_dtype,
    )  # fmt: skip
    for t, one in enumerate(found):
        assert one.plan == plan and one.ranked == plan.leaves
        assert one.cost == SearchCost(evaluations=SCHEDULE.steps, previews=0, reward_calls=1)
        assert {(t, s) for s in one.latents} == {place for place in drawn.latents if place[0] == t}
        for state, latents in one.latents.items():
            assert torch.equal(latents, drawn.latents[t, state])
        for state, value in one.log_prob.items():
            assert torch.equal(value, drawn.log_prob[t, state])


@pytest.mark.parametrize("steps", [(0, 2), (-1, 1, 3)])
def test_a_beam_of_one_is_greedy(steps) -> None:
    greedy = searched(SearchSettings("greedy", 4, steps))
    beam = searched(SearchSettings("beam", 4, steps, beam=1))
    assert all(map(alike, greedy, beam))


@pytest.mark.parametrize("steps", [(0, 2), (-1, 1, 3)])
def test_a_beam_of_everything_finds_what_brute_force_finds(steps) -> None:
    brute = searched(SearchSettings("brute", 3, steps))
    wide = SearchSettings("beam", 3, steps, beam=3 ** len(steps))
    assert all(map(alike, brute, searched(wide)))
    seen = searched(wide, preview_all=True)
    for one, other in zip(brute, seen, strict=True):
        assert not one.previews and len(one.ranked) == 3 ** len(steps)
        assert other.ranked == one.ranked and torch.equal(other.sample, one.sample)
        assert other.cost.previews == sum(3**depth for depth in range(1, len(steps) + 1))
        assert other.cost.evaluations == one.cost.evaluations


def test_brute_force_over_initial_noise_is_best_of_n() -> None:
    sampler = made_sampler(final="ode")
    noise = torch.randn(2, 6, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = searched(SearchSettings("brute", 6, (ROOT_STEP,)), sampler=sampler, roots=noise)
    for t, one in enumerate(found):
        samples = denoise(
            sampler.family, sampler.modules, SCHEDULE, "dance",
            embeddings(2).select([t] * 6), noise[t],
        )  # fmt: skip
        order = score(samples, [t] * 6)[:, 0].argsort()[::-1]
        assert torch.equal(torch.stack([one.latents[s] for s in one.ranked]), samples[order.copy()])
        assert one.cost == SearchCost(6 * SCHEDULE.steps, previews=0, reward_calls=6)


# ------------------------------------------------------------------ bits


def test_more_candidates_change_no_bit_of_the_others() -> None:
    few = searched(SearchSettings("brute", 2, (-1, 1, 2)))
    many = searched(SearchSettings("brute", 3, (-1, 1, 2)))
    for one, other in zip(map(by_path, few), map(by_path, many), strict=True):
        assert one.keys() < other.keys()
        assert all(torch.equal(latents, other[name]) for name, latents in one.items())
        finished = [x for (step, _), x in other.items() if step == SCHEDULE.steps]
        assert len({x.numpy().tobytes() for x in finished}) == 27


def test_neither_batches_nor_other_trees_change_a_bit() -> None:
    settings = SearchSettings("beam", 3, (0, 2), beam=2)
    together = searched(settings, trees=3)
    assert all(map(alike, together, searched(settings, 3, made_sampler(batch_size=1))))
    (alone,) = search(
        made_sampler(), embeddings(3).select([1]), [KEY.fold_in(1)], score, settings
    )
    assert alike(alone, together[1])


def test_forwards_that_are_owed_change_nothing() -> None:
    """Another process needs more of them: the last batch runs again."""
    settings, asked = SearchSettings("greedy", 3, (0, 2)), []
    plain = made_sampler(batch_size=4)
    owing = replace(made_sampler(batch_size=4), forwards=[1, 4, 1, 2, 3])
    found = searched(settings, 2, plain)
    again = searched(settings, 2, owing, before_step=asked.append)
    assert all(map(alike, found, again))
    # States of two trees: 2, 6, 2, 6, 2. Two more forwards of 2 at step 1, and two at the last.
    assert asked == [2, 6, 2, 6, 2]
    assert owing.family.evaluations == plain.family.evaluations + 2 * 2 + 2 * 2


# ------------------------------------------------------------------ against the definition


def by_definition(kept: int, width: int, steps: Sequence[int], t: int, box) -> list[tuple]:
    """Paths and samples of the beam that goes on to the end, in plain tensor arithmetic.

    Float64 throughout; noise by its own key. Returns (path, latents, preview value) of the last
    pruned level, then of the finished samples.
    """
    net, asked = Net(0), embeddings(2).select([t]).positive()["text"]
    inside = tuple(slice(*side) for side in box or [(0, n) for n in SHAPE])

    def output(x: Tensor, step: int) -> Tensor:
        row = features(x[None], torch.tensor([SCHEDULE.timesteps[step]]), asked)
        return net(row[0]).reshape(SHAPE).detach()

    def moved(x: Tensor, mean: Tensor) -> Tensor:
        y = x.clone()
        y[inside] = mean[inside]
        return y

    def noise(path, step: int) -> Tensor:
        state = SimpleNamespace(path=path)
        return normal(SHAPE, noise_key(KEY.fold_in(t), state, step)).double()

    root = range(width) if ROOT_STEP in steps else range(1)
    beam = [(path, noise(path, ROOT_STEP)) for c in root for path in [((-1, c),) if c else ()]]
    for step in range(SCHEDULE.steps):
        if step - 1 in steps and len(beam) > kept:
            p, q = x0_step(SCHEDULE, step)[:2]
            seen = [moved(x, p * x + q * output(x, step)) for _, x in beam]
            values = score(torch.stack(seen), [t] * len(seen))[:, 0]
            best = sorted(sorted(range(len(beam)), key=lambda i: -values[i])[:kept])
            beam = [beam[i] for i in best]
        kind = "sde" if step in steps else "x0" if step == LAST else "ode"
        row = transition(SCHEDULE, step, step + 1, dynamics="dance", kind=kind, level=LEVEL)
        following = []
        for path, x in beam:
            mean = row.a * x + row.b * output(x, step)
            for child in range(width if step in steps else 1):
                name = (*path, (step, child)) if child else path
                y = mean + row.s * noise(name, step) if step in steps else mean
                following.append((name, moved(x, y)))
        beam = following
    return beam


@pytest.mark.parametrize("box", [None, BOX])
@pytest.mark.parametrize(
    ("method", "beam", "steps"),
    [("greedy", None, (0, 1, 2, 3)), ("beam", 2, (0, 2, 3)), ("beam", 3, (-1, 1)),
     ("brute", None, (1, 3))],
)  # fmt: skip
def test_the_search_is_its_definition(method: str, beam, steps, box) -> None:
    kept = {"greedy": 1, "brute": 99}.get(method, beam)
    sampler = made_sampler(box=box, dtype=torch.float64)
    for t, one in enumerate(searched(SearchSettings(method, 4, steps, beam), 2, sampler)):
        expected = by_definition(kept, 4, steps, t, box)
        states = [one.plan.states[s] for s in sorted(one.ranked)]
        assert [state.path for state in states] == [path for path, _ in expected]
        for state, (_, latents) in zip(states, expected, strict=True):
            # Latents of order 1 are stored in float32 at each of 5 steps.
            assert (one.latents[state.index] - latents).abs().max() < 2e-6
        totals = [float(one.scores[s][0]) for s in one.ranked]
        assert totals == sorted(totals, reverse=True)


def test_previews_are_x0_estimates_of_the_candidates() -> None:
    shown = []

    def watched(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        shown.append(latents.clone())
        return score(latents, trees)

    settings = SearchSettings("greedy", 4, (1,))
    sampler = made_sampler(box=BOX)
    (one,) = searched(settings, 1, sampler, score=watched)
    (candidates,) = one.siblings
    x = torch.stack([one.latents[s] for s in candidates])
    m = sampler.family.model_output(
        sampler.modules["net"], x, torch.full((4,), SCHEDULE.timesteps[2]),
        embeddings(1).select([0] * 4), "net",
    ).detach()  # fmt: skip
    inside = (slice(None), *(slice(*side) for side in BOX))
    estimate = x.clone()
    estimate[inside] = (x - SCHEDULE.sigmas[2] * m)[inside]
    # One rounding of a product and a sum of order 1.
    assert (shown[0] - estimate).abs().max() < 1e-6
    outside = torch.ones(SHAPE, dtype=torch.bool)
    outside[inside[1:]] = False
    assert torch.equal(shown[0][:, outside], x[:, outside])
    assert [one.previews[s][0] for s in candidates] == score(shown[0], [0] * 4)[:, 0].tolist()


# ------------------------------------------------------------------ cost


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("steps", [(0,), (1, 3), (0, 1, 2, 3), (-1, 0)])
def test_cost_of_greedy_search(width: int, steps) -> None:
    sampler = made_sampler()
    found = searched(SearchSettings("greedy", width, steps), 2, sampler)
    shown = len(steps) * width if width > 1 else 0
    expected = SearchCost(SCHEDULE.steps + len(steps) * (width - 1), shown, shown + 1)
    assert [one.cost for one in found] == [expected] * 2
    assert sampler.family.evaluations == 2 * expected.evaluations


def test_cost_of_a_beam() -> None:
    # 3 candidates, all go on; then 3 x 3, of which 3 go on; then the same.
    (one,) = searched(SearchSettings("beam", 3, (0, 1, 3), beam=3), 1)
    assert one.cost == SearchCost(evaluations=1 + 3 + 9 + 3 + 9, previews=18, reward_calls=21)
    assert len(one.ranked) == 3
