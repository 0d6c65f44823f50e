"""Flow-GRPO: both steps, their std conventions, KL, GRPO-Guard, and stand-ins of the call sites."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import formulas
import pytest
import torch
from formulas import column, normal
from torch import Tensor

from dancegrpo_fast.integrations import flow_grpo
from dancegrpo_fast.integrations.flow_grpo import (
    sde_step_with_logprob,
    wan_sde_step_with_logprob,
)

SD3 = (2, 16, 8, 6)
PACKED = (2, 40, 64)  # FLUX and Qwen-Image
VIDEO = (2, 16, 3, 6, 4)
LEVEL = 0.7


def scheduler(steps: int = 10, shift: float = 3.0, *, integers: bool = False) -> Any:
    """What the steps read of a FlowMatchEuler (or, with integer timesteps, UniPC) scheduler."""
    u = torch.linspace(1, 1 / steps, steps)
    sigmas = torch.cat((shift * u / (1 + (shift - 1) * u), torch.zeros(1)))
    timesteps = sigmas[:-1] * 1000
    return SimpleNamespace(sigmas=sigmas, timesteps=timesteps.long() if integers else timesteps)


def oracle(
    host: Any, v: Tensor, x: Tensor, steps: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, std, std without sqrt(-dt), sqrt(-dt)) in float64."""
    sigmas = host.sigmas.double()
    here, there = column(sigmas[steps], x), column(sigmas[steps + 1], x)
    sqrt_dt = (here - there).sqrt()
    if kind == "cps":
        mean, std = formulas.cps_step(v, x, here, there, LEVEL)
        return mean, std, std, sqrt_dt
    name, level = ("flow", LEVEL) if kind == "sde" else ("flow_wan", 1.0)
    g = formulas.rate(name, here, level, float(sigmas[1]), float(sigmas[-1]))
    return (*formulas.flow_step(v, x, here, there, g), g, sqrt_dt)


def sd3(host: Any, *args: Any, kind: str, **options: Any) -> tuple[Tensor, ...]:
    return sde_step_with_logprob(
        host, *args, noise_level=LEVEL, sde_type=kind, return_sqrt_dt=True, **options
    )


def wan(host: Any, *args: Any, kind: str, **options: Any) -> tuple[Tensor, ...]:
    return wan_sde_step_with_logprob(host, *args, return_dt_and_std_dev_t=True, **options)


CASES = [("sde", SD3), ("sde", PACKED), ("cps", SD3), ("wan", VIDEO)]


