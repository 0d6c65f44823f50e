"""Searches of a small network, for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tree_stand_ins import KEY, LEVEL, SCHEDULE, SHAPE, Family, Net, embeddings

from dancegrpo_fast.search import Found, Sampler, SearchSettings, search

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
