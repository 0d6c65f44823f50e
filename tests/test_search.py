"""Search: what is kept, on which bits, at what cost; and training on the candidates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from tree_oracle import (
    CLIP,
    EXPERTS,
    LOG_RATIOS,
    Term,
    dyadic,
    explicit_losses,
    explicit_transitions,
    normalised,
)
from tree_stand_ins import (
    BOX,
    KEY,
    LEVEL,
    SCHEDULE,
    SHAPE,
    Family,
    Net,
    ReferencePolicy,
    embeddings,
    features,
)

from dancegrpo_fast.batching import build_updates, leaf_owners
from dancegrpo_fast.config import AdvantageConfig, LossConfig
from dancegrpo_fast.losses.policy_gradient import policy_gradient_loss, recompute_log_prob
from dancegrpo_fast.ops.noise import normal
from dancegrpo_fast.rollout import denoise, draw_trees
from dancegrpo_fast.search import (
    Found,
    Sampler,
    SearchCost,
    SearchSettings,
    search,
    sibling_credit,
    training_trees,
)
from dancegrpo_fast.trajectories import Fan
from dancegrpo_fast.transitions import coefficient_table, transition, x0_step
from dancegrpo_fast.tree import ROOT_STEP, TreePlan, noise_key, shared_root, window

LAST = SCHEDULE.steps - 1
NET = ("net",) * SCHEDULE.steps
TARGET = torch.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)


def score(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
    """[n, 1] nearness to a fixed latent: no candidate is worth the same as another."""
    distance = (latents.double() - TARGET).square().mean(dim=(1, 2, 3, 4))
    return -distance[:, None].numpy()


def made_sampler(
    names: Sequence[str] = NET,
    *,
    box: tuple[tuple[int, int], ...] | None = None,
    final: str = "x0",
    batch_size: int = 5,
    latent_dtype: str = "float32",
    dtype: torch.dtype = torch.float32,
) -> Sampler:
    networks = {name: Net(i, dtype) for i, name in enumerate(dict.fromkeys(names))}
    return Sampler(
        Family(names, box), networks, SCHEDULE, "dance", LEVEL, batch_size,
        final=final, latent_dtype=latent_dtype,
    )  # fmt: skip


def searched(
    settings: SearchSettings, trees: int = 2, sampler: Sampler | None = None, **options
) -> list[Found]:
    keys = [KEY.fold_in(t) for t in range(trees)]
    how = {"score": score} | options
    return search(
        sampler or made_sampler(), embeddings(trees), keys, how.pop("score"), settings, **how
    )


def alike(one: Found, other: Found) -> bool:
    """Whether two searches drew and chose the same, bit for bit."""
    return (
        one.plan == other.plan
        and one.ranked == other.ranked
        and one.cost == other.cost
        and one.latents.keys() == other.latents.keys()
        and all(torch.equal(x, other.latents[s]) for s, x in one.latents.items())
        and all(torch.equal(x, other.log_prob[s]) for s, x in one.log_prob.items())
        and one.previews.keys() == other.previews.keys()
        and all(np.array_equal(x, other.previews[s]) for s, x in one.previews.items())
        and all(np.array_equal(x, other.scores[s]) for s, x in one.scores.items())
    )


def by_path(found: Found) -> dict[tuple, Tensor]:
    """Stored latents by (step, path)."""
    states = found.plan.states
    return {(states[s].step, states[s].path): x for s, x in found.latents.items()}


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


# ------------------------------------------------------------------ scores that fail or tie


def failing(positions: Sequence[int]):
    """`score`, NaN for some of the first 4 samples it is shown."""
    calls = []

    def judged(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        values = score(latents, trees)
        if not calls:
            values[list(positions)] = np.nan
        calls.append(len(latents))
        return values

    return judged


def test_a_failed_score_is_never_chosen() -> None:
    settings = SearchSettings("greedy", 4, (1,))
    (one,) = searched(settings, 1)
    candidates = one.siblings[0]
    chosen = next(i for i, s in enumerate(candidates) if one.plan.children[s])
    others = [i for i in range(4) if i != chosen]
    second = max(others, key=lambda i: one.previews[candidates[i]][0])
    (other,) = searched(settings, 1, score=failing([chosen]))
    assert other.plan.children[other.siblings[0][second]]
    (last,) = searched(settings, 1, score=failing(others[:1] + others[1:2] + [chosen]))
    assert last.plan.children[last.siblings[0][others[2]]]
    with pytest.raises(ValueError, match=r"all 4 previews of tree 0 at step 2 have no score"):
        searched(settings, 1, score=failing(range(4)))


def test_a_beam_is_narrower_where_scores_fail() -> None:
    settings = SearchSettings("beam", 4, (1,), beam=3)
    (one,) = searched(settings, 1, score=failing([0, 2]))
    assert len(one.ranked) == 2
    assert not one.plan.children[one.siblings[0][0]]


def test_failed_samples_come_last() -> None:
    settings = SearchSettings("brute", 4, (1,))
    (one,) = searched(settings, 1, score=failing([0, 2]))
    assert [np.isnan(one.scores[s][0]) for s in one.ranked] == [False, False, True, True]
    with pytest.raises(ValueError, match=r"all 4 finished samples of tree 0 have no score"):
        searched(settings, 1, score=failing(range(4)))


def test_an_infinite_score_is_a_failed_one() -> None:
    def infinite(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        values = score(latents, trees)
        values[1] = np.inf
        return values

    (one,) = searched(SearchSettings("brute", 3, (0,)), 1, score=infinite)
    assert one.plan.states[one.ranked[-1]].path == ((0, 1),)


def test_equal_scores_keep_the_first() -> None:
    def equal(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        return np.full((len(latents), 1), 0.25)

    # 40 is where a sort that is not stable would show.
    for settings in (SearchSettings("greedy", 40, (0, 2)), SearchSettings("brute", 40, (2,))):
        (one,) = searched(settings, 1, score=equal)
        assert one.plan.states[one.ranked[0]].path == ()
    (one,) = searched(SearchSettings("beam", 3, (0, 2), beam=2), 1, score=equal)
    assert [one.plan.states[s].path for s in one.ranked] == [(), ((2, 1),)]


def test_weights_rank_and_a_weight_of_zero_decides_nothing() -> None:
    def three(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
        first = score(latents, trees)
        second = latents.double().mean(dim=(1, 2, 3, 4))[:, None].numpy()
        return np.concatenate([first, second, np.full_like(first, np.nan)], axis=1)

    settings = SearchSettings("brute", 5, (0,))
    (one,) = searched(settings, 1, score=three, weights=(0.5, -2.0, 0.0))
    totals = [0.5 * one.scores[s][0] - 2.0 * one.scores[s][1] for s in one.ranked]
    assert totals == sorted(totals, reverse=True)
    (plain,) = searched(settings, 1)
    assert plain.ranked != one.ranked


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("best", 3, (0,)), "method = 'best': must be one of brute, greedy, beam"),
        (("greedy", 0, (0,)), "width = 0: must be at least 1"),
        (("greedy", 3, ()), "steps = []: give distinct steps in ascending order"),
        (("greedy", 3, (2, 1)), "steps = [2, 1]: give distinct steps in ascending order"),
        (("greedy", 3, (1, 1)), "steps = [1, 1]: give distinct steps in ascending order"),
        (("greedy", 3, (1,), 2), "beam = 2 with method = 'greedy'"),
        (("beam", 3, (1,)), "beam = None with method = 'beam'"),
        (("beam", 3, (1,), 0), "beam = 0: must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        SearchSettings(*arguments)


def test_what_does_not_fit_is_refused() -> None:
    for steps in ((-2, 0), (LAST,)):
        with pytest.raises(ValueError, match="must lie from -1 .* to 3"):
            searched(SearchSettings("greedy", 2, steps))
    with pytest.raises(ValueError, match="score returned"):
        searched(SearchSettings("greedy", 2, (0,)), score=lambda x, trees: score(x, trees)[:, 0])
    with pytest.raises(ValueError, match=r"roots = \[2, 3, .*must be \[2, 1, C"):
        searched(SearchSettings("greedy", 3, (0,)), roots=torch.zeros(2, 3, *SHAPE))
    silent = replace(made_sampler(), level=0.0)
    with pytest.raises(ValueError, match=r"weights = \[0.0\]: all are 0"):
        searched(SearchSettings("greedy", 3, (0,)), weights=(0.0,))
    with pytest.raises(ValueError, match="noise_level = 0: every candidate"):
        searched(SearchSettings("greedy", 3, (-1, 0)), sampler=silent)
    assert len(searched(SearchSettings("brute", 3, (-1,)), sampler=silent)[0].ranked) == 3
    with pytest.raises(ValueError, match="final = 'sample'"):
        made_sampler(final="sample")


# ------------------------------------------------------------------ training on sibling groups

TWO_REWARDS = (0.75, 0.0, -0.5)


def several(latents: Tensor, trees: Sequence[int]) -> np.ndarray:
    """Three rewards; some candidates fail, and the one of weight 0 always does."""
    first = score(latents, trees)
    second = latents.double().flatten(1)[:, :5].mean(dim=1)[:, None].numpy()
    if len(latents) > len(set(trees)):  # Previews; a finished sample of a tree has no rival.
        second[1::5] = np.nan
    return np.concatenate([first, np.full_like(first, np.nan), second], axis=1)


SETTINGS = {
    "greedy": {"settings": SearchSettings("greedy", 4, (0, 2, 3)), "trees": 3},
    "beam": {"settings": SearchSettings("beam", 3, (0, 1, 3), beam=2), "trees": 1},
    "brute": {"settings": SearchSettings("brute", 3, (0, 2)), "trees": 2},
    "roots": {"settings": SearchSettings("beam", 3, (-1, 1, 2), beam=2), "trees": 1},
    "everything": {
        "settings": SearchSettings("greedy", 5, (0, 1, 3)), "trees": 2, "names": EXPERTS,
        "box": BOX, "weights": TWO_REWARDS, "combine": "loss", "kl_weight": 0.07,
    },
    "summed": {
        "settings": SearchSettings("greedy", 5, (1, 3)), "trees": 2, "weights": TWO_REWARDS,
        "combine": "advantage",
    },
}  # fmt: skip


class Training:
    """A search, trained by the package and as an explicit list of transitions."""

    def __init__(
        self, settings: SearchSettings, trees: int, names: Sequence[str] = NET, box=None,
        weights: Sequence[float] = (1.0,), combine: str = "advantage", kl_weight: float = 0.0,
    ) -> None:  # fmt: skip
        self.sampler = made_sampler(names, box=box, dtype=torch.float64)
        self.names, self.box, self.weights = names, box, weights
        self.config = AdvantageConfig(combine=combine, clip=1.2)
        self.loss = LossConfig(clip_range=CLIP, kl_weight=kl_weight, micro_batch_size=1)
        self.networks, self.conditions = self.sampler.modules, embeddings(trees)
        self.references = {name: Net(9 + i) for i, name in enumerate(self.networks)}
        self.found = searched(
            settings, trees, self.sampler, weights=weights, preview_all=True,
            score=score if len(weights) == 1 else several,
        )  # fmt: skip
        self.drawn, self.previews = training_trees(self.found, self.sampler)
        plan = self.drawn.plan
        self.drawn.coefficients = coefficient_table(
            plan.transitions(dynamics="dance", level=LEVEL), dtype=torch.float64
        )

    def gradient(self) -> Tensor:
        flat = [p.grad.flatten() for net in self.networks.values() for p in net.parameters()]
        for network in self.networks.values():
            network.zero_grad(set_to_none=True)
        return torch.cat(flat).clone()

    def edge_name(self, t: int, plan: TreePlan, edge: int) -> tuple:
        """What an edge is called whatever its number: by the bits it leads to."""
        states = self.found[t] if plan is self.found[t].plan else None
        latents = states.latents[edge] if states else self.drawn.latents[t, edge]
        return t, plan.states[edge].step, latents.numpy().tobytes()

    def terms(self, t: int) -> list[Term]:
        """The transitions of a tree, from the definition of sibling credit."""
        one, used = self.found[t], [i for i, w in enumerate(self.weights) if w]
        terms = []
        children: dict[int, list[int]] = {}
        for state in one.plan.states:
            if state.kind == "sde":
                children.setdefault(state.parent, []).append(state.index)
        for group in children.values():
            rows = {s: [one.previews[s][i] * np.sign(self.weights[i]) for i in used] for s in group}
            rows = {s: row for s, row in rows.items() if not any(map(math.isnan, row))}
            columns = [normalised(column) for column in zip(*rows.values(), strict=True)]
            for member, edge in enumerate(rows):
                normal_row = [column[member] for column in columns]
                if self.config.combine == "advantage":
                    pairs = zip(used, normal_row, strict=True)
                    normal_row = [sum(abs(self.weights[i]) * a for i, a in pairs)]
                values = [max(-1.2, min(1.2, a)) for a in normal_row]
                terms.append(Term(t, edge, tuple(dyadic(np.array(values)).tolist())))
        return terms

    def explicit_case(self, t: int) -> SimpleNamespace:
        """One tree as `tree_oracle` reads it, under its own numbers of states."""
        one = self.found[t]
        whole = SimpleNamespace(latents={(t, s): x for s, x in one.latents.items()})
        return SimpleNamespace(
            plan=one.plan, whole=whole, names=self.names, box=self.box, networks=self.networks,
            references=self.references, conditions=self.conditions, weights=self.weights,
            combine=self.config.combine, kl_weight=self.loss.kl_weight, step_weights=None,
        )  # fmt: skip

    def explicit(self) -> tuple[float, Tensor, int, dict[tuple, Tensor]]:
        """Loss, gradient, divisor, and the planted old log-probs."""
        planted: dict[tuple, Tensor] = {}
        losses, count = [], 0
        for t in range(len(self.found)):
            case, terms = self.explicit_case(t), self.terms(t)
            edges = [(t, term.edge) for term in terms]
            now = explicit_transitions(case, edges)[0].detach()
            turns = itertools.cycle(LOG_RATIOS)
            case.planted = {e: v - next(turns) for e, v in zip(edges, now, strict=True)}
            for edge, value in case.planted.items():
                planted[self.edge_name(t, case.plan, edge[1])] = value
            losses.append(explicit_losses(case, terms)[0].sum())
            count += len(terms)
        loss = torch.stack(losses).sum() / count
        loss.backward()
        return float(loss.detach()), self.gradient(), count, planted

    def package(self, planted: dict[tuple, Tensor], world_size: int) -> tuple[float, Tensor, float]:
        """The same by `sibling_credit`, the update schedule and the loss of calls."""
        plan, prompts = self.drawn.plan, len(self.found)
        advantages, values = sibling_credit(
            plan, self.previews, np.array(self.weights), self.config
        )
        total, divisors = 0.0, set()
        for rank in range(world_size):
            (update,) = build_updates(
                plan, advantages, advantages.valid, key=KEY.fold_in(2), modules=self.names,
                rank=rank, world_size=world_size, micro_batch_size=4, edge_values=dyadic(values),
                owner=leaf_owners(prompts, len(plan.leaves), world_size),
            )  # fmt: skip
            divisors.add(update.divisor)
            for call in update.calls:
                edges = [(i.prompt, c) for i in call.items for c in i.children]
                old = [planted.get(self.edge_name(t, plan, c)) for t, c in edges]
                # Edges of idle items may be failed ones, which nothing was planted for.
                rows = [torch.zeros((), dtype=torch.float64) if x is None else x for x in old]
                loss = policy_gradient_loss(
                    call, self.drawn, self.conditions, self.sampler.family,
                    ReferencePolicy(self.references), self.networks[call.module], self.loss,
                    divisor=update.divisor, reward_weights=advantages.weights,
                    old_log_prob=torch.stack(rows),
                ).loss  # fmt: skip
                loss.backward()
                total += float(loss.detach())
        (divisor,) = divisors
        return total, self.gradient(), divisor


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_of_sibling_groups_equals_the_explicit_list(name: str, world_size: int) -> None:
    training = Training(**SETTINGS[name])
    loss, gradient, count, planted = training.explicit()
    ours, ours_gradient, divisor = training.package(planted, world_size)
    assert divisor == count
    assert ours == pytest.approx(loss, rel=1e-10, abs=1e-10)
    # float64 throughout; sums in another order.
    scale = max(float(gradient.abs().max()), 1e-3)
    assert float((ours_gradient - gradient).abs().max()) <= 1e-10 * scale
    assert float(gradient.abs().max()) > 1e-3


def test_failed_candidates_are_left_out() -> None:
    training = Training(**SETTINGS["everything"])
    candidates = sum(len(group) for one in training.found for group in one.siblings)
    assert 0 < sum(len(training.terms(t)) for t in range(2)) < candidates


def test_a_failed_candidate_that_went_on_is_not_trained() -> None:
    """Nothing is pruned here, so it has candidates of its own; they go with it."""
    training = Training(
        SearchSettings("brute", 4, (0, 2)), 1, weights=TWO_REWARDS, combine="advantage"
    )
    plan = training.drawn.plan
    previews = training.previews[0][:, [0, 2]]
    failed = {s for group in plan.children for s in group
              if plan.states[s].trained and np.isnan(previews[s]).any()}  # fmt: skip
    assert any(plan.states[s].step == 1 for s in failed), "none went on"
    advantages, values = sibling_credit(
        plan, training.previews, np.array(TWO_REWARDS), training.config
    )
    (update,) = build_updates(
        plan, advantages, advantages.valid, key=KEY, modules=NET, rank=0, world_size=1,
        edge_values=values,
    )  # fmt: skip
    trained = {c for call in update.calls for item in call.items for c in item.children}
    assert trained and not trained & failed
    below = {s for s in trained if failed & set(plan.ancestry(s))}
    assert not below and update.divisor == len(trained)


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16"])
def test_training_sees_the_log_probs_of_the_search(latent_dtype: str) -> None:
    sampler = made_sampler(latent_dtype=latent_dtype, box=BOX)
    found = searched(SearchSettings("greedy", 4, (0, 2)), 2, sampler, preview_all=True)
    drawn, _ = training_trees(found, sampler)
    kids = drawn.plan.children
    places = [(t, s) for t in range(2) for s in range(len(kids)) if len(kids[s]) == 4]
    assert len(places) == 4
    fan = Fan.of(places, [kids[s] for _, s in places])
    again = recompute_log_prob(fan, drawn, embeddings(2), sampler.family, sampler.modules["net"])
    assert torch.equal(again, drawn.recorded_log_prob(fan.edges))
    assert all(drawn.latents[edge].dtype == getattr(torch, latent_dtype) for edge in fan.edges)


def test_training_is_refused_where_it_would_mean_nothing() -> None:
    sampler, config, one = made_sampler(), AdvantageConfig(), np.ones(1)
    pair = searched(SearchSettings("greedy", 2, (0,)), 2, sampler)
    drawn, previews = training_trees(pair, sampler)
    with pytest.raises(ValueError, match="3 or more candidates"):
        sibling_credit(drawn.plan, previews, one, config)
    only_roots = searched(SearchSettings("greedy", 4, (-1,)), 2, sampler)
    drawn, previews = training_trees(only_roots, sampler)
    with pytest.raises(ValueError, match="3 or more candidates"):
        sibling_credit(drawn.plan, previews, one, config)
    drawn, previews = training_trees(
        searched(SearchSettings("greedy", 3, (0,)), 2, sampler), sampler
    )
    with pytest.raises(ValueError, match="advantage.scope = 'batch'"):
        sibling_credit(drawn.plan, previews, one, AdvantageConfig(scope="batch"))
    with pytest.raises(ValueError, match="preview_all = True"):
        training_trees(searched(SearchSettings("brute", 3, (0,)), 2, sampler), sampler)


def test_beams_of_unequal_shape_are_trained_one_at_a_time() -> None:
    sampler = made_sampler()
    settings = SearchSettings("beam", 3, (0, 1, 2), beam=2)
    found = searched(settings, 6, sampler, preview_all=True)
    shapes = {tuple(map(len, one.plan.children)) for one in found}
    assert len(shapes) > 1
    with pytest.raises(ValueError, match="trees of different shapes"):
        training_trees(found, sampler)
    for one in found:
        drawn, _ = training_trees([one], sampler)
        assert len(drawn.plan.states) == len(one.plan.states)


def test_what_goes_on_comes_before_its_siblings() -> None:
    sampler = made_sampler()
    found = searched(SearchSettings("greedy", 4, (0, 2)), 3, sampler)
    chosen = {one.plan.states[one.ranked[0]].path for one in found}
    assert len(chosen) > 1  # The trees differ in what they kept.
    drawn, previews = training_trees(found, sampler)
    for t, one in enumerate(found):
        for group in [kids for kids in drawn.plan.children if len(kids) == 4]:
            assert [bool(drawn.plan.children[s]) for s in group] == [True, False, False, False]
            values = previews[t, list(group), 0]
            assert values[0] == values.max() and np.isfinite(values).all()
        last = len(drawn.plan.leaves) - 1
        assert drawn.plan.states[drawn.plan.leaves[last]].step == SCHEDULE.steps
        assert torch.equal(drawn.samples([(t, last)])[0], one.sample)
