"""Memory, work, traffic and time of a recipe on a mesh; and which mesh to choose.

Times are projected: products over a stated share of the peak, and transfers over stated links,
one after the other. Embedding, scoring and saving are not in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from pydantic import ValidationError

from dancegrpo_fast import networks as networks_of_run
from dancegrpo_fast.config import ParallelConfig, RunConfig, UserError
from dancegrpo_fast.models import Family
from dancegrpo_fast.parallel.graphs import check_graphs
from dancegrpo_fast.parallel.world import World, weight_axes
from dancegrpo_fast.planner.memory import Memory, memory_of
from dancegrpo_fast.planner.meshes import engines, meshes, reasons
from dancegrpo_fast.planner.network import Networks, known_family
from dancegrpo_fast.planner.tracing import Trace
from dancegrpo_fast.planner.traffic import Mesh, Received, exchanged, wire
from dancegrpo_fast.planner.work import Work, work_of


@dataclass(frozen=True)
class Hardware:
    """What a plan is made for.

    Attributes:
        gpus: Processes.
        machine: GPUs of a machine.
        memory: Bytes of a GPU.
        efficiency: Share of `peak` that products reach.
        peak: FLOP/s of a GPU in the arithmetic's type.
        link: Bytes/s that a GPU receives from other machines.
        inside: Bytes/s that it receives inside its machine.
    """

    gpus: int
    machine: int = 8
    memory: float = 80e9
    efficiency: float = 0.4
    peak: float = 989e12
    link: float = 50e9
    inside: float = 300e9

    # The driver's context, NCCL's buffers and what the allocator cannot use.
    reserve: float = 0.1

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run can fill."""
        return self.memory * (1 - self.reserve)


@dataclass(frozen=True)
class Estimate:
    """A recipe on a mesh.

    Attributes:
        config: The recipe, with this mesh.
        work: Of the busiest process.
        memory: Of the busiest process.
        flops: Of the busiest process by phase.
        received: Bytes that a process receives by phase.
        seconds: Projected, by phase: products and transfers.
    """

    config: RunConfig
    work: Work
    memory: Memory
    flops: dict[str, float]
    received: dict[str, Received]
    seconds: dict[str, float]

    def fits(self, hardware: Hardware) -> bool:
        """Whether every phase does."""
        return self.memory.total(self.memory.peak) <= hardware.usable

    @property
    def total(self) -> float:
        """Projected seconds of an iteration."""
        return sum(self.seconds.values())


