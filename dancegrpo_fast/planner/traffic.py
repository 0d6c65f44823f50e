"""Bytes and collectives of one process in an iteration, by the rules of `parallel/engine.py`.

Counted as benchmarks/traffic.py counts them: a process receives (n - 1) / n of a gathered or
reduced buffer, twice that of an all-reduce. Rewards, norms and metrics (some bytes) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dancegrpo_fast.config import ParallelConfig
from dancegrpo_fast.models import Family
from dancegrpo_fast.planner.network import Group, Network
from dancegrpo_fast.planner.work import Work

_GRADIENT = 4  # Gradients are reduced in float32.
_DDP_BUCKET = 25 * 2**20  # Bytes that torch's DDP reduces at once.
_ZERO_BUCKET = 50_000_000  # Elements that DeepSpeed does: parallel/zero.py.


@dataclass(frozen=True)
class Received:
    """What one process receives.

    Attributes:
        inside: Bytes from processes of the same machine.
        between: Bytes from others.
        collectives: Calls that bring them.
    """

    inside: float = 0.0
    between: float = 0.0
    collectives: int = 0

    def __add__(self, other: Received) -> Received:
        calls = self.collectives + other.collectives
        return Received(self.inside + other.inside, self.between + other.between, calls)

    def __mul__(self, times: int) -> Received:
        return Received(self.inside * times, self.between * times, self.collectives * times)


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

    def in_machine(self, neighbours: int) -> bool:
        """Whether no group of so many neighbours reaches from one machine into another."""
        return self.machine % neighbours == 0 or self.size <= self.machine

    def of_copy(self, size: float, calls: int) -> Received:
        """Bytes gathered or reduced inside a copy of the weights, in so many collectives."""
        return self._received(size, self.shards, self.in_machine(self.shards), calls)

    def of_copies(self, size: float, calls: int) -> Received:
        """Bytes all-reduced between the copies."""
        return self._received(2 * size, self.copies, self.in_machine(self.size), calls)

    def of_all(self, size: float, calls: int) -> Received:
        """Bytes gathered or reduced over all processes."""
        return self._received(size, self.size, self.in_machine(self.size), calls)

    @staticmethod
    def _received(size: float, ranks: int, inside: bool, calls: int) -> Received:
        if ranks == 1:
            return Received()
        moved = size * (ranks - 1) / ranks
        return Received(moved, 0.0, calls) if inside else Received(0.0, moved, calls)


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
    sp = parallel.sp
    rollout = update = Received()
    if sp == 1:
        return Received(), Received()
    pairs = zip(family.latent_shape[1:], family.token_patch(), strict=True)
    tokens = math.prod(size // patch for size, patch in pairs)
    for name, network in networks.items():
        config = family.source.config(name)
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        branches = 1 if family.guidance[name] == 1 else 2
        once = 4 * tokens / sp * hidden * family.dtype.itemsize * branches * (sp - 1) / sp
        blocks, passes = len(network.groups) - 1, 2 + (parallel.checkpointing != "none")
        drawn, again = work.rollout.get(name, []), work.recomputed.get(name, [])
        trained = [batch for update in work.training for batch in update.get(name, [])] * passes
        rollout += _passes(drawn, once, blocks, inside=mesh.in_machine(sp))
        update += _passes(again + trained, once, blocks, inside=mesh.in_machine(sp))
    return rollout, update


def _passes(batches: Sequence[int], once: float, blocks: int, *, inside: bool) -> Received:
    """Of `blocks` attentions: `once` bytes a state in four exchanges a pass over a batch."""
    size, calls = once * blocks * sum(batches), 4 * blocks * len(batches)
    return Received(size, 0.0, calls) if inside else Received(0.0, size, calls)


def _fsdp(
    parallel: ParallelConfig, mesh: Mesh, network: Network, work: Work, name: str, width: int,
    reference: bool, copied: bool,
) -> tuple[Received, Received]:  # fmt: skip
    def gathered(groups: Sequence[Group]) -> Received:
        elements = sum(g.elements(shards=mesh.shards) for g in groups) * mesh.shards
        return mesh.of_copy(elements * width, len(groups))

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
    shards = [g.elements(trained=True, shards=mesh.shards) for g in network.groups]
    shard, parts = sum(shards) * _GRADIENT, sum(size > 0 for size in shards)
    steps = sum(count > 0 for count in calls)
    reduces = steps if parallel.defer_reduction else sum(calls)
    update = update + mesh.of_copy(shard * mesh.shards, parts) * reduces
    return rollout, update + mesh.of_copies(shard, parts) * steps


def _ddp(
    parallel: ParallelConfig, mesh: Mesh, network: Network, work: Work, name: str, width: int,
    reference: bool, copied: bool,
) -> tuple[Received, Received]:  # fmt: skip
    steps = sum(name in update for update in work.training)
    gradients = network.elements(trained=True) * _GRADIENT
    exchanges = -(-gradients // _DDP_BUCKET)
    if work.graphs:  # `Engine.sum_gradients`: which tensors have a gradient, then each of them.
        exchanges = 1 + sum(trained for group in network.groups for _, _, trained in group.shapes)
    return Received(), mesh.of_all(2 * gradients, exchanges) * steps


def _deepspeed(
    parallel: ParallelConfig, mesh: Mesh, network: Network, work: Work, name: str, width: int,
    reference: bool, copied: bool,
) -> tuple[Received, Received]:  # fmt: skip
    """ZeRO's own accounting (Rajbhandari et al. 2020, section 7); not compared with counts."""
    size = network.elements(trained=True)
    trained = mesh.of_all(size * _GRADIENT, -(-size // _ZERO_BUCKET))
    calls = sum(len(update.get(name, [])) for update in work.training)
    steps = sum(name in update for update in work.training)
    if parallel.zero_stage < 3:
        reduces = steps if parallel.zero_stage == 1 else calls
        return Received(), trained * reduces + trained * steps
    whole = mesh.of_all(network.stored(), len(network.groups))
    forwards = 2 * calls + len(work.recomputed.get(name, [])) + (calls if reference else 0)
    return whole * work.gathers.get(name, 0), whole * forwards + trained * calls
