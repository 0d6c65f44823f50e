"""DiffusionNFT and AWM in the trainer: the loss by hand, keys, old policy, ranks, resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_models import CPU, tiny_config, tiny_recipe

from dancegrpo_fast import checkpoint
from dancegrpo_fast.batching import Call, Item
from dancegrpo_fast.chains import chains, trained_at
from dancegrpo_fast.config import LossConfig, UserError, load_config
from dancegrpo_fast.losses.forward_process import (
    Noised,
    awm_call_loss,
    leaf_of_states,
    mixed,
    nft_call_loss,
    noised,
)
from dancegrpo_fast.models.family import evaluate
from dancegrpo_fast.ops import policy_loss
from dancegrpo_fast.ops.noise import NoiseKey, normal_batch
from dancegrpo_fast.roles import Role
from dancegrpo_fast.run import train
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.updating.forward_process import old_decay
from dancegrpo_fast.updating.policy_gradient import _means

CHAINS = {"rollout.tree.kind": "independent_roots", "rollout.noise_level": 0}
NFT = CHAINS | {"loss.kind": "nft", "loss.kl_weight": 0.1, "policy.train": "lora"}
AWM = CHAINS | {"loss.kind": "awm", "loss.old_weight": 1.0, "loss.clip_range": 0.5}
KINDS = {"nft": NFT, "awm": AWM}
SHAPE = (2, 1, 3, 5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


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


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in trainer.policy.trainable().items()}


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_samples_come_from_the_old_policy_which_follows(tmp_path, tiny_wan_folder, trained) -> None:
    overrides = NFT | {
        "policy.train": trained, "loss.old_decay_limit": 0.75, "loss.old_decay_rate": 1.0,
        "optimizer.learning_rate": 0.01,
    }  # fmt: skip
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, overrides), CPU)
    start, seen = weights_of(trainer), {}
    sample = trainer.sample

    def watched(*arguments, **options):
        drawn = sample(*arguments, **options)
        seen["samples"] = drawn.samples()
        return drawn

    trainer.sample = watched
    metrics = trainer.iteration()
    assert metrics["gate/applies"] == 0 and "gate/max_gap" not in metrics
    # The first update is at the old policy: branches are equal, and so p + (1 - p) of them.
    assert metrics["nft/positive"] == pytest.approx(metrics["nft/negative"], rel=1e-4)
    after, old = weights_of(trainer), trainer.policy.old
    assert any(not torch.equal(after[k], start[k]) for k in start)
    for name, value in old.items():  # One multiplication and one fused addition.
        expected = 0.75 * start[name] + 0.25 * after[name]
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-7)
    trainer.iteration()
    first = seen["samples"]

    # The second iteration's samples are those of the old weights after the first.
    again = Trainer(tiny_config(tmp_path, tiny_wan_folder, overrides), CPU)
    again.iteration()
    with again.policy.as_old():
        conditions = again.embeddings.conditions([p for _, p in again.draws.batch(1)])
        again.updater.sampling = lambda: torch.no_grad()  # Already in place.
        drawn = again.sample(again.plan(1), conditions)
    assert torch.equal(first, drawn.samples())
    with pytest.raises(AssertionError):
        plain = again.sample(again.plan(1), conditions)
        assert torch.equal(first, plain.samples())


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_the_sum_over_samples_and_points(tmp_path, tiny_wan_folder, kind) -> None:
    """The gradient of an iteration against one call for each (sample, point), by the trainer's own
    tables; batches of unequal sizes, several updates' leaves, a subset of points."""
    overrides = KINDS[kind] | {
        "loss.timestep_range": [1, 4], "loss.timestep_fraction": 0.67, "loss.micro_batch_size": 5,
        "optimizer.max_grad_norm": 1e9,
    }  # fmt: skip
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, overrides), CPU)
    seen = {}
    schedule, clip = trainer.schedule_updates, trainer.engine.clip_grad_norm
    sample = trainer.sample

    def scheduled(*arguments):
        seen["updates"] = schedule(*arguments)
        seen["advantages"] = arguments[2]
        return seen["updates"]

    def drawn(*arguments, **options):
        seen["drawn"], seen["conditions"] = sample(*arguments, **options), arguments[1]
        return seen["drawn"]

    def clipped(name):
        norm = clip(name)
        seen["gradients"] = {k: p.grad.clone() for k, p in trainer.policy.trainable().items()}
        return norm

    trainer.schedule_updates, trainer.engine.clip_grad_norm = scheduled, clipped
    trainer.sample = drawn
    start = weights_of(trainer)
    trainer.iteration()

    (update,) = seen["updates"]
    items = [item for call in update.calls for item in call.items]
    plan = seen["drawn"].plan
    assert update.divisor == len(items) == 2 * 4 * 2
    assert {plan.states[item.state].step for item in items} <= {1, 2, 3}
    with trainer.policy.replaced(start):
        for p in trainer.policy.trainable().values():
            p.grad = None
        leaf_of, key = leaf_of_states(plan), trainer.updater.key.fold_in(0)
        for item in items:
            batch = noised(
                Call("transformer", (item,)), seen["drawn"], leaf_of, trainer.family, key
            )
            g = leaf_of[item.state]
            advantage = seen["advantages"].values[item.prompt, g]
            assert batch.advantages.sum() == pytest.approx(float(advantage.sum()))
            module = trainer.policy.modules["transformer"]
            output = evaluate(
                trainer.family, module, plan, seen["conditions"], batch.places, batch.latents
            )
            common = {"divisor": 16.0, "advantage_clip": 5.0, "action_box": None}
            if kind == "nft":
                with torch.no_grad(), trainer.policy.reference() as untrained:
                    reference = evaluate(
                        trainer.family, untrained["transformer"], plan, seen["conditions"],
                        batch.places, batch.latents,
                    )  # fmt: skip
                result = nft_call_loss(
                    output, batch, trainer.config.loss, old_output=output.detach(),
                    reference_output=reference, **common,
                )  # fmt: skip
            else:
                result = awm_call_loss(
                    output, batch, trainer.config.loss, old_log_prob=None,
                    old_output=output.detach(), reference_output=None,
                    reward_weights=torch.ones(1), **common,
                )  # fmt: skip
            result.loss.backward()
        for name, parameter in trainer.policy.trainable().items():
            # Other batch compositions: float32 rounding of sums over 16 terms.
            found = seen["gradients"][name]
            scale = max(float(parameter.grad.abs().max()), 1e-6)
            assert float((found - parameter.grad).abs().max()) < 1e-4 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_whole_run(tmp_path, tiny_wan_folder, kind) -> None:
    """2N = N + N bit for bit, the old policy and a steered KL included."""
    overrides = KINDS[kind] | {
        "checkpoint.every": 1, "iterations": 4, "loss.updates": 2, "policy.ema_decay": 0.9,
        "loss.kl_weight": 0.1, "loss.kl_target": 1e-4, "loss.kl_horizon": 10.0,
    }  # fmt: skip

    def config(folder: str, **changes):
        return tiny_config(tmp_path / folder, tiny_wan_folder, overrides | changes)

    train(config("whole"))
    train(config("half", iterations=2))
    train(config("half"), resume=True)
    tensors = []
    for folder in ("whole", "half"):
        trainer = Trainer(config(folder), CPU)
        assert trainer.resume()
        assert trainer.updater.kl_average is not None
        found = checkpoint.collect(trainer.policy, trainer.engine.optimizers)
        state = trainer.updater.state()
        tensors.append(({k: v.clone() for k, v in found.items()}, state))
    (one, first), (two, second) = tensors
    assert first == second and first["kl_weight"] != 0.1
    assert {name.split(".")[0] for name in one} == {"weights", "optimizer", "ema", "old"}
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any(
        not torch.equal(one[k], one[k.replace("old.", "weights.", 1)])
        for k in one
        if k.startswith("old.")
    )