def call(kind: str, shape: tuple[int, ...], exact_order: bool, train: bool) -> Callable:
    host = scheduler(integers=kind == "wan")
    m, x, y = (normal(*shape, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    m.requires_grad_(train)
    timestep = host.timesteps[[3, 6]] if train else host.timesteps[[3]]
    function = wan if kind == "wan" else sd3

    def run() -> None:
        with torch.set_grad_enabled(train):
            out = function(
                host, m, timestep, x, kind=kind, prev_sample=y if train else None,
                exact_order=exact_order,
            )  # fmt: skip
            if train:
                (out[1].sum() + out[2].sum()).backward()

    return run


CALLS = {
    f"flow_grpo {name}, {part}": (
        lambda exact, kind=kind, shape=shape, train=train: call(kind, shape, exact, train)
    )
    for name, kind, shape in (
        ("SD3 sde", "sde", SD3), ("SD3 cps", "cps", SD3), ("Wan", "wan", VIDEO)
    )  # fmt: skip
    for part, train in (("rollout", False), ("training with backward", True))
}


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [[0, 0], [5, 5], [0, 9], [9]])
def test_training_step(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, steps: list[int]
) -> None:
    host, index = scheduler(integers=kind == "wan"), torch.tensor(steps)
    m = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    stored = normal(shape[0], 3, *shape[1:], seed=2, dtype=torch.float32)
    x, m64 = stored[:, 1], m.detach().double().requires_grad_()
    mean, std, g, sqrt_dt = oracle(host, m64, x.double(), index, kind)
    stored[:, 2] = (mean + std * normal(*shape, seed=3)).detach()
    y = stored[:, 2]
    if kind == "cps":
        density = -(y.double() - mean).square().flatten(1).mean(1)
    else:
        density = formulas.log_density(y.double(), mean, std.expand_as(mean))
    function = wan if kind == "wan" else sd3
    found, host_order = (
        function(host, m, host.timesteps[index], x, kind=kind, prev_sample=y, exact_order=order)
        for order in (False, True)
    )
    assert type(found) is tuple and len(found) == 5
    assert found[0] is y and all(value.dtype == torch.float32 for value in found)
    assert [value.shape for value in found] == [value.shape for value in host_order]
    ones = (1,) * (len(shape) - 1)
    assert found[3].shape == found[4].shape == (len(steps), *ones)
    true = {"log_prob": density, "mean": mean, "std": g, "sqrt_dt": sqrt_dt}
    for name, ours, theirs in zip(true, found[1:], host_order[1:], strict=True):
        # float32 roundings of numbers up to 4 (the first step has std / sqrt(-dt) = 2.7).
        torch.testing.assert_close(ours.double(), true[name], rtol=2e-6, atol=8e-6, msg=name)
        formulas.assert_no_worse(ours, theirs, true[name], name)
    # Gradients through the log-prob, the mean, and both.
    weight = normal(*shape, seed=5)
    three = (*found[1:3], m), (*host_order[1:3], m), (density, mean, m64)
    for of_log_prob, of_mean in ((1.0, 0.0), (0.0, 1.0), (100.0, 1.0)):
        ours, theirs, exact = (
            torch.autograd.grad(
                of_log_prob * log_prob.sum() + of_mean * (center * weight.to(center.dtype)).sum(),
                leaf,
                retain_graph=True,
            )[0]
            for log_prob, center, leaf in three
        )
        formulas.assert_no_worse(ours, theirs, exact, f"gradient {of_log_prob} {of_mean}")
        assert exact.abs().max() > 0 or kind == "cps"


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_rollout_and_replay(kind: str, shape: tuple[int, ...]) -> None:
    host = scheduler(integers=kind == "wan")
    function = wan if kind == "wan" else sd3
    x = normal(*shape, seed=2, dtype=torch.float32)
    m = normal(*shape, seed=1, dtype=torch.bfloat16)
    for i in range(10):
        torch.manual_seed(i)
        drawn = function(host, m, host.timesteps[i].unsqueeze(0), x, kind=kind)
        torch.manual_seed(i)
        theirs = function(host, m, host.timesteps[[i]], x, kind=kind, exact_order=True)
        # The same numbers are drawn: x' differs by rounding.
        torch.testing.assert_close(drawn[0], theirs[0], rtol=0, atol=4e-6)
        index = torch.tensor([i])
        mean, std, _, _ = oracle(host, m.double(), x.double(), index, kind)
        torch.manual_seed(i)
        eps = torch.randn(shape).double()
        torch.testing.assert_close(drawn[0].double(), mean + std * eps, rtol=0, atol=4e-6)
        again = function(
            host, m, host.timesteps[[i, i]], x, kind=kind, prev_sample=drawn[0]
        )
        assert torch.equal(again[1], drawn[1])
        listed = [torch.Generator().manual_seed(n) for n in range(2)]
        rows = function(host, m, host.timesteps[[i]], x, kind=kind, generator=listed)[0]
        lone = function(
            host, m[1:], host.timesteps[[i]], x[1:], kind=kind,
            generator=torch.Generator().manual_seed(1),
        )[0]  # fmt: skip
        assert torch.equal(rows[1:], lone)


def test_conventions_of_the_results() -> None:
    host, video = scheduler(), scheduler(integers=True)
    x, t = normal(*SD3, seed=1, dtype=torch.float32), host.timesteps[[4, 6]]
    assert len(sde_step_with_logprob(host, x, t, x)) == 4
    z, s = normal(*VIDEO, seed=1, dtype=torch.float32), video.timesteps[[4, 6]]
    four = wan_sde_step_with_logprob(video, z, s, z)
    five = wan_sde_step_with_logprob(video, z, s, z, return_dt_and_std_dev_t=True)
    assert len(four) == 4 and len(five) == 5
    # Wan's fourth is the std with sqrt(-dt); SD3's is without it.
    torch.testing.assert_close(four[3], five[3] * five[4], rtol=1e-6, atol=0)
    sd = sde_step_with_logprob(host, x, t, x, return_sqrt_dt=True)
    g = formulas.rate("flow", host.sigmas[[4, 6]].double(), LEVEL, float(host.sigmas[1]), 0)
    torch.testing.assert_close(sd[3].reshape(-1).double(), g, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="sde_type = 'ode'"):
        sde_step_with_logprob(host, x, t, x, sde_type="ode")
    with pytest.raises(ValueError, match="sde_type = 'ode'"):
        flow_grpo.fused_loss(host, x, t, x, x, *torch.ones(2, len(x)), sde_type="ode")
    with pytest.raises(ValueError, match="not among the scheduler's"):
        sde_step_with_logprob(host, x, t + 1, x)
    with pytest.raises(ValueError, match="both given"):
        wan_sde_step_with_logprob(video, z, s, z, z, torch.Generator())
    with pytest.raises(ValueError, match="return_pixel_log_prob"):
        wan_sde_step_with_logprob(video, z, s, z, return_pixel_log_prob=True)


def test_evaluation_is_the_ode() -> None:
    host, x = scheduler(), normal(*SD3, seed=1, dtype=torch.float32)
    m, t = normal(*SD3, seed=2, dtype=torch.float32), host.timesteps[[4]]
    dt = float(host.sigmas[5].double() - host.sigmas[4].double())
    out = sde_step_with_logprob(host, m, t, x, noise_level=0)
    torch.testing.assert_close(out[0].double(), x.double() + dt * m.double(), rtol=0, atol=2e-6)
    assert torch.equal(out[1], torch.zeros(2)) and torch.equal(out[3], torch.zeros(1, 1, 1, 1))
    video = scheduler(integers=True)
    z, v = (normal(*VIDEO, seed=seed, dtype=torch.float32) for seed in (1, 2))
    state, t = torch.get_rng_state(), video.timesteps[[4]]
    out = wan_sde_step_with_logprob(video, v, t, z, determistic=True)
    assert torch.equal(torch.get_rng_state(), state)
    dt = float(video.sigmas[5].double() - video.sigmas[4].double())
    torch.testing.assert_close(out[0].double(), z.double() + dt * v.double(), rtol=0, atol=2e-6)
    # Its log-prob is still that of the SDE.
    mean, std, _, _ = oracle(video, v.double(), z.double(), torch.tensor([4]), "wan")
    density = formulas.log_density(out[0].double(), mean, std.expand_as(mean))
    torch.testing.assert_close(out[1].double(), density, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ losses


def test_kl_loss_is_the_gaussians() -> None:
    host = scheduler()
    x, v, v_ref = (normal(*SD3, seed=seed) for seed in (1, 2, 3))
    steps = torch.tensor([2, 8])
    mean, std, g, sqrt_dt = oracle(host, v, x, steps, "sde")
    mean_ref = oracle(host, v_ref, x, steps, "sde")[0]
    pair = [torch.distributions.Normal(center, std.expand_as(mean)) for center in (mean, mean_ref)]
    exact = torch.distributions.kl_divergence(*pair).flatten(1).mean(1)
    dt = sqrt_dt.reshape(-1) ** 2
    torch.testing.assert_close(flow_grpo.kl_loss(mean, mean_ref, g), (exact * dt).mean())
    torch.testing.assert_close(flow_grpo.kl_loss(mean, mean_ref, std), exact.mean())
    leaf = mean.requires_grad_()
    (gradient,) = torch.autograd.grad(flow_grpo.kl_loss(leaf, mean_ref, g, epsilon=1e-7), leaf)
    direct = (leaf - mean_ref) / (g * g + 5e-8) / leaf[0].numel() / 2
    torch.testing.assert_close(gradient, direct.detach())


def test_guard_ratio_is_the_mean_of_the_noise_times_the_shift() -> None:
    # With x' = mu_old + s eps its exponent is mean(dmu eps), whatever s.
    host, steps = scheduler(), torch.tensor([1, 8])
    x, v, eps = (normal(*SD3, seed=seed) for seed in (1, 2, 3))
    mean, std, g, sqrt_dt = oracle(host, v, x, steps, "sde")
    moved = mean + 1e-2 * normal(*SD3, seed=4)
    y = mean + std * eps
    wide = std.expand_as(mean)
    old, new = formulas.log_density(y, mean, wide), formulas.log_density(y, moved, wide)
    ratio = flow_grpo.guard_ratio(new, old, moved, mean, g, sqrt_dt)
    expected = ((moved - mean) * eps).flatten(1).mean(1).exp()
    torch.testing.assert_close(ratio, expected, rtol=1e-10, atol=0)
    advantages = torch.tensor([7.0, -1.0], dtype=torch.float64)
    loss = flow_grpo.guard_loss(ratio, advantages, sqrt_dt, clip_range=1e-6)
    parts = formulas.clipped(ratio, advantages.clamp(-5, 5), 1e-6, 1e-6)
    torch.testing.assert_close(loss, (parts / sqrt_dt.reshape(-1) ** 2).mean())


def test_the_vector_of_the_notes() -> None:
    # algorithms.md 1.6, RatioNorm at i = 5 of 16 steps, shift 3, a = 0.7.
    u = torch.linspace(1, 0, 17, dtype=torch.float64)
    sigmas = 3 * u / (1 + 2 * u)
    host = SimpleNamespace(sigmas=sigmas, timesteps=sigmas[:-1] * 1000)
    x, v, eps = torch.tensor(
        [[0.5, -1, 0.25, 2], [1, 0.5, -0.75, 0.2], [0.3, -1.2, 0.8, 0.1]], dtype=torch.float64
    ).split(1)
    new = v + torch.tensor([[0.02, -0.01, 0.03, 0]])
    t = host.timesteps[[5]]
    mean = sde_step_with_logprob(host, v, t, x, prev_sample=x, return_sqrt_dt=True)
    y = mean[2] + mean[3] * mean[4] * eps
    old, out = (
        sde_step_with_logprob(host, m, t, x, prev_sample=y, return_sqrt_dt=True) for m in (v, new)
    )
    assert float(old[1]) == pytest.approx(-0.10334637, abs=2e-7)
    ratio = flow_grpo.guard_ratio(out[1], old[1], out[2], old[2], out[3], out[4])
    assert float(ratio) == pytest.approx(0.9995414210, abs=1e-7)
    kl = flow_grpo.kl_loss(out[2], old[2], out[3])
    assert float(kl) == pytest.approx(1.032635e-7, rel=1e-3)


# ------------------------------------------------------------------ call sites


class Network(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(channels, channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scaled = x * (1 + t.reshape(-1, *(1 for _ in x.shape[1:])) / 1000)
        return self.layer(scaled.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("kind", ["sde", "cps", "wan"])
def test_a_stand_in_of_the_scripts(kind: str) -> None:
    host, shape = scheduler(8, integers=kind == "wan"), VIDEO if kind == "wan" else SD3
    network = Network(16)
    options: dict[str, Any] = {"return_dt_and_std_dev_t": True}
    function: Callable[..., tuple[Tensor, ...]] = wan_sde_step_with_logprob
    if kind != "wan":
        function = sde_step_with_logprob
        options = {"noise_level": LEVEL, "sde_type": kind, "return_sqrt_dt": True}
    # Rollout, as the pipelines: one timestep for the batch, unsqueezed.
    z = normal(*shape, seed=5, dtype=torch.float32)
    latents, log_probs = [z], []
    for t in host.timesteps:
        with torch.no_grad():
            noise_pred = network(z, t.expand(len(z)))
        z, log_prob, mean, std_dev_t = function(
            host, noise_pred.float(), t.unsqueeze(0), z.float(),
            **({} if kind == "wan" else {"noise_level": LEVEL, "sde_type": kind}),
        )  # fmt: skip
        latents.append(z)
        log_probs.append(log_prob)
    sample = {
        "timesteps": host.timesteps.repeat(len(z), 1),
        "latents": torch.stack(latents, 1)[:, :-1],
        "next_latents": torch.stack(latents, 1)[:, 1:],
        "log_probs": torch.stack(log_probs, 1),
    }
    # Each row's steps are shuffled, as the scripts do: a batch mixes steps.
    perms = torch.stack([torch.randperm(8), torch.arange(8)])
    for key in sample:
        sample[key] = sample[key][torch.arange(2)[:, None], perms]
    for j in range(8):
        t = sample["timesteps"][:, j]
        noise_pred = network(sample["latents"][:, j], t)
        prev_sample, log_prob, mean, std_dev_t, sqrt_dt = function(
            host, noise_pred.float(), t, sample["latents"][:, j].float(),
            prev_sample=sample["next_latents"][:, j].float(), **options,
        )  # fmt: skip
        ratio = torch.exp(log_prob - sample["log_probs"][:, j])
        # Before the first update. The network here sees the same batch; its rows are equal bits.
        assert torch.equal(ratio, torch.ones(2))
        loss = (-torch.tensor([1.0, -2.0]) * ratio).mean()
        loss = loss + 0.04 * flow_grpo.kl_loss(mean, mean.detach() + 0.1, std_dev_t + 1e-3)
        loss.backward()
    gradient = network.layer.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_fused_loss_is_step_loss_and_kl(beta: float) -> None:
    host = scheduler()
    m, ref, x, y = (normal(*SD3, seed=seed, dtype=torch.float32) for seed in (1, 2, 3, 4))
    m.requires_grad_()
    t, advantages = host.timesteps[[2, 8]], torch.tensor([1.5, -9.0])
    _, log_prob, mean, std_dev_t = sde_step_with_logprob(host, m, t, x, prev_sample=y)
    mean_ref = sde_step_with_logprob(host, ref, t, x, prev_sample=y)[2]
    old = log_prob.detach() + torch.tensor([3e-5, -4e-4])
    ratio = torch.exp(log_prob - old)
    split = formulas.clipped(ratio, advantages.clamp(-5, 5), 1e-4, 1e-4).mean()
    split = split + beta * flow_grpo.kl_loss(mean, mean_ref, std_dev_t)
    fused = flow_grpo.fused_loss(
        host, m, t, x, y, old, advantages, beta=beta, reference_output=ref if beta else None
    )
    # log_prob is -30 here, one ulp of which is 2e-6 of the ratio.
    torch.testing.assert_close(fused.loss, split, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(loss, m)[0] for loss in (fused.loss, split))
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", CALLS)
def test_syncs_and_launches(name: str, counts: Callable) -> None:
    before, after = (counts(CALLS[name](exact)) for exact in (True, False))
    assert after.syncs == 0
    assert after.launches + 2 * after.fused < before.launches, (before, after)
