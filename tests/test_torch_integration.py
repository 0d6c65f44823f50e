"""The ops inside torch: autograd, custom operators, torch.compile, checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from ops_cases import DIMS, F64, Ragged, draw_keys, each_implementation, randn, table  # noqa: F401
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dancegrpo_fast.ops import (
    awm_loss,
    nft_loss,
    policy_loss,
    sample_transition,
    transition_log_prob,
)

BOX = ((0, 3), (1, 2), (0, 5), (2, 6))
FLAT_BOX = [0, 3, 1, 2, 0, 5, 2, 6]


# On a GPU "auto" is Triton, in float32.
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


class Batch(Ragged):
    """Ragged, and what the forward losses take besides; float64, on a GPU float32."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(rewards=2)
        self.t = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0], dtype=F64)
        self.target = randn(5, *DIMS, seed=8)
        self.one_each = randn(5, seed=9)
        self.per_child = randn(30, seed=4)
        self.keys = draw_keys(30)
        if device != "cpu":
            for name, tensor in vars(self).items():
                narrow = tensor.float() if tensor.is_floating_point() else tensor
                setattr(self, name, narrow.detach().to(device))
            self.m.requires_grad_()

    def scalars(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Every differentiable op as m -> scalar."""
        given = {"child_offsets": self.offsets, "action_box": BOX}
        return {
            "policy_loss": lambda m: policy_loss(
                m, self.x, self.y, self.rows, self.parts, old_log_prob=self.old,
                weights=self.weights, reward_weights=self.u, clip_range=(1e-3, 2e-3),
                kl_weight=0.04, reference_output=self.m_ref, **given,
            ).loss,
            "ratio_norm": lambda m: policy_loss(
                m, self.x, self.y, self.rows, self.parts, old_log_prob=self.old, divisor=9.0,
                clip_range=0.5, old_output=self.m_ref, **given,
            ).loss,
            "transition_log_prob": lambda m: (
                transition_log_prob(m, self.x, self.y, self.rows, **given) * self.per_child
            ).sum(),
            "nft_loss": lambda m: nft_loss(
                m, self.x, self.target, self.t, self.one_each, old_output=self.m_ref, beta=0.3,
                kl_weight=0.1, reference_output=self.x, action_box=BOX,
            ).loss,
            "awm_loss": lambda m: awm_loss(
                m, self.x, self.target, self.one_each, weighting=self.t + 0.1, form="ghuber",
                ema_output=self.m_ref, ema_weight=0.5, action_box=BOX,
            ).loss,
        }  # fmt: skip


SCALARS = tuple(Batch().scalars())


def value_and_gradient(call: Callable[[Tensor], Tensor], m: Tensor) -> tuple[Tensor, Tensor]:
    value = call(m)
    return value.detach(), torch.autograd.grad(-2.5 * value, m)[0]


# ------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SCALARS)
def test_compiles_without_a_break_to_the_same_bits(
    name: str, device: str, implementation: str
) -> None:
    batch, graphs = Batch(device), []
    call = batch.scalars()[name]
    expected = value_and_gradient(call, batch.m)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    ours = value_and_gradient(torch.compile(call, fullgraph=True, backend=backend), batch.m)
    assert all(map(torch.equal, ours, expected))
    assert len(graphs) == 1
    operators = [target for target in graphs[0] if target.startswith("dancegrpo_fast.")]
    assert bool(operators) == (implementation == "native" or device == "cuda")


def test_sampling_compiles_to_the_same_bits() -> None:
    batch, keys = Batch(), draw_keys(30)

    def call(m: Tensor) -> tuple[Tensor, Tensor]:
        return sample_transition(
            m, batch.x, batch.rows, noise=noise, child_offsets=batch.offsets, action_box=BOX,
            latent_dtype=torch.bfloat16,
        )  # fmt: skip

    noise = sample_transition(
        torch.zeros(30, *DIMS), torch.zeros(30, *DIMS), table(5).float().expand(30, 8), keys=keys
    ).next_latents
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(batch.m)
    assert all(map(torch.equal, compiled, call(batch.m)))
    assert not compiled[1].requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_by_keys_compiles(device: str, implementation: str) -> None:
    """The reference draws in NumPy, which cannot be traced; the operator can."""
    if implementation == "reference":
        pytest.skip("the reference draws in NumPy")
    batch = Batch(device)

    def call(m: Tensor) -> tuple[Tensor, Tensor]:
        layout = {"keys": batch.keys, "child_offsets": batch.offsets}
        return sample_transition(m, batch.x, batch.rows, **layout)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(batch.m)
    assert all(map(torch.equal, compiled, call(batch.m)))


def test_one_compilation_serves_every_size(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference's grid of sums is compiled for one size")

    def call(m: Tensor, x: Tensor, y: Tensor, rows: Tensor, advantages: Tensor) -> Tensor:
        return policy_loss(m, x, y, rows, advantages, divisor=4.0).loss

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for states, size in ((3, 50), (4, 60), (7, 5000)):
            tensors = [randn(states, size, seed=s, dtype=torch.float32) for s in range(3)]
            rows, advantages = table(*range(2, 2 + states)).float(), randn(states).float()
            tensors[0].requires_grad_()
            run = functools.partial(value_and_gradient, m=tensors[0])
            ours = run(lambda m: compiled(m, *tensors[1:], rows, advantages))  # noqa: B023
            expected = run(lambda m: call(m, *tensors[1:], rows, advantages))  # noqa: B023
            assert all(map(torch.equal, ours, expected))


@pytest.mark.skipif(
    getattr(torch._dynamo.config, "specialize_float", True), reason="this torch compiles numbers in"
)
@pytest.mark.parametrize("name", ["policy_loss", "nft_loss"])
def test_one_compilation_serves_every_divisor(name: str) -> None:
    """It is another one in every update."""
    batch, compilations = Batch(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(m: Tensor, divisor: float) -> Tensor:
        if name == "policy_loss":
            return batch.call(divisor=divisor).loss
        return nft_loss(
            m, batch.x, batch.target, batch.t, batch.one_each, old_output=batch.m_ref,
            divisor=divisor,
        ).loss  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for divisor in (3.0, 4.0, 6.5, 11.0, 50.0):
        assert torch.equal(compiled(batch.m, divisor), call(batch.m, divisor))
    assert len(compilations) == 2  # The first number is taken for a constant.


def test_a_bad_divisor_is_refused_while_compiling(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference looks at no number that may vary")
    batch = Batch()
    torch._dynamo.reset()
    compiled = torch.compile(batch.call, backend="aot_eager")
    with pytest.raises(ValueError, match="divisor = -1.0: must be a positive number"):
        compiled(divisor=-1.0)


# ------------------------------------------------------------------ the operators


def operator_inputs(device: str = "cpu") -> dict[str, tuple[object, ...]]:
    batch = Batch(device)
    m, rest = batch.m, (batch.x, batch.y, batch.rows)
    keys, offsets = batch.keys, batch.offsets
    narrow = batch.x.to(torch.bfloat16).transpose(2, 4)
    return {
        "policy_loss": (
            m, *rest, batch.parts, batch.old, batch.weights, offsets, batch.u, batch.m_ref, None,
            1e-3, 2e-3, None, 0.04, FLAT_BOX, 1.0, None,
        ),
        "policy_loss on policy, narrow": (
            narrow.detach().requires_grad_(), narrow, narrow, batch.rows[:5],
            batch.one_each, None, None, None, None, None, None,
            1e-3, 2e-3, torch.tensor(3.0, dtype=F64), 0.0, None, 1.0, None,
        ),
        "transition_log_prob": (m, *rest, offsets, None),
        "nft_loss": (
            m, batch.x, batch.target, batch.t, batch.one_each, None, batch.x, batch.m_ref,
            0.3, 5.0, None, 0.1, 1e-5, FLAT_BOX,
        ),
        # These two have no gradient of their own.
        "sample_transition": (
            m.detach(), batch.x, batch.rows, keys, None, offsets, FLAT_BOX, torch.bfloat16,
        ),
        "transition_gradient": (
            batch.per_child, batch.rows[:, :3], m.detach(), *rest, offsets,
            batch.m_ref, batch.m_ref, FLAT_BOX,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", operator_inputs())
def test_opcheck(name: str, device: str, implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference is no operator")
    operator = getattr(torch.ops.dancegrpo_fast, name.partition(" ")[0]).default
    torch.library.opcheck(operator, operator_inputs(device)[name])


# ------------------------------------------------------------------ autograd


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", SCALARS)
def test_checkpointing_gives_the_same_bits(name: str, reentrant: bool, device: str) -> None:
    batch = Batch(device)
    call = batch.scalars()[name]
    weight = randn(DIMS[-1], DIMS[-1], seed=3).to(batch.x).requires_grad_()

    def network(x: Tensor) -> Tensor:
        return call((x @ weight).tanh())

    plain = network(batch.m)
    expected = torch.autograd.grad(plain, (batch.m, weight))
    saved = checkpoint(network, batch.m, use_reentrant=reentrant)
    batch.m.grad = weight.grad = None
    saved.backward()
    assert torch.equal(saved, plain)
    assert torch.equal(batch.m.grad, expected[0]) and torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("name", SCALARS)
def test_nothing_of_latent_size_is_kept(name: str, implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("autograd keeps what the reference computes")
    batch = Batch()
    given = {t.untyped_storage().data_ptr() for t in vars(batch).values() if isinstance(t, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch.scalars()[name](batch.m)
    new = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert len(kept) > 3 and all(t.numel() <= 30 * 8 for t in new), [t.shape for t in new]


def test_only_the_loss_is_differentiable_and_only_where_asked_for() -> None:
    batch = Batch()
    out = batch.call()
    assert out.loss.requires_grad and not out.log_prob.requires_grad
    assert not out.metrics.requires_grad
    with torch.no_grad():
        assert not batch.call().loss.requires_grad
    batch.m = batch.m.detach()
    quiet = batch.call()
    assert not quiet.loss.requires_grad and torch.equal(quiet.loss, out.loss.detach())


def test_a_second_derivative_is_refused(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference has one")
    batch = Batch()
    for call in batch.scalars().values():
        (gradient,) = torch.autograd.grad(call(batch.m), batch.m, create_graph=True)
        assert torch.equal(gradient, torch.autograd.grad(call(batch.m), batch.m)[0])
        with pytest.raises(RuntimeError, match="no second derivative: use implementation='ref"):
            (call(batch.m) + (gradient**2).sum()).backward()


def test_inputs_changed_before_backward_are_noticed(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference keeps what it computed from them")
    batch = Batch()
    loss = batch.call().loss
    batch.y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    """The smallest float16 is 6e-8: the loss's scale must enter before the rounding."""
    m, x = randn(2, 4000).half().requires_grad_(), randn(2, 4000, seed=1).half()
    rows = table(3, 9).float()
    y = sample_transition(m, x, rows, keys=draw_keys(2)).next_latents
    wide = m.detach().float().requires_grad_()
    gradients = []
    for leaf, scale in ((m, 1.0), (m, 2.0**16), (wide, 1.0), (m, 2.0**40)):
        loss = policy_loss(leaf, x, y, rows, torch.tensor([1e-3, -1e-3])).loss
        gradients.append(torch.autograd.grad(loss * scale, leaf)[0])
    plain, scaled, exact, overflown = gradients
    assert (plain == 0).float().mean() > 0.2, "the comparison has no power"
    assert torch.equal(scaled, (exact * 2.0**16).half())
    assert torch.isinf(overflown).any()


def test_autocast_and_inference_mode_change_nothing() -> None:
    batch = Batch()
    expected = {name: call(batch.m) for name, call in batch.scalars().items()}
    for name, call in batch.scalars().items():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(batch.m), expected[name])
        with torch.inference_mode():
            assert torch.equal(call(batch.m), expected[name])


@pytest.mark.parametrize("name", SCALARS)
def test_what_a_rollout_in_inference_mode_made_can_be_trained_on(name: str) -> None:
    batch, plain = Batch(), Batch()
    with torch.inference_mode():
        for key, tensor in vars(batch).items():
            if key not in ("m", "per_child"):  # per_child is the test's own factor
                setattr(batch, key, tensor.clone())
    found = value_and_gradient(batch.scalars()[name], batch.m)
    expected = value_and_gradient(plain.scalars()[name], plain.m)
    assert batch.x.is_inference() and all(map(torch.equal, found, expected))
