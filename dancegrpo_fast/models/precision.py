"""Arithmetic below that of training, for samples that are scored and then drawn again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.family import Family

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
_MULTIPLE = 16  # Of both sides of a weight: what the hardware's products take.
_CAPABILITY = (8, 9)


def check_float8(family: Family) -> None:
    """Refuse float8 where device or networks have no such products, before any weight is read.

    The CPU has them, slowly: for tests.

    Raises:
        UserError: Another device than a GPU of compute capability 8.9 or a CPU, or no layer of
            fitting sides.
    """
    device = family.device
    able = device.type == "cpu"
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= _CAPABILITY
    if not able:
        raise UserError(
            f"rollout.pool_dtype = 'float8_e4m3': {device} has no such products (GPUs of compute "
            "capability 8.9 have: Ada, Hopper, Blackwell); use bfloat16, or null"
        )
    float8_layers(family.build().values(), family.blocks)


@contextmanager
def lower_precision(
    family: Family, dtype: str, networks: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Inside, the networks compute in another type; the weights stay as they are.

    `bfloat16` is the autocast of a recipe with `model.dtype: bfloat16`. `float8_e4m3` is that, with
    both sides of the linear layers of blocks (not a LoRA's own) in float8, each row with a scale of
    its own: amax / 448 of a weight's row when it is first used, of an input's row in every call.

    Args:
        family: Loaded, if no networks are given; nothing is compiled, no gradient taken inside.
        dtype: "bfloat16" or "float8_e4m3".
        networks: That are called; none: the family's own.

    Raises:
        UserError: No layer that float8 could compute.
    """
    layers: list[nn.Linear] = []
    if dtype == "float8_e4m3":
        layers = float8_layers(networks or family.modules.values(), family.blocks)
    own, family.dtype = family.dtype, torch.bfloat16
    for layer in layers:
        layer.forward = Float8Linear(layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        family.dtype = own
        for layer in layers:
            del layer.forward


def float8_layers(networks: Iterable[nn.Module], blocks: Collection[str]) -> list[nn.Linear]:
    """The layers that float8 computes: in blocks, whose lists are named here."""
    found = [
        part
        for network in networks
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear)
        and name.partition(".")[0] in blocks
        and "lora_" not in name
        and part.in_features % _MULTIPLE == part.out_features % _MULTIPLE == 0
    ]
    if not found:
        raise UserError(
            "rollout.pool_dtype = 'float8_e4m3': the blocks have no linear layer whose sides are "
            f"multiples of {_MULTIPLE}; use bfloat16, or null"
        )
    assert not any("forward" in vars(layer) for layer in found), "a forward of its own"
    return found


class Float8Linear:
    """The forward of a linear layer with both sides in float8; its weight is converted once."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._weight: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out_features] bfloat16 of x [..., in_features]."""
        # Here: torch has it since about 2.10, and only float8 asks for it.
        from torch.nn.functional import ScalingType, scaled_mm

        if self._weight is None:
            self._weight = by_rows(self._layer.weight.detach())
        weight, scale = self._weight
        rows, scales = by_rows(x.reshape(-1, x.shape[-1]))
        product = scaled_mm(
            rows, weight.t(),
            scales, ScalingType.RowWise, scale.t(), ScalingType.RowWise,
            output_dtype=torch.bfloat16,
        )  # fmt: skip
        if self._layer.bias is not None:
            product = product + self._layer.bias.to(product.dtype)
        return product.reshape(*x.shape[:-1], -1)


def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] as float8 [n, k] times a float32 scale [n, 1]."""
    x = x.float()
    # Of a row of zeros any scale would do; the smallest normal number has an exact inverse.
    scale = (x.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    # Division may round the largest up: beyond it float8_e4m3 has NaN only.
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(FLOAT8), scale
