"""Noise as a sample: moments, distribution, tails, independence; and the integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from test_noise import RANDOM123

from dancegrpo_fast.ops import noise
from dancegrpo_fast.ops import noise_reference as reference
from dancegrpo_fast.ops.noise import DrawKey, NoiseKey, normal, normal_batch

# ---------------------------------------------------------------------------- statistics

# Limits are 5 standard errors (p = 6e-7) with fixed keys: a failure is a defect, not bad luck.


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """float64 [2**24]."""
    key = NoiseKey.from_seed(2024).fold_in(1).draw()
    return normal((1 << 24,), key).numpy().astype(np.float64)


def test_moments(sample) -> None:
    n = len(sample)
    square = sample * sample
    # power, expectation, variance of the power: E z^2k - (E z^k)^2
    for power, (values, mean, variance) in enumerate(
        [(sample, 0, 1), (square, 1, 2), (square * sample, 0, 15), (square * square, 3, 96)], 1
    ):
        assert abs(values.mean() - mean) < 5 * np.sqrt(variance / n), power


def test_kolmogorov_smirnov(sample) -> None:
    assert scipy.stats.kstest(sample[: 1 << 21], "norm").pvalue > 1e-3
    # Each lane of a block by itself: they come through different branches.
    for lane in range(4):
        assert scipy.stats.kstest(sample[lane::4][: 1 << 18], "norm").pvalue > 1e-3, lane


def test_tails_to_five_sigma(sample) -> None:
    n = len(sample)
    for limit in (1, 2, 3, 4, 4.5, 5):
        p = scipy.stats.norm.sf(limit)
        for count in ((sample > limit).sum(), (sample < -limit).sum()):
            low, high = scipy.stats.binom.ppf([3e-7, 1 - 3e-7], n, p)
            assert low <= count <= high, (limit, count, n * p)


def test_lanes_and_neighbours_are_uncorrelated(sample) -> None:
    n = len(sample)
    for lag in (1, 2, 3, 4, 5, 8, 64, 4096):
        for values in (sample, sample**2 - 1, np.abs(sample) - np.sqrt(2 / np.pi)):
            r = np.dot(values[:-lag], values[lag:]) / np.dot(values, values)
            assert abs(r) < 5 / np.sqrt(n), lag


def test_keys_are_independent() -> None:
    """A parent, its children, their children and neighbouring seeds: all pairs uncorrelated."""
    root = NoiseKey.from_seed(0)
    keys = [root, *(root.fold_in(i) for i in range(30)), *(NoiseKey.from_seed(i) for i in range(9))]
    keys += [root.fold_in(2).fold_in(i) for i in range(24)]
    draws = [k.draw() for k in dict.fromkeys(keys)]
    n = 1 << 16
    z = normal_batch((n,), draws).double()
    pairs = len(draws) * (len(draws) - 1) // 2
    for values in (z, z**2 - 1):
        r = torch.corrcoef(values) - torch.eye(len(draws), dtype=torch.float64)
        assert r.abs().max() < 5.5 / n**0.5
        assert abs(r.sum() / 2) < 5 * (pairs / n) ** 0.5


# ---------------------------------------------------------------------------- integers


def test_random_bits_are_the_words_in_order() -> None:
    words = noise.random_bits(6, DrawKey(0, 0))
    assert words.dtype == np.uint32
    assert words[:4].tolist() == list(RANDOM123[0][2])
    assert words[4:].tolist() == list(reference.philox_scalar((1, 0, 0, 0), 0))[:2]
    assert len(noise.random_bits(0, DrawKey(0, 0))) == 0
    wrapped = noise.random_bits(8, DrawKey(0, 2**64 - 1))
    assert wrapped[4:].tolist() == list(RANDOM123[0][2])


def test_permutation_is_uniform() -> None:
    root = NoiseKey.from_seed(3)
    orders = [tuple(noise.permutation(4, root.fold_in(i).draw())) for i in range(4800)]
    counts = [orders.count(p) for p in itertools.permutations(range(4))]
    assert sum(counts) == 4800  # nothing but permutations
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert noise.permutation(0, root.draw()).tolist() == []
    assert noise.permutation(1, root.draw()).dtype == np.int64


def test_randint_is_uniform_and_in_range() -> None:
    root = NoiseKey.from_seed(4)
    values = [noise.randint(-2, 5, root.fold_in(i).draw()) for i in range(7000)]
    counts = [values.count(v) for v in range(-2, 5)]
    assert sum(counts) == 7000
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert noise.randint(8, 9, root.draw()) == 8
    # multiply-shift by hand: the top of value * range / 2**64
    value = 0xE169C58D6627E8D5
    assert noise.randint(0, 1000, DrawKey(0, 0)) == value * 1000 // 2**64
    for low, high in ((3, 3), (4, 3), (0, 2**32 + 1)):
        with pytest.raises(ValueError, match=rf"low = {low}, high = {high}"):
            noise.randint(low, high, DrawKey(0, 0))