def test_a_steered_kl_goes_to_its_target(tmp_path, tiny_wan_folder) -> None:
    """The public controller's numbers, and its ends."""
    overrides = {"loss.kl_weight": 0.004, "loss.kl_target": 0.0025, "loss.kl_horizon": 80.0,
                 "loss.kl_range": [0.004, 0.006]}  # fmt: skip
    updater = Trainer(tiny_config(tmp_path, tiny_wan_folder, overrides), CPU).updater
    weight, average = 0.004, None
    for kl in (0.05, 0.001, 0.2, 0.2, 0.0, 0.0):
        average = kl if average is None else 0.8 * average + 0.2 * kl
        weight *= np.exp((average - 0.0025) / 0.0025 / 80)
        weight = min(max(weight, 0.004), 0.006)
        assert updater.steer(kl)["update/kl_weight"] == pytest.approx(weight, rel=1e-12)
    assert updater.steer(float("nan"))["update/kl_weight"] == pytest.approx(weight)
    assert updater.kl_average == pytest.approx(average)
    assert 0.004 <= updater.steer(1e30)["update/kl_weight"] <= 0.006


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


DEMO = [
    "rollout.noise_level=0", "rollout.tree={kind: independent_roots}", "rollout.steps=8",
    "rollout.group_size=16", "data.prompts_per_iteration=8", "iterations=12",
    "evaluation.every=null", "loss.kind=nft", "loss.timestep_fraction=0.375",
    "loss.old_decay_rate=1", "loss.old_decay_limit=0.5",
]  # fmt: skip


