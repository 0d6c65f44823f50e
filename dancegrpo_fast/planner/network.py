"""A recipe's networks without weights: how many of them, in which groups, and what a call costs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import ParallelConfig, RunConfig, UserError
from dancegrpo_fast.models import Conditions, Family
from dancegrpo_fast.models.family import DTYPES
from dancegrpo_fast.models.loading import build
from dancegrpo_fast.models.precision import lower_precision
from dancegrpo_fast.parallel.activations import prepare_blocks
from dancegrpo_fast.planner.inputs import TEXT, condition
from dancegrpo_fast.planner.tracing import Trace, hollow, measure, trace, without_storage
from dancegrpo_fast.policy import ADAPTER


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered together: a block, or what lies outside all blocks.

    Attributes:
        shapes: (shape, bytes of an element as stored, whether it is trained) of each.
    """

    shapes: tuple[tuple[tuple[int, ...], int, bool], ...]

    def elements(self, *, trained: bool | None = None, shards: int = 1) -> int:
        """Elements that one of `shards` processes holds: slices of the first axis, rounded up."""
        return sum(
            _slice(shape, shards) for shape, _, t in self.shapes if trained is None or t is trained
        )

    def stored(self, shards: int = 1) -> int:
        """Bytes of that."""
        return sum(_slice(shape, shards) * width for shape, width, _ in self.shapes)


