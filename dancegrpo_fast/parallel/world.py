"""The processes of a run: `torchrun` starts them, one per GPU; alone, everything is a no-op."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dancegrpo_fast.config import ParallelConfig, UserError
from dancegrpo_fast.parallel.meeting import fresh_store

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class World:
    """This process among all.

    Ranks of one sequence-parallel group are neighbours: they hold the same samples and share the
    tokens of each forward. Counted in such groups, a process is `data_rank` of `data_size`.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
        device: Where this process computes.
        sp: Processes in a sequence-parallel group.
        weights: Axes (replicate, shard) that weights are spread over; None alone.
        tokens: Axes (data, ring, ulysses) that samples and tokens are spread over; None alone.
            "ring" has size 1: diffusers asks for it.
        timeout: Processes that do not answer in a collective for so long end the run.
    """

    rank: int
    size: int
    device: torch.device
    sp: int = 1
    weights: DeviceMesh | None = None
    tokens: DeviceMesh | None = None
    timeout: timedelta = timedelta(seconds=1800)

    @classmethod
    def from_environment(
        cls, parallel: ParallelConfig | None = None
    ) -> World:
        """Join the group `torchrun` describes: NCCL with GPUs, gloo without; or stand alone.

        Raises:
            UserError: The mesh's axes do not multiply to the number of processes.
        """
        parallel = parallel or ParallelConfig()
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        copies, shards = weight_axes(parallel, size)
        if size == 1:
            return cls(0, 1, device)
        seconds = timedelta(seconds=parallel.timeout_seconds)
        if not dist.is_initialized():
            # gloo beside NCCL: small exchanges of host values never touch the GPU's queue.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store, rank, size = fresh_store(seconds)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=seconds
            )
        sp, kind = parallel.sp, device.type
        weights = init_device_mesh(kind, (copies, shards), mesh_dim_names=("replicate", "shard"))
        names = ("data", "ring", "ulysses")
        tokens = init_device_mesh(kind, (size // sp, 1, sp), mesh_dim_names=names)
        for group in {*weights.get_all_groups(), *tokens.get_all_groups()}:
            dist.distributed_c10d._set_pg_timeout(seconds, group)  # Not inherited by subgroups.
        return cls(dist.get_rank(), size, device, sp, weights, tokens, seconds)

    @property
    def is_main(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of this process's sequence-parallel group."""
        return self.rank // self.sp

    @property
    def data_size(self) -> int:
        """Number of sequence-parallel groups: what samples are spread over."""
        return self.size // self.sp

    @property
    def speaks(self) -> bool:
        """Whether this process adds its group's samples to sums over all processes."""
        return self.rank % self.sp == 0

    def side_group(self) -> Any:
        """A gloo group of all for exchanges beside the others; None alone. A collective."""
        if self.size == 1:
            return None
        return dist.new_group(backend="gloo", timeout=self.timeout)

    def all_reduce(self, values: Tensor, op: str) -> None:
        """Reduce in place over all processes; `op` is "sum" or "max"."""
        if self.size > 1:
            dist.all_reduce(values, _OPS[op])

    def gather_rows(self, own: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every rank's [n_rank, ...] rows, on the CPU; ranks may have unequal numbers of them.

        Args:
            own: [counts[rank], ...]; trailing sizes and dtype are equal on all ranks.
            counts: Rows of each rank.
        """
        if self.size == 1:
            return [own.cpu()]
        # gloo gathers equal shapes only.
        padded = own.new_zeros((max(counts), *own.shape[1:])).to(self.device)
        padded[: len(own)] = own.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[:count].cpu() for part, count in zip(parts, counts, strict=True)]

    def gather_rewards(self, own: Tensor, scorer: np.ndarray) -> np.ndarray:
        """The one exchange of samples' worth: rewards [P, G, R] float32 of every rank's samples.

        Args:
            own: [n, R] float32, NaN where a reward failed, of this rank's samples in order.
            scorer: [P, G] rank that scored each sample.
        """
        counts = np.bincount(scorer.ravel(), minlength=self.size).tolist()
        rewards = np.empty((*scorer.shape, own.shape[1]), np.float32)
        for rank, rows in enumerate(self.gather_rows(own, counts)):
            rewards[scorer == rank] = rows.numpy()
        return rewards

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process at once, if torchrun started it; otherwise return.

    Everything is written and the group is left: what follows is the interpreter's teardown, in
    which threads of gloo now and then abort (torch 2.13, seen once in ten short runs); torchrun
    would take that for a failure, and restart a finished run.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def weight_axes(parallel: ParallelConfig, size: int) -> tuple[int, int]:
    """(copies of the weights, processes that share one); sequence parallelism shards them too."""
    given = parallel.dp_replicate * parallel.sp
    shard = parallel.dp_shard or max(size // given, 1)
    if given * shard != size:
        raise UserError(
            f"parallel.dp_replicate = {parallel.dp_replicate}, dp_shard = "
            f"{parallel.dp_shard or 'null'}, sp = {parallel.sp}: they must multiply to the {size} "
            "processes that run; change one, or start another number"
        )
    return parallel.dp_replicate, shard * parallel.sp


def scorers(owner: np.ndarray, sp: int) -> np.ndarray:
    """[P, G] rank that decodes and scores each sample: its owner group's ranks share the work.

    Args:
        owner: [P, G] data rank of each sample.
        sp: Ranks in a group.
    """
    result = np.empty_like(owner)
    for group in np.unique(owner):
        held = np.argwhere(owner == group)
        for member, part in enumerate(np.array_split(held, sp)):
            result[tuple(part.T)] = group * sp + member
    return result