@pytest.mark.slow
def test_the_demo_learns(tmp_path, monkeypatch) -> None:
    """Minutes. Measured once: held-out reward 0.598 -> 0.637, paired gain 0.039, s.e. 0.006."""
    monkeypatch.chdir(Path(__file__).parents[1])
    train(load_config("recipes/demo.yaml", [f"output={tmp_path / 'run'}", *DEMO]))
    reward = json.loads((tmp_path / "run" / "summary.json").read_text())["reward"]
    assert reward["gain"] > 3 * reward["standard_error"] > 0


MISTAKES = [
    (["rollout.noise_level=0.3", "rollout.solver=multistep"], "rollout.solver = 'multistep': is "
     "deterministic; set rollout.noise_level to 0, or use euler"),
    (["loss.max_log_prob_gap=0.1"], "loss.max_log_prob_gap = 0.1: has no effect with loss.kind = "
     "'nft'; set that to policy_gradient, or leave it at 0.001"),
    (["loss.clip_range=0.1"], "loss.clip_range = 0.1: has no effect with loss.kind = 'nft'; set "
     "that to policy_gradient or awm, or leave it at 0.0001"),
    (["rollout.tree.kind=shared_root"], "rollout.tree.kind = 'shared_root': loss.kind nft draws "
     "single chains; use independent_roots"),
    (["model.guidance=4.5"], "model.guidance = 4.5: loss.kind nft trains the unguided velocity; "
     "use 1.0"),
    (["advantage.combine=loss"], "advantage.combine = 'loss': nft turns one advantage into a "
     "probability; use advantage"),
    (["loss.timestep_range=[3, 9]"], "loss.timestep_range = [3, 9]: must be [first, end) inside "
     "[0, 4]"),
    (["parallel.engine=deepspeed"], "parallel.engine = 'deepspeed': not verified with loss.kind "
     "nft; use fsdp or ddp"),
    (["loss.kind=awm", "loss.old_log_prob=rollout"], "loss.old_log_prob = 'rollout': a rollout "
     "knows no log-prob of awm; use recompute or on_policy"),
    (["loss.kind=awm", "loss.old_decay_limit=0.3"], "loss.old_decay_limit = 0.3: has no effect "
     "with loss.old_weight = 0"),
    (["loss.kl_horizon=80"], "loss.kl_horizon = 80: has no effect without loss.kl_target; give "
     "that a KL"),
    (["loss.kl_target=0.1"], "loss.kl_target = 0.1: needs loss.kl_weight above 0, from where the "
     "weight is steered"),
    (["loss.kl_target=0.1", "loss.kl_weight=2"], "loss.kl_weight = 2: with loss.kl_target it is "
     "where the weight begins: must lie in loss.kl_range = [0.0001, 1.0]"),
    (["rollout.solver=multistep", "rollout.final=ode"], "rollout.final = 'ode': has no effect with "
     "rollout.solver = 'multistep'; set that to euler, or leave it at 'x0'"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_settings_that_would_do_nothing_are_refused(tmp_path, overrides, said) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "model", CHAINS | {"loss.kind": "nft"})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    load_config(tmp_path / "r.yaml")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "r.yaml", overrides)
    assert str(caught.value).split("\n") == [f"override: {said}"]
