"""DanceGRPO: values, gradients, conventions, and a stand-in of the scripts' two call sites."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import formulas
import pytest
import torch
from formulas import normal
from torch import Tensor

from dancegrpo_fast.integrations import dancegrpo
from dancegrpo_fast.integrations.dancegrpo import ddim_step_with_logprob, flux_step

# FLUX and Qwen-Image are packed; HunyuanVideo, SkyReels and Wan are videos.
SHAPES = [(2, 40, 64), (2, 4, 8, 6), (2, 16, 3, 6, 4)]
ETA = 0.3


def sd3_grid(steps: int, shift: float) -> Tensor:
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


SIGMAS = sd3_grid(10, 3.0)


def oracle(v: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, x0) in float64."""
    sigmas = SIGMAS.double()
    here, there = (formulas.column(sigmas[i], x) for i in (index, index + 1))
    mean, std = formulas.flow_step(v, x, here, there, torch.full_like(here, ETA))
    return mean, std, x - here * v


def call(exact_order: bool, train: bool) -> Callable[[], object]:
    m, x, y = (normal(2, 40, 64, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    m = m.bfloat16().requires_grad_(train)
    index = torch.tensor(3) if train else 3

    def run() -> None:
        with torch.set_grad_enabled(train):
            out = flux_step(
                m, x, ETA, SIGMAS, index, y if train else None, True, True, exact_order=exact_order
            )
            if train:
                out[2].sum().backward()

    return run


def ddim_call(exact_order: bool) -> Callable[[], object]:
    m, x, y = (normal(2, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    m.requires_grad_()
    host, t = scheduler(), torch.tensor([981, 1])

    def run() -> None:
        out = ddim_step_with_logprob(
            host, m, t, x, eta=1.0, prev_sample=y, exact_order=exact_order
        )
        out[1].sum().backward()

    return run


CALLS = {
    "DanceGRPO flux_step, rollout": lambda exact: call(exact, train=False),
    "DanceGRPO flux_step, training with backward": lambda exact: call(exact, train=True),
    "DanceGRPO ddim_step_with_logprob, training with backward": ddim_call,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("index", [0, 9, torch.tensor(5), torch.tensor([0, 9])])
def test_training_step(shape: tuple[int, ...], dtype: torch.dtype, index: int | Tensor) -> None:
    m = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    stored = normal(shape[0], 3, *shape[1:], seed=2, dtype=torch.float32)
    x, m64 = stored[:, 1], m.detach().double().requires_grad_()
    steps = torch.as_tensor(index).expand(2)
    mean, std, x0 = oracle(m64, x.double(), steps)
    stored[:, 2] = (mean + std * normal(*shape, seed=3)).detach()
    y = stored[:, 2]
    density = formulas.log_density(y.double(), mean, std)
    out = flux_step(m, x, ETA, SIGMAS, index, prev_sample=y, grpo=True, sde_solver=True)
    assert type(out) is tuple and len(out) == 3
    prev_sample, pred_original, log_prob = out
    assert prev_sample is y and log_prob.shape == (2,) and pred_original.shape == shape
    assert log_prob.dtype == pred_original.dtype == torch.float32
    # Against float64: residuals are x' to within 2^-24 x 4, divided by s >= 0.05, then averaged.
    torch.testing.assert_close(log_prob.double(), density, rtol=0, atol=1e-5)
    torch.testing.assert_close(pred_original.double(), x0, rtol=0, atol=2e-6)
    weights = normal(*shape, seed=4)
    ours, true = (
        torch.autograd.grad(lp.sum() * 100 + (c * weights.to(c.dtype)).sum(), leaf)[0]
        for lp, c, leaf in ((log_prob, pred_original, m), (density, x0, m64))
    )
    bound = 2**-7 if dtype == torch.bfloat16 else 2e-5  # bf16: two roundings of 2^-9
    assert (ours.double() - true).abs().max() <= bound * true.abs().max()
    if isinstance(index, Tensor) and index.dim():
        return
    host = flux_step(m, x, ETA, SIGMAS, index, y, True, True, exact_order=True)
    formulas.assert_no_worse(log_prob, host[2], density, "log_prob")
    formulas.assert_no_worse(pred_original, host[1], x0, "x0")
    theirs = torch.autograd.grad(host[2].sum(), m)[0]
    again = flux_step(m, x, ETA, SIGMAS, index, y, True, True)
    mine = torch.autograd.grad(again[2].sum(), m)[0]
    mean, std, _ = oracle(m64, x.double(), steps)
    true = torch.autograd.grad(formulas.log_density(y.double(), mean, std).sum(), m64)[0]
    formulas.assert_no_worse(mine, theirs, true, "gradient")


@pytest.mark.parametrize("sde_solver", [True, False])
def test_rollout_step(sde_solver: bool) -> None:
    shape = SHAPES[0]
    m = normal(*shape, seed=1, dtype=torch.bfloat16)
    x = normal(*shape, seed=2, dtype=torch.float32)
    mean, std, _ = oracle(m.double(), x.double(), torch.tensor([4, 4]))
    if not sde_solver:
        mean = x.double() + (SIGMAS[5].double() - SIGMAS[4].double()) * m.double()
    torch.manual_seed(3)
    y, _, log_prob = flux_step(m, x, ETA, SIGMAS, 4, None, True, sde_solver)
    torch.manual_seed(3)
    eps = torch.randn(shape)
    torch.testing.assert_close(y.double(), mean + std * eps.double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(
        log_prob.double(), formulas.log_density(y.double(), mean, std), rtol=0, atol=1e-5
    )
    # Training on what was drawn is the same bits: the ratio is 1 before the first update.
    replay = flux_step(m, x, ETA, SIGMAS, torch.tensor(4), y, True, sde_solver)
    assert torch.equal(replay[2], log_prob)
    # The numbers drawn are the script's: with its order of operations x' differs by rounding only.
    torch.manual_seed(3)
    host = flux_step(m.float(), x, ETA, SIGMAS, 4, None, True, sde_solver, exact_order=True)
    torch.testing.assert_close(host[0], y, rtol=0, atol=2e-6)


def test_without_grpo_there_is_no_noise() -> None:
    m, x = (normal(*SHAPES[1], seed=seed, dtype=torch.float32) for seed in (1, 2))
    state = torch.get_rng_state()
    out = flux_step(m, x, ETA, SIGMAS, 4, None, False, True)
    assert torch.equal(torch.get_rng_state(), state) and len(out) == 2
    mean, _, x0 = oracle(m.double(), x.double(), torch.tensor([4, 4]))
    torch.testing.assert_close(out[0].double(), mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(out[1].double(), x0, rtol=0, atol=2e-6)


def test_exact_order_keeps_the_scripts_dtypes() -> None:
    # A 0-d sigma times a bf16 prediction is rounded to bf16 before the latents are added.
    m = normal(*SHAPES[0], seed=1, dtype=torch.bfloat16)
    x = normal(*SHAPES[0], seed=2, dtype=torch.float32)
    _, x0, _ = flux_step(m, x, ETA, SIGMAS, 4, x, True, True, exact_order=True)
    product = SIGMAS[4] * m
    assert product.dtype == torch.bfloat16 and torch.equal(x0, x - product)
    assert not torch.equal(x0, flux_step(m, x, ETA, SIGMAS, 4, x, True, True)[1])
    with pytest.raises(ValueError, match="one index for all rows"):
        flux_step(m, x, ETA, SIGMAS, torch.tensor([1, 2]), x, True, True, exact_order=True)


# ------------------------------------------------------------------ the scripts' call sites


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(hidden_states * (1 + timestep[:, None, None])).bfloat16()


def rollout(args: SimpleNamespace, z: Tensor, sigma_schedule: Tensor, network: Network) -> tuple:
    """As the scripts' `run_sample_step` uses the step."""
    all_latents, all_log_probs = [z], []
    for i in range(args.sampling_steps):
        t = torch.full([len(z)], int(sigma_schedule[i] * 1000), dtype=torch.long)
        with torch.no_grad():
            pred = network(z, t / 1000)
        z, pred_original, log_prob = flux_step(
            pred, z.to(torch.float32), args.eta, sigmas=sigma_schedule, index=i, prev_sample=None,
            grpo=True, sde_solver=True,
        )  # fmt: skip
        all_latents.append(z)
        all_log_probs.append(log_prob)
    return pred_original, torch.stack(all_latents, 1), torch.stack(all_log_probs, 1)


def trained(loss: str) -> Tensor:
    """The network's gradient after the script's loop over samples and shuffled steps."""
    args = SimpleNamespace(
        sampling_steps=6, eta=ETA, clip_range=1e-4, adv_clip_max=5.0, accumulation=2
    )
    network, sigmas = Network(), sd3_grid(args.sampling_steps, 3.0)  # which seeds torch
    batch = 3
    final, latents, log_probs = rollout(
        args, normal(batch, 40, 64, seed=5, dtype=torch.float32), sigmas, network
    )
    assert final.isfinite().all()
    advantages = torch.tensor([1.5, -6.0, 0.3])
    perms = torch.stack([torch.randperm(args.sampling_steps - 1) for _ in range(batch)])
    scale = 1 / (args.accumulation * (args.sampling_steps - 1))
    for b in range(batch):
        for j in range(args.sampling_steps - 1):
            i = perms[b][j]
            x, y = latents[b : b + 1, :-1][:, i], latents[b : b + 1, 1:][:, i]
            t = torch.full([1], int(sigmas[i] * 1000), dtype=torch.long)
            old, advantage = log_probs[b : b + 1, i], advantages[b : b + 1]
            pred = network(x, t / 1000)
            step_args = (pred, x.to(torch.float32), args.eta, sigmas, i)
            options = {"gradient_accumulation_steps": 2, "train_timesteps": 5}
            if loss == "fused_loss":
                out = dancegrpo.fused_loss(*step_args, y, old, advantage, **options)
                assert torch.equal(out.log_prob, old)
                total = out.loss
            else:
                _, _, new = flux_step(
                    *step_args, prev_sample=y.to(torch.float32), grpo=True, sde_solver=True
                )
                ratio = torch.exp(new - old)
                assert torch.equal(ratio, torch.ones(1))  # before the first update
                limited = advantage.clamp(-5, 5)
                total = formulas.clipped(ratio, limited, 1e-4, 1e-4).mean() * scale
                if loss == "grpo_loss":
                    total = dancegrpo.grpo_loss(new, old, advantage, **options).loss
            total.backward()
            # At ratio 1 the loss is -A, clamped, by the two divisors.
            expected = -max(-5.0, min(5.0, float(advantage))) * scale
            assert float(total.detach()) == pytest.approx(expected, rel=1e-6)
    assert network.layer.weight.grad is not None
    return network.layer.weight.grad


@pytest.mark.parametrize("loss", ["grpo_loss", "fused_loss"])
def test_a_stand_in_of_the_script(loss: str) -> None:
    gradients, expected = trained(loss), trained("inline")
    # The ways differ in float32 rounding of scalars; bf16 gradients of the prediction may
    # then fall to the other side: 2^-8 of the largest.
    assert (gradients - expected).abs().max() <= 2**-8 * expected.abs().max() > 0


def test_the_video_loss_clips_each_reward_by_itself() -> None:
    old = torch.zeros(4)
    new = torch.tensor([5e-5, 2e-4, -3e-4, 3e-4]).requires_grad_()
    vq, mq = torch.tensor([1.0, 2.0, 9.0, -1.0]), torch.tensor([-1.0, -2.0, 1.0, -0.5])
    options = {"gradient_accumulation_steps": 2, "train_timesteps": 5}
    out = dancegrpo.video_grpo_loss(new, old, vq, mq, vq_coef=0.7, mq_coef=0.3, **options)
    ratio = new.double().exp()
    parts = [
        formulas.clipped(ratio, values.double().clamp(-5, 5), 1e-4, 1e-4).mean() / 10
        for values in (vq, mq)
    ]
    true = 0.7 * parts[0] + 0.3 * parts[1]
    assert float(out.loss.detach()) == pytest.approx(float(true.detach()), rel=1e-6)
    for got, part in zip(out.per_reward, parts, strict=True):
        assert float(got) == pytest.approx(float(part.detach()), rel=1e-6)
    ours, theirs = (torch.autograd.grad(value, new)[0] for value in (out.loss, true))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    # The same through the fused pass, which makes its own log-probs.
    m, x, y = (normal(4, 6, 8, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    m.requires_grad_()
    log_prob = flux_step(m, x, ETA, SIGMAS, 3, y, True, True)[2]
    args = (log_prob, log_prob.detach() - 1e-4 * torch.arange(4), vq, mq)
    split = dancegrpo.video_grpo_loss(*args, vq_coef=0.7, mq_coef=0.3, **options)
    fused = dancegrpo.fused_loss(
        m, x, ETA, SIGMAS, 3, y, args[1], torch.stack((vq, mq), 1),
        reward_weights=torch.tensor([0.7, 0.3]), **options,
    )  # fmt: skip
    torch.testing.assert_close(fused.loss, split.loss, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(value.loss, m)[0] for value in (fused, split))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


# ------------------------------------------------------------------ Stable Diffusion


def scheduler(num_inference_steps: int = 50, **config: object) -> SimpleNamespace:
    """What DDPO's step reads of a DDIMScheduler after set_timesteps."""
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000)
    values = {
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "clip_sample": False,
        "thresholding": False,
    }  # fmt: skip
    return SimpleNamespace(
        alphas_cumprod=torch.cumprod(1 - root * root, 0),
        num_inference_steps=num_inference_steps,
        config=SimpleNamespace(**{**values, **config}),
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ddim(prediction: str, dtype: torch.dtype) -> None:
    host, shape = scheduler(prediction_type=prediction), (3, 4, 8, 6)
    t = torch.tensor([981, 501, 1])
    m = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    x = normal(*shape, seed=2, dtype=torch.float32)
    m64 = m.detach().double().requires_grad_()
    alphas = host.alphas_cumprod.double()
    here, there = (formulas.column(alphas[i], x) for i in (t, (t - 20).clamp(min=0)))
    mean, std, _ = formulas.ddim_step(m64, x.double(), here, there, 1.0, prediction)
    y = (mean + std * normal(*shape, seed=3)).detach().float()
    density = formulas.log_density(y.double(), mean, std)
    out = ddim_step_with_logprob(host, m, t, x, eta=1.0, prev_sample=y)
    assert type(out) is tuple and len(out) == 2 and torch.equal(out[0], y)
    assert out[1].dtype == torch.float32 and out[1].shape == (3,)
    theirs = ddim_step_with_logprob(host, m, t, x, eta=1.0, prev_sample=y, exact_order=True)
    # The last step's noise is 0.02 and x' reaches 4: 2^-24 x 4 / 0.02 = 1e-5 of relative residual.
    torch.testing.assert_close(out[1].double(), density, rtol=0, atol=2e-5)
    formulas.assert_no_worse(out[1], theirs[1], density, "log_prob")
    gradients = [torch.autograd.grad(lp.sum(), leaf)[0] for lp, leaf in
                 ((out[1], m), (theirs[1], m), (density, m64))]  # fmt: skip
    formulas.assert_no_worse(*gradients, "gradient")


def test_ddim_conventions() -> None:
    host, shape = scheduler(), (2, 4, 8, 6)
    m, x = (normal(*shape, seed=seed, dtype=torch.float16) for seed in (1, 2))
    for t in (981, torch.tensor(981), torch.tensor([981, 1])):
        y, log_prob = ddim_step_with_logprob(
            host, m, t, x, eta=1.0, generator=torch.Generator().manual_seed(1)
        )
        # Stored in the dtype of the sample, and the log-prob is that of the stored x'.
        assert y.dtype == torch.float16 and log_prob.dtype == torch.float32
        replay = ddim_step_with_logprob(host, m, t, x, eta=1.0, prev_sample=y)
        assert torch.equal(replay[1], log_prob)
    with pytest.raises(ValueError, match="both given"):
        ddim_step_with_logprob(host, m, 1, x, generator=torch.Generator(), prev_sample=x)
    with pytest.raises(ValueError, match="clip_sample = True"):
        ddim_step_with_logprob(scheduler(clip_sample=True), m, 1, x)
    host.num_inference_steps = None
    with pytest.raises(ValueError, match="set_timesteps"):
        ddim_step_with_logprob(host, m, 1, x)


def test_a_stand_in_of_the_stable_diffusion_script() -> None:
    host, network = scheduler(num_inference_steps=10), Network()
    timesteps = torch.arange(901, 0, -100)
    latents, log_probs = [normal(3, 4, 8, 64, seed=6, dtype=torch.float32)], []
    for t in timesteps:  # the pipeline: a 0-d timestep, eta and generator as keywords
        with torch.no_grad():
            noise_pred = network(latents[-1].flatten(1, 2), t.expand(3)).unflatten(1, (4, 8))
        step = ddim_step_with_logprob(
            host, noise_pred, t, latents[-1], **{"eta": 1.0, "generator": None}
        )
        latents.append(step[0])
        log_probs.append(step[1])
    now, after = torch.stack(latents[:-1], 1), torch.stack(latents[1:], 1)
    perm = torch.stack([torch.randperm(10) for _ in range(3)])
    every = torch.arange(3)[:, None]
    sample = {"latents": now[every, perm], "next_latents": after[every, perm]}
    for j in range(10):
        t = timesteps[perm[:, j]]
        x = sample["latents"][:, j]
        noise_pred = network(x.flatten(1, 2), t).unflatten(1, (4, 8))
        _, log_prob = ddim_step_with_logprob(
            host, noise_pred, t, x, eta=1.0, prev_sample=sample["next_latents"][:, j]
        )
        ratio = torch.exp(log_prob - torch.stack(log_probs, 1)[torch.arange(3), perm[:, j]])
        assert torch.equal(ratio, torch.ones(3))
        (ratio * torch.tensor([1.0, -1.0, 0.5])).mean().backward()
    assert network.layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", CALLS)
def test_syncs_and_launches(name: str, counts: Callable) -> None:
    before, after = (counts(CALLS[name](exact)) for exact in (True, False))
    assert after.syncs == 0
    assert after.launches + 2 * after.fused < before.launches, (before, after)
