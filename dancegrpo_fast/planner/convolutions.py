"""Memory that the CPU's convolutions need while they run, which no tensor shows.

By torch's rules (aten/src/ATen/native/Convolution.cpp, torch 2.13): either oneDNN, which works on
copies whose channels come in blocks, or a product with columns, one row per input element that an
output sees. What cuDNN takes depends on the algorithm it picks; it is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def transient_bytes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    y: Tensor,
) -> int:
    """Most bytes that a convolution has alive beside what lives before it; its output counts.

    Args:
        x: [N, C, ...] input.
        weight: [K, C / groups, ...].
        stride: Of each axis.
        dilation: Of each axis.
        transposed: Not looked into: only the output counts.
        groups: Of channels.
        y: [N, K, ...] output.
    """
    output = y.numel() * y.element_size()
    if transposed:
        return output
    last = _channels_last(x)  # Such an input is read as it stands.
    copied = 0 if x.is_contiguous() or last else x.numel() * x.element_size()
    if not _by_blocks(x, weight, stride, dilation, groups):
        columns = 0
        if not _pointwise(weight):
            columns = weight[0].numel() * y[0, 0].numel() * x.element_size()
        return copied + columns + output
    if last:
        return output + 2 * weight.numel() * weight.element_size()
    pointwise, result = _pointwise(weight), _blocked(y, 1)
    # Few channels are read as they stand; the input's copy is gone before the output is unblocked.
    given = _blocked(x, 1) if x.shape[1] >= _block() or pointwise else 0
    # In narrow types a product over channels alone is summed in float32, one sample at a time.
    sums = result // len(y) * 4 // y.element_size() if pointwise and y.element_size() < 4 else 0
    return copied + max(sums + given + _blocked(weight, 0) + result, result + output)


def _by_blocks(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether oneDNN runs it: always in narrow types, else unless it is small."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return True
    if x.dtype != torch.float32:
        return False
    moves = any(s != 1 for s in stride) or any(d != 1 for d in dilation)
    flat = weight.shape[-1] == 1 and weight.shape[-2] == 1
    alone = flat and not moves and x.shape[0] < 16 and torch.get_num_threads() == 1
    several = x.shape[0] > 1 or x.shape[:4].numel() > 20480
    wide = weight.shape[-1] > 3 and weight.shape[-2] > 3
    return not alone and (groups > 1 or wide or several)


def _channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.is_contiguous() or x.dim() not in formats:
        return False
    return x.is_contiguous(memory_format=formats[x.dim()])


def _pointwise(weight: Tensor) -> bool:
    return all(size == 1 for size in weight.shape[2:])


def _blocked(tensor: Tensor, axis: int) -> int:
    """Bytes with the channels of an axis rounded up to whole blocks."""
    channels = tensor.shape[axis]
    whole = -(-channels // _block()) * _block()
    return tensor.numel() // channels * whole * tensor.element_size()


def _block() -> int:
    """Channels in a block: a register's worth of float32."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
