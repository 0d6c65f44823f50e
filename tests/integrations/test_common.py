"""Tables, gathering, the step and the clipped loss that all hosts share."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import formulas
import pytest
import torch
from formulas import normal
from torch import Tensor

from dancegrpo_fast import (
    NoiseKey,
    dance_schedule,
    from_sigmas,
    keys_table,
    normal_batch,
    transition,
)
from dancegrpo_fast.integrations import common, tables

GRID = dance_schedule(8, 3.0)
SIGMAS = torch.tensor(GRID.sigmas, dtype=torch.float64)
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
FLOW = {"dance": 0.3, "flow": 0.7, "flow_wan": 1.0, "cps": 0.8, "ode": 0.0}


def expected_rows(dynamics: str, level: float, **options: bool) -> Tensor:
    kind = "ode" if dynamics == "ode" else "sde"
    name = "dance" if dynamics == "ode" else dynamics
    steps = range(GRID.steps)
    moves = [
        transition(GRID, i, i + 1, dynamics=name, kind=kind, level=level, **options) for i in steps
    ]
    return torch.tensor([tuple(move) for move in moves], dtype=torch.float64)


# ------------------------------------------------------------------ tables


@pytest.mark.parametrize(("dynamics", "level"), FLOW.items())
def test_tables_are_the_transitions(dynamics: str, level: float) -> None:
    # Both in float64, a few operations each: their difference is rounding, below 1e-12.
    table = common.flow_table(SIGMAS, dynamics=dynamics, level=level, dtype=torch.float64)
    torch.testing.assert_close(table, expected_rows(dynamics, level), rtol=1e-12, atol=1e-12)
    single = common.flow_table(SIGMAS, dynamics=dynamics, level=level)
    assert single.dtype == torch.float32
    assert torch.equal(single, table.float())


def test_table_options() -> None:
    exact = common.flow_table(
        SIGMAS, dynamics="cps", level=0.8, exact_density=True, dtype=torch.float64
    )
    wanted = expected_rows("cps", 0.8, exact_density=True)
    torch.testing.assert_close(exact, wanted, rtol=1e-12, atol=1e-12)
    # The normaliser is c and nothing else.
    with_c = common.flow_table(SIGMAS, dynamics="dance", level=0.3)
    without = common.flow_table(SIGMAS, dynamics="dance", level=0.3, normaliser=False)
    assert (without[:, 4] == 0).all() and (with_c[:, 4] != 0).all()
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(with_c[:, others], without[:, others])
    # sigma_max replaces sigma = 1 in the denominator, and only there.
    other = common.flow_table(SIGMAS, dynamics="flow", level=0.7, sigma_max=0.99)
    assert other[0, 2] != common.flow_table(SIGMAS, dynamics="flow", level=0.7)[0, 2]
    assert other[0, 2] == pytest.approx(0.7 * 10 * (1 - GRID.sigmas[1]) ** 0.5, rel=1e-6)
    # Level 0 is the ODE, without a density, whatever the dynamics.
    for dynamics in ("dance", "flow", "flow_wan", "cps"):
        still = common.flow_table(SIGMAS, dynamics=dynamics, level=0.0, dtype=torch.float64)
        ode = expected_rows("ode", 0.0)
        torch.testing.assert_close(still, ode, rtol=1e-12, atol=1e-12)


def test_euler_noise_is_the_ode_with_dance_noise() -> None:
    # DanceGRPO without its SDE solver: the mean of the ODE, the noise and density of the SDE.
    table = common.flow_table(SIGMAS, dynamics="euler_noise", level=0.3, dtype=torch.float64)
    ode, sde = expected_rows("ode", 0.0), expected_rows("dance", 0.3)
    torch.testing.assert_close(table[:, :2], ode[:, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table[:, 2:5], sde[:, 2:5], rtol=1e-12, atol=1e-12)


def test_undefined_steps_are_nan_and_bad_arguments_are_refused() -> None:
    sigmas = torch.tensor([0.5, 0.2, 0.0, 0.0])
    table = common.flow_table(sigmas, dynamics="dance", level=0.3)
    assert table[:2].isfinite().all() and table[2].isnan().all()
    at_one = common.flow_table(torch.tensor([1.0, 1.0, 0.5]), dynamics="flow", level=0.7)
    assert at_one[0].isnan().all() and at_one[1].isnan().all()
    assert common.flow_table(sigmas, dynamics="ode").isfinite().all()
    with pytest.raises(ValueError, match="must fall within"):
        common.flow_table(torch.tensor([0.2, 0.5]), dynamics="dance", level=0.3)
    with pytest.raises(ValueError, match="must fall within"):
        common.flow_table(torch.tensor([1.0, float("nan")]), dynamics="ode")
    with pytest.raises(ValueError, match="level = -1"):
        common.flow_table(SIGMAS, dynamics="dance", level=-1)
    with pytest.raises(ValueError, match="level = 1.5: must be from 0 to 1"):
        common.flow_table(SIGMAS, dynamics="cps", level=1.5)
    with pytest.raises(ValueError, match="dynamics = 'sde'"):
        common.flow_table(SIGMAS, dynamics="sde", level=0.7)
    with pytest.raises(ValueError, match=r"sigmas has shape \[\]"):
        common.flow_table(torch.tensor(1.0), dynamics="ode")


def test_tables_are_kept_until_the_sigmas_change_or_die() -> None:
    build = functools.partial(common.flow_table, dynamics="dance")
    sigmas = torch.linspace(1, 0, 5)
    before = len(tables._TABLES)
    first = build(sigmas, level=0.3)
    assert build(sigmas, level=0.3) is first
    assert build(sigmas, level=0.4) is not first
    assert build(sigmas, level=0.3, normaliser=False) is not first
    sigmas[1] = 0.8  # in place: the host's schedule object reused
    changed = build(sigmas, level=0.3)
    assert not torch.equal(changed, first) and changed[0, 1] == pytest.approx(-0.2)
    for _ in range(50):  # a host that makes sigmas anew in each rollout must not leak
        build(torch.linspace(1, 0, 5), level=0.3)
    del sigmas
    gc.collect()
    assert len(tables._TABLES) == before
    with torch.inference_mode():  # writes to these are not counted: never kept
        sigmas = torch.linspace(1, 0, 5)
        first = build(sigmas, level=0.3)
        sigmas[1] = 0.8
        assert not torch.equal(build(sigmas, level=0.3), first)
    assert len(tables._TABLES) == before


def test_noise_table() -> None:
    table = common.noise_table(SIGMAS, dynamics="flow", level=0.7)
    rows = expected_rows("flow", 0.7)
    torch.testing.assert_close(table[:, 0] * table[:, 1], rows[:, 2].float())
    torch.testing.assert_close(table[:, 2], SIGMAS.diff().float())
    sigma = SIGMAS[:-1]
    rate = formulas.rate("flow", sigma, 0.7, float(SIGMAS[1]), 0.0)
    torch.testing.assert_close(table[:, 0], rate.float())


@pytest.mark.parametrize(("dynamics", "level"), FLOW.items())
def test_pairs_are_the_table(dynamics: str, level: float) -> None:
    table = common.flow_table(SIGMAS, dynamics=dynamics, level=level)
    pairs = functools.partial(
        common.pair_rows, dynamics=dynamics, level=level, sigma_min=0.0, sigma_max=GRID.sigmas[1]
    )
    for i in (0, 3, 7):
        here, there = SIGMAS[i], SIGMAS[i + 1]
        numbers = pairs(float(here), float(there), batch=2)
        assert torch.equal(numbers, table[i].expand(2, 8))
        assert torch.equal(pairs(here, there, batch=2), numbers)
        assert torch.equal(pairs(here.reshape(1, 1, 1), float(there), batch=2), numbers)
    index = torch.tensor([4, 0, 7])
    mixed = pairs(SIGMAS[index], SIGMAS[index + 1].reshape(3, 1, 1), batch=3)
    assert torch.equal(mixed, table[index])
    with pytest.raises(ValueError, match="must be 1 or 2"):
        pairs(SIGMAS[index], SIGMAS[index + 1], batch=2)


def test_pairs_need_the_limits_of_wan() -> None:
    with pytest.raises(ValueError, match="needs sigma_min and sigma_max"):
        common.pair_rows(0.5, 0.4, dynamics="flow_wan", level=1.0, batch=1)
    # Without sigma_max the first step of Flow-GRPO's SDE is undefined; all others need none.
    rows = common.pair_rows(torch.tensor([1.0, 0.5]), 0.4, dynamics="flow", level=0.7, batch=2)
    assert rows[0].isnan().all() and rows[1].isfinite().all()


ALPHAS = torch.cumprod(
    1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_table(prediction: str) -> None:
    x, m = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
    table = common.ddim_table(
        ALPHAS, stride=20, eta=1.0, prediction=prediction, dtype=torch.float64
    )
    assert table.shape == (1000, 8)
    t = torch.tensor([981, 501, 1])
    a, a_next = ALPHAS[t].reshape(3, 1, 1), ALPHAS[(t - 20).clamp(min=0)].reshape(3, 1, 1)
    mean, std, x0 = formulas.ddim_step(m, x, a, a_next, 1.0, prediction)
    row = common.rows(table, t, 3)
    torch.testing.assert_close(common.per_sample(row[:, 2], x), std, rtol=1e-12, atol=0)
    out = common.step(m, x, row, prev_sample=x)
    # Both in float64; 1 / sqrt(A) is 13 at the first timestep, which amplifies the rounding.
    torch.testing.assert_close(out.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.x0, x0, rtol=1e-12, atol=1e-12)


def test_ddim_vectors_and_the_rule_below_zero() -> None:
    # algorithms.md 1.6: the last step keeps its noise because it goes to timestep 0.
    table = common.ddim_table(ALPHAS, stride=20, eta=1.0)
    found = table[[981, 501, 1], 2]
    torch.testing.assert_close(found, torch.tensor([0.45446327, 0.29478454, 0.02064832]))
    final = common.ddim_table(ALPHAS, stride=20, eta=1.0, final_alpha=1.0)
    assert final[1, 2] == 0.0 and torch.equal(final[20:], table[20:])


# ------------------------------------------------------------------ gathering


def test_rows_take_every_kind_of_index() -> None:
    table = common.flow_table(SIGMAS, dynamics="dance", level=0.3)
    same = torch.tensor([2, 2, 2], dtype=torch.int32)
    for index in (2, torch.tensor(2), torch.tensor([2]), same):
        assert torch.equal(common.rows(table, index, 3), table[2].expand(3, 8))
    mixed = torch.tensor([7, 0, 3])
    assert torch.equal(common.rows(table, mixed, 3), table[mixed])
    for index in (-1, 8):
        with pytest.raises(ValueError, match=f"index = {index}: must be a step from 0 to 7"):
            common.rows(table, index, 3)
    with pytest.raises(ValueError, match="must be 0-d or"):
        common.rows(table, torch.tensor([0, 1]), 3)
    with pytest.raises(IndexError):
        common.rows(table, torch.tensor([0, 1, 8]), 3)


def test_timesteps_are_found_by_equality() -> None:
    timesteps = torch.tensor([1000.0, 933.3, 750.0, 750.0, 500.0])
    wanted = timesteps[[4, 1]]
    assert common.timestep_index(timesteps, wanted).tolist() == [4, 1]
    assert common.timestep_index(timesteps, timesteps[1]).shape == ()
    assert common.timestep_index(timesteps, 500.0).item() == 4
    assert common.timestep_index(timesteps, torch.tensor([750.0, 1000.0])).tolist() == [2, 0]
    second = common.timestep_index(timesteps, torch.tensor([750.0, 1000.0]), second=True)
    assert second.tolist() == [3, 0]
    with pytest.raises(ValueError, match="not among the scheduler's"):
        common.timestep_index(timesteps, torch.tensor([933.0]))


# ------------------------------------------------------------------ the step


def oracle(m: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, x0) of the dance SDE, from the mathematics, in float64."""
    here, there = (formulas.column(SIGMAS[i], x) for i in (index, index + 1))
    mean, std = formulas.flow_step(m, x, here, there, torch.full_like(here, 0.3))
    return mean, std, x - here * m


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_step_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    double = dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    index = torch.tensor([0, 7, 3])  # the first and the last step in one batch
    table = common.flow_table(SIGMAS, dynamics="dance", level=0.3, dtype=wide)
    row = common.rows(table, index, 3)
    m = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    x = normal(*shape, seed=2, dtype=wide)
    m64 = m.detach().double().requires_grad_()
    mean, std, x0 = oracle(m64, x.double(), index)
    y = (mean + std * normal(*shape, seed=3)).detach().to(wide)
    density = formulas.log_density(y.double(), mean, std)
    out = common.step(m, x, row, prev_sample=y)
    assert out.prev_sample is y
    found = {"log_prob": out.log_prob, "mean": out.mean, "x0": out.x0}
    wanted = {"log_prob": density, "mean": mean, "x0": x0}
    # float32: mean and x0 are three roundings of numbers up to 4; the log-prob's residual is one
    # rounding of x' (2^-24 x 4) against s >= 0.03, and it is squared and averaged.
    atol = 1e-10 if double else 4e-6
    for name, value in found.items():
        assert value.dtype == wide and value.requires_grad
        torch.testing.assert_close(value.double(), wanted[name], rtol=0, atol=atol, msg=name)
    # Gradients through each and through their sum, with weights that tell elements apart.
    weight = {name: normal(*value.shape, seed=5) for name, value in found.items()}
    for names in (["log_prob"], ["mean"], ["x0"], ["log_prob", "mean", "x0"]):
        got = sum((found[n] * weight[n].to(wide)).sum() for n in names)
        true = sum((wanted[n] * weight[n]).sum() for n in names)
        gradient = torch.autograd.grad(got, m, retain_graph=True)[0]
        (exact,) = torch.autograd.grad(true, m64, retain_graph=True)
        # bf16 gradients are rounded once (2^-9) per output that adds to them.
        bound = {torch.bfloat16: 2**-7, torch.float32: 2e-5, torch.float64: 1e-9}[dtype]
        assert gradient.dtype == dtype
        error = (gradient.double() - exact).abs().max() / exact.abs().max()
        assert error <= bound, (names, float(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drawing_and_replaying_give_the_same_bits(dtype: torch.dtype) -> None:
    shape = (3, 4, 6, 5)
    table = common.flow_table(SIGMAS, dynamics="flow", level=0.7)
    row = common.rows(table, torch.tensor([0, 7, 3]), 3)
    m, x = normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=torch.float32)
    drawn = common.step(m, x, row, mean=False, x0=False)
    assert drawn.mean is None and drawn.x0 is None
    assert drawn.prev_sample.dtype == torch.float32
    replay = common.step(m.requires_grad_(), x, row, prev_sample=drawn.prev_sample)
    assert torch.equal(replay.log_prob, drawn.log_prob)
    assert replay.log_prob.requires_grad
    # Without a gradient in sight the training path is the same bits too.
    again = common.step(m.detach(), x, row, prev_sample=drawn.prev_sample, mean=False, x0=False)
    assert torch.equal(again.log_prob, drawn.log_prob)


def test_a_drawn_sample_has_the_gradient_of_its_mean() -> None:
    shape = (2, 4, 5)
    table = common.flow_table(SIGMAS, dynamics="dance", level=0.3, dtype=torch.float64)
    m = normal(*shape, seed=1).requires_grad_()
    x = normal(*shape, seed=2)
    torch.manual_seed(7)
    out = common.step(m, x, common.rows(table, 3, 2))
    torch.manual_seed(7)
    eps = torch.randn(shape).double()
    mean, std, _ = oracle(m, x, torch.tensor([3, 3]))
    torch.testing.assert_close(out.prev_sample, mean + std * eps, rtol=0, atol=1e-12)
    weight = normal(*shape, seed=4)
    (got,) = torch.autograd.grad((out.prev_sample * weight).sum(), m, retain_graph=True)
    (true,) = torch.autograd.grad((mean * weight).sum(), m)
    torch.testing.assert_close(got, true, rtol=0, atol=1e-12)
    # In the log-prob it is a constant: differentiated through, its noise would cancel the mean.
    (got,) = torch.autograd.grad(out.log_prob.sum(), m)
    assert got.abs().max() > 0


def test_generators_and_keys() -> None:
    shape = (2, 4, 5)
    x, m = normal(*shape, seed=1, dtype=torch.float32), normal(*shape, seed=2, dtype=torch.float32)
    table = common.flow_table(SIGMAS, dynamics="dance", level=0.3)
    row = common.rows(table, 3, 2)
    mean = common.step(m, x, row, prev_sample=x).mean

    def noise_of(**options: object) -> Tensor:
        drawn = common.step(m, x, row, mean=False, x0=False, **options)  # type: ignore[arg-type]
        return (drawn.prev_sample - mean) / row[0, 2]

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    # The division amplifies the rounding of x' (2^-23) by 1 / s = 10.
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    torch.manual_seed(3)
    found = noise_of()
    torch.manual_seed(3)
    close(found, torch.randn(shape))
    close(noise_of(generator=seeded(4)), torch.randn(shape, generator=seeded(4)))
    listed = noise_of(generator=[seeded(5), seeded(6)])
    close(listed[0], torch.randn(shape[1:], generator=seeded(5)))
    close(listed[1], torch.randn(shape[1:], generator=seeded(6)))
    keys = [NoiseKey.from_seed(1).fold_in(n).draw() for n in range(2)]
    close(noise_of(key=keys), normal_batch(shape[1:], keys))
    close(noise_of(key=keys_table(keys)), normal_batch(shape[1:], keys))
    with pytest.raises(ValueError, match="generator has 1 entries"):
        noise_of(generator=[seeded(1)])
    with pytest.raises(ValueError, match="both given"):
        noise_of(generator=seeded(1), key=keys)
    with pytest.raises(ValueError, match="pass no generator"):
        noise_of(generator=seeded(1), deterministic=True)


def test_a_deterministic_step_draws_nothing() -> None:
    x, m = normal(2, 6, seed=1, dtype=torch.float32), normal(2, 6, seed=2, dtype=torch.float32)
    row = common.rows(common.flow_table(SIGMAS, dynamics="ode"), 3, 2)
    state = torch.get_rng_state()
    out = common.step(m, x, row, deterministic=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out.prev_sample, out.mean) and torch.equal(out.log_prob, torch.zeros(2))
    dance = common.rows(common.flow_table(SIGMAS, dynamics="dance", level=0.3), 3, 2)
    with pytest.raises(ValueError, match="s > 0"):
        common.step(m, x, dance, deterministic=True)


def test_slices_of_stored_latents() -> None:
    # Hosts store [B, T + 1, ...] and pass latents[:, j].
    stored = normal(3, 4, 5, 6, seed=1, dtype=torch.float32)
    m = normal(3, 6, 5, seed=2, dtype=torch.float32).transpose(1, 2)
    row = common.rows(common.flow_table(SIGMAS, dynamics="dance", level=0.3), 2, 3)
    x, y = stored[:, 1], stored[:, 2]
    assert not x.is_contiguous() and not m.is_contiguous()
    sliced = common.step(m, x, row, prev_sample=y)
    dense = common.step(m.contiguous(), x.contiguous(), row, prev_sample=y.contiguous())
    for one, other in zip(sliced, dense, strict=True):
        assert torch.equal(one, other)


def test_latents_with_a_gradient_are_refused_where_it_would_be_lost() -> None:
    x, m = normal(2, 6, seed=1).requires_grad_(), normal(2, 6, seed=2)
    row = common.rows(common.flow_table(SIGMAS, dynamics="dance", level=0.3), 3, 2)
    with pytest.raises(ValueError, match="latents requires a gradient"):
        common.step(m, x, row, prev_sample=m)
    out = common.step(m, x, row, prev_sample=m, log_prob=False)
    (gradient,) = torch.autograd.grad(out.mean.sum() + out.x0.sum(), x)
    torch.testing.assert_close(gradient, (row[:, 0:1] + row[:, 6:7]).double().expand(2, 6))


def test_no_value_is_read_back(counts: Callable[..., tuple[int, int]]) -> None:
    x, m = normal(3, 6, seed=1, dtype=torch.float32), normal(3, 6, seed=2, dtype=torch.float32)
    timesteps = torch.tensor(GRID.timesteps)
    m.requires_grad_()
    alphas = ALPHAS.clone()

    def train(index: int | Tensor) -> None:
        table = common.flow_table(SIGMAS, dynamics="flow", level=0.7)
        out = common.step(m, x, common.rows(table, index, 3), prev_sample=x)
        loss = common.clipped_loss(out.log_prob, out.log_prob.detach(), x[:, 0], 1e-4)
        common.ratio_metrics(out.log_prob, out.log_prob, 1e-4)
        loss.loss.backward()

    def rollout() -> None:
        index = common.timestep_index(timesteps, timesteps[[2, 0, 5]], second=True)
        table = common.ddim_table(alphas, stride=20, eta=1.0)
        common.step(m.detach(), x, common.rows(table, index * 100 + 20, 3))
        common.pair_rows(0.5, 0.4, dynamics="dance", level=0.3, batch=3)

    for index in (2, torch.tensor(2), torch.tensor([2, 0, 7])):
        assert counts(lambda index=index: train(index)).syncs == 0
    assert counts(rollout).syncs == 0


# ------------------------------------------------------------------ losses


def test_clipped_loss() -> None:
    # The test vector of algorithms.md 1.6.
    advantages = torch.tensor([-0.54772241, 0.54772241, -1.09544482, 1.09544482])
    difference = torch.tensor([5e-5, 2e-4, -2e-4, -3e-4], dtype=torch.float64)
    out = common.clipped_loss(difference, torch.zeros(4).double(), advantages.double(), 1e-4)
    assert float(out.loss) == pytest.approx(4.79136e-5, abs=2e-10)
    scaled = common.clipped_loss(
        difference, torch.zeros(4).double(), advantages.double(), 1e-4, loss_scale=0.25
    )
    assert float(scaled.loss) == pytest.approx(float(out.loss) / 4, rel=1e-12)


def test_clipped_loss_of_two_rewards_and_its_gradient() -> None:
    new = (normal(6, seed=1) * 1e-2).requires_grad_()
    old, advantages = torch.zeros(6).double(), 3 * normal(6, 2, seed=2)
    out = common.clipped_loss(
        new, old, advantages, (1e-2, 2e-2), advantage_clip=2.0, reward_weights=(0.3, 1.0),
        loss_scale=0.5,
    )  # fmt: skip
    limited = advantages.clamp(-2, 2)
    ratio = new.exp()
    per_reward = [formulas.clipped(ratio, limited[:, r], 1e-2, 2e-2) for r in range(2)]
    true = 0.5 * (0.3 * per_reward[0] + per_reward[1]).mean()
    torch.testing.assert_close(out.loss, true, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, new)[0] for v in (out.loss, true)))
    metrics = dict(zip(common.RATIO_METRICS, common.ratio_metrics(new, old, 1e-2), strict=True))
    assert float(metrics["clipped_low"]) == pytest.approx(float((ratio < 0.99).double().mean()))
    assert float(metrics["log_prob_gap"]) == pytest.approx(float(new.detach().abs().max()))
    with pytest.raises(ValueError, match="reward_weights"):
        common.clipped_loss(new, old, advantages, 1e-2, reward_weights=(1.0,))
    with pytest.raises(ValueError, match="must be"):
        common.clipped_loss(new, old[:3], advantages, 1e-2)


def test_a_schedule_of_another_length_is_another_table() -> None:
    short = torch.tensor(from_sigmas([1.0, 0.5, 0.0]).sigmas)
    assert common.flow_table(short, dynamics="dance", level=0.3).shape == (2, 8)
