"""Blocks as CUDA graphs: what is refused, and that wrong replays are found. Graphs need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CPU, tiny_config

from dancegrpo_fast.config import ParallelConfig, UserError
from dancegrpo_fast.parallel.activations import prepare_blocks
from dancegrpo_fast.parallel.graphs import _CHECKED, Graphs, check_graphs
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.trainer import Trainer

GPU = World(0, 1, torch.device("cuda"))


def test_a_cpu_is_refused_by_name(tmp_path, tiny_wan_folder):
    config = tiny_config(tmp_path, tiny_wan_folder, {"parallel.compile": "graphs"})
    with pytest.raises(UserError, match=r"^parallel.compile = 'graphs': CUDA graphs need a GPU"):
        Trainer(config, CPU)


@pytest.mark.parametrize(
    ("changes", "world", "reason"),
    [
        ({}, World(0, 2, torch.device("cuda")), "not verified on several processes, here 2"),
        ({"checkpointing": "full"}, GPU, "parallel.checkpointing = none"),
        ({"offload_activations": True}, GPU, "offload_activations = false"),
    ],
)
def test_what_graphs_cannot_do_is_refused(changes, world, reason):
    with pytest.raises(UserError, match=reason):
        check_graphs(ParallelConfig(compile="graphs", **changes), world)
    check_graphs(ParallelConfig(compile="graphs"), GPU)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ self.weight


class Network(torch.nn.Module):
    """A compiled block, and what lies outside."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.out = Block(), torch.nn.Linear(4, 4)
        torch._dynamo.reset()
        self.block.compile(backend=backend)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.out(self.block(hidden_states)),)


def replaying(fresh: int, *, of: str) -> Any:
    """A backend whose results are those of the last of `fresh` calls: of its inputs or weights."""

    def backend(graph: Any, _: Any) -> Any:
        seen: list[Any] = []

        def run(*inputs: torch.Tensor) -> Any:
            if len(seen) < fresh:
                seen.append([tensor.detach().clone() for tensor in inputs])
            weights = [isinstance(tensor, torch.nn.Parameter) for tensor in inputs]
            stale = [
                old if weight is (of == "weights") else new
                for new, old, weight in zip(inputs, seen[-1], weights, strict=True)
            ]
            return graph(*stale)

        return run

    return backend


@torch.no_grad()
def test_replays_of_old_inputs_are_found():
    network, graphs = Network(replaying(2, of="inputs")), Graphs()
    graphs.watch(network, torch.float32)
    for _ in range(2):
        network(hidden_states=torch.randn(3, 4))
    with pytest.raises(UserError, match=r"differs from one without graphs by .*0\.001 is allowed"):
        network(hidden_states=torch.randn(3, 4))


@torch.no_grad()
def test_replays_of_old_weights_are_found_after_a_step():
    network, graphs = Network(replaying(1, of="weights")), Graphs()
    graphs.watch(network, torch.float32)
    for _ in range(2 * _CHECKED):
        network(hidden_states=torch.randn(3, 4))
    network.block.weight += 1.0
    network(hidden_states=torch.randn(3, 4))  # Nothing is compared any more, until
    graphs.stepped()
    with pytest.raises(UserError, match="differs"):
        network(hidden_states=torch.randn(3, 4))


@torch.no_grad()
def test_right_replays_pass():
    network, graphs = Network("eager"), Graphs()
    graphs.watch(network, torch.float32)
    for _ in range(_CHECKED + 1):
        network(hidden_states=torch.randn(3, 4))
    with torch.enable_grad():
        network(hidden_states=torch.randn(3, 4))


@torch.no_grad()
def test_a_sample_that_failed_is_no_difference():
    """The plain forward is NaN there, too; a NaN of the replay alone is one."""
    network, graphs = Network("eager"), Graphs()
    graphs.watch(network, torch.float32)
    inputs = torch.randn(3, 4)
    inputs[1] = torch.nan
    network(hidden_states=inputs)
    network(hidden_states=torch.full((3, 4), torch.nan))
    network, graphs = Network(replaying(1, of="inputs")), Graphs()
    graphs.watch(network, torch.float32)
    network.block(inputs)
    with pytest.raises(UserError, match="differs"):
        network(hidden_states=torch.randn(3, 4))


class HandsOverItsBuffer(torch.autograd.Function):
    """x * weight, whose gradient of the weight stands in the same memory every time."""

    buffer = torch.zeros(4)

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        buffer = HandsOverItsBuffer.buffer
        buffer.copy_(upstream[0] * ctx.saved_tensors[0])
        return buffer.detach(), None  # A tensor of its own on that memory, as a replay's is.


@pytest.mark.parametrize("copied", [False, True])
def test_gradients_are_copied_from_a_replays_memory(copied):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(4))
    graphs = Graphs()
    if copied:
        graphs.keep_gradients(module)
    for _ in range(2):  # Two updates: the second begins with no gradient again.
        for value in (1.0, 2.0, 4.0):
            HandsOverItsBuffer.apply(module.weight, torch.full((4,), value)).sum().backward()
        right = torch.equal(module.weight.grad, torch.full((4,), 7.0))
        assert right is copied, "without copies the sum would hold the last twice"
        module.weight.grad = None
        graphs.cleared()


@torch.no_grad()
def test_a_generation_begins_with_each_forward_but_inside_a_pending_backward(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    network, graphs = Network("eager"), Graphs()
    graphs.watch(network, torch.float32)
    for _ in range(2):
        network(hidden_states=torch.randn(3, 4))
    assert len(begun) == 2, "a comparison is none"
    with graphs.training():
        for _ in range(3):
            network(hidden_states=torch.randn(3, 4))
    assert len(begun) == 3


def test_compiled_blocks_of_many_kinds_of_calls_stay_compiled(monkeypatch):
    """torch runs what is new uncompiled once a class has eight graphs."""
    graphs: list[Any] = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    network, compiling = torch.nn.Module(), torch.nn.Module.compile
    network.blocks = torch.nn.ModuleList(Block() for _ in range(2))
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode=None: compiling(self, backend=counted)
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        prepare_blocks(network, ParallelConfig(compile=True, checkpointing="none"), ("blocks",))
        for axes in range(12):
            for block in network.blocks:
                block(torch.randn(*[1] * axes, 2, 4))
    assert len(graphs) == 12
