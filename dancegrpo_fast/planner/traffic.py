"""Bytes that one process receives in an iteration, by the rules of `parallel/engine.py`.

Counted as benchmarks/traffic.py counts them: (n - 1) / n of a gathered or reduced buffer, twice
that for an all-reduce. Rewards, norms and metrics (some bytes) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dancegrpo_fast.config import ParallelConfig
from dancegrpo_fast.models import Family
from dancegrpo_fast.planner.network import Group, Network
from dancegrpo_fast.planner.work import Work

_GRADIENT = 4  # Gradients are reduced in float32.


@dataclass(frozen=True)
class Received:
    """Bytes from processes of the same machine, and from others."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Received) -> Received:
        return Received(self.inside + other.inside, self.between + other.between)

    def __mul__(self, factor: float) -> Received:
        return Received(self.inside * factor, self.between * factor)


@dataclass(frozen=True)
class Mesh:
    """How processes are laid out: `shards` neighbours hold one copy of the weights.

    Attributes:
        copies: Of the weights.
        shards: Processes that share one; includes sequence parallelism.
        machine: Processes of a machine.
    """

    copies: int
    shards: int
    machine: int

    @property
    def size(self) -> int:
        """Processes."""
        return self.copies * self.shards

    def of_copy(self, size: float) -> Received:
        """A buffer of so many bytes, gathered or reduced inside a copy of the weights."""
        inside = self.shards <= self.machine and self.machine % self.shards == 0
        return self._received(size, self.shards, inside)

    def of_copies(self, size: float) -> Received:
        """A buffer of so many bytes, all-reduced between the copies."""
        return self._received(2 * size, self.copies, self.size <= self.machine)

    def of_all(self, size: float) -> Received:
        """A buffer gathered or reduced over all processes."""
        return self._received(size, self.size, self.size <= self.machine)

    @staticmethod
    def _received(size: float, ranks: int, inside: bool) -> Received:
        moved = size * (ranks - 1) / ranks
        return Received(moved, 0.0) if inside else Received(0.0, moved)


def wire(
    parallel: ParallelConfig,
    mesh: Mesh,
    networks: Mapping[str, Network],
    work: Work,
    *,
    width: int,
    reference: bool,
    copied: bool,
) -> tuple[Received, Received]:
    """What one process receives in (rollout, update).

    Args:
        parallel: Engine and settings.
        mesh: Of the processes.
        networks: By name.
        work: Of an iteration.
        width: Bytes of an element that is gathered.
        reference: Every training call also evaluates the untrained network.
        copied: That one is a network of its own (full training).
    """
    nothing = Received()
    if mesh.size == 1:
        return nothing, nothing
    rules = {"fsdp": _fsdp, "ddp": _ddp, "deepspeed": _deepspeed}[parallel.engine]
    rollout = update = nothing
    for name, network in networks.items():
        drawn, trained = rules(
            parallel, mesh, network, work, name, width, reference, copied
        )
        rollout, update = rollout + drawn, update + trained
    return rollout, update


def exchanged(
    family: Family, parallel: ParallelConfig, mesh: Mesh, networks: Mapping[str, Network],
    work: Work,
) -> tuple[Received, Received]:  # fmt: skip
    """What sequence parallelism adds in (rollout, update); by formula, not compared with counts.

    q, k, v and the output of every attention over the image tokens change hands once a forward and
    once a backward, (sp - 1) / sp of what a process holds of them; a block that is computed again
    exchanges again. Text is left out.
    """
    sp, rollout, update = parallel.sp, 0.0, 0.0
    if sp == 1:
        return Received(), Received()
    pairs = zip(family.latent_shape[1:], family.token_patch(), strict=True)
    tokens = math.prod(size // patch for size, patch in pairs)
    for name, network in networks.items():
        config = family.source.config(name)
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        branches = 1 if family.guidance[name] == 1 else 2
        once = 4 * tokens / sp * hidden * family.dtype.itemsize * branches * (sp - 1) / sp
        once *= len(network.groups) - 1
        passes = 2 + (parallel.checkpointing != "none")
        rollout += once * sum(work.rollout.get(name, []))
        update += once * sum(work.recomputed.get(name, []))
        update += once * passes * sum(sum(batches.get(name, [])) for batches in work.training)
    if mesh.machine % sp == 0:
        return Received(rollout, 0.0), Received(update, 0.0)
    return Received(0.0, rollout), Received(0.0, update)


def _fsdp(
    parallel: ParallelConfig, mesh: Mesh, network: Network, work: Work, name: str, width: int,
    reference: bool, copied: bool,
) -> tuple[Received, Received]:  # fmt: skip
    def gathered(groups: Iterable[Group]) -> Received:
        elements = sum(g.elements(shards=mesh.shards) for g in groups) * mesh.shards
        return mesh.of_copy(elements * width)

    outside, blocks = gathered(network.groups[:1]), gathered(network.groups[1:])
    calls = [len(update.get(name, [])) for update in work.training]
    recomputed = len(work.recomputed.get(name, []))
    # A reference that is a copy is never gathered for a rollout: outside its blocks it stays whole.
    twice = sum(calls) if reference else 0
    if parallel.gather_rollout:
        rollout = (outside + blocks) * work.gathers.get(name, 0)
        # FSDP2 leaves what lies outside blocks whole after a forward until it is told otherwise,
        # as the end of a rollout does: it is gathered again in every forward and backward.
        update = (outside + blocks) * (2 * sum(calls) + recomputed)
        update = update + (blocks if copied else outside + blocks) * twice
    else:
        rollout = blocks * work.agreed.get(name, 0) + outside * (name in work.agreed)
        update = blocks * (2 * sum(calls) + recomputed + twice)
        update = update + outside * sum(calls)
    shard = sum(g.elements(trained=True, shards=mesh.shards) for g in network.groups) * _GRADIENT
    steps = sum(count > 0 for count in calls)
    reduces = steps if parallel.defer_reduction else sum(calls)
    update = update + mesh.of_copy(shard * mesh.shards) * reduces
    return rollout, update + mesh.of_copies(shard) * steps


def _ddp(
    parallel: ParallelConfig, mesh: Mesh, network: Network, work: Work, name: str, width: int,
    reference: bool, copied: bool,
) -> tuple[Received, Received]:  # fmt: skip
    steps = sum(name in update for update in work.training)
    gradients = network.elements(trained=True) * _GRADIENT
    return Received(), mesh.of_all(2 * gradients) * steps


def _deepspeed(
    parallel: ParallelConfig, mesh: Mesh, network: Network, work: Work, name: str, width: int,
    reference: bool, copied: bool,
) -> tuple[Received, Received]:  # fmt: skip
    """ZeRO's own accounting (Rajbhandari et al. 2020, section 7); not compared with counts."""
    trained = mesh.of_all(network.elements(trained=True) * _GRADIENT)
    calls = sum(len(update.get(name, [])) for update in work.training)
    steps = sum(name in update for update in work.training)
    if parallel.zero_stage < 3:
        reduces = steps if parallel.zero_stage == 1 else calls
        return Received(), trained * reduces + trained * steps
    whole = mesh.of_all(network.stored())
    forwards = 2 * calls + len(work.recomputed.get(name, [])) + (calls if reference else 0)
    return whole * work.gathers.get(name, 0), whole * forwards + trained * calls
