"""Noise: published vectors, closed forms in float64, statistics, boxes, keys, bad input."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch

from dancegrpo_fast.ops import native, noise
from dancegrpo_fast.ops import noise_reference as reference
from dancegrpo_fast.ops.noise import DrawKey, NoiseKey, keys_table, normal, normal_batch

# Random123 1.14, kat_vectors, philox4x32 10: counter, key, words
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
GOLDEN = [
    0x3F7DBB31, 0xBF6CB6B0, 0xBF1E1BA0, 0xBEF6D1B3, 0xBE1D5354, 0x3E392A68, 0x3F54EC98, 0x3E4A2DA3,
]  # fmt: skip
EDGES = [
    ((0x00000000, 0x1FFFFFFF), (0x40990B92, 0x40990B92)),
    ((0xFFFFFF7F, 0x20000000), (0x39800000, 0x39800000)),
    ((0xFFFFFF80, 0x9FFFFFFF), (0x00000000, 0x00000000)),
    ((0xFFFFFFFF, 0xE0000000), (0x80000000, 0x00000000)),
]
INTEGER_VIEW = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=["reference", "native"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("native_module")
    return request.param


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns: unlike ==, this tells -0 from 0."""
    return x.view(INTEGER_VIEW[x.element_size()])


# ---------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_philox_known_answers(counter, key, words) -> None:
    assert reference.philox_scalar(counter, key[0] | key[1] << 32) == words


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_native_philox_known_answers(counter, key, words, native_module) -> None:
    assert tuple(native_module.philox(counter, key[0] | key[1] << 32)) == words


def test_numpy_philox_equals_scalar_for_64_bit_counters_and_seeds() -> None:
    seed = 0xA40938229F31D0FE
    counters = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x85A308D3243F6A88]
    columns = reference.philox(np.array(counters, np.uint64), seed)
    for i, counter in enumerate(counters):
        words = reference.philox_scalar((counter & 0xFFFFFFFF, counter >> 32, 0, 0), seed)
        assert tuple(int(c[i]) for c in columns) == words


def test_golden_bits(implementation) -> None:
    z = normal((8,), DrawKey(0, 0), implementation=implementation)
    assert z.numpy().view(np.uint32).tolist() == GOLDEN


@pytest.mark.parametrize(("words", "expected"), EDGES)
def test_edge_bits(words, expected) -> None:
    z = reference.box_muller(*(np.array([w], np.uint32) for w in words))
    assert tuple(int(v.view(np.uint32)[0]) for v in z) == expected


@pytest.mark.parametrize(("words", "expected"), EDGES)
def test_native_edge_bits(words, expected, native_module) -> None:
    z = np.array(native_module.box_muller(*words), np.float32)
    assert tuple(z.view(np.uint32).tolist()) == expected


def test_box_muller_accuracy() -> None:
    """Against float64: the bounds stated in the docstring, over random and extreme words."""
    rng = np.random.default_rng(0)
    x0 = rng.integers(0, 2**32, 1 << 20, dtype=np.uint32)
    x1 = rng.integers(0, 2**32, 1 << 20, dtype=np.uint32)
    # The smallest u, and u around the switch of the logarithm's exponent (u^2 = 1/2).
    x0[:4096] = np.arange(4096)
    x0[4096:8192] = np.arange(4096) + int(2**32 * 2**-0.5) - 2048
    z0, z1 = (z.astype(np.float64) for z in reference.box_muller(x0, x1))
    # u as float32 holds it: its rounding is part of the definition, not an error.
    u = (x0.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    angle = 2 * np.pi * x1 / 2.0**32
    ok = u < 1
    assert np.abs(np.hypot(z0, z1)[ok] / radius[ok] - 1).max() < 1.14e-7 + 1.44e-7
    for z, exact in ((z0, radius * np.cos(angle)), (z1, radius * np.sin(angle))):
        assert np.abs((z - exact)[ok] / radius[ok]).max() < 1.14e-7 + 1.44e-7
    assert (z0[~ok] == 0).all() and (z1[~ok] == 0).all()
    assert max(np.abs(z0).max(), np.abs(z1).max()) <= 6.7638


# ---------------------------------------------------------------------------- keys


def test_fold_in_repacks_the_block() -> None:
    key = NoiseKey.from_seed(0).fold_in(0)
    assert key == NoiseKey(0xE169C58D6627E8D5, 0x9B00DBD8BC57AC4C)
    assert NoiseKey(0, 2**64 - 1).fold_in(1) == key  # the counter is modulo 2**64
    assert NoiseKey.from_seed(np.int64(0)).fold_in(np.int64(0)) == key


def test_draw_key_is_no_folded_key_and_cannot_fold() -> None:
    key = NoiseKey(7, 9)
    words = reference.philox_scalar((8, 0, 0, 0), 7)  # block 2**64 - 1 from counter 9
    assert key.draw() == DrawKey(words[0] | words[1] << 32, words[2] | words[3] << 32)
    assert not hasattr(key.draw(), "fold_in")
    with pytest.raises(ValueError, match=r"data = 9223372036854775808: must be in 0 .. 2\*\*63"):
        key.fold_in(2**63)
    with pytest.raises(ValueError, match="data = -1"):
        key.fold_in(-1)


def test_keys_are_frozen_and_checked() -> None:
    with pytest.raises(AttributeError):
        NoiseKey(1, 2).seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"NoiseKey.seed = -1: must be in 0 .. 2\*\*64 - 1"):
        NoiseKey.from_seed(-1)
    with pytest.raises(ValueError, match="DrawKey.offset"):
        DrawKey(0, 2**64)
    with pytest.raises(TypeError):
        NoiseKey(1.5, 0)  # type: ignore[arg-type]


