"""How the networks' weights and gradients are spread over processes.

Every engine sums gradients and never averages: the loss is already divided by the update's global
divisor, so the sum is the gradient of the whole update on any mesh. Under sequence parallelism each
rank holds a part of every gradient, and the same sum completes it.

An engine is used in this order: `shard` while the networks are on the meta device, `ready` when
their weights are there, then `gathered`, `call`, `backward` and `step` in every iteration.
"""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the classes.
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dancegrpo_fast.config import OptimizerConfig, ParallelConfig
from dancegrpo_fast.parallel.activations import kept_activations
from dancegrpo_fast.parallel.graphs import Graphs
from dancegrpo_fast.parallel.world import World


class Engine(ABC):
    """Named networks, their optimizers, and the processes they are spread over.

    Attributes:
        optimizers: One AdamW per network, so that a network with nothing to train is not stepped.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        world: World,
    ) -> None:
        self.modules: dict[str, Any] = dict(modules)
        self.parallel, self.settings, self.world = parallel, optimizer, world
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def shard(  # noqa: B027 (nothing to spread is a fine way to do it)
        self, module: nn.Module, *, blocks: tuple[str, ...], dtype: torch.dtype
    ) -> None:
        """Spread a network's parameters, before it has weights.

        Args:
            module: On the meta device, its adapters added.
            blocks: Names of its lists of blocks.
            dtype: Of the arithmetic.
        """

    def ready(self) -> None:
        """Make the optimizers; every network has its weights."""
        for name, module in self.modules.items():
            self.optimizers[name] = adamw(module, self.settings, fused=True)

    @contextmanager
    def gathered(self) -> Iterator[Mapping[str, nn.Module]]:
        """The networks for calls without gradients; ranks may make unequal numbers of calls.

        Every rank asks for the networks in the same order.
        """
        yield self.modules

    @contextmanager
    def by_forward(self) -> Iterator[Mapping[str, nn.Module]]:
        """Networks whose weights are gathered in every forward without gradients, if at all."""
        yield self.modules

    @property
    def rollout_calls_agree(self) -> bool:
        """Whether every rank must make the same calls in a rollout: each call gathers weights."""
        return False

    @contextmanager
    @abstractmethod
    def call(self, name: str, last: bool) -> Iterator[nn.Module]:
        """A network for one forward and backward; `last` says whether it is its last of the update.

        Every rank makes the same calls in the same order.
        """

    def backward(self, name: str, loss: Tensor) -> None:
        """Add the loss's gradient to what this update has so far."""
        loss.backward()

    def sum_gradients(self, name: str) -> None:
        """Sum over processes what backwards of forwards outside of `call` left here."""
        raise AssertionError(f"{type(self).__name__} does not reuse forwards")

    @torch.no_grad()
    def clip_grad_norm(self, name: str) -> float:
        """Scale a network's gradients to `optimizer.max_grad_norm`.

        Returns the norm before, equal on all ranks.
        """
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.modules[name].parameters(), limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, name: str) -> None:
        """One optimizer step of a network with its clipped gradients."""
        self.optimizers[name].step()

    def clear(self, name: str) -> None:
        """Drop a network's gradients."""
        self.optimizers[name].zero_grad(set_to_none=True)


