"""ReFL and DRaFT: gradients of rewards through the decoder and the last steps."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tiny_models import CPU, tiny_config, tiny_recipe
from tree_stand_ins import BOX, SCHEDULE, SHAPE, Family, Net, embeddings

from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.config import RunConfig, UserError, load_config
from dancegrpo_fast.losses.reward_gradient import reward_gradient, step_loss
from dancegrpo_fast.models.family import evaluate
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.rewards import SampleReward
from dancegrpo_fast.trainer import Trainer
from dancegrpo_fast.trajectories import Trajectories
from dancegrpo_fast.transitions import coefficient_table
from dancegrpo_fast.trees.chains import chains, cut_after, gradient_begin
from dancegrpo_fast.updating import Iteration
from dancegrpo_fast.updating.reward_gradient import (
    RewardUpdater,
    chain_update,
    differentiable_names,
)

DIRECT = {
    "loss.kind": "draft", "rollout.tree.kind": "independent_roots", "rollout.noise_level": 0,
    "rewards": [{"name": "colourfulness"}],
}  # fmt: skip
KEY = NoiseKey.from_seed(3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class SoftPixels(Family):
    """A family whose decoder is a smooth function of the latent."""

    def pixels(self, latents: torch.Tensor, vae: None) -> torch.Tensor:
        assert latents.shape[1:] == SHAPE
        flat = latents.flatten(1)[:, :12].reshape(-1, 1, 3, 2, 2)
        return torch.sigmoid(flat)

    @contextmanager
    def vae(self):
        yield None


class Curved(SampleReward):
    """A quadratic of the pixels that differs from sample to sample."""

    name, differentiable = "curved", True

    def score(self, samples):
        raise NotImplementedError

    def gradient_scores(self, samples):
        pixels = samples.videos.flatten(1)
        weights = torch.linspace(-1, 2, pixels.shape[1], dtype=pixels.dtype)
        return (weights * pixels).sum(1) - 0.3 * pixels.square().sum(1)


class Stub:
    """Stands in for engine and policy: plain backward, and no step."""

    def __init__(self, network: Net) -> None:
        self.network, self.calls = network, 0

    def call(self, name: str, last: bool):
        self.calls += 1
        return nullcontext(self.network)

    def backward(self, name: str, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm(self, name: str) -> float:
        return 1.0

    def step(self, name: str) -> None: ...
    def clear(self, name: str) -> None: ...
    def update_ema(self) -> None: ...


def hand_sized(tmp_path, box, **changes) -> SimpleNamespace:
    """Chains of five steps of a float64 network with two prompts, and their updater."""
    overrides = DIRECT | {
        "rollout.group_size": 3, "rollout.steps": 5, "loss.gradient_from": [2, 3],
        "loss.micro_batch_size": 4, "rewards": [{"name": "x.py:Curved", "weight": 0.7}],
    }  # fmt: skip
    config = tiny_config(tmp_path, tmp_path / "model", overrides | changes)
    plan = chains(config, SCHEDULE, 0, KEY)
    network, family = Net(0), SoftPixels(("net",) * plan.schedule.steps, box)
    generator = torch.Generator().manual_seed(1)
    table = coefficient_table(
        plan.transitions(dynamics="dance", level=0.3), dtype=torch.float64
    )
    owner = leaf_owners(2, 3, 1)
    leaves = [(int(p), int(g)) for p, g in np.argwhere(owner == 0)]
    drawn = Trajectories(plan, table, leaves)
    conditions = embeddings(2)
    for p, g in leaves:
        x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        for state in plan.ancestry(plan.leaves[g])[1:]:
            parent = plan.states[state].parent
            drawn.latents[p, parent] = x
            output = evaluate(family, network, plan, conditions, [(p, parent)], x[None])
            eps = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
            inside = tuple(slice(*side) for side in box) if box else ...
            moved = table[state, 0] * x + table[state, 1] * output[0].detach()
            moved = moved + table[state, 2] * eps
            x = x.clone()
            x[inside] = moved[inside]
        drawn.latents[p, state] = x
    stub = Stub(network)
    updater = RewardUpdater(config, family, stub, stub, CPU)  # type: ignore[arg-type]
    updater.use([Curved()])
    prompts = [Prompt("one"), Prompt("two")]
    given = Iteration(0, prompts, conditions, drawn, np.ones(1), None)
    return SimpleNamespace(**locals())


def through_the_graph(case, valid, limit) -> list[torch.Tensor]:
    """The gradient by one autograd graph through all trained steps and the decoder."""
    plan, drawn = case.plan, case.drawn
    total = torch.zeros((), dtype=torch.float64)
    inside = tuple(slice(*side) for side in case.box) if case.box else ...
    for p, g in np.argwhere(valid).tolist():
        way = plan.ancestry(plan.leaves[g])
        begin = next(i for i, s in enumerate(way) if plan.states[s].trained)
        x = drawn.latents[p, way[begin - 1]]
        for parent, state in zip(way[begin - 1 :], way[begin:], strict=False):
            output = evaluate(
                case.family, case.network, plan, case.conditions, [(p, parent)], x[None]
            )[0]
            a, b = drawn.coefficients[state, :2]
            mean = a * x + b * output
            new = x.clone()
            new[inside] = mean[inside]
            x = new + (drawn.latents[p, state] - new).detach()  # The noise that was drawn.
        scores = 0.7 * Curved().gradient_scores(
            SimpleNamespace(videos=case.family.pixels(x[None], None))
        )
        total = total + (-scores if limit is None else (limit - scores).clamp(min=0)).sum()
    return list(torch.autograd.grad(total / valid.sum(), list(case.network.parameters())))


@pytest.mark.parametrize(
    ("box", "changes"),
    [
        (None, {}),
        (BOX, {"loss.gradient_from": [0, 1]}),
        (BOX, {"rollout.noise_level": 0.3, "rollout.final": "sample"}),
        (None, {"loss.gradient_from": [4, 5], "loss.reward_limit": 2.0}),
        (None, {"loss.kind": "refl", "loss.micro_batch_size": 1}),
    ],
    ids=["three steps", "all steps", "stochastic", "one step and a limit", "refl"],
)
def test_step_by_step_is_the_gradient_through_the_whole_graph(tmp_path, box, changes) -> None:
    """In float64, so 1e-10 is rounding; a sample whose reward failed takes no part."""
    case = hand_sized(tmp_path, box, **changes)
    valid = np.array([[True, True, False], [True, True, True]])
    updates = case.updater.schedule(case.plan, valid, case.owner)
    metrics = case.updater.run(updates, case.given)
    limit = changes.get("loss.reward_limit")
    expected = through_the_graph(case, valid, limit)
    for parameter, gradient in zip(case.network.parameters(), expected, strict=True):
        assert gradient.abs().max() > 1e-6
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)
    trained = {s.step for s in case.plan.states if s.trained}
    kind = changes.get("loss.kind", "draft")
    assert metrics[f"{kind}/steps"] == len(trained) and metrics["gate/applies"] == 0
    size = case.config.loss.micro_batch_size
    assert case.stub.calls == len(trained) * -(-5 // size)


def test_calls_of_zero_weight_add_nothing(tmp_path) -> None:
    """A rank with one sample, where another has two: its gradient is that of its own sample."""
    case = hand_sized(tmp_path, None)
    owner, everyone = leaf_owners(2, 3, 4), np.ones((2, 3), bool)
    updates = chain_update(
        case.plan, everyone, owner=owner, rank=2, modules=["net"] * 5, kinds=[0, 0],
        micro_batch_size=1,
    )  # fmt: skip
    assert sum(item.weights[0] == 0 for call in updates[0].calls for item in call.items) == 3
    case.updater.run(updates, case.given)
    expected = through_the_graph(case, owner == 2, None)
    for parameter, gradient in zip(case.network.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient / 6, rtol=1e-10, atol=1e-14)


def test_gradients_are_let_go_of_behind_the_front(tmp_path, monkeypatch) -> None:
    """Five samples through five steps: never more than one latent-sized gradient a sample."""
    case, held = hand_sized(tmp_path, None, **{"loss.gradient_from": [0, 1]}), []

    def counted(call, drawn, conditions, family, module, gradients, *, first):
        held.append(len(gradients))
        return step_loss(call, drawn, conditions, family, module, gradients, first=first)

    monkeypatch.setattr("dancegrpo_fast.updating.reward_gradient.step_loss", counted)
    valid = np.array([[True, True, False], [True, True, True]])
    updates = case.updater.schedule(case.plan, valid, case.owner)
    case.updater.run(updates, case.given)
    assert len(held) == 10 and max(held) == 5


def test_a_limit_reached_has_no_gradient() -> None:
    x = torch.randn((2, *SHAPE), dtype=torch.float64)
    family = SoftPixels((), None)
    low, high = (
        reward_gradient(x, family, None, lambda v: v.flatten(1).sum(1), limit=limit)
        for limit in (-100.0, 100.0)
    )
    assert not low.gradient.any() and not low.loss.any()
    pixels = family.pixels(x, None)
    slope = -(pixels * (1 - pixels)).flatten(1)  # d(limit - sum sigmoid)/dx
    assert torch.allclose(high.gradient.flatten(1)[:, :12], slope, rtol=1e-12)
    assert torch.allclose(high.loss, 100 - pixels.flatten(1).sum(1))


def test_refl_is_draft_on_the_grid_that_ends_there(tmp_path) -> None:
    config = tiny_config(tmp_path, tmp_path / "m", DIRECT | {"loss.kind": "refl"})
    config = config.model_copy(
        update={"loss": config.loss.model_copy(update={"gradient_from": (1, 3)}),
                "rollout": config.rollout.model_copy(update={"steps": 5})}
    )  # fmt: skip
    begins = [gradient_begin(config, i, KEY) for i in range(40)]
    assert set(begins) == {1, 2}
    for i in range(3):
        plan = chains(config, SCHEDULE, i, KEY)
        chain = [plan.states[s] for s in plan.ancestry(plan.leaves[0])]
        assert [s.kind for s in chain] == ["root", *["ode"] * begins[i], "x0"]
        assert [s.trained for s in chain] == [False] * (begins[i] + 1) + [True]
        assert plan.schedule == cut_after(SCHEDULE, begins[i])
        assert plan.schedule.sigmas == (*SCHEDULE.sigmas[: begins[i] + 1], 0.0)


def test_every_rank_makes_the_same_calls(tmp_path) -> None:
    """Last step first; a rank with fewer samples repeats one with weight 0, as does one whose
    samples all failed; unequal kinds of prompts stay apart."""
    case = hand_sized(tmp_path, None)
    owner = leaf_owners(2, 3, 4)  # 2, 2, 1 and 1 samples.
    valid = np.array([[True, True, True], [True, True, False]])
    seen, weights = [], 0.0
    for rank in range(4):
        (update,) = chain_update(
            case.plan, valid, owner=owner, rank=rank, modules=["a", "a", "b", "b", "b"],
            kinds=[0, 1], micro_batch_size=2,
        )  # fmt: skip
        steps = [{case.plan.states[i.state].step for i in call.items} for call in update.calls]
        seen.append([(call.module, *step) for call, step in zip(update.calls, steps, strict=True)])
        weights += sum(float(i.weights[0]) for call in update.calls for i in call.items)
        assert update.divisor == 5 and update.modules == ("b",)
        for call in update.calls:
            assert len({(item.prompt, ) for item in call.items}) == 1
    # The second rank's two samples are of two prompts: two calls at each step, on all ranks.
    assert seen[0] == [("b", s) for s in (4, 4, 3, 3, 2, 2)]
    assert all(other == seen[0] for other in seen[1:])
    assert weights == 5 * 3


def weights_after(tmp_path, model, overrides, iterations=1) -> dict[str, torch.Tensor]:
    trainer = Trainer(tiny_config(tmp_path, model, overrides), CPU)
    for _ in range(iterations):
        trainer.iteration()
    return {k: p.detach().clone() for k, p in trainer.policy.trainable().items()}


def test_draft_1_is_refl_at_the_last_step(tmp_path, tiny_wan_folder) -> None:
    """Bit for bit, weights after two iterations."""
    last = DIRECT | {"loss.gradient_from": [3, 4]}
    one = weights_after(tmp_path, tiny_wan_folder, last, 2)
    two = weights_after(tmp_path, tiny_wan_folder, last | {"loss.kind": "refl"}, 2)
    three = weights_after(tmp_path, tiny_wan_folder, DIRECT, 2)  # The default of draft.
    assert all(torch.equal(one[k], two[k]) and torch.equal(one[k], three[k]) for k in one)


def test_resumed_run_is_the_whole_run(tmp_path, tiny_wan_folder) -> None:
    """Bit for bit, with a step drawn in each iteration."""
    overrides = DIRECT | {"loss.gradient_from": [0, 4]}
    whole = weights_after(tmp_path, tiny_wan_folder, overrides, 3)
    config = tiny_config(tmp_path, tiny_wan_folder, overrides)
    half = Trainer(config, CPU)
    half.iteration()
    half.save()
    half.saver.finish()
    rest = Trainer(config, CPU)
    assert rest.resume() and rest.done == 1
    firsts = [rest.iteration()["draft/first_step"] for _ in range(2)]
    assert len(set(firsts)) == 2
    assert all(torch.equal(p, whole[k]) for k, p in rest.policy.trainable().items())


def test_a_wan_pipeline_learns_what_is_differentiated(tmp_path, tiny_wan_folder) -> None:
    """The gradient of the whole graph of real classes, and a reward that rises with it."""
    overrides = DIRECT | {
        "loss.gradient_from": [1, 2], "loss.micro_batch_size": 3, "optimizer.max_grad_norm": 1e9,
        "optimizer.learning_rate": 3e-3,
    }  # fmt: skip
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder, overrides), CPU)
    seen = {}
    clip, sample = trainer.engine.clip_grad_norm, trainer.sample

    def drawn(*arguments, **options):
        seen["drawn"], seen["conditions"] = sample(*arguments, **options), arguments[1]
        return seen["drawn"]

    def clipped(name):
        seen["gradients"] = {k: p.grad.clone() for k, p in trainer.policy.trainable().items()}
        return clip(name)

    trainer.sample, trainer.engine.clip_grad_norm = drawn, clipped
    start = {k: p.detach().clone() for k, p in trainer.policy.trainable().items()}
    first = trainer.iteration()
    assert first["draft/loss"] == pytest.approx(-first["reward/mean"], abs=1e-5)

    found, plan = seen["drawn"], seen["drawn"].plan
    module = trainer.policy.modules["transformer"]
    with trainer.policy.replaced(start), trainer.family.vae() as vae:
        places = [(p, plan.ancestry(plan.leaves[g])[1]) for p, g in found.leaves]
        x = found.stack(places)
        for _ in range(3):
            output = evaluate(trainer.family, module, plan, seen["conditions"], places, x)
            places = [(p, plan.children[s][0]) for p, s in places]
            a, b = found.edge_coefficients(places)[:, :2].unbind(1)
            x = a.view(-1, 1, 1, 1, 1) * x + b.view(-1, 1, 1, 1, 1) * output
        pixels = trainer.family.pixels(x, vae)
        (reward,) = trainer.rewards
        scores = reward.score_images(pixels.flatten(0, 1), [""] * (8 * 5)).reshape(8, 5).mean(1)
        trainable = trainer.policy.trainable()
        gradients = torch.autograd.grad(-scores.mean(), list(trainable.values()))
    largest = max(float(g.abs().max()) for g in gradients)
    for name, gradient in zip(trainable, gradients, strict=True):
        # Other batch compositions and a re-run of each step: float32 rounding, through a VAE.
        assert float((seen["gradients"][name] - gradient).abs().max()) < 1e-3 * largest, name
    for _ in range(5):
        last = trainer.iteration()
    # Means of eight samples: over four standard errors.
    assert last["reward/mean"] > first["reward/mean"] + 1.5 * first["reward/std_in_group"]


def test_a_reward_without_a_gradient_is_refused_by_name(
    tmp_path, tiny_wan_folder, monkeypatch
) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("networks were loaded before the reward was refused")

    names = differentiable_names()
    assert {"colourfulness", "aesthetic", "imagereward"} & set(names) and "ocr" not in names
    for reward in ({"name": "jpeg_compressibility"}, {"name": "colourfulness", "threshold": 0.5}):
        config = tiny_config(tmp_path, tiny_wan_folder, DIRECT | {"rewards": [reward]})
        with monkeypatch.context() as patch:
            patch.setattr("dancegrpo_fast.trainer.assemble", loaded)
            with pytest.raises(UserError, match=r"rewards.0.name = .*no gradient.*colourfulness"):
                Trainer(config, CPU)
    logged = [{"name": "colourfulness"}, {"name": "jpeg_compressibility", "weight": 0}]
    assert Trainer(tiny_config(tmp_path, tiny_wan_folder, DIRECT | {"rewards": logged}), CPU)


MISTAKES = [
    ("loss.updates=2", "= 2: has no effect with loss.kind = 'draft'; set that to policy_gradient "
     "or nft or awm, or leave it at 1"),
    ("advantage.best_of_n=2", "= 2: has no effect with loss.kind = 'draft'; set that to "
     "policy_gradient or nft or awm, or leave it at null"),
    ("loss.gradient_from=[3, 6]", "= [3, 6]: must be [first, end) inside [0, 4]"),
    ("loss.beta=0.1", "= 0.1: has no effect with loss.kind = 'draft'; set that to nft, or leave it "
     "at 1.0"),
    ("loss.kl_weight=0.1", "= 0.1: has no effect with loss.kind = 'draft'; set that to "
     "policy_gradient or nft or awm, or leave it at 0.0"),
    ("parallel.sp=2", "= 2: not verified with loss.kind draft; use 1"),
    ("data.skip_zero_variance=1", "= 1: has no effect with loss.kind = 'draft'; set that to "
     "policy_gradient or nft or awm, or leave it at null"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said"), MISTAKES, ids=[o for o, _ in MISTAKES])
def test_settings_that_would_do_nothing_are_refused(tmp_path, override, said) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path, tmp_path / "m", DIRECT)))
    assert isinstance(load_config(tmp_path / "r.yaml", ["rollout.group_size=1"]), RunConfig)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "r.yaml", [override])
    assert str(caught.value) == f"override: {override.partition('=')[0]} {said}"
