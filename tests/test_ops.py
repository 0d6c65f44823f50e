"""Sampling, log-probs and argument checks of the ops: closed forms and exact bits."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import (  # noqa: F401
    DIMS,
    F64,
    GRID,
    Ragged,
    draw_keys,
    each_implementation,
    loop_log_prob,
    randn,
    table,
)

from dancegrpo_fast.ops import (
    POLICY_METRICS,
    policy_loss,
    reference,
    sample_transition,
    transition_log_prob,
    transition_mean,
    x0_estimate,
)
from dancegrpo_fast.ops.noise import NoiseKey, keys_table, normal
from dancegrpo_fast.transitions import coefficient_table, x0_step

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


# ------------------------------------------------------------------ mean and x0


def test_mean_and_x0_estimate_are_the_published_formulas_and_differentiable() -> None:
    """The flow model's x0 is x - sigma v; the mean plus s eps is what sample_transition draws."""
    m, x, eps = (randn(2, *DIMS, seed=s) for s in range(3))
    rows, offsets = table(3, 6, 9), torch.tensor([0, 2, 3])
    eps = torch.cat((eps, eps[:1]))
    y = sample_transition(m, x, rows, noise=eps, child_offsets=offsets).next_latents
    m.requires_grad_()
    center = transition_mean(m, x, rows, child_offsets=offsets)
    s = rows[:, 2].reshape(3, 1, 1, 1, 1)
    assert torch.allclose(center + s * eps, y, rtol=1e-13, atol=1e-13)
    clean = x0_estimate(m, x, rows, child_offsets=offsets)
    sigmas = [GRID.sigmas[i] for i in (3, 6, 9)]
    for child, (state, sigma) in enumerate(zip([0, 0, 1], sigmas, strict=True)):
        assert torch.allclose(clean[child], x[state] - sigma * m[state], rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(clean.sum() + 2 * center.sum(), m)
    of_children = rows[:, 7] + 2 * rows[:, 1]
    assert torch.allclose(gradient[0], of_children[:2].sum().expand(DIMS), rtol=1e-12)
    assert torch.allclose(gradient[1], of_children[2].expand(DIMS), rtol=1e-12)
    box = ((0, 3), (1, 2), (0, 5), (0, 7))
    boxed = transition_mean(m, x, rows, child_offsets=offsets, action_box=box)
    assert torch.equal(boxed[:, :, 1], center[:, :, 1]) and torch.equal(boxed[2, :, 0], x[1, :, 0])


# ------------------------------------------------------------------ gradcheck


def test_gradcheck_log_prob() -> None:
    x, rows = randn(3, 2, 3, seed=1), table(2, 5, 7, 11)
    offsets, y = torch.tensor([0, 1, 1, 4]), randn(4, 2, 3, seed=2)
    assert torch.autograd.gradcheck(
        lambda m: transition_log_prob(
            m, x, y, rows, child_offsets=offsets, action_box=((0, 2), (1, 3))
        ),
        randn(3, 2, 3).requires_grad_(),
    )


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
        (bad_sample(implementation="cuda"), "implementation = 'cuda': not available; there is"),
        (bad_loss(implementation="triton"), "implementation = 'triton': .*; or use 'auto' or 'ref"),
        (bad_sample(model_output=randn(6)), r"model_output has shape \[6\]"),
        (bad_sample(latents=randn(2, 5)), r"latents has shape \[2, 5\]: must be \[2, 6\]"),
        (bad_sample(coefficients=randn(2, 5)), r"coefficients has shape \[2, 5\]"),
        (bad_sample(coefficients=table(3)), "coefficients has 1 rows for 2 states"),
        (bad_sample(noise=randn(3, 6)), r"noise has shape \[3, 6\]: must be \[2, 6\]"),
        (bad_sample(keys=draw_keys(2)), "keys and noise are both given"),
        (bad_sample(noise=None), "child 0 has s > 0"),
        (bad_sample(noise=None, keys=draw_keys(3)), "keys has 3 rows: must be 2"),
        (bad_sample(noise=None, keys=draw_keys(2).int()), "keys = torch.int32 .*use keys_table"),
        (bad_sample(noise=randn(2, 6).long()), "noise is torch.int64"),
        (bad_sample(latent_dtype=torch.int32), "latent_dtype = torch.int32: must be one of"),
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
        (bad_loss(old_log_prob=randn(3)), r"old_log_prob has shape \[3\]: must be \[2\]"),
        (bad_loss(reference_output=randn(2, 5)), r"reference_output has shape \[2, 5\]"),
        (bad_loss(kl_weight=math.nan), "kl_weight = nan"),
        (bad_loss(divisor=math.inf), "divisor = inf"),
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
        (bad_loss(clip_range=(1.0, math.inf)), r"finite; \(1.0, 1e9\) does not clip"),
        (bad_sample(model_output=randn(2, 0), latents=randn(2, 0)), "latent .* has no elements"),
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
