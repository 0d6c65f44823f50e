"""Putting a tensor where a parameter stands, whatever an engine made of that parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def assign(
    module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Put a tensor where a parameter or buffer of this name stands.

    Args:
        module: The network; it may be sharded, and on the meta device.
        name: Dotted name of the parameter.
        tensor: The whole value, on any device.
        dtype: Of the result, if the tensor is floating point.
        device: Of the result; DTensors go to the device of their mesh.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old: Any = owner._parameters.get(leaf)
    if isinstance(old, DTensor):
        # Every process has the value itself: no rank's data has to be sent to another.
        tensor = distribute_tensor(tensor, old.device_mesh, old.placements, src_data_rank=None)
    else:
        tensor = tensor.to(device)
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)  # Only now: a GPU converts faster, and of a shard there is less.
    if old is None:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)


def like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """A whole value as this process holds the parameter: its slice, dtype and device."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3: a slice of the flattened value, padded.
        own: Any = parameter.ds_tensor
        flat = tensor.flatten()[own.numel() * dist.get_rank() :][: own.numel()]
        flat = nn.functional.pad(flat, (0, own.numel() - flat.numel()))
        return flat.to(own.device, own.dtype)
    data: Any = parameter.data
    if isinstance(data, DTensor):
        mesh, placements = data.device_mesh, data.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to(data.dtype)
    return tensor.to(data.device, data.dtype)
