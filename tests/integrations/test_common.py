"""The step and the clipped loss that all hosts share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import formulas
import pytest
import torch
from formulas import normal
from torch import Tensor

from dancegrpo_fast import NoiseKey, dance_schedule, keys_table, normal_batch
from dancegrpo_fast.integrations import common

GRID = dance_schedule(8, 3.0)
SIGMAS = torch.tensor(GRID.sigmas, dtype=torch.float64)
SHAPES = [(3, 40, 8), (3, 4, 6, 5), (3, 2, 3, 4, 5)]
ALPHAS = torch.cumprod(
    1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
)

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
    # Stored narrower, x' is rounded first and the log-prob is that of the rounded value.
    narrow = common.step(m.detach(), x, row, latent_dtype=torch.bfloat16)
    assert narrow.prev_sample.dtype == torch.bfloat16
    replay = common.step(m.detach(), x, row, prev_sample=narrow.prev_sample)
    assert torch.equal(replay.log_prob, narrow.log_prob)
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
        common.timestep_index(timesteps, timesteps[2], second=True)
        common.timestep_index(timesteps, 375.0 * 2, second=False)
        index = common.timestep_index(timesteps, timesteps[[2, 0, 5]], second=True)
        table = common.ddim_table(alphas, stride=20, eta=1.0)
        common.step(m.detach(), x, common.rows(table, index * 100 + 20, 3))
        common.pair_rows(0.5, 0.4, dynamics="dance", level=0.3, batch=3)

    for index in (2, torch.tensor(2), torch.tensor([2, 0, 7])):
        assert counts(lambda index=index: train(index)).syncs == 0
    assert counts(rollout).syncs == 0


def test_a_rollout_in_inference_mode_leaves_tables_for_training() -> None:
    sigmas, x = SIGMAS.clone(), normal(2, 6, seed=1, dtype=torch.float32)
    build = functools.partial(common.flow_table, sigmas, dynamics="dance", level=0.3)
    with torch.inference_mode():
        common.step(x, x, common.rows(build(), 3, 2))
        common.pair_rows(0.51, 0.41, dynamics="dance", level=0.3, batch=2)
    m = x.clone().requires_grad_()
    common.step(m, x, common.rows(build(), 3, 2), prev_sample=x).log_prob.sum().backward()
    pair = common.pair_rows(0.51, 0.41, dynamics="dance", level=0.3, batch=2)
    common.step(m, x, pair, prev_sample=x).log_prob.sum().backward()
    assert m.grad.abs().max() > 0


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu() -> None:
    timesteps = torch.tensor(GRID.timesteps, device="cuda")
    x = normal(3, 4, 6, seed=1, dtype=torch.float32).cuda()
    m = x.bfloat16().requires_grad_()
    alphas, on_device = ALPHAS.clone(), SIGMAS.float().cuda()
    where = {"device": torch.device("cuda")}
    # Here: moving them there would wait.
    indices = (2, torch.tensor(2).cuda(), torch.tensor([2, 0, 7]).cuda())

    def run() -> None:
        for sigmas in (SIGMAS, on_device):
            for index in indices:
                table = common.flow_table(sigmas, dynamics="flow", level=0.7, **where)
                out = common.step(m, x, common.rows(table, index, 3))
                again = common.step(m, x, common.rows(table, index, 3), prev_sample=x)
                lp = again.log_prob
                loss = common.clipped_loss(lp, lp.detach(), x[:, 0, 0], 1e-4)
                (loss.loss + out.mean.sum() + out.x0.sum()).backward()
                common.ratio_metrics(lp, lp, 1e-4)
        index = common.timestep_index(timesteps, timesteps[1:4], second=True)
        table = common.ddim_table(alphas, stride=20, eta=1.0, **where)
        common.step(m.detach(), x, common.rows(table, index + 20, 3))
        common.pair_rows(on_device[2], on_device[3], dynamics="cps", level=0.5, batch=3)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    for bad in (-0.1, (0.1, float("nan"))):
        with pytest.raises(ValueError, match="clip_range = .*: must be"):
            common.clipped_loss(new, old, advantages, bad)
        with pytest.raises(ValueError, match="clip_range = .*: must be"):
            common.ratio_metrics(new, old, bad)


def test_a_negative_reward_weight_turns_the_whole_clipped_objective() -> None:
    new, old = normal(6, seed=1) * 1e-2, torch.zeros(6).double()
    advantages = 3 * normal(6, 2, seed=2)
    weights = (1.0, -0.5)
    out = common.clipped_loss(new, old, advantages, [1e-3, 2e-3], reward_weights=weights)
    per_reward = [formulas.clipped(new.exp(), advantages[:, r], 1e-3, 2e-3) for r in range(2)]
    true = (weights[0] * per_reward[0] + weights[1] * per_reward[1]).mean()
    torch.testing.assert_close(out.loss, true, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="must be"):
        common.clipped_loss(new, old[:3], advantages, 1e-2)