def test_many_folded_keys_are_distinct() -> None:
    root = NoiseKey.from_seed(1)
    keys = {root.fold_in(i).fold_in(j) for i in range(100) for j in range(100)}
    keys |= {root.fold_in(i) for i in range(100)}
    assert len(keys) == 10_100
    assert len({k.draw() for k in keys}) == 10_100


def test_keys_table_keeps_64_bits(implementation) -> None:
    keys = [DrawKey(2**64 - 1, 2**63), DrawKey(3, 2**64 - 1), DrawKey(0, 0)]
    table = keys_table(keys)
    assert table.dtype == torch.int64
    assert table.tolist() == [[-1, -(2**63)], [3, -1], [0, 0]]
    from_table = normal_batch((5, 3), table, implementation=implementation)
    for row, key in zip(from_table, keys, strict=True):
        assert torch.equal(bits(row), bits(normal((5, 3), key, implementation=implementation)))
    # A transposed table is not contiguous; an empty one draws nothing.
    strided = table.t().contiguous().t()
    again = normal_batch((5, 3), strided, implementation=implementation)
    assert torch.equal(bits(from_table), bits(again))
    assert normal_batch((5, 3), [], implementation=implementation).shape == (0, 5, 3)


# ---------------------------------------------------------------------------- layout


