"""What the native kernels promise about bits: order of sums, layouts, noise, rounding, NaN."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from native_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    boxed,
    make,
    native_gradient,
    native_policy,
    parts_of,
)  # fmt: skip
from ops_cases import draw_keys, randn
from torch import Tensor

from dancegrpo_fast.ops.noise import normal_batch

# ------------------------------------------------------------------ bits


LARGE = (3, 11, 1501)  # 49533 elements: 13 chunks, the last one odd, and two threads take part


@pytest.mark.parametrize("dtypes", [(BF16, F32, F32, BF16, F32), (F64,) * 5])
def test_same_bits_for_threads_and_ops(native_module, dtypes) -> None:
    n, c = native_module, make((2, 0, 3, 1), LARGE, dtypes)
    keys, parts = draw_keys(6), parts_of(6, 1)
    box = ((0, 3), (1, 11), (3, 1500))

    def everything(threads: int) -> list[Tensor]:
        y, lp = n.sample_transition(c.m, c.x, c.table, keys, None, c.offsets, box, BF16, threads)
        at = c._replace(y=y)
        again = n.transition_log_prob(c.m, c.x, y, c.table, c.offsets, box, threads)
        loss = native_policy(
            n, at, parts, ref=True, old=True, old_lp=lp, kl_weight=0.1, box=box, threads=threads
        )
        dm = native_gradient(n, at, loss[3], ref=True, old=True, box=box, threads=threads)
        four = [t[:4] for t in (c.m, c.x, y, torch.ones(4), parts[:, 0, 0])]
        forward = n.nft_loss(
            *four, None, c.ref, c.old, 0.5, 5.0, None, 0.1, 1e-5, box, True, threads
        )
        assert torch.equal(lp, again) and torch.equal(lp, loss[1])
        return [y, lp, *loss, dm, *forward]

    one = everything(1)
    for threads in (2, 3):
        for ours, expected in zip(everything(threads), one, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradient_past_the_cache_has_the_same_bits(native_module, dtype) -> None:
    """From 2^21 elements on: aligned or not, in whole tiles or not."""
    for size in (1 << 20, (1 << 20) + 11):
        c = make((1, 1), (size,), (dtype, F32, F32, F32, F32))
        scales = torch.full((2, 3), 0.3)
        whole = native_gradient(native_module, c, scales, threads=2)
        for i in range(2):
            alone = [t[i : i + 1] for t in c[:4]]
            one = native_module.transition_gradient(
                torch.ones(()), scales[:1], *alone, None, None, None, None, 1
            )
            assert torch.equal(whole[i : i + 1], one)


def test_bits_do_not_depend_on_other_states(native_module) -> None:
    n, c = native_module, make((2, 40, 3), LARGE)
    keys = draw_keys(45)
    y, lp = n.sample_transition(c.m, c.x, c.table, keys, None, c.offsets, None, F32, 2)
    only = slice(42, 45)
    alone = n.sample_transition(
        c.m[2:], c.x[2:], c.table[only], keys[only], None, torch.tensor([0, 3]), None, F32, 1
    )
    assert torch.equal(y[only], alone[0]) and torch.equal(lp[only], alone[1])


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("box", [
    None, ((0, 3), (0, 11), (1, 1501)), ((1, 3), (5, 6), (7, 1498)), ((2, 3), (3, 10), (0, 3)),
    ((0, 3), (0, 11), (1499, 1501)), ((0, 3), (2, 9), (700, 701)), ((1, 3), (4, 5), (6, 7)),
])  # fmt: skip
def test_noise_is_that_of_ops_noise(native_module, out, box) -> None:
    zero = torch.zeros(2, *LARGE)
    table = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 0]).repeat(3, 1)
    keys = draw_keys(3)
    y, _ = native_module.sample_transition(
        zero, zero, table, keys, None, torch.tensor([0, 1, 3]), box, out, 2
    )
    expected = torch.zeros(3, *LARGE, dtype=out)
    boxed(expected, box)[:] = normal_batch(LARGE, keys, dtype=out, box=box)
    assert torch.equal(y, expected)


def views() -> dict[str, Tensor]:
    base = randn(3, 4, 6, 10, seed=1, dtype=F32)
    return {
        "slice": randn(3, 2, 4, 6, 10, dtype=F32)[:, 1],
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "steps": randn(3, 4, 6, 20, dtype=F32)[..., ::2],
        "cut": randn(3, 4, 8, 10, dtype=F32)[:, :, 1:7],
        "expanded": randn(3, 4, 1, 10, dtype=F32).expand(3, 4, 6, 10),
        "expanded state": randn(1, 4, 6, 10, dtype=F32).expand(3, 4, 6, 10),
        "constant": torch.full((), 0.5).expand(3, 4, 6, 10),
        "backwards": base.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("box", [None, ((0, 4), (1, 6), (2, 9))])
def test_strides_change_no_bit(native_module, name, dtype, box) -> None:
    view = views()[name]
    # .to() of an overlapping view would copy it: expand again.
    view = view if dtype == F32 else view.to(dtype).as_strided(view.shape, view.to(dtype).stride())
    plain, parts = view.contiguous(), parts_of(3, 1)
    c = make((1, 1, 1), (4, 6, 10), (dtype,) * 5)
    for field in ("m", "x", "y", "ref"):
        results = []
        for tensor in (view, plain):
            at = c._replace(**{field: tensor})
            loss = native_policy(native_module, at, parts, ref=True, kl_weight=0.1, box=box)
            dm = native_gradient(native_module, at, loss[3], ref=True, box=box)
            y, lp = native_module.sample_transition(
                at.m, at.x, at.table, None, at.y, None, box, F32, 1
            )
            results.append([*loss, y, lp, dm])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), field
        if field == "m":
            assert results[0][-1].stride() == torch.empty_like(view).stride()


def test_attributes_give_the_same_as_the_exchange_api(native_module) -> None:
    """What torch below 2.10 takes."""
    c = make((1, 3, 24), dtypes=(BF16, F32, F16, F32, F32))
    parts, results = parts_of(28, 2), []
    try:
        for wanted in (True, False):
            native_module.use_exchange(wanted)
            loss = native_policy(native_module, c, parts, ref=True)
            dm = native_gradient(native_module, c, loss[3], ref=True)
            results.append([*loss, dm])
        with pytest.raises(native_module.Refused, match="not on the CPU"):
            native_policy(native_module, c._replace(x=c.x.to("meta")), parts)
    finally:
        native_module.use_exchange(True)
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride()


# ------------------------------------------------------------------ rounding and NaN


def copied(n: ModuleType, x: Tensor, out: torch.dtype) -> Tensor:
    """x through the kernels: a = 1, b = s = 0."""
    x = x[None]
    table = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    return n.sample_transition(torch.zeros_like(x), x, table, None, None, None, None, out, 1)[0][0]


def test_every_half_is_read_exactly_and_written_back(native_module) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (F16, BF16):
        x = bits.view(dtype)
        read = copied(native_module, x, F32)
        torch.testing.assert_close(read, x.float(), rtol=0, atol=0, equal_nan=True)
        finite = ~x.isnan()
        # 1 x + 0 is +0 for x = -0.
        assert torch.equal(copied(native_module, x, dtype)[finite] + 0.0, x[finite] + 0.0)
        assert copied(native_module, x, dtype)[~finite].isnan().all()


def test_float32_to_half_rounds_to_nearest_even(native_module) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=generator)
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 2**-24, 2**-25, 2**-25 * 1.0001,
                          2**-14, 2**-14 * 0.9999, 3.3895e38, 3.4e38, float("inf")])  # fmt: skip
    small = torch.rand(1 << 16, generator=generator) * 2**-13
    x = torch.cat((bits.to(torch.int32).view(F32), edges, -edges, small))
    for dtype in (F16, BF16):
        torch.testing.assert_close(
            copied(native_module, x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True
        )


def test_float64_to_half_rounds_once(native_module) -> None:
    """Through float32 the first of these would end on the even neighbour."""
    tie = 1 + 2**-8
    assert float(copied(native_module, torch.tensor([tie + 2**-40], dtype=F64), BF16)) == 1 + 2**-7
    assert float(copied(native_module, torch.tensor([tie], dtype=F64), BF16)) == 1.0
    gen = torch.Generator().manual_seed(1)
    # Ties of float16 and of bfloat16 with a disturbance that float32 cannot hold.
    for dtype, digits in ((F16, 11), (BF16, 8)):
        digit = torch.randint(1 << (digits - 1), 1 << digits, (4096,), generator=gen)
        x = (2 * digit + 1).double() * (1 + torch.randint(-1, 2, (4096,), generator=gen) * 2.0**-45)
        x = x * 2.0 ** torch.randint(-14, 4, (4096,), generator=gen).double()
        x = torch.cat((x, -x))
        fraction, exponent = np.frexp(x.numpy())
        exact = np.ldexp(np.rint(np.ldexp(fraction, digits)), exponent - digits)
        assert np.array_equal(copied(native_module, x, dtype).double().numpy(), exact)
    wide = torch.tensor([1e300, -1e300, 65519.999999, 65520.0, 1e-300], dtype=F64)
    infinity = float("inf")
    assert copied(native_module, wide, F16).tolist() == [infinity, -infinity, 65504, infinity, 0]


def test_float16_gradient_is_scaled_before_rounding(native_module) -> None:
    c = make((1,), (64,), (F16, F32, F32, F32, F32))
    scales = torch.tensor([[2.0**-40, 0, 0]])
    assert not native_gradient(native_module, c, scales).any()  # below the smallest subnormal
    scaled = native_gradient(native_module, c, scales, upstream=65536.0).double()
    residual = c.double().y - (c.double().x * c.table[0, 0].double() + c.double().m * c.table[0, 1])
    assert bool(((scaled - residual * 2.0**-24).abs() <= 2**-25 * 1.001).all()) and scaled.any()
    overflow = native_gradient(native_module, c, torch.tensor([[1e6, 0, 0]]), upstream=1e6)
    assert bool(overflow.isinf().all())


def test_nan_stays_where_it_is(native_module) -> None:
    c = make((2, 1), (5, 900))
    parts = parts_of(3, 1)
    good = native_policy(native_module, c, parts)
    y = c.y.clone()
    y[1, 2, 3] = float("nan")
    at = c._replace(y=y)
    for weights in (None, torch.tensor([1.0, 0.0, 1.0])):
        loss, lp, _, scales = native_policy(native_module, at, parts, weights=weights)
        assert loss.isnan() and lp[1].isnan()
        assert torch.equal(lp[[0, 2]], good[1][[0, 2]])
        dm = native_gradient(native_module, at, scales)
        assert dm[0].isnan().all() and not dm[1].isnan().any()
    advantages = torch.tensor([1.0, float("nan"), 1.0])
    loss, lp, *_ = native_policy(native_module, c, advantages)
    assert loss.isnan() and torch.equal(lp, good[1])


def test_measuring_only_keeps_nan_out(native_module) -> None:
    c = make((1, 1), (40,))
    ref = torch.full_like(c.ref, float("nan"))
    c = c._replace(ref=ref)
    loss, _, metrics, scales = native_policy(native_module, c, parts_of(2, 1), ref=True)
    assert loss.isfinite() and metrics[3].isnan()
    dm = native_gradient(native_module, c, scales, ref=True)
    assert dm.isfinite().all()


def test_children_without_noise(native_module) -> None:
    """s <= 0 takes nothing from the noise, not even NaN, and needs no key."""
    c = make((2,), (33,))
    table = c.table.clone()
    table[0, 2], table[1, 2], table[:, 3] = 0, -1, 0
    noise = torch.full((2, 33), float("nan"))
    args = (c.offsets, None, F32, 1)
    y, lp = native_module.sample_transition(c.m, c.x, table, None, noise, *args)
    center = table[:, :1] * c.x + table[:, 1:2] * c.m
    assert torch.equal(y, center) and torch.equal(lp, table[:, 4])
    for keys in (None, draw_keys(2)):
        again, _ = native_module.sample_transition(c.m, c.x, table, keys, None, *args)
        assert torch.equal(again, y)


def test_children_without_density(native_module) -> None:
    c = make((2,), (33,))
    table = c.table.clone()
    table[0, 3] = 0
    at, weights, parts = c._replace(table=table), torch.tensor([0.0, 1.0]), parts_of(2, 1)
    parts[0] = 0
    loss, lp, *_ = native_policy(native_module, at, parts, weights=weights)
    assert loss.isfinite() and lp[0] == table[0, 4]


def test_no_children_at_all(native_module) -> None:
    c = make((0, 0), (5,))
    y, lp = native_module.sample_transition(
        c.m, c.x, c.table, None, None, c.offsets, ((1, 3),), BF16, 1
    )
    assert y.shape == (0, 5) and lp.shape == (0,)
    loss, _, metrics, scales = native_policy(native_module, c, torch.zeros(0), divisor=2.0)
    assert loss == 0 and not metrics.any() and scales.shape == (0, 3)
    assert not native_gradient(native_module, c, scales).any()
