"""The processes of a run: `torchrun` starts them, one per GPU; alone, everything is a no-op."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def from_environment(cls, timeout: timedelta = timedelta(minutes=30)) -> World:
        """Join the group `torchrun` describes: NCCL with GPUs, gloo without; or stand alone."""
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timeout
            )
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0

    def all_reduce(self, values: Tensor, op: str) -> None:
        """Reduce in place over all processes; `op` is "sum" or "max"."""
        if self.size > 1:
            dist.all_reduce(values, _OPS[op])

    def gather_rewards(self, own: Tensor, owner: np.ndarray) -> np.ndarray:
        """The one exchange of samples' worth: rewards [P, G, R] float32 from every rank's leaves.

        Args:
            own: [n, R] float32, NaN where a reward failed, of this rank's leaves in order.
            owner: [P, G] rank of each leaf.
        """
        prompts, group_size = owner.shape
        counts = np.bincount(owner.ravel(), minlength=self.size)
        if self.size == 1:
            return own.cpu().numpy().reshape(prompts, group_size, -1)
        # Ranks may own one leaf more or less; gloo gathers equal shapes only.
        padded = own.new_full((int(counts.max()), own.shape[1]), torch.nan).to(self.device)
        padded[: len(own)] = own.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        kept = [part[:n].cpu().numpy() for part, n in zip(parts, counts, strict=True)]
        return np.concatenate(kept).reshape(prompts, group_size, -1)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()