@pytest.mark.parametrize("offset", [0, 2**32 - 2, 2**64 - 2])
def test_element_is_block_and_lane(offset, implementation) -> None:
    """Element i is lane i % 4 of the block offset + i // 4, also where the counter carries."""
    key = DrawKey(0x0123456789ABCDEF, offset)
    z = normal((3, 7), key, implementation=implementation).numpy().reshape(-1)
    for i, value in enumerate(z):
        counter = (offset + i // 4) % 2**64
        words = reference.philox_scalar((counter & 0xFFFFFFFF, counter >> 32, 0, 0), key.seed)
        pair = np.array(words, np.uint32).reshape(2, 2)[(i % 4) // 2]
        assert value == reference.box_muller(pair[:1], pair[1:])[i % 2][0]


def test_native_equals_reference_in_16m_draws(native_module) -> None:
    """16,777,216 values, element by element, in every dtype; keys on both sides of a carry."""
    keys = [DrawKey(0, 0), DrawKey(2**64 - 1, 2**64 - 1000), DrawKey(0xDEADBEEF, 2**32 - 1)]
    keys.append(NoiseKey.from_seed(5).fold_in(3).draw())
    shape = (1 << 22,)
    expected = normal_batch(shape, keys, implementation="reference")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        drawn = normal_batch(shape, keys, dtype=dtype, implementation="native")
        assert drawn.dtype == dtype
        assert torch.equal(bits(drawn), bits(expected.to(dtype))), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reference_rounds_to_nearest_even(dtype) -> None:
    wide = normal((1 << 18,), DrawKey(1, 2), implementation="reference")
    narrow = normal((1 << 18,), DrawKey(1, 2), dtype=dtype, implementation="reference")
    assert torch.equal(bits(narrow), bits(wide.to(dtype)))


def test_native_does_not_depend_on_threads(native_module) -> None:
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            drawn.append(
                normal_batch(
                    (3, 50_021),
                    [DrawKey(1, 2), DrawKey(3, 4)],
                    box=((0, 3), (5, 49_999)),
                    implementation="native",
                )  # fmt: skip
            )
    finally:
        torch.set_num_threads(before)
    for other in drawn[1:]:
        assert torch.equal(bits(drawn[0]), bits(other))


# ---------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7, 9), (4, 3, 2, 11), (1, 8), (13,), (3, 1, 1, 5), ()])
def test_every_box_is_a_slice(shape, dtype, implementation) -> None:
    full = normal(shape, DrawKey(11, 5), dtype=dtype, implementation=implementation)
    rng = np.random.default_rng(0)
    for _ in range(40):
        box = tuple(tuple(sorted(rng.integers(0, size + 1, 2).tolist())) for size in shape)
        part = normal(shape, DrawKey(11, 5), dtype=dtype, box=box, implementation=implementation)
        assert torch.equal(bits(part), bits(full[tuple(slice(*b) for b in box)])), box


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_noise_is_the_same_for_any_number_of_boxes(parts, dim, implementation) -> None:
    shape, keys = (4, 5, 6, 7), [DrawKey(1, 1), DrawKey(2, 2)]
    full = normal_batch(shape, keys, implementation=implementation)
    cuts = np.linspace(0, shape[dim], parts + 1).astype(int)
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        box = [(0, size) for size in shape]
        box[dim] = (int(start), int(stop))
        pieces.append(normal_batch(shape, keys, box=box, implementation=implementation))
    assert torch.equal(bits(full), bits(torch.cat(pieces, dim + 1)))


def test_a_box_draws_no_more_than_itself(implementation) -> None:
    """A full tensor of 2**58 elements could not be drawn; its last ten can."""
    shape = (1 << 20, 1 << 20, 1 << 18)
    box = ((shape[0] - 1, shape[0]), (shape[1] - 1, shape[1]), (shape[2] - 10, shape[2]))
    z = normal(shape, DrawKey(3, 4), box=box, implementation=implementation)
    last = 2**58 // 4 - 1  # the block of the last four elements
    expected = reference.normal_blocks(np.array([last + 4], np.uint64), 3)[0]
    assert z.shape == (1, 1, 10)
    assert np.array_equal(z.numpy()[0, 0, -4:], expected)


# ---------------------------------------------------------------------------- out, bad input


def test_out_is_filled_and_decides_dtype(implementation) -> None:
    out = torch.full((2, 6), 9.0, dtype=torch.bfloat16)
    result = normal((2, 6), DrawKey(1, 2), out=out, implementation=implementation)
    assert result is out
    expected = normal((2, 6), DrawKey(1, 2), dtype=torch.bfloat16, implementation="reference")
    assert torch.equal(bits(out), bits(expected))


def test_default_device_of_torch_does_not_matter(implementation) -> None:
    with torch.device("meta"):
        z = normal((8,), DrawKey(0, 0), implementation=implementation)
    assert z.numpy().view(np.uint32).tolist() == GOLDEN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int32}, "dtype = torch.int32: must be one of torch.float32"),
        ({"box": ((0, 2),)}, r"box = \(\(0, 2\),\): needs one \(start, stop\) for each of the 2"),
        ({"box": ((0, 2), (1, 4))}, r"box\[1\] = \(1, 4\): must satisfy 0 <= start <= stop <= 3"),
        ({"box": ((-1, 2), (0, 3))}, r"box\[0\] = \(-1, 2\)"),
        ({"box": ((2, 1), (0, 3))}, r"box\[0\] = \(2, 1\)"),
        ({"out": torch.empty(3, 2)}, r"out = \[3, 2\].*must be contiguous \[2, 3\]"),
        ({"out": torch.empty(3, 2).t()}, r"out = \[2, 3\], strides .*must be contiguous"),
        (
            {"out": torch.empty(2, 3), "dtype": torch.float64},
            "out is torch.float32 on cpu, but dtype = torch.float64",
        ),
        ({"out": torch.empty(2, 3), "device": "meta"}, "device = meta: leave them out"),
        ({"implementation": "cuda"}, "implementation = 'cuda': must be 'auto', 'native'"),
    ],
)
def test_bad_arguments_name_field_value_and_way_out(options, message) -> None:
    out = options.get("out")
    options = options | ({"out": out[None]} if out is not None else {})
    message = message.replace(r"\[3, 2\]", r"\[1, 3, 2\]").replace(r"\[2, 3\]", r"\[1, 2, 3\]")
    with pytest.raises(ValueError, match=message):
        normal_batch((2, 3), [DrawKey(0, 0)], **options)


def test_bad_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="is not a DrawKey; call .draw"):
        normal((2,), NoiseKey(0, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keys = torch.int32 \[1, 2\]: must be int64 \[n, 2\]"):
        normal_batch((2,), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"shape = \(-1,\)"):
        normal((-1,), DrawKey(0, 0))


def test_native_refuses_tensors_without_plain_memory(native_module) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="FakeTensor has no plain memory"):
        normal((2, 3), DrawKey(0, 0), implementation="native")


def test_missing_native_module_is_named(monkeypatch, caplog) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "the native module is not built: do this")
    monkeypatch.setattr(noise, "_warn_once", noise._warn_once.__wrapped__)
    with pytest.raises(ValueError, match="'native': the native module is not built: do this"):
        normal((4,), DrawKey(0, 0), implementation="native")
    with caplog.at_level(logging.WARNING):
        z = normal((8,), DrawKey(0, 0))
    assert [r.message for r in caplog.records] == [
        "noise is drawn by NumPy, about 30 times slower, with the same bits: "
        "the native module is not built: do this"
    ]
    assert z.numpy().view(np.uint32).tolist() == GOLDEN
    assert noise.implementations() == {
        "native": "the native module is not built: do this",
        "reference": None,
    }


def test_fallback_warning_is_given_once(monkeypatch, caplog) -> None:
    noise._warn_once.cache_clear()
    monkeypatch.setattr(native, "why_not", lambda: "not built")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert noise.selected("auto") == "reference"
    assert len(caplog.records) == 1
