"""DiffusionNFT and AWM by hand: losses, noise and its keys, chains, the old policy's schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forward_cases import NFT, SHAPE, random
from tiny_models import CPU, tiny_config

from dancegrpo_fast.batching import Call, Item
from dancegrpo_fast.config import LossConfig
from dancegrpo_fast.losses.forward_process import (
    Noised,
    awm_call_loss,
    leaf_of_states,
    mixed,
    nft_call_loss,
    noised,
)
from dancegrpo_fast.ops import policy_loss
from dancegrpo_fast.ops.noise import NoiseKey, normal_batch
from dancegrpo_fast.roles import Role
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.trees.chains import chains, trained_at
from dancegrpo_fast.updating.forward_process import old_decay
from dancegrpo_fast.updating.policy_gradient import _means


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rows(advantages: np.ndarray, weights: list[float]) -> Noised:
    """Micro-batch of hand-made float64 tensors; sigmas from nearly clean to pure noise."""
    count = len(weights)
    clean, noise = random(count, *SHAPE, seed=1), random(count, *SHAPE, seed=2)
    sigmas = torch.linspace(0.05, 1.0, count, dtype=torch.float64)
    parts = np.stack([advantages.clip(min=0), advantages.clip(max=0)], axis=-1)
    latents = mixed(clean, noise, sigmas, None)
    return Noised(
        [], clean, noise, latents, sigmas, torch.from_numpy(parts), torch.tensor(weights)
    )


def test_nft_loss_is_the_formula_and_its_gradient() -> None:
    """Weighted rows, KL, an advantage beyond the clamp; float64, so 1e-12 is rounding."""
    loss = LossConfig(kind="nft", beta=0.3, kl_weight=0.2, micro_batch_size=1)
    batch = rows(np.array([[1.5], [-7.0], [0.0]]), [1.0, 1.0, 0.0])
    v = random(3, *SHAPE, seed=3).requires_grad_(True)
    old, reference = random(3, *SHAPE, seed=4), random(3, *SHAPE, seed=5)
    result = nft_call_loss(
        v, batch, loss, old_output=old, reference_output=reference, advantage_clip=5.0,
        divisor=4.0, action_box=None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, v)

    w = v.detach().clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for i, (advantage, weight) in enumerate([(1.5, 1.0), (-7.0, 1.0), (0.0, 0.0)]):
        t, x0, eps = batch.sigmas[i], batch.clean[i], batch.noise[i]
        x_t = (1 - t) * x0 + t * eps
        r = min(max(advantage / 10 + 0.5, 0.0), 1.0)
        branch = 0.0
        for share, sign in ((r, 1), (1 - r, -1)):
            error = x_t - t * (old[i] + sign * 0.3 * (w[i] - old[i])) - x0
            scale = error.detach().abs().mean().clamp(min=1e-5)
            branch = branch + share * (error.square().mean() / scale)
        kl = (w[i] - reference[i]).square().mean()
        total = total + weight * (5.0 * branch / 0.3 + 0.2 * kl)
    (expected,) = torch.autograd.grad(total / 4, w)
    assert torch.allclose(result.loss, (total / 4).detach(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-13)
    assert not gradient[2].any()


def test_published_nft_value() -> None:
    """reference/algorithms.md, section 1.6: loss 0.33126369 at beta = 1 (without its KL)."""
    clean = torch.tensor([0.2, -0.4, 0.6, 1.0], dtype=torch.float64).reshape(1, 1, 1, 1, 4)
    noise = torch.tensor([0.1, 0.9, -1.0, 0.5], dtype=torch.float64).reshape(1, 1, 1, 1, 4)
    sigmas = torch.tensor([0.6], dtype=torch.float64)
    old = torch.tensor([0.0, 1.2, -1.5, -0.4], dtype=torch.float64).reshape(1, 1, 1, 1, 4)
    change = torch.tensor([0.05, -0.02, 0.03, 0.01], dtype=torch.float64).reshape(1, 1, 1, 1, 4)
    batch = Noised(
        [], clean, noise, mixed(clean, noise, sigmas, None), sigmas,
        torch.tensor([[[1.5, 0.0]]], dtype=torch.float64), torch.ones(1),
    )  # fmt: skip
    for beta, expected in ((1.0, 0.33126369), (0.1, 3.02540133)):
        loss = LossConfig(kind="nft", beta=beta, micro_batch_size=1)
        found = nft_call_loss(
            old + change, batch, loss, old_output=old, reference_output=None, advantage_clip=5.0,
            divisor=1.0, action_box=None,
        )  # fmt: skip
        assert float(found.loss) == pytest.approx(expected, abs=1e-8)


def test_nft_at_the_old_policy_pushes_by_the_advantage_alone() -> None:
    """v = v_old: both branches are equal, so the gradient is A / clip times that of a matching
    loss, and none where the advantage is 0."""
    loss = LossConfig(kind="nft", beta=0.7, micro_batch_size=1)
    batch = rows(np.array([[2.0], [-2.0], [0.0]]), [1.0, 1.0, 1.0])
    v = random(3, *SHAPE, seed=3).requires_grad_(True)
    result = nft_call_loss(
        v, batch, loss, old_output=v.detach(), reference_output=None, advantage_clip=5.0,
        divisor=1.0, action_box=None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, v)
    error = (batch.latents - batch.sigmas.view(-1, 1, 1, 1, 1) * v - batch.clean).detach()
    scale = error.abs().mean((1, 2, 3, 4), keepdim=True)
    t = batch.sigmas.view(-1, 1, 1, 1, 1)
    advantage = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    expected = advantage * -2 * t * error / scale / error[0].numel()
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", ["linear", "huber", "ghuber"])
@pytest.mark.parametrize("weighting", ["uniform", "t", "t^2"])
def test_awm_loss_is_the_formula_and_its_gradient(form, weighting) -> None:
    """Two separately clipped rewards, clipped and unclipped rows, KL and old policy."""
    loss = LossConfig(
        kind="awm", form=form, weighting=weighting, clip_range=0.05, kl_weight=0.2, old_weight=0.3,
        micro_batch_size=1,
    )  # fmt: skip
    advantages = np.array([[2.0, -1.0], [-3.0, 0.5], [4.0, 1.0]])
    batch = rows(advantages, [1.0, 1.0, 1.0])
    v = random(3, *SHAPE, seed=3).requires_grad_(True)
    old, reference = random(3, *SHAPE, seed=4), random(3, *SHAPE, seed=5)

    def log_prob(output):
        e = (output - (batch.noise - batch.clean)).square().mean((1, 2, 3, 4))
        weight = {"uniform": 1 + 0 * batch.sigmas, "t": batch.sigmas, "t^2": batch.sigmas**2}
        shape = {
            "linear": e,
            "huber": (e + 1e-10).sqrt() - 1e-5,
            "ghuber": ((e + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25,
        }
        return -weight[weighting] * shape[form]

    old_log_prob = log_prob(v.detach()) + torch.tensor([0.2, -0.2, 0.01], dtype=torch.float64)
    result = awm_call_loss(
        v, batch, loss, old_log_prob=old_log_prob, old_output=old, reference_output=reference,
        advantage_clip=5.0, reward_weights=torch.tensor([1.0, 0.5]), divisor=3.0, action_box=None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, v)

    w = v.detach().clone().requires_grad_(True)
    ratio = (log_prob(w) - old_log_prob).exp()
    cut = ratio.clamp(0.95, 1.05)
    total = torch.zeros((), dtype=torch.float64)
    for column, weight in ((0, 1.0), (1, 0.5)):
        a = torch.from_numpy(advantages[:, column]) / 5.0
        total = total + weight * torch.maximum(-a * ratio, -a * cut).sum()
    for other, weight in ((reference, 0.2), (old, 0.3)):
        total = total + weight * (w - other).square().mean((1, 2, 3, 4)).sum()
    (expected,) = torch.autograd.grad(total / 3, w)
    assert torch.allclose(result.loss, (total / 3).detach(), rtol=1e-10, atol=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(result.log_prob, log_prob(v.detach()), rtol=1e-10)


def test_noise_is_a_function_of_prompt_sample_and_point(tmp_path, tiny_wan_folder) -> None:
    """Whatever the micro-batch; inside the action box only, x0 outside it."""
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, NFT), CPU)
    family = trainer.family
    plan = trainer.plan(0)
    samples = {(p, g): random(*family.latent_shape, seed=10 * p + g).float() for p, g in
               [(0, 0), (0, 1), (1, 3)]}  # fmt: skip
    latents = {(p, plan.leaves[g]): value for (p, g), value in samples.items()}
    drawn = Trajectories(plan, torch.zeros(len(plan.states), 8), list(samples), latents)
    leaf_of, key = leaf_of_states(plan), NoiseKey.from_seed(5).fold_in(Role.FORWARD).fold_in(3)

    def item(p: int, g: int, step: int) -> Item:
        state, child = plan.ancestry(plan.leaves[g])[step : step + 2]
        return Item(p, state, (child,), np.zeros((1, 1, 2)), np.ones(1))

    items = [item(0, 1, 2), item(1, 3, 0), item(0, 1, 1)]
    whole = noised(Call("transformer", tuple(items)), drawn, leaf_of, family, key)
    for row, (p, g, step) in enumerate([(0, 1, 2), (1, 3, 0), (0, 1, 1)]):
        draw = key.fold_in(p).fold_in(g).fold_in(step).draw()
        eps = normal_batch(family.latent_shape, [draw])[0]
        sigma = torch.tensor(plan.schedule.sigmas[step], dtype=torch.float32)
        assert torch.equal(whole.noise[row], eps) and whole.sigmas[row] == sigma
        assert torch.equal(whole.latents[row], (1 - sigma) * samples[p, g] + sigma * eps)
        alone = noised(Call("transformer", (items[row],)), drawn, leaf_of, family, key)
        assert torch.equal(alone.latents[0], whole.latents[row])
    assert whole.sigmas[1] == 1 and torch.equal(whole.latents[1], whole.noise[1])

    family.action_box = ((0, 4), (1, 3), (0, 4), (0, 4))
    boxed = noised(Call("transformer", tuple(items)), drawn, leaf_of, family, key).latents
    assert torch.equal(boxed[:, :, 1:], whole.latents[:, :, 1:])
    assert torch.equal(boxed[:, :, 0], whole.clean[:, :, 0])


def test_chains_are_the_stock_sampler(tmp_path, tiny_wan_folder) -> None:
    """Deterministic steps to the end; second order where a step lies before; one point a state."""
    config = tiny_config(tmp_path, tiny_wan_folder, NFT | {"rollout.solver": "multistep"})
    schedule = Trainer(config, CPU).family.grid.schedule(config.rollout)
    plan = chains(config, schedule, 0, NoiseKey.from_seed(0))
    assert len(plan.leaves) == 4 and not any(plan.leaf_edges)
    chain = [plan.states[i] for i in plan.ancestry(plan.leaves[2])]
    assert [s.kind for s in chain] == ["root"] + ["multistep"] * 4
    assert [s.history for s in chain] == [False, False, True, True, True]
    euler = tiny_config(tmp_path, tiny_wan_folder, NFT)
    plan = chains(euler, schedule, 0, NoiseKey.from_seed(0))
    assert [plan.states[i].kind for i in plan.ancestry(plan.leaves[0])] == [
        "root", "ode", "ode", "ode", "x0"
    ]  # fmt: skip
    inner = trained_at(plan, (1, 3))
    assert {inner.states[inner.states[e].parent].step for e in inner.leaf_edges[0]} == {1, 2}


@pytest.mark.parametrize(
    ("settings", "iterations", "expected"),
    [
        ((0.001, 0, 0.5), [0, 9, 499, 900], [0.001, 0.01, 0.5, 0.5]),
        ((0.0075, 75, 0.999), [0, 74, 75, 300], [0.0, 0.0, 0.0075, 0.999]),
        ((1.0, 0, 0.0), [0, 50], [0.0, 0.0]),
    ],
)
def test_published_schedules_of_the_old_policy(settings, iterations, expected) -> None:
    rate, start, limit = settings
    loss = LossConfig(
        kind="nft", old_decay_rate=rate, old_decay_start=start, old_decay_limit=limit,
        micro_batch_size=1,
    )  # fmt: skip
    assert [old_decay(loss, i) for i in iterations] == pytest.approx(expected)
    twice = loss.model_copy(update={"updates": 2})  # Counted in optimizer steps.
    assert old_decay(twice, 299) == pytest.approx(min(max(600 - start, 0) * rate, limit))


def test_the_mean_kl_is_that_of_separate_samples() -> None:
    """An edge that stands for three samples counts three times, as it does in the loss."""
    shape, kl = (1, 1, 2, 3), {"kl_weight": 0.1, "divisor": 4.0, "clip_range": 0.5}
    table = torch.tensor([[0.9, -0.2, 0.4, 1.0, 0.0, 0.5, 1.0, -1.0]], dtype=torch.float64)

    def means(counts: list[int], weights: list[float]) -> dict[str, float]:
        x, y, m, ref = (
            torch.cat([random(2, *shape, seed=s)[row : row + 1].expand(n, *shape)
                       for row, n in enumerate(counts)])
            for s in range(4)
        )  # fmt: skip
        weight = torch.tensor(weights, dtype=torch.float64)
        advantages = torch.stack([0.3 * weight, -0.1 * weight], dim=-1)[:, None]
        result = policy_loss(
            m, x, y, table.expand(len(m), -1), advantages, weights=weight, reference_output=ref,
            **kl,
        )  # fmt: skip
        return _means(result.metrics, ratio_norm=False)

    shared, separate = means([1, 1], [3.0, 1.0]), means([3, 1], [1.0] * 4)
    for name in ("policy/kl", "policy/policy"):
        assert shared[name] == pytest.approx(separate[name], rel=1e-12) and separate[name] != 0
    assert shared["policy/weight"] == 2.0
