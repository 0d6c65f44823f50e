"""The ops in reference form: closed forms, explicit loops, exact bits, published vectors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dancegrpo_fast.ops import (
    POLICY_METRICS,
    policy_loss,
    reference,
    sample_transition,
    transition_log_prob,
)
from dancegrpo_fast.ops.noise import NoiseKey, keys_table, normal
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.transitions import coefficient_table, transition, x0_step

GRID = dance_schedule(16, 3.0)
DIMS = (3, 2, 5, 7)
F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def table(*steps: int, dtype: torch.dtype = F64, dynamics: str = "flow", kind: str = "sde"):
    level = 0.3 if dynamics == "dance" else 0.7
    rows = [transition(GRID, i, i + 1, dynamics=dynamics, kind=kind, level=level) for i in steps]
    return coefficient_table(rows, dtype=dtype)


def draw_keys(count: int, seed: int = 7) -> Tensor:
    return keys_table([NoiseKey.from_seed(seed).fold_in(i).draw() for i in range(count)])


# ------------------------------------------------------------------ loops written out


def loop_log_prob(m: Tensor, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
    a, b, _, w, c, *_ = row
    return c - w * ((y - a * x - b * m) ** 2).mean()


def loop_loss(m, x, y, rows, parts, old, weights, offsets, u, low, high, kl_weight, m_ref, divisor):
    """One sample at a time, as the papers write it."""
    total = m.new_zeros(())
    for state in range(len(m)):
        for child in range(int(offsets[state]), int(offsets[state + 1])):
            log_prob = loop_log_prob(m[state], x[state], y[child], rows[child])
            rho = torch.exp(log_prob - old[child])
            for r in range(parts.shape[1]):
                for advantage in parts[child, r]:
                    clipped = rho.clamp(1 - low, 1 + high)
                    total = total + u[r] * torch.maximum(-advantage * rho, -advantage * clipped)
            distance = ((m[state] - m_ref[state]) ** 2).mean()
            total = total + kl_weight * weights[child] * rows[child, 5] * distance
    return total / divisor


class Ragged:
    """States with 0, 1, 3, 24 and 2 children, ratios on both sides of the clip range."""

    def __init__(self, rewards: int = 2, seed: int = 0) -> None:
        counts = [0, 1, 3, 24, 2]
        self.offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        children = sum(counts)
        self.m = randn(5, *DIMS, seed=seed).requires_grad_()
        self.x = randn(5, *DIMS, seed=seed + 1)
        self.rows = table(*[2 + i % 11 for i in range(children)])
        self.y = sample_transition(
            self.m, self.x, self.rows, keys=draw_keys(children), child_offsets=self.offsets
        ).next_latents
        self.m_ref = self.m.detach() + 0.05 * randn(5, *DIMS, seed=seed + 2)
        spread = torch.linspace(-3e-3, 3e-3, children, dtype=F64)[randn(children).argsort()]
        log_prob = transition_log_prob(
            self.m, self.x, self.y, self.rows, child_offsets=self.offsets
        )
        self.old = (log_prob - spread).detach()
        advantages = randn(children, rewards, 4, seed=seed + 3)  # four leaves each
        self.parts = torch.stack(
            (advantages.clamp(min=0).sum(-1), advantages.clamp(max=0).sum(-1)), -1
        )
        self.weights = torch.arange(1.0, children + 1, dtype=F64)
        self.u = torch.linspace(0.5, 1.5, rewards, dtype=F64)

    def call(self, **changes: object):
        args = {
            "old_log_prob": self.old, "weights": self.weights, "child_offsets": self.offsets,
            "reward_weights": self.u, "clip_range": (1e-3, 2e-3), "kl_weight": 0.04,
            "reference_output": self.m_ref,
        }  # fmt: skip
        return policy_loss(self.m, self.x, self.y, self.rows, self.parts, **{**args, **changes})


# ------------------------------------------------------------------ sampling and log-prob


def test_sample_is_the_affine_step_with_the_given_noise() -> None:
    m, x, eps, rows = (
        randn(3, *DIMS),
        randn(3, *DIMS, seed=1),
        randn(3, *DIMS, seed=2),
        table(1, 5, 9),
    )
    y, log_prob = sample_transition(m, x, rows, noise=eps)
    for i in range(3):
        a, b, s = rows[i, :3]
        assert torch.allclose(y[i], a * x[i] + b * m[i] + s * eps[i], rtol=1e-13, atol=1e-13)
        true = torch.distributions.Normal(a * x[i] + b * m[i], s).log_prob(y[i]).mean()
        assert log_prob[i] == pytest.approx(float(true), rel=1e-11)


def test_published_log_prob() -> None:
    """algorithms.md 1.6, i = 5, Flow a = .7: through the op."""
    x, m, eps = (
        torch.tensor([v], dtype=F64)
        for v in ([0.5, -1.0, 0.25, 2.0], [1.0, 0.5, -0.75, 0.2], [0.3, -1.2, 0.8, 0.1])
    )
    y, log_prob = sample_transition(m, x, table(5), noise=eps)
    assert float(log_prob) == pytest.approx(-0.10334637, abs=1e-8)
    m_new = m + torch.tensor([[0.02, -0.01, 0.03, 0.0]], dtype=F64)
    new = transition_log_prob(m_new, x, y, table(5))
    assert float(new) == pytest.approx(-0.1047109654, abs=1e-10)


@pytest.mark.parametrize("latent_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamics", ["dance", "flow", "cps"])
def test_rollout_and_training_log_probs_are_the_same_bits(
    dynamics: str, output_dtype: torch.dtype, latent_dtype: torch.dtype
) -> None:
    counts = torch.tensor([1, 4, 2])
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    m = randn(3, 16, 3, 20, 21, dtype=output_dtype)  # 20160 elements: not whole chunks
    x = randn(3, 16, 3, 20, 21, seed=1, dtype=latent_dtype)
    rows = table(0, 1, 5, 9, 10, 12, 14, dtype=torch.float32, dynamics=dynamics)
    y, rollout = sample_transition(m, x, rows, keys=draw_keys(7), child_offsets=offsets)
    assert y.dtype == latent_dtype and rollout.dtype == torch.float32
    training = transition_log_prob(m.clone().requires_grad_(), x, y, rows, child_offsets=offsets)
    assert torch.equal(rollout, training.detach())
    loss = policy_loss(m, x, y, rows, torch.ones(7), old_log_prob=rollout, child_offsets=offsets)
    assert torch.equal(loss.log_prob, rollout)
    metrics = dict(zip(POLICY_METRICS, loss.metrics.tolist(), strict=True))
    assert metrics["ratio"] == 7.0 and metrics["ratio_deviation"] == 0.0
    # One state and one child at a time, as a host without a tree would train.
    for state, child in [(0, 0), (1, 3), (2, 6)]:
        alone = transition_log_prob(
            m[state : state + 1],
            x[state : state + 1],
            y[child : child + 1],
            rows[child : child + 1],
        )
        assert torch.equal(alone, rollout[child : child + 1])


def test_log_prob_is_of_the_stored_latents() -> None:
    m, x, rows = randn(1, 4096, dtype=torch.float32), randn(1, 4096, seed=1), table(12, dtype=F64)
    x = x.float()
    y, log_prob = sample_transition(m, x, rows, keys=draw_keys(1), latent_dtype=torch.bfloat16)
    exact = sample_transition(m, x, rows, keys=draw_keys(1)).next_latents
    assert torch.equal(y, exact.to(torch.bfloat16))
    stored = loop_log_prob(m.double(), x.double(), y.double(), rows[0])
    unrounded = loop_log_prob(m.double(), x.double(), exact.double(), rows[0])
    assert float(log_prob) == pytest.approx(float(stored), abs=2e-6)
    assert abs(float(stored - unrounded)) > 1e-5, "the comparison has no power"


@pytest.mark.parametrize("numel", [1, 2, 3, 127, 4095, 4096, 4097, 100_003])
def test_a_row_is_the_same_bits_in_any_batch_and_with_any_threads(numel: int) -> None:
    m, x, y = (randn(5, numel, seed=s, dtype=torch.float32) for s in range(3))
    rows = table(1, 3, 5, 9, 12, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(transition_log_prob(m, x, y, rows))
            results.append(
                torch.cat(
                    [transition_log_prob(m[i, None], x[i, None], y[i, None], rows[i, None])
                     for i in range(5)]
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    for i in range(5):
        exact = loop_log_prob(m[i].double(), x[i].double(), y[i].double(), rows[i].double())
        assert float(results[0][i]) == pytest.approx(float(exact), rel=1e-6)


def test_sums_follow_the_documented_grid() -> None:
    """Chunks of 4096 halved to one number, then the chunk sums likewise; zeros fill up."""
    values = randn(1, 3 * reference.CHUNK + 5, dtype=torch.float32)
    squares = (values * values)[0].tolist()
    squares += [0.0] * (4 * reference.CHUNK - len(squares))

    def halve(numbers: list[float]) -> float:
        numbers = torch.tensor(numbers)
        while len(numbers) > 1:
            half = len(numbers) // 2
            numbers = numbers[:half] + numbers[half:]
        return numbers

    width = reference.CHUNK
    chunks = [float(halve(squares[i * width : (i + 1) * width])) for i in range(4)]
    total = halve(chunks)
    assert torch.equal(reference.mean_square(values), total / values.shape[1])


def test_keys_give_the_noise_of_their_own_latent_only() -> None:
    m, x, rows = randn(3, *DIMS).float(), randn(3, *DIMS, seed=1).float(), table(1, 5, 9).float()
    keys = [NoiseKey.from_seed(3).fold_in(i).draw() for i in range(3)]
    noise = torch.stack([normal(DIMS, key) for key in keys])
    by_key = sample_transition(m, x, rows, keys=keys)
    by_noise = sample_transition(m, x, rows, noise=noise)
    assert torch.equal(by_key.next_latents, by_noise.next_latents)
    assert torch.equal(by_key.log_prob, by_noise.log_prob)
    alone = sample_transition(m[1:2], x[1:2], rows[1:2], keys=keys_table(keys)[1:2])
    assert torch.equal(alone.next_latents, by_key.next_latents[1:2])


def test_deterministic_children_draw_nothing() -> None:
    rows = torch.cat((table(4, dtype=torch.float32), table(4, dtype=torch.float32, kind="ode")))
    rows = torch.cat((rows, coefficient_table([x0_step(GRID, 4)])))
    m, x = randn(1, *DIMS).float(), randn(1, *DIMS, seed=1).float()
    offsets = torch.tensor([0, 3])
    noise = torch.full((3, *DIMS), float("nan"))
    noise[0] = 0.5
    y, log_prob = sample_transition(m, x, rows, noise=noise, child_offsets=offsets)
    assert torch.equal(y[1], x[0] + rows[1, 1] * m[0])
    assert torch.equal(y[2], x[0] - torch.tensor(GRID.sigmas[4]).float() * m[0])
    assert log_prob[1:].tolist() == [0.0, 0.0] and math.isfinite(log_prob[0])
    # Without noise at all where nothing needs it, and with keys that no draw could take.
    quiet = sample_transition(m, x, rows[1:], child_offsets=torch.tensor([0, 2]))
    assert torch.equal(quiet.next_latents, y[1:])
    mixed = sample_transition(m, x, rows, keys=draw_keys(3), child_offsets=offsets)
    plain = sample_transition(m, x, rows[:1], keys=draw_keys(1))
    assert torch.equal(mixed.next_latents, torch.cat((plain.next_latents, y[1:])))


def test_action_box_copies_outside_and_equals_slicing_inside() -> None:
    box = ((0, 3), (1, 2), (0, 5), (2, 6))
    cut = (slice(None), *(slice(*part) for part in box))
    rows = table(3, 6, 9, dtype=torch.float32)
    m, x = randn(2, *DIMS).float(), randn(2, *DIMS, seed=1).float()
    offsets, eps = torch.tensor([0, 2, 3]), randn(3, *DIMS, seed=2).float()
    layout = {"child_offsets": offsets, "action_box": box}
    y, log_prob = sample_transition(m, x, rows, noise=eps, **layout)
    inner = sample_transition(m[cut], x[cut], rows, noise=eps[cut], child_offsets=offsets)
    assert torch.equal(y[cut], inner.next_latents)
    assert torch.equal(log_prob, inner.log_prob)
    outside = torch.ones(DIMS, dtype=torch.bool)
    outside[cut[1:]] = False
    for child, state in enumerate([0, 0, 1]):
        assert torch.equal(y[child][outside], x[state][outside])
    # Keys: a boxed draw takes the elements of the whole latent, not the first ones.
    keys = [NoiseKey.from_seed(1).fold_in(i).draw() for i in range(3)]
    whole = torch.stack([normal(DIMS, key) for key in keys])
    by_key = sample_transition(m, x, rows, keys=keys, **layout).next_latents
    by_noise = sample_transition(m, x, rows, noise=whole, **layout).next_latents
    assert torch.equal(by_key, by_noise)
    # What lies outside reaches neither loss nor gradient, whatever it is.
    wild = y.clone()
    wild[:, outside] = float("nan")
    m.requires_grad_()
    loss = policy_loss(m, x, wild, rows, torch.ones(3), **layout).loss
    loss.backward()
    small = m.detach()[cut].clone().requires_grad_()
    policy_loss(small, x[cut], y[cut], rows, torch.ones(3), child_offsets=offsets).loss.backward()
    assert torch.equal(m.grad[cut], small.grad) and not m.grad[:, outside].any()


# ------------------------------------------------------------------ ragged children


def test_ragged_children_equal_a_loop() -> None:
    batch = Ragged()
    log_prob = transition_log_prob(
        batch.m, batch.x, batch.y, batch.rows, child_offsets=batch.offsets
    )
    expected = torch.stack(
        [
            loop_log_prob(batch.m[state], batch.x[state], batch.y[child], batch.rows[child])
            for state in range(5)
            for child in range(int(batch.offsets[state]), int(batch.offsets[state + 1]))
        ]
    )
    assert torch.allclose(log_prob, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rewards", [1, 2, 3])
@pytest.mark.parametrize("divisor", [None, 17.0])
def test_loss_and_gradient_equal_a_loop(rewards: int, divisor: float | None) -> None:
    batch = Ragged(rewards)
    ours = batch.call(divisor=divisor)
    rho = torch.exp(ours.log_prob - batch.old)
    for side in (rho < 1 - 1e-3, rho > 1 + 2e-3, (rho - 1).abs() < 1e-3):
        assert ((batch.parts[..., 0] > 0).any(1) & side).any()
        assert ((batch.parts[..., 1] < 0).any(1) & side).any()
    (gradient,) = torch.autograd.grad(ours.loss, batch.m)
    expected = loop_loss(
        batch.m, batch.x, batch.y, batch.rows, batch.parts, batch.old, batch.weights,
        batch.offsets, batch.u, 1e-3, 2e-3, 0.04, batch.m_ref,
        batch.weights.sum() if divisor is None else divisor,
    )  # fmt: skip
    (wanted,) = torch.autograd.grad(expected, batch.m)
    assert float(ours.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-14)
    assert not gradient[0].any(), "a state without children has no gradient"


@pytest.mark.parametrize("shift", [-5e-3, -5e-5, 0.0, 5e-5, 5e-3])
def test_summed_parts_equal_separate_leaves_at_every_ratio(shift: float) -> None:
    """The mean advantage of the leaves would not: the objective is linear in each part only."""
    leaves = torch.tensor([1.3, -0.4, 0.2, -2.0], dtype=F64)
    m, x = randn(1, 50).requires_grad_(), randn(1, 50, seed=1)
    rows = table(6)
    y, log_prob = sample_transition(m, x, rows, keys=draw_keys(1))
    parts = torch.tensor([[[leaves.clamp(min=0).sum(), leaves.clamp(max=0).sum()]]], dtype=F64)
    one = policy_loss(
        m, x, y, rows, parts, old_log_prob=log_prob - shift, weights=torch.tensor([4.0], dtype=F64)
    ).loss
    many = policy_loss(
        m, x, y.expand(4, -1), rows.expand(4, -1), leaves,
        old_log_prob=(log_prob - shift).expand(4), child_offsets=torch.tensor([0, 4]),
    ).loss  # fmt: skip
    gradients = [torch.autograd.grad(loss, m)[0] for loss in (one, many)]
    assert float(one.detach()) == pytest.approx(float(many.detach()), rel=1e-12)
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-16)


# ------------------------------------------------------------------ the loss


def test_clip_loss_vector() -> None:
    advantages = torch.tensor([-0.54772241, 0.54772241, -1.09544482, 1.09544482], dtype=F64)
    difference = torch.tensor([5e-5, 2e-4, -2e-4, -3e-4], dtype=F64)
    m, x = randn(4, 9), randn(4, 9, seed=1)
    rows = table(2, 5, 8, 11)
    y, log_prob = sample_transition(m, x, rows, keys=draw_keys(4))
    old = log_prob - difference
    total = policy_loss(m, x, y, rows, advantages, old_log_prob=old).loss
    assert float(total) == pytest.approx(4.79136e-5, abs=1e-9)
    for i, wanted in enumerate([0.54774979, -0.54777718, 1.09533527, -1.09511623]):
        one = policy_loss(
            m[i, None], x[i, None], y[i, None], rows[i, None], advantages[i, None],
            old_log_prob=old[i, None],
        )  # fmt: skip
        assert float(one.loss) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [-0.3, -0.05, 0.05, 0.4])
def test_gradient_stops_on_the_right_side_only(advantage: float, difference: float) -> None:
    m, x, rows = randn(1, 30).requires_grad_(), randn(1, 30, seed=1), table(6)
    y, log_prob = sample_transition(m, x, rows, keys=draw_keys(1))
    loss = policy_loss(
        m, x, y, rows, torch.tensor([advantage], dtype=F64),
        old_log_prob=log_prob - difference, clip_range=(0.2, 0.3),
    ).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, m)
    rho = math.exp(difference)
    stopped = rho > 1.3 if advantage > 0 else rho < 0.8
    if stopped:
        assert not gradient.any()
        assert float(loss.detach()) == pytest.approx(-advantage * min(max(rho, 0.8), 1.3), rel=1e-12)
    else:
        (slope,) = torch.autograd.grad(transition_log_prob(m, x, y, rows).sum(), m)
        assert torch.allclose(gradient, -advantage * rho * slope, rtol=1e-11)


def test_ratio_normalisation_vector() -> None:
    x, m_old, eps = (
        torch.tensor([v], dtype=F64)
        for v in ([0.5, -1.0, 0.25, 2.0], [1.0, 0.5, -0.75, 0.2], [0.3, -1.2, 0.8, 0.1])
    )
    rows, dm = table(5), torch.tensor([[0.02, -0.01, 0.03, 0.0]], dtype=F64)
    y, old = sample_transition(m_old, x, rows, noise=eps)
    m = (m_old + dm).requires_grad_()
    out = policy_loss(
        m, x, y, rows, torch.ones(1, dtype=F64),
        old_log_prob=old, old_output=m_old, clip_range=1.0,
    )  # fmt: skip
    rho = dict(zip(POLICY_METRICS, out.metrics.tolist(), strict=True))["ratio"]
    assert rho == pytest.approx(0.9995414210, abs=1e-10)
    # rho = exp(mean(dmu eps)): linear in the exponent, without the bias term.
    assert rho == pytest.approx(math.exp(float((rows[0, 1] * dm * eps).mean())), rel=1e-12)
    (gradient,) = torch.autograd.grad(out.loss, m)
    assert torch.allclose(gradient, -rho * rows[0, 1] * eps / 4, rtol=1e-10)


def test_on_policy_is_the_policy_gradient() -> None:
    batch = Ragged(1)
    out = batch.call(old_log_prob=None, kl_weight=0.0, reference_output=None)
    (gradient,) = torch.autograd.grad(out.loss, batch.m)
    log_prob = transition_log_prob(
        batch.m, batch.x, batch.y, batch.rows, child_offsets=batch.offsets
    )
    score = (batch.parts.sum((1, 2)) * batch.u[0] * log_prob).sum() / batch.weights.sum()
    (wanted,) = torch.autograd.grad(-score, batch.m)
    assert torch.allclose(gradient, wanted, rtol=1e-11, atol=1e-15)


def test_advantage_forms_agree() -> None:
    batch = Ragged(1)
    signed = randn(len(batch.y), seed=9)
    split = torch.stack((signed.clamp(min=0), signed.clamp(max=0)), -1)[:, None]
    losses = []
    for form in (signed, signed[:, None], split):
        batch.parts = form
        losses.append(batch.call().loss.detach())
    assert losses[0] == losses[1] == losses[2]


def test_metrics_are_sums_over_weighted_children() -> None:
    batch = Ragged(2)
    weights = batch.weights.clone()
    weights[::4] = 0.0
    parts = batch.parts.clone()
    parts[::4] = 0.0
    batch.weights, batch.parts = weights, parts
    out = batch.call(divisor=3.0)
    rho = torch.exp(out.log_prob - batch.old)
    on = weights > 0
    states = torch.repeat_interleave(torch.arange(5), batch.offsets.diff())
    distance = ((batch.m.detach() - batch.m_ref) ** 2).flatten(1).mean(1)[states]
    kl = (weights * batch.rows[:, 5] * distance).sum()
    wanted = {
        "children": on.sum(),
        "weight": weights.sum(),
        "policy": out.loss.detach() * 3 - 0.04 * kl,
        "kl": kl,
        "log_prob": out.log_prob[on].sum(),
        "ratio": rho[on].sum(),
        "ratio_deviation": (rho[on] - 1).abs().sum(),
        "ratio_deviation_square": ((rho[on] - 1) ** 2).sum(),
        "clipped_low": (rho[on] < 1 - 1e-3).sum(),
        "clipped_high": (rho[on] > 1 + 2e-3).sum(),
    }
    assert tuple(wanted) == POLICY_METRICS
    assert out.metrics.tolist() == pytest.approx([float(v) for v in wanted.values()], rel=1e-9)
    assert wanted["clipped_low"] > 0 and wanted["clipped_high"] > 0


def test_micro_batches_add_up() -> None:
    batch = Ragged(2)
    whole = batch.call(divisor=50.0)
    (gradient,) = torch.autograd.grad(whole.loss, batch.m)
    pieces, metrics = torch.zeros_like(gradient), torch.zeros_like(whole.metrics)
    for states in ((0, 3), (3, 4), (4, 5)):
        first, last = int(batch.offsets[states[0]]), int(batch.offsets[states[1]])
        part, kids = slice(*states), slice(first, last)
        out = policy_loss(
            batch.m[part], batch.x[part], batch.y[kids], batch.rows[kids], batch.parts[kids],
            old_log_prob=batch.old[kids], weights=batch.weights[kids],
            child_offsets=batch.offsets[states[0] : states[1] + 1] - first,
            reward_weights=batch.u, clip_range=(1e-3, 2e-3), divisor=50.0, kl_weight=0.04,
            reference_output=batch.m_ref[part],
        )  # fmt: skip
        pieces += torch.autograd.grad(out.loss, batch.m)[0]
        metrics += out.metrics
    assert torch.allclose(pieces, gradient, rtol=1e-12, atol=1e-16)
    assert torch.allclose(metrics, whole.metrics, rtol=1e-12)


def test_zero_weight_items_are_exact_zeros() -> None:
    """What a rank with no work runs: the same shapes, nothing in loss, gradient or metrics."""
    batch = Ragged(1)
    batch.parts, batch.weights = torch.zeros_like(batch.parts), torch.zeros_like(batch.weights)
    out = batch.call(divisor=12.0)
    (gradient,) = torch.autograd.grad(out.loss, batch.m)
    assert float(out.loss.detach()) == 0.0
    assert not gradient.any() and not out.metrics.any()


def test_no_children_at_all() -> None:
    m = randn(2, *DIMS).requires_grad_()
    out = policy_loss(
        m, randn(2, *DIMS), randn(0, *DIMS), table(), torch.zeros(0, dtype=F64),
        child_offsets=torch.zeros(3, dtype=torch.int64), divisor=4.0,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, m)
    assert float(out.loss.detach()) == 0.0 and not gradient.any()
    assert out.log_prob.shape == (0,)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_nan_is_never_hidden(weight: float) -> None:
    m, x, rows = randn(2, 8), randn(2, 8, seed=1), table(3, 4)
    y = sample_transition(m, x, rows, keys=draw_keys(2)).next_latents
    m[1, 3] = float("nan")
    out = policy_loss(
        m, x, y, rows, torch.tensor([1.0, 0.0], dtype=F64),
        weights=torch.tensor([1.0, weight], dtype=F64),
    )  # fmt: skip
    assert math.isnan(out.loss) and math.isnan(out.log_prob[1]) and math.isfinite(out.log_prob[0])
    assert math.isnan(sample_transition(m, x, rows, keys=draw_keys(2)).log_prob[1])


def test_non_contiguous_inputs() -> None:
    batch = Ragged(2)
    expected = batch.call()
    (wanted,) = torch.autograd.grad(expected.loss, batch.m)
    strided = batch.m.detach().transpose(1, 4).contiguous().transpose(1, 4).requires_grad_()
    assert not strided.is_contiguous()
    m, batch.m = batch.m, strided
    batch.x = batch.x.repeat_interleave(2, 1)[:, ::2]
    batch.y = batch.y.flip(2).flip(2).transpose(2, 3).contiguous().transpose(2, 3)
    batch.rows = torch.stack((batch.rows, batch.rows), 2)[..., 0]
    out = batch.call()
    (gradient,) = torch.autograd.grad(out.loss, batch.m)
    assert torch.equal(out.loss, expected.loss) and torch.equal(gradient, wanted)
    assert torch.equal(m.detach(), strided.detach())


def test_gradient_in_bfloat16_is_the_rounded_float32_one() -> None:
    m, x, rows = randn(2, 40).to(torch.bfloat16), randn(2, 40, seed=1).float(), table(3, 9).float()
    y = sample_transition(m, x, rows, keys=draw_keys(2)).next_latents
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = m.to(dtype, copy=True).requires_grad_()
        policy_loss(leaf, x, y, rows, torch.tensor([1.0, -1.0])).loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1].to(torch.bfloat16))


# ------------------------------------------------------------------ gradcheck and compile


def test_gradcheck_log_prob() -> None:
    x, rows = randn(3, 2, 3, seed=1), table(2, 5, 7, 11)
    offsets, y = torch.tensor([0, 1, 1, 4]), randn(4, 2, 3, seed=2)
    assert torch.autograd.gradcheck(
        lambda m: transition_log_prob(
            m, x, y, rows, child_offsets=offsets, action_box=((0, 2), (1, 3))
        ),
        randn(3, 2, 3).requires_grad_(),
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_gradcheck_policy_loss(normalised: bool) -> None:
    m, x, rows = randn(3, 2, 3).requires_grad_(), randn(3, 2, 3, seed=1), table(2, 5, 7, 11)
    layout = {"child_offsets": torch.tensor([0, 1, 1, 4]), "action_box": ((0, 2), (1, 3))}
    y, log_prob = sample_transition(m, x, rows, keys=draw_keys(4), **layout)
    old = log_prob + torch.tensor([0.05, -0.3, 0.4, -0.02], dtype=F64)
    extra = {"old_output": m.detach() + 0.3 * randn(3, 2, 3, seed=5)} if normalised else {}
    assert torch.autograd.gradcheck(
        lambda m: policy_loss(
            m, x, y, rows, randn(4, 2, seed=4), old_log_prob=old, clip_range=0.2, kl_weight=0.1,
            reference_output=randn(3, 2, 3, seed=6), **layout, **extra,
        ).loss,
        m,
    )  # fmt: skip


def test_compiles_without_a_break() -> None:
    batch = Ragged(2)
    expected = batch.call()
    (wanted,) = torch.autograd.grad(expected.loss, batch.m)
    out = torch.compile(batch.call, fullgraph=True, backend="aot_eager")()
    (gradient,) = torch.autograd.grad(out.loss, batch.m)
    assert torch.equal(out.loss, expected.loss) and torch.equal(gradient, wanted)


# ------------------------------------------------------------------ errors


def bad_sample(**changes: object):
    args = {"model_output": randn(2, 6), "latents": randn(2, 6), "coefficients": table(3, 4)}
    args = {**args, "noise": randn(2, 6), **changes}
    return lambda: sample_transition(**args)


def bad_loss(**changes: object):
    args = {
        "model_output": randn(2, 6), "latents": randn(2, 6), "next_latents": randn(2, 6),
        "coefficients": table(3, 4), "advantages": torch.ones(2, dtype=F64), **changes,
    }  # fmt: skip
    return lambda: policy_loss(**args)


ODE_AND_SDE = torch.cat((table(3, kind="ode"), table(4)))
OFFSETS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad_sample(implementation="triton"), "implementation = 'triton': not available; there is"),
        (bad_loss(implementation="native"), "implementation = 'native'"),
        (bad_sample(model_output=randn(6)), r"model_output has shape \[6\]"),
        (bad_sample(latents=randn(2, 5)), r"latents has shape \[2, 5\]: must be \[2, 6\]"),
        (bad_sample(coefficients=randn(2, 5)), r"coefficients has shape \[2, 5\]"),
        (bad_sample(coefficients=table(3)), "coefficients has 1 rows for 2 states"),
        (bad_sample(noise=randn(3, 6)), r"noise has shape \[3, 6\]: must be \[2, 6\]"),
        (bad_sample(keys=draw_keys(2)), "keys and noise are both given"),
        (bad_sample(noise=None), "child 0 has s > 0"),
        (bad_sample(noise=None, keys=draw_keys(3)), "keys has 3 rows: must be 2"),
        (bad_sample(model_output=torch.ones(2, 6).long()), "model_output is torch.int64"),
        (bad_sample(child_offsets=OFFSETS.int()), "child_offsets is torch.int32"),
        (bad_sample(child_offsets=OFFSETS[:2]), r"int64 \[3\]"),
        (bad_sample(child_offsets=torch.tensor([0, 3, 2])), "must rise from 0 to 2"),
        (bad_sample(child_offsets=torch.tensor([0, 1, 3])), "runs from 0 to 3"),
        (bad_sample(action_box=((0, 7),)), r"action_box\[0\] = \(0, 7\)"),
        (bad_sample(action_box=((2, 2),)), "0 <= start < stop <= 6"),
        (bad_sample(action_box=((0, 1), (0, 1))), "one .* for each of the 1 dimensions"),
        (bad_loss(next_latents=randn(3, 6)), r"next_latents has shape \[3, 6\]"),
        (bad_loss(latents=randn(2, 6).requires_grad_()), "latents requires a gradient"),
        (bad_loss(next_latents=randn(2, 6).requires_grad_()), "next_latents requires a gradient"),
        (
            bad_loss(reference_output=randn(2, 6).requires_grad_()),
            "reference_output requires a gradient: only model_output",
        ),
        (bad_loss(old_log_prob=randn(2).requires_grad_()), "old_log_prob requires a gradient"),
        (bad_loss(advantages=randn(3)), r"advantages has shape \[3\]"),
        (bad_loss(advantages=randn(2, 1, 3)), r"must be \[2\], \[2, rewards\] or"),
        (bad_loss(advantages=-torch.ones(2, 1, 2)), "must be >= 0"),
        (bad_loss(advantages=torch.ones(2, 1, 2)), "<= 0"),
        (bad_loss(reward_weights=torch.ones(2)), r"reward_weights has shape \[2\]: must be \[1\]"),
        (bad_loss(weights=torch.tensor([1.0, -1.0])), "minimum -1.0"),
        (bad_loss(weights=torch.zeros(2)), "weights sum to 0"),
        (bad_loss(divisor=0.0), "divisor = 0.0"),
        (bad_loss(clip_range=-0.1), "clip_range = -0.1"),
        (bad_loss(clip_range=(1.5, 0.1)), "clip_range"),
        (bad_loss(kl_weight=0.1), "without reference_output"),
        (bad_loss(kl_weight=-0.1), "kl_weight = -0.1"),
        (bad_loss(old_output=randn(2, 6)), "old_output without old_log_prob"),
        (bad_loss(coefficients=ODE_AND_SDE), r"coefficients\[0\] has w = 0"),
        (
            bad_loss(coefficients=ODE_AND_SDE, advantages=torch.tensor([0.0, 1.0])),
            r"coefficients\[0\] has w = 0",
        ),
        (bad_loss(latents=torch.empty(2, 6, device="meta")), "latents is on meta: must be on cpu"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_ode_children_may_stand_with_no_advantage_and_no_weight() -> None:
    out = bad_loss(
        coefficients=ODE_AND_SDE,
        advantages=torch.tensor([0.0, 1.0]),
        weights=torch.tensor([0.0, 1.0]),
    )()
    assert float(out.loss) == -1.0 and out.metrics[0] == 1.0


def test_constants_may_require_gradients_where_none_is_taken() -> None:
    with torch.no_grad():
        transition_log_prob(randn(1, 4), randn(1, 4).requires_grad_(), randn(1, 4), table(3))


# ------------------------------------------------------------------ the core's imports

GUARD = """
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"the core imported {name}", name=name)

allowed = {"dancegrpo_fast", "torch", "numpy"}
import numpy, torch  # what these import themselves is theirs
before = set(sys.modules)
sys.meta_path.insert(0, Guard())
import dancegrpo_fast as core
rows = core.coefficient_table(
    [core.transition(core.dance_schedule(8, 3.0), 2, 3, dynamics="dance", kind="sde", level=0.3)]
)
m = torch.ones(1, 4, 4, requires_grad=True)
keys = [core.NoiseKey.from_seed(0).draw()]
y, old = core.sample_transition(m, torch.ones(1, 4, 4), rows, keys=keys)
core.policy_loss(m, torch.ones(1, 4, 4), y, rows, torch.ones(1), old_log_prob=old).loss.backward()
assert m.grad.abs().sum() > 0
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - allowed - sys.stdlib_module_names))
"""


def test_the_core_imports_torch_and_numpy_only() -> None:
    done = subprocess.run([sys.executable, "-c", GUARD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
