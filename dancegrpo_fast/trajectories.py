"""What one rank drew in one iteration: the stored states of the trees, and how losses read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.batching import Call
from dancegrpo_fast.trees.tree import TreePlan

# A state of an iteration: (position of the prompt, state index in the plan). As an edge: its child.
Place = tuple[int, int]


@dataclass
class Trajectories:
    """The stored part of the trees of one iteration.

    Attributes:
        plan: The tree of every prompt.
        coefficients: [states, 8] on the device, of the edge into each state (roots: 0).
        leaves: (prompt, leaf position) of this rank's samples, in canonical order.
        latents: Latents [C, F, H, W] of the states that training or decoding will read.
        log_prob: Log-prob (0-d) of every stochastic edge drawn here, as the rollout saw it.
        outputs: Model outputs [C, F, H, W] at states with a trained child, where they are asked
            for.
        batches: The states of each forward of the rollout.
        graphs: With `loss.reuse_forwards`: the states and the output [n, C, F, H, W], with its
            autograd graph, of each forward with a trained child.
        device: Where latents and outputs are wanted, while they are stored in host memory; None:
            they stay where they are made.
    """

    plan: TreePlan
    coefficients: Tensor
    leaves: list[tuple[int, int]]
    latents: dict[Place, Tensor] = field(default_factory=dict)
    log_prob: dict[Place, Tensor] = field(default_factory=dict)
    outputs: dict[Place, Tensor] = field(default_factory=dict)
    batches: list[list[Place]] = field(default_factory=list)
    graphs: list[tuple[list[Place], Tensor]] = field(default_factory=list)
    device: torch.device | None = None

    def stack(self, places: Sequence[Place]) -> Tensor:
        """Stored latents [n, C, F, H, W] of some states."""
        return self._back([self.latents[place] for place in places])

    def _stored(self, tensor: Tensor) -> Tensor:
        """A tensor as it waits for training."""
        if self.device is None:
            return tensor
        pinned = self.device.type == "cuda"
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return host.copy_(tensor, non_blocking=True)

    def _back(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stored tensors, stacked where they are wanted."""
        if self.device is not None:
            # Before they are stacked: the host must not read a copy that is still under way.
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        return torch.stack(list(tensors))

    def samples(self, leaves: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Final latents [n, C, F, H, W] of some of this rank's leaves; None: of all."""
        chosen = self.leaves if leaves is None else leaves
        if not chosen:  # A rank of a sequence-parallel group with more ranks than samples.
            return torch.empty(0, device=self.coefficients.device)
        return self.stack([(p, self.plan.leaves[g]) for p, g in chosen])

    def keep(self, front: dict[Place, Tensor], *, samples_only: bool = False) -> None:
        """Store the states of a level that are read again; the others go with their level."""
        for (p, index), latents in front.items():
            kids = self.plan.children[index]
            trained = any(self.plan.states[s].trained for s in (index, *kids))
            if not kids or (trained and not samples_only):
                self.latents[p, index] = self._stored(latents)

    def keep_output(self, place: Place, output: Tensor) -> None:
        """Store the model's output at a state."""
        self.outputs[place] = self._stored(output)

    def joined(self, other: Trajectories) -> Trajectories:
        """These and those of other prompts; what was drawn a second time stays as it was first."""
        return Trajectories(
            self.plan,
            self.coefficients,
            sorted({*self.leaves, *other.leaves}),
            other.latents | self.latents,
            other.log_prob | self.log_prob,
            other.outputs | self.outputs,
            self.batches + other.batches,
            self.graphs + other.graphs,
            self.device,
        )

    def recorded_log_prob(self, edges: Sequence[Place]) -> Tensor:
        """[n] log-prob that the rollout recorded for some edges."""
        return torch.stack([self.log_prob[edge] for edge in edges])

    def recorded_output(self, places: Sequence[Place]) -> Tensor:
        """[n, C, F, H, W] model output that the rollout recorded at some states."""
        return self._back([self.outputs[place] for place in places])

    def edge_coefficients(self, edges: Sequence[Place]) -> Tensor:
        """[n, 8] coefficients of some edges."""
        return self.coefficients[[child for _, child in edges]]


def harmless(tensor: Tensor, call: Call) -> Tensor:
    """A tensor that a loss reads; of an idle call without NaN and infinities, as 0 x NaN is NaN.

    A rank all of whose samples failed has nothing else to make its idle calls with.
    """
    return tensor if not call.idle else tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class Fan:
    """Some states with their trained children, as the fused ops take them.

    Attributes:
        places: [n] states.
        edges: [children] edges by child state, state after state.
        offsets: [n + 1] int64 in host memory, where each state's children begin.
    """

    places: list[Place]
    edges: list[Place]
    offsets: Tensor

    @classmethod
    def of(cls, places: Sequence[Place], children: Sequence[Sequence[int]]) -> Fan:
        """States with the given children each."""
        edges = [(p, c) for (p, _), group in zip(places, children, strict=True) for c in group]
        offsets = torch.tensor([0, *np.cumsum([len(group) for group in children])])
        return cls(list(places), edges, offsets.to(torch.int64))

    @classmethod
    def of_call(cls, call: Call) -> Fan:
        """The states and trained children of a micro-batch."""
        places = [(item.prompt, item.state) for item in call.items]
        return cls.of(places, [item.children for item in call.items])
