"""Training on what a search visited: the candidates of each searched state as sibling groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dancegrpo_fast.batching import micro_batches
from dancegrpo_fast.search.sampler import Sampler
from dancegrpo_fast.search.settings import Found
from dancegrpo_fast.trajectories import Place, Trajectories
from dancegrpo_fast.trees.candidates import beside, candidates_apart


def training_trees(
    found: Sequence[Found],
    sampler: Sampler,
    *,
    prompts: Sequence[int] | None = None,
    trunks: int = 1,
    kinds: Sequence[int] | None = None,
    kl: str = "exact",
    device: torch.device | None = None,
) -> tuple[Trajectories, np.ndarray]:
    """The trees of searches under one plan, as losses read them, and what their samples are worth.

    The plan is that of `candidates.candidates_apart`: a candidate is a leaf, its preview the
    reward. `leaf_advantages`, `edge_advantages` with `credit: siblings` and `build_updates` do the
    rest: a group's rewards are one kind of value, those that went on included, and a candidate
    without a score enters no statistic. Its paths are the first tree's; the noise is drawn, and
    nothing asks for them again.

    Args:
        found: [P x trunks] searches, prompt by prompt.
        sampler: How they were drawn.
        prompts: [P] positions of the prompts in the iteration; None: 0, 1, ...
        trunks: Searches of a prompt, each a trunk of its tree.
        kinds: [P x trunks] trees of unequal kinds shared no forward; None: all could.
        kl: Form of the KL term.
        device: Where latents are wanted, while they are stored in host memory; None: as they are.

    Returns:
        The trajectories, and previews [P, G, R].

    Raises:
        ValueError: Trees of different shapes, or a candidate without a preview.
    """
    assert len(found) % trunks == 0
    numbers = range(len(found) // trunks) if prompts is None else prompts
    apart = [candidates_apart(one.plan) for one in found]
    shapes = [[replace(state, path=()) for state in plan.states] for plan, _ in apart]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "found: trees of different shapes (a beam keeps where it likes); hand over one tree at "
            "a time"
        )
    plan = beside(apart[0][0], trunks)
    leaves = [(p, g) for p in numbers for g in range(len(plan.leaves))]
    drawn = Trajectories(plan, sampler.table(plan, kl), leaves, device=device)
    columns = len(next(iter(found[0].scores.values())))
    previews = np.full((len(numbers), len(plan.leaves), columns), np.nan)
    places: list[dict[int, Place]] = []
    for t, (one, (single, sources)) in enumerate(zip(found, apart, strict=True)):
        p, j = divmod(t, trunks)
        at = [(numbers[p], new * trunks + j) for new in range(len(sources))]
        drawn.keep({at[new]: one.latents[s] for new, s in enumerate(sources) if s in one.latents})
        for number, leaf in enumerate(single.leaves):
            if (source := sources[leaf]) not in one.previews:
                raise ValueError(
                    "found: candidates without a preview; search with preview_all = True"
                )
            drawn.log_prob[at[leaf]] = one.log_prob[source]
            previews[p, number * trunks + j] = one.previews[source]
        places.append(dict(zip(sources, at, strict=True)))  # Of two, the copy that went on.
    drawn.batches += _batches(found, sampler, places, kinds or [0] * len(found))
    return drawn, previews


def _batches(
    found: Sequence[Found],
    sampler: Sampler,
    places: Sequence[dict[int, Place]],
    kinds: Sequence[int],
) -> list[list[Place]]:
    """The forwards of the search, less the states that training does not know."""
    cut = []
    for step in range(sampler.schedule.steps):
        level = [(t, s.index) for t, one in enumerate(found)
                 for s in one.plan.states if s.step == step]  # fmt: skip
        cut += micro_batches(level, sampler.batch_size, lambda state: kinds[state[0]])
    known = ([places[t][s] for t, s in batch if s in places[t]] for batch in cut)
    return [batch for batch in known if batch]