def adamw(
    module: nn.Module, settings: OptimizerConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW over what is trained in a network.

    Args:
        module: The network.
        settings: The recipe's.
        fused: In one kernel, which reads and writes each number once and makes no temporary
            tensors. ZeRO replaces the parameters by slices of its own, maybe on another device.
    """
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


class Replicated(Engine):
    """Every process holds the whole network (DDP); alone, nothing at all."""

    graphs: Graphs | None = None

    def shard(self, module: nn.Module, *, blocks: tuple[str, ...], dtype: torch.dtype) -> None:
        if self.parallel.compile == "graphs":
            self.graphs = self.graphs or Graphs()
            self.graphs.watch(module, dtype)

    def ready(self) -> None:
        super().ready()
        if self.graphs:
            for module in self.modules.values():
                self.graphs.keep_gradients(module)
        self._wrapped: dict[str, nn.Module] = dict(self.modules)
        if self.world.size > 1:
            device = self.world.device
            for name, module in self.modules.items():
                wrapped = DistributedDataParallel(
                    module,
                    device_ids=[device] if device.type == "cuda" else None,
                    # Qwen-Image's last block computes text features that nothing reads.
                    find_unused_parameters=True,
                    # Constant tables. In a forward that reused ones leave to one process alone
                    # (`reused`: a row that is not finite) nobody would answer.
                    broadcast_buffers=False,
                )
                wrapped.register_comm_hook(None, _sum_hook)
                self._wrapped[name] = wrapped

    @contextmanager
    def call(self, name: str, last: bool) -> Iterator[nn.Module]:
        module = self._wrapped[name]
        with ExitStack() as stack:
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
            stack.enter_context(kept_activations(self.parallel))
            if self.graphs:
                stack.enter_context(self.graphs.training())
            yield module

    def step(self, name: str) -> None:
        super().step(name)
        if self.graphs:
            self.graphs.stepped()

    def clear(self, name: str) -> None:
        super().clear(name)
        if self.graphs:
            self.graphs.cleared()

    def sum_gradients(self, name: str) -> None:
        if self.world.size == 1:
            return
        trained = [p for p in self.modules[name].parameters() if p.requires_grad]
        # As DDP does: what no process used has no gradient, what one used has one everywhere.
        used = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
        used = used.to(self.world.device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        works = []
        for parameter, anywhere in zip(trained, used.tolist(), strict=True):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                works.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()


def _sum_hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Replaces DDP's average by a sum: an average rounds when the size is no power of two."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Sharded(Engine):
    """FSDP2: each process holds a slice of every block, whole blocks only while they work.

    With `dp_replicate` > 1 (HSDP) the slices of a copy are exchanged inside it in every micro-batch
    and between the copies once per update.
    """

    def shard(self, module: nn.Module, *, blocks: tuple[str, ...], dtype: torch.dtype) -> None:
        mesh = self.world.weights
        assert mesh is not None
        if mesh["replicate"].size() == 1:
            mesh = mesh["shard"]
        narrow = None if dtype == torch.float32 else dtype
        # Inputs are cast by the networks themselves: bfloat16 would turn timestep 954.5 into 956.
        policy = MixedPrecisionPolicy(
            param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for name in blocks:
            for block in getattr(module, name):
                fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        for part in _parts(module):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum.

    @contextmanager
    def by_forward(self) -> Iterator[Mapping[str, nn.Module]]:
        try:
            yield self.modules
        finally:
            # What lies outside blocks stays whole after a forward. A snapshot or the old policy,
            # which ask for the trained parameters next, would see copies instead of slices.
            for module in self.modules.values():
                for part in _parts(module):
                    part.reshard()

    @property
    def rollout_calls_agree(self) -> bool:
        return not self.parallel.gather_rollout

    @contextmanager
    def gathered(self) -> Iterator[Mapping[str, nn.Module]]:
        gathered = OneGathered(self.modules)
        try:
            yield gathered
        finally:
            gathered.release()

    @contextmanager
    def call(self, name: str, last: bool) -> Iterator[nn.Module]:
        module = self.modules[name]
        module.set_is_last_backward(last)
        module.set_requires_all_reduce(last)
        if self.parallel.defer_reduction:
            module.set_requires_gradient_sync(last)
        with kept_activations(self.parallel):
            yield module


class OneGathered(Mapping[str, nn.Module]):
    """Networks whose weights are whole; asking for one lets go of the others.

    Every rank asks for them in the same order (the steps of a rollout), so that the gathers meet.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules, self._whole = modules, ""

    def __getitem__(self, name: str) -> nn.Module:
        if name != self._whole:
            self.release()
            self._whole = name
            for part in _parts(self._modules[name]):
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
        return self._modules[name]

    def release(self) -> None:
        """Back to slices."""
        if self._whole:
            for part in _parts(self._modules[self._whole]):
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()
        self._whole = ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def _parts(module: nn.Module) -> list[FSDPModule]:
    """The sharded parts of a network, the whole first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
