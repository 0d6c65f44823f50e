"""The policy loss: explicit loops, published vectors, clipping, metrics and micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import (  # noqa: F401
    DIMS,
    F64,
    Ragged,
    draw_keys,
    each_implementation,
    loop_loss,
    randn,
    table,
)

from dancegrpo_fast.ops import (
    POLICY_METRICS,
    policy_loss,
    sample_transition,
    transition_log_prob,
)


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
        assert float(loss.detach()) == pytest.approx(
            -advantage * min(max(rho, 0.8), 1.3), rel=1e-12
        )
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
    assert float(out.metrics[-1]) == pytest.approx(float((dm**2).mean()), rel=1e-12)


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


def test_a_clip_range_may_be_a_list_as_configuration_files_give_it() -> None:
    batch = Ragged()
    assert torch.equal(batch.call(clip_range=[1e-3, 2e-3]).loss, batch.call().loss)
    open_range = batch.call(clip_range=(1.0, 1e9), kl_weight=0.0)
    ratio = torch.exp(open_range.log_prob - batch.old)
    plain = -(ratio[:, None] * batch.parts.sum(-1) * batch.u).sum() / batch.weights.sum()
    torch.testing.assert_close(open_range.loss.detach(), plain, rtol=1e-12, atol=0)


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
        "old_distance": 0.0,
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


# ------------------------------------------------------------------ gradcheck


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