class Planner:
    """Plans of one recipe; what networks cost is found once.

    Attributes:
        config: The recipe.
        family: Opened, not loaded.
        networks: Its networks, without weights.
        iteration: That is planned: a window moves.
    """

    def __init__(
        self, config: RunConfig, family: Family, networks: Networks | None = None,
        *, iteration: int = 0,
    ) -> None:  # fmt: skip
        known_family(config)
        self.config, self.family = config, family
        self.networks = networks or Networks(config, family)
        self.iteration = iteration
        self.work = cache(self._work)

    def estimate(
        self, hardware: Hardware, parallel: ParallelConfig | None = None, *, cuda: bool = True
    ) -> Estimate:
        """The recipe on its own mesh, or on another.

        Raises:
            UserError: The mesh's axes do not multiply to the GPUs, the samples cannot be spread
                over them, the network cannot be split so, or a setting of the recipe is not
                for this mesh.
        """
        parallel = parallel or self.config.parallel
        config = self.config.model_copy(update={"parallel": parallel})
        if config.loss.reuse_forwards and hardware.gpus > 1 and parallel.engine != "ddp":
            raise UserError(
                f"parallel.engine = {parallel.engine!r}: on several GPUs loss.reuse_forwards needs "
                "ddp; change one of the two"
            )
        if parallel.compile == "graphs":
            check_graphs(parallel, World(0, hardware.gpus, torch.device("cuda")))
        copies, shards = weight_axes(parallel, hardware.gpus)
        if parallel.sp > 1:
            self._check_split(config, hardware.gpus)
        work = self.work(hardware.gpus, parallel.sp)
        memory = memory_of(
            config, self.family, self.networks, work, shards, hardware.gpus, cuda=cuda
        )
        mesh = Mesh(copies, shards, hardware.machine)
        kl = config.loss.kl_weight > 0
        drawn, trained = wire(
            parallel, mesh, self.networks.networks, work,
            width=self.family.dtype.itemsize, reference=kl,
            copied=kl and config.policy.train == "full",
        )  # fmt: skip
        split = exchanged(self.family, parallel, mesh, self.networks.networks, work)
        received = {"rollout": drawn + split[0], "train": trained + split[1]}
        sharded = parallel.engine == "fsdp" and hardware.gpus > 1
        flops = self._flops(config, work, sharded, cuda)
        return Estimate(config, work, memory, flops, received, _seconds(flops, received, hardware))

    def _work(self, processes: int, sp: int) -> Work:
        return work_of(self.config, self.family, processes, sp, iteration=self.iteration)

    def _flops(
        self, config: RunConfig, work: Work, sharded: bool, cuda: bool
    ) -> dict[str, float]:
        """Products of the busiest process in an iteration, by phase."""
        sp, checkpointing = config.parallel.sp, config.parallel.checkpointing

        def one(name: str) -> Trace:
            return self.networks.call(name, 1, checkpointing, gathered=sharded, cuda=cuda, sp=sp)

        def forwards(calls: dict[str, list[int]]) -> float:
            return sum(sum(batches) * one(name).forward_flops for name, batches in calls.items())

        rollout, train = forwards(work.rollout), forwards(work.recomputed)
        reference = config.loss.kl_weight > 0
        for update in work.training:
            for name, batches in update.items():
                call = one(name)
                each = call.train_flops + (call.forward_flops if reference else 0.0)
                if config.loss.reuse_forwards:
                    each -= call.forward_flops
                train += sum(batches) * each
        decode = self.networks.decode(1, cuda=cuda).forward_flops * work.samples
        return {"rollout": rollout, "decode": decode, "train": train}

    def _check_split(self, config: RunConfig, processes: int) -> None:
        parallel = config.parallel.model_copy(update={"attention": "default"})
        world = World(0, processes, torch.device("cpu"), config.parallel.sp)
        networks_of_run.check(
            config.model_copy(update={"parallel": parallel}), self.family, world
        )

    def recommend(self, hardware: Hardware) -> tuple[Estimate, list[str]] | None:
        """The fastest mesh that fits, and why; None if none does.

        Of the recipe's engine, and only if nothing of it fits of FSDP.
        """
        for parallel in engines(self.config.parallel, hardware):
            found = list(self._candidates(hardware, parallel))
            fitting = [estimate for estimate in found if estimate.fits(hardware)]
            if fitting:
                best = min(fitting, key=lambda estimate: estimate.total)
                return best, list(reasons(best, found, hardware))
        return None

    def _candidates(self, hardware: Hardware, given: ParallelConfig) -> Iterator[Estimate]:
        for parallel in meshes(given, hardware):
            try:
                RunConfig.model_validate(
                    self.config.model_dump() | {"parallel": parallel.model_dump()}
                )
                yield self.estimate(hardware, parallel)
            except (UserError, ValidationError):
                continue  # This split or spread is not possible; others are.

    def smallest(self, hardware: Hardware) -> Estimate | None:
        """What comes nearest to fitting."""
        return min(
            (
                estimate
                for parallel in engines(self.config.parallel, hardware)
                for estimate in self._candidates(hardware, parallel)
            ),
            key=lambda estimate: estimate.memory.total(estimate.memory.peak),
            default=None,
        )


def _seconds(
    flops: dict[str, float], received: dict[str, Received], hardware: Hardware
) -> dict[str, float]:
    rate = hardware.peak * hardware.efficiency
    seconds = {phase: value / rate for phase, value in flops.items()}
    for phase, moved in received.items():
        seconds[f"{phase} transfers"] = (
            moved.inside / hardware.inside + moved.between / hardware.link
        )
    return seconds
