"""The Triton kernels on a GPU: `pytest -m gpu tests/test_kernels_gpu.py`, nothing else to set.

What the interpreter shows for small inputs, at real sizes and on the device: the bits of noise and
of log-probs are those of NumPy, graphs replay, streams, devices and offsets beyond 32 bits.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from kernel_cases import (
    F64,
    Case,
    assert_close,
    assert_gradient,
    case,
    coefficients,
    log_prob_bits,
    nft,
    offsets_of,
    parents,
    policy,
    randn,
)

from dancegrpo_fast.ops.noise import DrawKey, keys_table, normal_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WAN = (16, 9, 30, 52)  # 240 x 416, 33 frames
FRAMES = ((0, 16), (1, 9), (0, 30), (0, 52))
CUT = ((1, 16), (0, 9), (3, 29), (1, 50))


@pytest.fixture(scope="module")
def kernels() -> Any:
    pytest.importorskip("triton")
    return importlib.import_module("dancegrpo_fast.ops.kernels")


def keys(count: int, seed: int = 3) -> torch.Tensor:
    rows = [DrawKey(seed + i, (2**64 - 1 - 100 * i) % 2**64) for i in range(count)]
    return keys_table(rows).cuda()


def on_gpu(c: Case) -> Case:
    return Case(*(None if t is None else t.cuda() for t in c))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("box", [None, FRAMES, CUT])
def test_noise_has_the_bits_of_the_cpu(kernels: Any, dtype: torch.dtype, box: Any) -> None:
    zero = torch.zeros(3, *WAN, device="cuda")
    table = torch.zeros(3, 8, device="cuda")
    table[:, 2] = 1
    y, _ = kernels.sample_transition(zero, zero, table, keys(3), None, None, box, dtype)
    inside = (slice(None), *(slice(*pair) for pair in box or ((0, size) for size in WAN)))
    assert torch.equal(y[inside].cpu(), normal_batch(WAN, keys(3).cpu(), dtype=dtype, box=box))


@pytest.mark.parametrize("box", [None, FRAMES, CUT])
@pytest.mark.parametrize(
    ("model", "latent"), [(BF16, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP32)]
)
def test_rollout_and_training_agree_with_numpy_to_the_bit(
    kernels: Any, model: torch.dtype, latent: torch.dtype, box: Any
) -> None:
    offsets, table = offsets_of(0, 1, 5), coefficients(6)
    table[1, 2] = 0
    m, x = randn(3, *WAN, seed=1, dtype=model), randn(3, *WAN, seed=2, dtype=latent)
    on = [t.cuda() for t in (m, x, table, offsets)]
    y, lp = kernels.sample_transition(*on[:3], keys(6), None, on[3], box, latent)
    training = kernels.transition_log_prob(on[0], on[1], y, on[2], on[3], box)
    _, loss_lp, _, _ = kernels.policy_loss(
        on[0], on[1], y, on[2], torch.ones(6, device="cuda"), None, None, on[3], None, None, None,
        1e-4, 1e-4, 1.0, 0.0, box, 1.0, None, True,
    )  # fmt: skip
    assert torch.equal(lp, training) and torch.equal(lp, loss_lp)
    assert torch.equal(lp.cpu(), log_prob_bits(m, x, y.cpu(), table, offsets, box))
    a, b, s = (table[:, k].reshape(-1, 1, 1, 1, 1) for k in range(3))
    parent = parents(3, offsets)
    eps = normal_batch(WAN, keys(6).cpu())
    drawn = ((a * x[parent].float() + b * m[parent].float()) + s * eps).to(latent)
    if box is None:
        assert torch.equal(y.cpu(), drawn)
    again, _ = kernels.sample_transition(*on[:3], keys(6), None, on[3], box, latent)
    assert torch.equal(again, y)


def test_strides_and_dtypes_change_no_bit(kernels: Any) -> None:
    c = on_gpu(case(2, (3, 2), WAN, FP16, FP16))
    expected = kernels.transition_log_prob(c.m, c.x, c.y, c.table, c.offsets, None)
    for m, x, y in (
        (c.m.float(), c.x.float(), c.y.float()),
        (c.m, torch.stack((c.x, c.x), 1)[:, 1], c.y.float()),
        (c.m.movedim(1, -1).contiguous().movedim(-1, 1), c.x, c.y),
        (c.m, torch.stack((c.x, c.x + 1), -1)[..., 0], c.y),  # every other element
        (torch.cat((c.m.new_zeros(1), c.m.flatten()))[1:].view_as(c.m), c.x, c.y),  # misaligned
    ):
        lp = kernels.transition_log_prob(m, x, y, c.table, c.offsets, None)
        assert torch.equal(lp, expected)
    drawn = kernels.sample_transition(c.m, c.x, c.table, keys(5), None, c.offsets, None, FP16)
    strided = torch.stack((c.x, c.x + 1), -1)[..., 0]
    again = kernels.sample_transition(c.m, strided, c.table, keys(5), None, c.offsets, None, FP16)
    assert torch.equal(drawn[0], again[0]) and torch.equal(drawn[1], again[1])


@pytest.mark.parametrize("box", [None, FRAMES, CUT])
@pytest.mark.parametrize("model", [BF16, FP16, FP32])
@pytest.mark.parametrize("old_penalty", [None, 0.7])
def test_policy_loss_and_gradient(
    kernels: Any, model: torch.dtype, box: Any, old_penalty: float | None
) -> None:
    # Bounds as in tests/interpreter/test_losses.py.
    host = case(3, (2, 0, 3), WAN, model, box=box)
    c = on_gpu(host)
    advantages, weights = randn(5, 2, seed=9), torch.tensor([1.0, 2, 0, 3, 1])
    loss, lp, metrics, scales = kernels.policy_loss(
        c.m, c.x, c.y, c.table, advantages.cuda(), c.old_log_prob, weights.cuda(), c.offsets, None,
        c.ref, c.old, 1e-2, 2e-2, None, 0.3, box, 1.0, old_penalty, True,
    )  # fmt: skip
    m = host.m.double().requires_grad_()
    expected = policy(
        m, host, advantages, weights=weights, ref=host.ref, old=host.old, kl_weight=0.3, box=box,
        old_penalty=old_penalty,
    )  # fmt: skip
    size = max(1.0, float(expected[2].detach()[:3].abs().max()))
    assert_close(loss, expected[0], 5e-6 * size, "loss")
    assert_close(lp, expected[1], 5e-6, "log-prob")
    assert_close(metrics, expected[2], 5e-6 * size, "metrics")
    upstream = 2.0**20  # A loss scale: without one these gradients are subnormal in float16.
    (expected[0] * upstream).backward()
    dm = kernels.transition_gradient(
        torch.full((), upstream, device="cuda"), scales, c.m, c.x, c.y, c.table, c.offsets, c.ref,
        c.old, box,
    )  # fmt: skip
    half_ulp = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 0.0}[model]
    assert_gradient(dm, m.grad, 5e-6 + half_ulp)


def test_nft_loss_and_gradient(kernels: Any) -> None:
    host = case(4, None, WAN, BF16)
    c = on_gpu(host)
    sigmas, advantages = torch.tensor([0.1, 0.3, 0.7, 1.0]), torch.tensor([-9.0, 0.5, 3, 9])
    rest = (0.5, 5.0, None, 0.1, 1e-5, FRAMES)
    loss, metrics, scales = kernels.nft_loss(
        c.m, c.x, c.y, sigmas.cuda(), advantages.cuda(), None, c.ref, c.old, *rest, True
    )
    m = host.m.double().requires_grad_()
    expected, expected_metrics = nft(
        m, host.x, host.y, sigmas, advantages, None, host.ref, host.old, *rest
    )
    assert_close(loss, expected, 1e-5, "loss")
    assert_close(metrics, expected_metrics, 1e-5, "metrics")
    expected.backward()
    table = torch.zeros(4, 8, device="cuda")
    table[:, 0], table[:, 1] = 1, -sigmas.cuda()
    dm = kernels.transition_gradient(
        torch.ones((), device="cuda"), scales, c.m, c.x, c.y, table, None, c.ref, c.old, FRAMES
    )
    assert_gradient(dm, m.grad, 5e-6 + 2.0**-8)


def test_ratio_has_the_bits_of_the_interpreter(kernels: Any) -> None:
    # exp is our own: equal log-probs give 1 exactly, and infinity and 0 where float32 ends.
    c = on_gpu(case(1, (4,), (8, 16), FP32))
    lp = kernels.transition_log_prob(c.m, c.x, c.y, c.table, c.offsets, None)
    for step, value in ((0.0, 4.0), (100.0, math.inf), (-100.0, 0.0)):
        metrics = kernels.policy_loss(
            c.m, c.x, c.y, c.table, torch.ones(4, device="cuda"), lp - step, None, c.offsets, None,
            None, None, 1e-4, 1e-4, 1.0, 0.0, None, 1.0, None, False,
        )[2]  # fmt: skip
        assert float(metrics[5]) == value


def test_graph_replays_with_other_keys(kernels: Any) -> None:
    c = on_gpu(case(2, (3, 2), WAN, BF16))
    table_of_keys = keys(5)
    advantages, one = torch.ones(5, device="cuda"), torch.ones((), device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        y, lp = kernels.sample_transition(
            c.m, c.x, c.table, table_of_keys, None, c.offsets, None, FP32
        )
        loss, _, metrics, scales = kernels.policy_loss(
            c.m, c.x, y, c.table, advantages, lp, None, c.offsets, None, c.ref, None,
            1e-4, 1e-4, None, 0.1, None, 1.0, None, True,
        )  # fmt: skip
        dm = kernels.transition_gradient(
            one, scales, c.m, c.x, y, c.table, c.offsets, c.ref, None, None
        )
        return y, lp, loss, metrics, dm

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for seed in (11, 12):
        table_of_keys.copy_(keys(5, seed))
        graph.replay()
        replays.append([t.clone() for t in captured])
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)
    assert not torch.equal(replays[0][0], replays[1][0])


def test_side_stream(kernels: Any) -> None:
    c = on_gpu(case(2, (3, 2), WAN, BF16))
    args = (c.m, c.x, c.table, keys(5), None, c.offsets, None, FP32)
    expected = kernels.sample_transition(*args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = kernels.sample_transition(*args)
        training = kernels.transition_log_prob(c.m, c.x, actual[0], c.table, c.offsets, None)
    stream.synchronize()
    assert torch.equal(actual[0], expected[0]) and torch.equal(training, expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_launches_go_to_the_tensors_device(kernels: Any) -> None:
    c = case(2, (3, 2), WAN, BF16)
    there = Case(*(None if t is None else t.to("cuda:1") for t in c))
    with torch.cuda.device(0):
        lp = kernels.transition_log_prob(
            there.m, there.x, there.y, there.table, there.offsets, None
        )
    assert lp.device.index == 1
    assert torch.equal(lp.cpu(), log_prob_bits(c.m, c.x, c.y, c.table, c.offsets))


def test_offsets_beyond_32_bits(kernels: Any) -> None:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    last = 1000  # compared: the last elements of a row, past 2^31
    n = (1 << 31) + 4096 + 9
    rows = torch.tensor([[0.9, -0.1, 0.5, 2.0, 0.1, 1.0, 0, 0]], device="cuda")
    m = torch.zeros(1, 1, n, dtype=BF16, device="cuda")
    x = torch.zeros(1, 1, n, dtype=BF16, device="cuda")
    x[..., -last:] = randn(1, 1, last, dtype=BF16).cuda()
    m[..., -last:] = randn(1, 1, last, seed=1, dtype=BF16).cuda()
    y, lp = kernels.sample_transition(m, x, rows, keys(1), None, None, None, BF16)
    assert torch.equal(lp, kernels.transition_log_prob(m, x, y, rows, None, None))
    eps = normal_batch((1, n), keys(1).cpu(), box=((0, 1), (n - last, n)))
    table = rows.cpu()
    center = table[0, 0] * x[..., -last:].cpu().float() + table[0, 1] * m[..., -last:].cpu().float()
    assert torch.equal(y[..., -last:].cpu(), (center + table[0, 2] * eps).to(BF16))
    # eps^2 averages to 1 within 5 sqrt(2 / n) of its own spread, plus bfloat16's rounding noise.
    assert abs(float((0.1 - lp) / 2.0) - 0.25) < 1e-3
    scales = torch.tensor([[3.0, 0, 0]], device="cuda")
    dm = kernels.transition_gradient(
        torch.ones((), device="cuda"), scales, m, x, y, rows, None, None, None, None
    )
    r = y[..., -last:].cpu().float() - center
    assert torch.equal(dm[..., -last:].cpu(), (3 * r).to(BF16))
    del m, x, y, dm
    # Many rows: each begins beyond 2^31 elements, none is long.
    memory = torch.empty(1 << 32, dtype=BF16, device="cuda")
    few = memory.as_strided((3, 4096), ((1 << 31) - 7000, 1))
    few.normal_()
    y, _ = kernels.sample_transition(few, few, rows.expand(3, -1), keys(3), None, None, None, FP32)
    again, _ = kernels.sample_transition(
        few.contiguous(), few.contiguous(), rows.expand(3, -1), keys(3), None, None, None, FP32
    )
    assert torch.equal(y, again)


def test_many_chunks_agree_with_float64(kernels: Any) -> None:
    n = 64 << 20  # 16384 chunks: several rounds of the finalising kernel
    generator = torch.Generator("cuda").manual_seed(0)
    m = torch.randn(1, n, device="cuda", generator=generator).to(BF16)
    x = torch.randn(1, n, device="cuda", generator=generator)
    table = coefficients(1).cuda()
    y, lp = kernels.sample_transition(m, x, table, keys(1), None, None, None, FP32)
    a, b, _, w, c = table[0, :5].to(F64)
    e = ((y.to(F64) - (a * x.to(F64) + b * m.to(F64))) ** 2).mean()
    assert abs(float(lp[0] - (c - w * e))) < 5e-6


@pytest.mark.parametrize("dynamics", ["dance", "flow", "flow_wan", "cps", "ode", "euler_noise"])
def test_rows_of_sigma_pairs_are_those_of_the_cpu(dynamics: str) -> None:
    from dancegrpo_fast.integrations.common import pair_rows

    sigma = torch.linspace(1, 0.1, 7, dtype=F64)
    args: Any = {"dynamics": dynamics, "batch": 7, "level": 0.7, "sigma_min": 0.0}
    wanted = pair_rows(sigma, sigma * 0.9, **args, sigma_max=0.95)
    sigma = sigma.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = pair_rows(sigma, sigma * 0.9, **args, sigma_max=0.95)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), wanted, rtol=1.2e-7, atol=0)


def test_tables_made_in_a_capture_are_not_kept() -> None:
    """Until a replay they hold nothing: what is built next, without a graph, must be right."""
    pytest.importorskip("triton")
    from dancegrpo_fast.integrations.common import flow_table, pair_rows

    def rows(sigmas: torch.Tensor, level: float) -> tuple[torch.Tensor, torch.Tensor]:
        how: Any = {"dynamics": "dance", "level": level}
        return flow_table(sigmas, **how), pair_rows(sigmas[:-1], sigmas[1:], batch=8, **how)

    sigmas, level = torch.linspace(1, 0, 9), 0.123  # a level that no other test has kept
    wanted, on_gpu = rows(sigmas, level), sigmas.cuda()
    rows(on_gpu, 0.5)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rows(on_gpu, level)
    eager = rows(on_gpu, level)
    graph.replay()
    for own, found, expected in zip(captured, eager, wanted, strict=True):
        assert found.data_ptr() != own.data_ptr() and torch.equal(own, found)
        torch.testing.assert_close(found.cpu(), expected, rtol=1.2e-7, atol=0)
    assert rows(on_gpu, level)[0] is eager[0]  # that one is kept
