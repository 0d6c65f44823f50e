"""Search for good samples: grow denoising trees level by level and keep what previews well.

A chain is deterministic except at the *search steps*. There each visited state gets `width`
stochastic children, the candidates; their previews (x0 estimates, from the evaluation that a
candidate needs anyway) are scored, and the best go on. Step -1 searches over initial noise.

    brute     keep every candidate, score finished samples only (at step -1: best of n)
    greedy    keep the best candidate of each tree
    beam      keep the `beam` best of each tree

Noise is keyed by path, as in every tree: more candidates change no bit of the others.

A searched sample is a selection and no draw of the policy, so nothing can be trained on the
selected paths alone. But the candidates of one visited state are independent draws of the policy
from that state: with previews as their rewards they are a sibling group whose policy gradient is
exact given the state. Which states are visited is decided by the search: their distribution is not
the policy's own. `training_trees` hands such groups to the update schedule.
"""

from __future__ import annotations

from dancegrpo_fast.search.growth import search
from dancegrpo_fast.search.sampler import Sampler
from dancegrpo_fast.search.settings import METHODS, Found, SearchCost, SearchSettings
from dancegrpo_fast.search.siblings import training_trees

__all__ = [
    "METHODS",
    "Found",
    "Sampler",
    "SearchCost",
    "SearchSettings",
    "search",
    "training_trees",
]
