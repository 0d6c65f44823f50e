"""The engine for small models: every process holds the whole module, gradients are summed."""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the classes.
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dancegrpo_fast.parallel.world import World


class Replicated:
    """Named modules whose gradients are summed (not averaged) over processes once per update.

    The loss is already divided by the update's global divisor, so the sum is the gradient of the
    whole update on any number of processes.
    """

    def __init__(self, modules: Mapping[str, nn.Module], world: World) -> None:
        self.modules: dict[str, nn.Module] = dict(modules)
        if world.size > 1:
            for name, module in modules.items():
                wrapped = DistributedDataParallel(
                    module, device_ids=[world.device] if world.device.type == "cuda" else None
                )
                wrapped.register_comm_hook(None, _sum_hook)
                self.modules[name] = wrapped

    @contextmanager
    def synchronised(self, name: str, last: bool) -> Iterator[nn.Module]:
        """The module for one forward and backward; gradients are exchanged in its `last` one."""
        module = self.modules[name]
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield module
        else:
            yield module

    @torch.no_grad()
    def clip_grad_norm(self, name: str, max_norm: float) -> Tensor:
        """Scale a module's gradients to `max_norm`; returns the norm before, equal on ranks."""
        return nn.utils.clip_grad_norm_(self.modules[name].parameters(), max_norm)


def _sum_hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Replaces DDP's average by a sum: an average rounds when the size is no power of two."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