def _slice(shape: tuple[int, ...], shards: int) -> int:
    rest = 1
    for size in shape[1:]:
        rest *= size
    return -(-(shape[0] if shape else 1) // shards) * rest


@dataclass(frozen=True)
class Network:
    """One network of the recipe.

    Attributes:
        name: As the family calls it.
        groups: What lies outside the blocks first, then the blocks.
        buffers: Bytes of tables that no file holds.
    """

    name: str
    groups: tuple[Group, ...]
    buffers: int

    def elements(self, *, trained: bool | None = None, shards: int = 1) -> int:
        """Of all groups; see `Group.elements`."""
        return sum(group.elements(trained=trained, shards=shards) for group in self.groups)

    def stored(self, shards: int = 1) -> int:
        """Bytes as stored; see `Group.stored`."""
        return sum(group.stored(shards) for group in self.groups)


class Networks:
    """The networks of a recipe, on the meta device.

    Attributes:
        networks: By name, in the family's order.
    """

    def __init__(self, config: RunConfig, family: Family) -> None:
        self.config, self.family = config, family
        self.networks = {name: self._read(name) for name in family.grid.networks}
        # One trace serves all meshes; recipes differ in batch sizes by few.
        self.call, self.decode = cache(self._call), cache(self._decode)
        self.traced = cache(self._traced)

    def _make(self, name: str) -> nn.Module:
        """The network with its adapter, on meta; `requires_grad` says what is trained."""
        family, policy = self.family, self.config.policy
        cls = family.source.component_class(name)
        module: Any = build(cls, family.source.folder / name)
        module.requires_grad_(policy.train == "full")
        if policy.train == "lora":
            from peft import LoraConfig

            targets = policy.lora_targets or family.lora_targets
            with torch.device("meta"):
                module.add_adapter(
                    LoraConfig(
                        r=policy.lora_rank, lora_alpha=policy.lora_alpha, target_modules=targets
                    ),
                    adapter_name=ADAPTER,
                )
        return module.eval()

    def stored_dtype(self, name: str, parameter: Tensor) -> torch.dtype:
        """What a process alone holds: trained weights float32, the others the recipe's."""
        if parameter.requires_grad or not set(self._exact).isdisjoint(name.split(".")):
            return torch.float32
        return self.family.dtype

    def _gathered_dtype(self, name: str, parameter: Tensor) -> torch.dtype:
        """What FSDP gathers: the arithmetic's."""
        return self.family.dtype

    @property
    def _exact(self) -> list[str]:
        cls = self.family.source.component_class(self.family.grid.networks[0])
        return list(getattr(cls, "_keep_in_fp32_modules", None) or [])

    def _read(self, name: str) -> Network:
        module = self._make(name)
        of_blocks: dict[str, list[Any]] = {}
        rest: list[Any] = []
        for path, parameter in module.named_parameters():
            first, _, tail = path.partition(".")
            key = f"{first}.{tail.partition('.')[0]}"
            width = self.stored_dtype(path, parameter).itemsize
            row = (tuple(parameter.shape), width, parameter.requires_grad)
            (of_blocks.setdefault(key, []) if first in self.family.blocks else rest).append(row)
        buffers = sum(b.numel() * b.element_size() for b in module.buffers())
        groups = [rest, *of_blocks.values()]
        return Network(name, tuple(Group(tuple(group)) for group in groups), buffers)

    def _call(
        self, name: str, batch: int, checkpointing: str, *, gathered: bool, cuda: bool, sp: int = 1,
        lower: str | None = None,
    ) -> Trace:  # fmt: skip
        """A call on some states, guidance included.

        Args:
            name: Of the network.
            batch: States.
            checkpointing: `parallel.checkpointing`.
            gathered: Weights come from FSDP, in the arithmetic's type.
            cuda: Follow CUDA's autocast.
            sp: Processes that share the tokens: by linearity from two sizes of the sample.
            lower: `rollout.pool_dtype`, inside which a forward runs; never with sp.
        """
        shape = self.family.latent_shape
        full = self.traced(name, batch, checkpointing, shape, gathered, cuda, lower)
        if sp == 1:
            return full
        channels, frames, height, width = self.family.latent_shape
        patch = self.family.token_patch()[1]
        part = max(height // (2 * patch), 1) * patch
        shape = (channels, frames, part, width)
        half = self.traced(name, batch, checkpointing, shape, gathered, cuda)
        # What does not depend on the image tokens (the text) stays whole on every process.
        slope = full.plus(half, -1.0)
        split = full.plus(slope, -(1 - 1 / sp) * height / max(height - part, 1))
        # Attention's products grow with the square of the tokens: they are shared evenly.
        flops = full.forward_flops / sp, full.train_flops / sp
        return Trace(*flops, *(max(value, 0.0) for value in split.values[2:]))

    def _traced(
        self, name: str, batch: int, checkpointing: str, shape: tuple[int, ...], gathered: bool,
        cuda: bool, lower: str | None = None,
    ) -> Trace:  # fmt: skip
        family = self.family
        parallel = ParallelConfig.model_validate({"checkpointing": checkpointing})

        def call(module: nn.Module) -> Tensor:
            row = condition(family)
            latents = torch.empty(batch, *shape, dtype=torch.float32)
            timesteps = torch.empty(batch, dtype=torch.float32)
            given = Conditions.of([row] * batch)
            with lower_precision(family, lower, [module]) if lower else nullcontext():
                return family.model_output(module, latents, timesteps, given, name).float()

        return trace(
            lambda: self._make(name),
            call,
            self._gathered_dtype if gathered else self.stored_dtype,
            family.blocks,
            prepare=lambda module: prepare_blocks(module, parallel, family.blocks),
            backward=lower is None,
            cuda=cuda,
        )

    def _decode(self, batch: int, *, cuda: bool) -> Trace:
        """The VAE's decoder on some samples; a convolution's workspace is not seen."""
        family = self.family
        with without_storage():
            family._idle["vae"] = self._vae()
            try:
                return measure(
                    lambda: family.decode(torch.empty(batch, *family.latent_shape)), [], cuda=cuda
                )
            finally:
                del family._idle["vae"]

    def _vae(self) -> nn.Module:
        config = self.family.config
        dtype = DTYPES[config.vae_dtype]
        cls, folder = self.family.source.component_class("vae"), self.family.source.folder / "vae"
        vae: Any = hollow(build(cls, folder), lambda name, parameter: dtype)
        if config.vae_tiling:
            vae.enable_tiling()
        vae.to = lambda *_, **__: vae  # Parameters without storage cannot be moved, nor need to.
        return vae.requires_grad_(False)

    def vae_bytes(self) -> int:
        """The VAE's weights."""
        cls, folder = self.family.source.component_class("vae"), self.family.source.folder / "vae"
        width = DTYPES[self.family.config.vae_dtype].itemsize
        return sum(p.numel() for p in build(cls, folder).parameters()) * width

    def encoder_bytes(self) -> tuple[int, list[str]]:
        """Bytes of the encoders' weights, and the encoders whose size is not known."""
        total, unknown = 0, []
        for name in self.family.encoders:
            if not self.family.source.has(name):
                continue
            cls = self.family.source.component_class(name)
            if not isinstance(cls, type) or not issubclass(cls, nn.Module):
                continue  # A tokenizer.
            folder = self.family.source.folder / name
            if not (folder / "config.json").is_file():
                unknown.append(name)
                continue
            with torch.device("meta"):
                module = cls(cls.config_class.from_pretrained(folder))  # type: ignore[attr-defined]
            elements = sum(p.numel() for p in module.parameters())
            total += elements * self.family.dtype.itemsize
        return total, unknown


def known_family(config: RunConfig) -> None:
    """Refuse a family whose inputs are not known here, and losses whose calls are not."""
    if config.loss.kind != "policy_gradient":
        raise UserError(
            f"loss.kind = {config.loss.kind!r}: `plan --gpus` knows the work of policy gradients "
            "only; plan without --gpus prints the tree"
        )
    if config.model.family not in TEXT:
        raise UserError(
            f"model.family = {config.model.family!r}: `plan --gpus` knows the inputs of our own "
            f"families only ({', '.join(TEXT)}); plan without --gpus prints the tree"
        )

