"""What a network is told about its prompts, and how prompts of an iteration share a forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What the network is told about one prompt; tensors have no batch axis.

    Attributes:
        positive: Inputs of the prompted branch, by name.
        negative: The same names for the unguided branch; None without guidance.
        shared: Inputs of both branches (an image's latents).
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """All tensors by "branch.name", as a safetensors file holds them."""
        branches = {"positive": self.positive, "negative": self.negative, "shared": self.shared}
        return {f"{b}.{k}": t for b, named in branches.items() for k, t in (named or {}).items()}

    @classmethod
    def from_flat(cls, tensors: Mapping[str, Tensor]) -> Condition:
        """What `flat` gave."""
        branches: dict[str, dict[str, Tensor]] = {"positive": {}, "negative": {}, "shared": {}}
        for path, tensor in tensors.items():
            branch, name = path.split(".", 1)
            branches[branch][name] = tensor
        return cls(branches["positive"], branches["negative"] or None, branches["shared"])

    def to(self, device: torch.device) -> Condition:
        """The same on a device."""
        return Condition.from_flat({name: t.to(device) for name, t in self.flat().items()})

    @property
    def shape(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and sizes: prompts that agree can stand in one forward."""
        return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(self.flat().items()))


@dataclass(frozen=True)
class Conditions:
    """The prompts of an iteration, or the rows of one forward.

    Attributes:
        rows: One entry a prompt.
        one_forward: Both guidance branches run in one forward: the text lengths of every prompt of
            the iteration agree. It is one decision for all ranks, rollout and training, so that
            every rank makes the same number of network calls.
    """

    rows: tuple[Condition, ...]
    one_forward: bool

    @classmethod
    def of(cls, rows: Sequence[Condition]) -> Conditions:
        """Of the prompts of an iteration."""
        return cls(tuple(rows), all(_branches_agree(row) for row in rows))

    def select(self, rows: Sequence[int]) -> Conditions:
        """The conditions of some prompts, repeated as asked."""
        return Conditions(tuple(self.rows[row] for row in rows), self.one_forward)

    @property
    def kinds(self) -> tuple[int, ...]:
        """[P] for each prompt, the first one of equal sizes: unequal ones never share a forward."""
        shapes = [row.shape for row in self.rows]
        return tuple(shapes.index(shape) for shape in shapes)

    def positive(self) -> dict[str, Tensor]:
        """[B, ...] inputs of the prompted branch, those of both branches included."""
        return _stack([{**row.positive, **row.shared} for row in self.rows])

    def negative(self) -> dict[str, Tensor] | None:
        """[B, ...] inputs of the unguided branch, or None without guidance."""
        if any(row.negative is None for row in self.rows):
            return None
        return _stack([{**(row.negative or {}), **row.shared} for row in self.rows])

    def shared(self, name: str) -> Tensor:
        """[B, ...] one input of both branches."""
        return torch.stack([row.shared[name] for row in self.rows])


def _branches_agree(row: Condition) -> bool:
    if row.negative is None:
        return True
    return all(row.positive[name].shape == row.negative[name].shape for name in row.positive)


def _stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
