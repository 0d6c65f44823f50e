"""Noise drawn on NVIDIA GPUs by the native module (csrc/noise_cuda.cu): the launches.

Called by `noise.py` with checked arguments. Nothing here waits for the GPU; work goes to torch's
current stream of the tensor's device.
"""

from __future__ import annotations

import functools

import torch

from dancegrpo_fast.ops import native
from dancegrpo_fast.ops.noise_reference import Runs


def why_not(device: torch.device) -> str | None:
    """None if noise can be drawn on this CUDA device, else one line: the reason and the way out."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: `dancegrpo-fast doctor` says why"
    return _load(torch.cuda.current_device() if device.index is None else device.index)


def build() -> dict[str, str] | None:
    """The toolkit and architectures the module was compiled with; None: without CUDA."""
    if native.why_not() is not None:
        return None
    return getattr(native.module(), "cuda_build", None)


@functools.cache
def _load(index: int) -> str | None:
    reason = native.why_not()
    if reason is not None:
        return reason
    found = build()
    if found is None:
        return (
            "the native module was built without CUDA: put nvcc on the path and reinstall with "
            "DANCEGRPO_FAST_CUDA=ON pip install ."
        )
    try:
        with torch.cuda.device(index):
            native.module().load_cuda(index)
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"{error} (built by CUDA {found['toolkit']} for {found['architectures']}; this GPU is "
            f"{major}.{minor}): update the driver, or reinstall with "
            f"DANCEGRPO_FAST_CUDA_ARCHS={major}{minor} pip install ."
        )
    return None


def normal(out: torch.Tensor, dtype: int, table: torch.Tensor, runs: Runs, copies: int) -> None:
    """Fills contiguous `out` `[n, copies, box]` from n keys; `dtype` is its number."""
    native.check_plain(out)
    # torch's guard, not only the module's: leaving it never touches a device that is not in use.
    with torch.cuda.device(out.device):
        keys = _on_device(table, out.device, "keys")
        native.module().normal_cuda(
            out.data_ptr(), dtype, keys.data_ptr(), len(keys), copies,
            runs.base, runs.extents, runs.strides, out.device.index, _stream(out.device),
        )  # fmt: skip


def add_normal(
    x: torch.Tensor, dtype: int, table: torch.Tensor, runs: Runs, scale: float | torch.Tensor
) -> None:
    """x += scale * normal on contiguous `x` `[n, box]`; `dtype` is its number."""
    native.check_plain(x)
    with torch.cuda.device(x.device):
        keys = _on_device(table, x.device, "keys")
        number, scales = 1.0, None
        if isinstance(scale, torch.Tensor):
            scales = _on_device(scale.detach(), x.device, "scale").float()
        else:
            number = scale
        native.module().add_normal_cuda(
            x.data_ptr(), dtype, keys.data_ptr(), len(keys),
            runs.base, runs.extents, runs.strides,
            number, 0 if scales is None else scales.data_ptr(), x.device.index, _stream(x.device),
        )  # fmt: skip
    torch.autograd.graph.increment_version(x)  # torch did not see the change


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _on_device(tensor: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    """The tensor, contiguous on the device; an upload does not wait for the GPU."""
    if tensor.device != device and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{name} on {tensor.device}: must be on {device} while a CUDA graph is captured, which "
            f"would keep today's values; move it there before, with {name}.to(device)"
        )
    return tensor.to(device, non_blocking=True).contiguous()
