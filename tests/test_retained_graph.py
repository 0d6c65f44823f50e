"""`loss.reuse_forwards`: the rollout's forwards are differentiated, and none is made again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from tree_case import EXPERTS, Case, schedule_updates
from tree_stand_ins import BOX, KEY, LEVEL, SCHEDULE, ReferencePolicy, embeddings

from dancegrpo_fast.advantages import leaf_advantages
from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.config import LossConfig
from dancegrpo_fast.losses.policy_gradient import policy_gradient_loss
from dancegrpo_fast.rollout import draw_trees
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.trees.tree import branch_points, shared_root, trunk_with_branches, window
from dancegrpo_fast.updating.policy_gradient import reused

TREE = "rollout.tree"
REUSE = {"loss.reuse_forwards": True}


# ---- in float64, on stand-ins --------------------------------------------------------------------

PLANS = {
    "shared_root": shared_root(SCHEDULE, 5),
    "window": window(SCHEDULE, 6, 1, 2),
    "flash": window(SCHEDULE, 6, 0, 2, solver="multistep"),
    "branch_points": branch_points(SCHEDULE, (1, 2), 3, noise_scale=1.3),
    "trunk": trunk_with_branches(SCHEDULE, (0, 1, 3), 3, trunks=2),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untrained rows": {"best_of_n": 2, "fraction": 0.5, "failures": True, "prompts": 4},
    "kl, box, experts": {"kl_weight": 0.07, "box": BOX, "names": EXPERTS},
}


def draw(case: Case, batch_size: int, *, keep_graphs: bool) -> Trajectories:
    """The case's trees; networks, outputs and coefficients are float64."""
    rows = case.plan.transitions(dynamics="dance", level=LEVEL)
    return draw_trees(
        case.family, case.networks, case.plan, coefficient_table(rows, dtype=torch.float64),
        embeddings(case.prompts), key=KEY.fold_in(1),
        owner=leaf_owners(case.prompts, len(case.plan.leaves), 1), rank=0,
        batch_size=batch_size, keep_graphs=keep_graphs,
    )  # fmt: skip


def update_of(case: Case, drawn: Trajectories, *, normalise: bool, reuse: bool) -> Any:
    """(loss, gradient, forwards) of the one update."""
    (update,) = schedule_updates(case)
    kept: list[Any] = [None] * len(update.calls)
    case.family.evaluations = 0
    if reuse:
        update, kept = reused(update, drawn)
    networks = [p for net in case.networks.values() for p in net.parameters()]
    for parameter in networks:
        parameter.grad = None
    weights = leaf_advantages(case.rewards, np.array(case.weights), case.settings).weights
    total = 0.0
    for call, output in zip(update.calls, kept, strict=True):
        result = policy_gradient_loss(
            call, drawn, case.conditions, case.family, ReferencePolicy(case.references),
            case.networks[call.module],
            LossConfig(kl_weight=case.kl_weight, micro_batch_size=1, ratio_norm=normalise),
            divisor=update.divisor, reward_weights=weights, old_log_prob=None, output=output,
        )  # fmt: skip
        result.loss.backward()
        total += float(result.loss.detach())
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in networks]
    return total, torch.cat(flat), case.family.evaluations


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tree", PLANS)
def test_loss_and_gradient_are_those_of_second_forwards(tree, settings, batch_size, normalise):
    """Rows of the stand-in are evaluated one by one: only sums may round, in float64."""
    case = Case(PLANS[tree], micro_batch_size=batch_size, **SETTINGS[settings])
    plain = draw(case, batch_size, keep_graphs=False)
    drawn = draw(case, batch_size, keep_graphs=True)
    assert not plain.graphs and drawn.graphs
    for place, latents in plain.latents.items():
        assert torch.equal(latents, drawn.latents[place])
        assert not drawn.latents[place].requires_grad
    assert all(torch.equal(value, drawn.log_prob[edge]) for edge, value in plain.log_prob.items())
    loss, gradient, made = update_of(case, plain, normalise=normalise, reuse=False)
    again, other, remade = update_of(case, drawn, normalise=normalise, reuse=True)
    assert gradient.abs().max() > 1e-3
    assert again == pytest.approx(loss, rel=1e-10, abs=1e-12)
    assert (other - gradient).abs().max() <= 1e-10 * gradient.abs().max()
    if batch_size == 1:  # The same calls in the same order.
        assert torch.equal(other, gradient)
    # What is left are the reference's: nothing is evaluated a second time.
    reference = made // 2 if case.kl_weight else 0
    assert made > 0 and remade == reference
    assert not drawn.graphs, "graphs outlive their update"


def test_only_forwards_with_a_trained_child_keep_a_graph():
    case = Case(PLANS["window"])
    drawn = draw(case, 3, keep_graphs=True)
    sources = {s.parent for s in case.plan.states if s.trained}
    assert {s for places, _ in drawn.graphs for _, s in places} == sources
    assert all(output.requires_grad for _, output in drawn.graphs)


def test_a_row_that_is_not_finite_does_not_reach_the_others():
    """Of a failed sample, in one forward with trained ones: 0 x NaN is NaN."""
    case = Case(PLANS["shared_root"], failures=True, prompts=2, micro_batch_size=5)
    clean = draw(case, 5, keep_graphs=False)
    _, gradient, _ = update_of(case, clean, normalise=False, reuse=False)
    drawn = draw(case, 5, keep_graphs=True)
    (update,) = schedule_updates(case)
    trained = {(i.prompt, i.state) for call in update.calls for i in call.items}
    planted = 0
    for number, (places, output) in enumerate(drawn.graphs):
        rows = [row for row, place in enumerate(places) if place not in trained]
        if rows and len(rows) < len(places):
            broken = torch.ones(len(places), 1, 1, 1, 1, dtype=output.dtype)
            broken[rows] = torch.nan
            drawn.graphs[number] = (places, output * broken)
            planted += 1
    assert planted
    _, other, remade = update_of(case, drawn, normalise=False, reuse=True)
    assert remade > 0
    assert (other - gradient).abs().max() <= 1e-10 * gradient.abs().max()


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "loss.updates": ({"loss.updates": 2}, "later updates need forwards of their own"),
    "loss.old_log_prob": ({"loss.old_log_prob": "recompute"}, "both log-probs are one"),
    "loss.micro_batch_size": ({"loss.micro_batch_size": 4}, "set it to rollout.batch_size = 8"),
    "parallel.offload_activations": (
        {"parallel.offload_activations": True}, "copy of the weights along"
    ),
    "parallel.sp": ({"parallel.sp": 2}, "not verified"),
    "parallel.compile": ({"parallel.compile": "graphs"}, "replay overwrites"),
    "loss.reuse_forwards": (
        {"loss.kind": "awm", f"{TREE}.kind": "independent_roots"}, "policy_gradient"
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_needs_second_forwards_is_refused(tmp_path, field):
    changes, reason = REFUSED[field]
    with pytest.raises(ValueError, match=f"{field} = .*{reason}"):
        tiny_config(tmp_path, tmp_path, REUSE | changes)
