"""Training on what a search visited: sibling groups against explicit lists of transitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from search_cases import NET, made_sampler, score, searched
from torch import Tensor
from tree_case import CLIP, EXPERTS, LOG_RATIOS, dyadic, explicit_transitions
from tree_oracle import Term, explicit_losses, normalised
from tree_stand_ins import BOX, KEY, LEVEL, SCHEDULE, Net, ReferencePolicy, embeddings

from dancegrpo_fast.advantages import check_credit, edge_advantages, leaf_advantages
from dancegrpo_fast.batching import build_updates, leaf_owners
from dancegrpo_fast.config import AdvantageConfig, LossConfig
from dancegrpo_fast.losses.policy_gradient import policy_gradient_loss, recompute_log_prob
from dancegrpo_fast.search import SearchSettings, search, training_trees
from dancegrpo_fast.trajectories import Fan
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.trees.candidates import beside, candidates_apart, search_tree
from dancegrpo_fast.trees.tree import Cost

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
    "trunks": {"settings": SearchSettings("greedy", 3, (0, 1)), "trees": 4, "trunks": 2},
    "beam": {"settings": SearchSettings("beam", 3, (0, 1, 3), beam=2), "trees": 1},
    "brute": {"settings": SearchSettings("brute", 3, (0, 2)), "trees": 2},
    "roots": {"settings": SearchSettings("beam", 3, (-1, 1, 2), beam=2), "trees": 1},
    "everything": {
        "settings": SearchSettings("greedy", 5, (0, 1, 3)), "trees": 4, "trunks": 2,
        "names": EXPERTS, "box": BOX, "weights": TWO_REWARDS, "combine": "loss", "kl_weight": 0.07,
    },
    "summed": {
        "settings": SearchSettings("greedy", 5, (1, 3)), "trees": 2, "weights": TWO_REWARDS,
        "combine": "advantage",
    },
    # Nothing is pruned: failed candidates have candidates of their own, which are groups as others.
    "failed_go_on": {
        "settings": SearchSettings("brute", 4, (0, 2)), "trees": 1, "weights": TWO_REWARDS,
        "combine": "advantage",
    },
}  # fmt: skip


class Training:
    """A search, trained by the package and as an explicit list of transitions."""

    def __init__(
        self, settings: SearchSettings, trees: int, trunks: int = 1, names: Sequence[str] = NET,
        box=None, weights: Sequence[float] = (1.0,), combine: str = "advantage",
        kl_weight: float = 0.0,
    ) -> None:  # fmt: skip
        self.sampler = made_sampler(names, box=box, dtype=torch.float64)
        self.names, self.box, self.weights = names, box, weights
        self.config = AdvantageConfig(combine=combine, clip=1.2, credit="siblings")
        self.loss = LossConfig(clip_range=CLIP, kl_weight=kl_weight, micro_batch_size=1)
        self.networks, self.conditions = self.sampler.modules, embeddings(trees // trunks)
        self.references = {name: Net(9 + i) for i, name in enumerate(self.networks)}
        self.of_trees = self.conditions.select([t // trunks for t in range(trees)])
        self.found = search(
            self.sampler, self.of_trees, [KEY.fold_in(t) for t in range(trees)],
            score if len(weights) == 1 else several, settings, weights=weights, preview_all=True,
        )  # fmt: skip
        self.drawn, self.previews = training_trees(self.found, self.sampler, trunks=trunks)
        plan = self.drawn.plan
        check_credit(plan, "siblings")
        self.drawn.coefficients = coefficient_table(
            plan.transitions(dynamics="dance", level=LEVEL), dtype=torch.float64
        )

    def gradient(self) -> Tensor:
        flat = [p.grad.flatten() for net in self.networks.values() for p in net.parameters()]
        for network in self.networks.values():
            network.zero_grad(set_to_none=True)
        return torch.cat(flat).clone()

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
            references=self.references, conditions=self.of_trees, weights=self.weights,
            combine=self.config.combine, kl_weight=self.loss.kl_weight, step_weights=None,
        )  # fmt: skip

    def explicit(self) -> tuple[float, Tensor, int, dict[bytes, Tensor]]:
        """Loss, gradient, divisor, and the planted old log-probs by the bits they lead to."""
        planted: dict[bytes, Tensor] = {}
        losses, count = [], 0
        for t in range(len(self.found)):
            case, terms = self.explicit_case(t), self.terms(t)
            edges = [(t, term.edge) for term in terms]
            now = explicit_transitions(case, edges)[0].detach()
            turns = itertools.cycle(LOG_RATIOS)
            case.planted = {e: v - next(turns) for e, v in zip(edges, now, strict=True)}
            for (_, edge), value in case.planted.items():
                planted[self.found[t].latents[edge].numpy().tobytes()] = value
            losses.append(explicit_losses(case, terms)[0].sum())
            count += len(terms)
        assert len(planted) == count
        loss = torch.stack(losses).sum() / count
        loss.backward()
        return float(loss.detach()), self.gradient(), count, planted

    def package(self, planted: dict[bytes, Tensor], world_size: int) -> tuple[float, Tensor, float]:
        """The same by the advantages, the update schedule and the loss of calls."""
        plan, weights = self.drawn.plan, np.array(self.weights)
        advantages = leaf_advantages(self.previews, weights, self.config)
        values, _ = edge_advantages(plan, self.previews, weights, self.config)
        total, divisors = 0.0, set()
        for rank in range(world_size):
            (update,) = build_updates(
                plan, advantages, advantages.valid, key=KEY.fold_in(2), modules=self.names,
                rank=rank, world_size=world_size, micro_batch_size=4, edge_values=dyadic(values),
                owner=leaf_owners(*self.previews.shape[:2], world_size),
            )  # fmt: skip
            divisors.add(update.divisor)
            for call in update.calls:
                edges = [(i.prompt, c) for i in call.items for c in i.children]
                names = [self.drawn.latents[edge].numpy().tobytes() for edge in edges]
                # Edges of idle items may be failed ones, which nothing was planted for.
                nothing = torch.zeros((), dtype=torch.float64)
                loss = policy_gradient_loss(
                    call, self.drawn, self.conditions, self.sampler.family,
                    ReferencePolicy(self.references), self.networks[call.module], self.loss,
                    divisor=update.divisor, reward_weights=advantages.weights,
                    old_log_prob=torch.stack([planted.get(name, nothing) for name in names]),
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


@pytest.mark.parametrize("name", ["everything", "failed_go_on"])
def test_failed_candidates_are_left_out(name: str) -> None:
    training = Training(**SETTINGS[name])
    trees = range(len(training.found))
    candidates = sum(len(group) for one in training.found for group in one.siblings)
    assert 0 < sum(len(training.terms(t)) for t in trees) < candidates


def test_candidates_below_a_failed_one_are_a_group_of_their_own() -> None:
    training = Training(**SETTINGS["failed_go_on"])
    (one,) = training.found
    below = {
        term.edge for term in training.terms(0) for above in one.plan.ancestry(term.edge)[:-1]
        if above in one.previews and np.isnan(one.previews[above][-1])
    }  # fmt: skip
    assert len(below) >= 3


# ------------------------------------------------------------------ the plan


@pytest.mark.parametrize("trunks", [1, 3])
@pytest.mark.parametrize("steps", [(0,), (1, 3), (0, 1, 2, 3)])
def test_the_static_plan_is_that_of_every_search(steps, trunks: int) -> None:
    """Whatever is chosen; its evaluations and previews are those that the search counts."""
    sampler = made_sampler(final="ode")
    found = searched(SearchSettings("greedy", 4, steps), 2 * trunks, sampler)
    tree = search_tree(SCHEDULE, steps, 4, final="ode")
    plan = beside(candidates_apart(tree)[0], trunks)
    drawn, previews = training_trees(found, sampler, trunks=trunks)

    def shape(states):
        return [replace(state, path=()) for state in states]

    assert shape(drawn.plan.states) == shape(plan.states)
    assert [s.path[0] for s in plan.states if s.parent < 0 and s.path] == [
        (-1, j) for j in range(1, trunks)
    ]
    assert previews.shape == (2, trunks * len(steps) * 4, 1) and np.isfinite(previews).all()
    assert tree.cost().rollout == found[0].cost.evaluations
    assert len(tree.leaves) == found[0].cost.reward_calls == found[0].cost.previews + 1
    assert plan.cost().training == trunks * len(steps)
    assert plan.cost().training_unshared == trunks * len(steps) * 4


def test_a_small_search_tree_by_hand() -> None:
    plan = search_tree(SCHEDULE, (1,), 2)
    assert plan.cost() == Cost(6, 1, rollout_unshared=3 + 5 + 3, training_unshared=3)
    rows = [(s.parent, s.step, s.kind, s.trained) for s in plan.states]
    assert rows == [
        (-1, 0, "root", False), (0, 1, "ode", False),
        (1, 2, "sde", True), (1, 2, "sde", True),
        (2, 3, "ode", False), (2, 5, "x0", False), (3, 5, "x0", False),
        (4, 4, "ode", False), (7, 5, "x0", False),
    ]  # fmt: skip
    apart, sources = candidates_apart(plan)
    assert sources == [0, 1, 2, 3]
    assert [s.trained for s in apart.states] == [False, False, True, True]
    apart, sources = candidates_apart(search_tree(SCHEDULE, (0, 1), 2))
    assert sources == [0, 1, 2, 1, 3, 4]  # The one that went on is a leaf, and carries the trunk.
    assert [(s.parent, s.trained) for s in apart.states] == [
        (-1, False), (0, True), (0, True), (0, False), (3, True), (3, True),
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [(), (2, 1), (0, 4), (-1, 1)])
def test_steps_outside_the_schedule_are_refused(steps) -> None:
    with pytest.raises(ValueError, match=r"branch_steps = \[.*: give ascending steps from 0 to 3"):
        search_tree(SCHEDULE, steps, 3)


# ------------------------------------------------------------------ what training reads


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16"])
def test_training_sees_the_log_probs_of_the_search(latent_dtype: str) -> None:
    sampler = made_sampler(latent_dtype=latent_dtype, box=BOX)
    found = searched(SearchSettings("greedy", 4, (0, 2)), 2, sampler)
    drawn, _ = training_trees(found, sampler)
    kids = [[c for c in own if drawn.plan.states[c].trained] for own in drawn.plan.children]
    places = [(t, s) for t in range(2) for s in range(len(kids)) if kids[s]]
    assert len(places) == 4
    fan = Fan.of(places, [kids[s] for _, s in places])
    again = recompute_log_prob(fan, drawn, embeddings(2), sampler.family, sampler.modules["net"])
    assert torch.equal(again, drawn.recorded_log_prob(fan.edges))
    assert all(drawn.latents[edge].dtype == getattr(torch, latent_dtype) for edge in fan.edges)


def test_each_candidate_has_its_own_preview_and_latents() -> None:
    sampler = made_sampler()
    found = searched(SearchSettings("greedy", 4, (0, 2)), 6, sampler)
    chosen = {one.plan.states[one.ranked[0]].path for one in found}
    assert len(chosen) > 1  # The trees differ in what they kept.
    drawn, previews = training_trees(found, sampler, prompts=[4, 5, 6], trunks=2)
    assert drawn.leaves == [(p, g) for p in (4, 5, 6) for g in range(16)]
    for t, one in enumerate(found):
        p, j = divmod(t, 2)
        for s, group in enumerate(one.siblings):
            for k, candidate in enumerate(group):
                leaf = (s * 4 + k) * 2 + j
                assert previews[p, leaf] == one.previews[candidate]
                latents = drawn.samples([(4 + p, leaf)])[0]
                assert torch.equal(latents, one.latents[candidate])


def test_the_forwards_of_the_search_are_known_to_the_ratio_gate() -> None:
    sampler = made_sampler(batch_size=3)
    found = searched(SearchSettings("greedy", 4, (0, 1)), 2, sampler)
    drawn, _ = training_trees(found, sampler)
    trained = {(t, s.parent) for t in range(2) for s in drawn.plan.states if s.trained}
    sizes = {}
    for place in trained:
        (batch,) = [batch for batch in drawn.batches if place in batch]
        assert all(other in drawn.latents for other in batch)
        sizes[place[0], drawn.plan.states[place[1]].step] = len(batch)
    # Step 0: two roots in a forward. Step 1: 4 + 4 candidates in batches of 3.
    assert sizes[0, 0] == sizes[1, 0] == 2
    assert sum(len(b) for b in drawn.batches if drawn.plan.states[b[0][1]].step == 1) == 8


def test_latents_wait_where_they_are_asked_to() -> None:
    sampler = made_sampler()
    found = searched(SearchSettings("greedy", 3, (0,)), 1, sampler)
    kept, _ = training_trees(found, sampler)
    stored, _ = training_trees(found, sampler, device=torch.device("cpu"))
    assert kept.latents.keys() == stored.latents.keys()
    for place, latents in kept.latents.items():
        assert torch.equal(stored.latents[place], latents)
        assert stored.latents[place].data_ptr() != latents.data_ptr()


def test_what_cannot_be_trained_is_refused() -> None:
    sampler = made_sampler()
    for settings in (SearchSettings("greedy", 2, (0,)), SearchSettings("greedy", 1, (0, 1))):
        drawn, _ = training_trees(searched(settings, 2, sampler, preview_all=True), sampler)
        with pytest.raises(ValueError, match="2 trained children|only child"):
            check_credit(drawn.plan, "siblings")
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
        drawn, previews = training_trees([one], sampler)
        assert previews.shape[1] == len(one.previews) == len(drawn.plan.leaves)
