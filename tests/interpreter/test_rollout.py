"""The rollout kernel in the interpreter: bits of noise, stored latents and log-prob."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import coefficients, log_prob, log_prob_bits, offsets_of, parents, randn

from dancegrpo_fast.ops import kernels
from dancegrpo_fast.ops.noise import DrawKey, keys_table, normal_batch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEYS = [DrawKey(1, 2), DrawKey(2**64 - 1, 2**64 - 3), DrawKey(7, 2**32 - 1), DrawKey(0, 0)]


def keys(count: int) -> torch.Tensor:
    return keys_table([DrawKey(5 + i, 1 << (i % 60)) for i in range(count)])


def only_noise(count: int) -> torch.Tensor:
    """a = b = 0, s = 1: y is eps."""
    table = torch.zeros(count, 8)
    table[:, 2] = 1
    return table


BOXES = [
    ((3, 4, 6, 8), None),
    ((3, 4, 6, 8), ((0, 3), (1, 4), (0, 6), (0, 8))),  # frames: blocks of four stay whole
    ((3, 4, 6, 8), ((1, 3), (1, 3), (2, 6), (4, 8))),  # rows of four, aligned
    ((3, 4, 6, 8), ((0, 3), (0, 4), (1, 5), (3, 6))),  # blocks are cut
    ((5, 7, 3), ((0, 5), (1, 7), (0, 3))),  # rows of 18 from an odd place
    ((5, 7, 3), ((2, 3), (1, 7), (1, 2))),  # columns
    ((130, 33), None),  # two chunks, odd
]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("dims", "box"), BOXES)
def test_noise_is_that_of_numpy_and_the_native_module(
    dims: tuple[int, ...], box: object, dtype: torch.dtype
) -> None:
    zero = torch.zeros(4, *dims)
    y, _ = kernels.sample_transition(
        zero, zero, only_noise(4), keys_table(KEYS), None, None, box, dtype
    )
    inside = (slice(None), *(slice(*pair) for pair in box or ((0, size) for size in dims)))
    expected = normal_batch(dims, KEYS, dtype=dtype, box=box, implementation="reference")
    # x = 0 and center = 0, so 0 + eps is eps, but for the sign of a zero.
    assert torch.equal(y[inside], expected)
    if box is not None:
        outside = torch.ones_like(y, dtype=torch.bool)
        outside[inside] = False
        assert not y[outside].any()


@pytest.mark.parametrize(
    ("model", "latent", "out"),
    [
        (BF16, FP32, FP32),
        (BF16, BF16, BF16),
        (FP16, FP16, FP32),
        (FP32, FP32, BF16),
        (FP32, FP16, FP16),
    ],
)
@pytest.mark.parametrize("dims", [(6, 16), (3, 5, 7), (2, 3, 5, 8)])
def test_stored_latents_and_log_prob_to_the_bit(
    dims: tuple[int, ...], model: torch.dtype, latent: torch.dtype, out: torch.dtype
) -> None:
    offsets = offsets_of(0, 1, 3)
    m, x = randn(3, *dims, seed=1, dtype=model), randn(3, *dims, seed=2, dtype=latent)
    table = coefficients(4)
    table[2, 2] = 0
    y, lp = kernels.sample_transition(m, x, table, keys(4), None, offsets, None, out)
    parent = parents(3, offsets)
    a, b, s = (table[:, k].reshape(-1, *(1,) * len(dims)) for k in range(3))
    eps = normal_batch(dims, keys(4))
    expected = ((a * x[parent].float() + b * m[parent].float()) + s * eps).to(out)
    assert y.dtype == out and y.is_contiguous()
    assert torch.equal(y, expected)
    assert torch.equal(lp, log_prob_bits(m, x, y, table, offsets))
    assert torch.equal(lp, kernels.transition_log_prob(m, x, y, table, offsets, None))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_children_share_a_state(count: int) -> None:
    m, x, table = randn(1, 3, 5, 7, seed=1), randn(1, 3, 5, 7, seed=2), coefficients(count)
    y, lp = kernels.sample_transition(m, x, table, keys(count), None, offsets_of(count), None, FP32)
    for c in range(count):  # alone, each is the same bits
        row = slice(c, c + 1)
        alone = (table[row], keys(count)[row])
        one, its = kernels.sample_transition(m, x, *alone, None, None, None, FP32)
        assert torch.equal(one, y[row]) and torch.equal(its, lp[row])


def test_given_noise_equals_keys() -> None:
    dims = (3, 5, 7)
    m, x, table = randn(2, *dims, seed=1), randn(2, *dims, seed=2), coefficients(2)
    noise = normal_batch(dims, keys(2))
    drawn = kernels.sample_transition(m, x, table, keys(2), None, None, None, BF16)
    strided = noise.transpose(1, 3).contiguous().transpose(1, 3)
    for eps in (noise, strided):
        given = kernels.sample_transition(m, x, table, None, eps, None, None, BF16)
        assert torch.equal(drawn[0], given[0]) and torch.equal(drawn[1], given[1])


def test_no_noise_where_s_is_0_and_nan_where_it_is_missing() -> None:
    m, x, table = randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2), coefficients(3)
    table[0, 2], table[1, 2] = 0, -1
    y, lp = kernels.sample_transition(m, x, table, None, None, None, None, FP32)
    center = table[:, 0, None, None] * x + table[:, 1, None, None] * m
    assert torch.equal(y[:2], center[:2]) and y[2].isnan().all()
    assert torch.equal(lp[:2], table[:2, 4]) and lp[2].isnan()
    poisoned = torch.full_like(y, float("nan"))
    given, _ = kernels.sample_transition(m, x, table, None, poisoned, None, None, FP32)
    assert torch.equal(given[:2], center[:2])


def test_bf16_rounds_to_even_and_keeps_nan_and_infinity() -> None:
    high = torch.arange(0, 1 << 16, 37, dtype=torch.int32)
    edges = torch.tensor([0x7F7F, 0x7F80, 0x7FFF, 0xFF80, 0xFFFF], dtype=torch.int32)
    bits = torch.cat((high, edges)) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (bits[:, None] | low[None, :]).reshape(1, -1).view(FP32)
    table = torch.zeros(1, 8)
    table[0, 0] = 1
    y, _ = kernels.sample_transition(values, values, table, None, None, None, None, BF16)
    # 0 m is NaN where m is not finite: compare where it is.
    finite = values.isfinite()
    assert torch.equal(y[finite], values.to(BF16)[finite])
    assert y[~finite].isnan().all()


@pytest.mark.parametrize("box", [BOXES[1][1], BOXES[3][1]])
def test_box_copies_and_means(box: tuple[tuple[int, int], ...]) -> None:
    dims = (3, 4, 6, 8)
    m, x = randn(2, *dims, seed=1, dtype=BF16), randn(2, *dims, seed=2)
    offsets, table = offsets_of(1, 2), coefficients(3)
    y, lp = kernels.sample_transition(m, x, table, keys(3), None, offsets, box, FP16)
    inside = torch.zeros(dims, dtype=torch.bool)
    inside[tuple(slice(*pair) for pair in box)] = True
    copied = x.to(FP16)[parents(2, offsets)]
    assert torch.equal(y[:, ~inside], copied[:, ~inside])
    assert torch.equal(lp, log_prob_bits(m, x, y, table, offsets, box))
    # Float32 rounding of the residual: |y| 2^-24 on residuals of s >= .1, averaged.
    torch.testing.assert_close(
        lp.double(), log_prob(m.double(), x, y, table, offsets, box), atol=1e-5, rtol=0
    )
    full, _ = kernels.sample_transition(m, x, table, keys(3), None, offsets, None, FP16)
    assert torch.equal(y[:, inside], full[:, inside])


STRIDED = {
    "slice of a trajectory": lambda t: torch.stack([t * 0, t, t * 0], 1)[:, 1],
    "transposed": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "every other": lambda t: torch.stack([t, t * 0], -1).flatten(-2)[..., ::2],
    "offset by one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("dims", [(6, 16), (3, 4, 8), (3, 2, 4, 16)])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(STRIDED, STRIDED))[::3])
def test_any_strides(dims: tuple[int, ...], first: str, second: str) -> None:
    m, x, table = randn(2, *dims, seed=1, dtype=BF16), randn(2, *dims, seed=2), coefficients(2)
    expected = kernels.sample_transition(m, x, table, keys(2), None, None, None, FP32)
    m, x = STRIDED[first](m), STRIDED[second](x)
    actual = kernels.sample_transition(m, x, table, keys(2), None, None, None, FP32)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_expanded_inputs_and_float64_table() -> None:
    x = randn(1, 3, 4, 8, seed=2).expand(3, -1, -1, -1)
    m = randn(3, 3, 1, 8, seed=1).expand(-1, -1, 4, -1)
    table = coefficients(3)
    actual = kernels.sample_transition(m, x, table.double(), keys(3), None, None, None, FP32)
    expected = kernels.sample_transition(
        m.contiguous(), x.contiguous(), table, keys(3), None, None, None, FP32
    )
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_several_chunks_and_no_children() -> None:
    m, x, table = randn(2, 3, 4099, seed=1), randn(2, 3, 4099, seed=2), coefficients(3)
    offsets = offsets_of(0, 3)
    y, lp = kernels.sample_transition(m, x, table, keys(3), None, offsets, None, FP32)
    assert torch.equal(lp, log_prob_bits(m, x, y, table, offsets))
    empty = kernels.sample_transition(
        m, x, table[:0], keys(3)[:0], None, offsets_of(0, 0), None, FP32
    )
    assert empty[0].shape == (0, 3, 4099) and empty[1].shape == (0,)
