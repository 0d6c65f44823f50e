"""What is trained: named modules, in full or through a LoRA, with a reference and an average.

Modules are diffusers models. Trainable parameters are float32; frozen ones keep their dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import PolicyConfig, UserError
from dancegrpo_fast.ops.noise import NoiseKey, normal
from dancegrpo_fast.placing import assign

ADAPTER = "default"


class Policy:
    """Named modules, their trainable parameters, and the weights derived from them.

    Attributes:
        modules: Name to network, in the order everything iterates over (Wan2.2 has two).
        config: How they are trained.
        ema: Averaged trainable parameters by "module.parameter", or None.
        ema_updates: How many updates the average has seen.
        old: Trainable parameters that follow slowly, where a loss asks for them (DiffusionNFT's
            sampling policy, AWM's anchor), or None.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        config: PolicyConfig,
        *,
        lora_targets: list[str],
        key: NoiseKey,
        needs_reference: bool,
    ) -> None:
        self.modules: dict[str, Any] = dict(modules)  # diffusers models: adapters come with peft
        self.config, self._key = config, key
        for module in self.modules.values():
            # Rollout and training run the same mode: dropout would make the ratio differ from 1.
            module.eval().requires_grad_(False)
            if config.train == "lora":
                targets = config.lora_targets or lora_targets
                _add_lora(module, config, targets)
            else:
                module.requires_grad_(True)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.frozen: dict[str, nn.Module] = {}
        if needs_reference and config.train == "full":
            self.frozen = {
                name: copy.deepcopy(module).requires_grad_(False)
                for name, module in self.modules.items()
            }
        self.ema: dict[str, Tensor] | None = None
        self.ema_updates = 0
        self.old: dict[str, Tensor] | None = None

    def initialise_adapters(self, device: torch.device) -> None:
        """Give adapters their first weights; not before the networks are where they will stay."""
        for position, module in enumerate(self.modules.values()):
            key = self._key.fold_in(position)
            for index, (name, parameter) in enumerate(list(module.named_parameters())):
                if "lora_A" in name:
                    # peft's "gaussian" scale, from a key: the same on every rank and resume.
                    draw = normal(tuple(parameter.shape), key.fold_in(index).draw())
                    first = draw / self.config.lora_rank
                elif "lora_B" in name:
                    first = torch.zeros(tuple(parameter.shape))
                else:
                    continue
                assign(module, name, first, torch.float32, device)

    def start_average(self) -> None:
        """Begin the average at the weights there are, once they are where they will stay."""
        if self.config.ema_decay is not None:
            self.ema = {k: held(p).clone() for k, p in self.trainable().items()}

    def start_old(self) -> None:
        """Begin the old policy at the weights there are, once they are where they will stay."""
        self.old = {k: held(p).clone() for k, p in self.trainable().items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by "module.parameter", in module order."""
        return {
            f"{name}.{parameter_name}": parameter
            for name, module in self.modules.items()
            for parameter_name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @contextmanager
    def reference(self) -> Iterator[Mapping[str, nn.Module]]:
        """The untrained modules: adapters off, or the frozen copies."""
        if self.config.train == "full":
            assert self.frozen, "the policy was built without a reference"
            yield self.frozen
            return
        for module in self.modules.values():
            module.disable_adapters()
        try:
            yield self.modules
        finally:
            for module in self.modules.values():
                module.enable_adapters()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Fold the current weights into the average; early updates weigh more, as in Flow-GRPO."""
        if self.ema is None:
            return
        assert self.config.ema_decay is not None
        self.ema_updates += 1
        decay = min(self.config.ema_decay, (1 + self.ema_updates) / (10 + self.ema_updates))
        for name, parameter in self.trainable().items():
            self.ema[name].lerp_(held(parameter), 1 - decay)

    @torch.no_grad()
    def update_old(self, decay: float) -> None:
        """old <- decay old + (1 - decay) weights."""
        assert self.old is not None, "the policy was built without an old one"
        for name, parameter in self.trainable().items():
            self.old[name].mul_(decay).add_(held(parameter), alpha=1 - decay)

    @contextmanager
    def as_old(self) -> Iterator[None]:
        """Inside, the modules hold the old policy's weights."""
        assert self.old is not None, "the policy was built without an old one"
        with self.replaced(self.old):
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the modules hold the averaged weights where there are any."""
        if self.ema is None:
            yield
            return
        with self.replaced(self.ema):
            yield

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the trainable parameters hold other values."""
        # Copied, not swapped: an engine may hold the parameters' storage.
        own = {name: held(p).clone() for name, p in self.trainable().items()}
        self._copy_in(values)
        try:
            yield
        finally:
            self._copy_in(own)

    @torch.no_grad()
    def _copy_in(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainable().items():
            held(parameter).copy_(values[name])


def held(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter, to read or to change in place.

    ZeRO 3 leaves an empty parameter behind, and this process's slice beside it.
    """
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.detach()


def _add_lora(module: Any, config: PolicyConfig, targets: list[str]) -> None:
    from peft import LoraConfig

    try:
        module.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=targets,
                init_lora_weights="gaussian",
            ),
            adapter_name=ADAPTER,
        )
    except ValueError as error:
        raise UserError(
            f"policy.lora_targets = {targets}: no such layers in {type(module).__name__}; "
            f"give names of its linear layers ({error})"
        ) from error
