"""Attention backends: chosen per network, on its processors, never for the whole process.

diffusers' `set_attention_backend` also switches every other model of the process that has no
backend of its own (the reference model, the VAE); `set_attention` does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.parallel.joint_attention import JOINT_NETWORKS, joint_attention

_ALWAYS_MASKED = ("HunyuanVideoTransformer3DModel",)
_WITHOUT_DISPATCHER = ("UNet2DConditionModel",)  # Its processors call SDPA.
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


@dataclass(frozen=True)
class Backend:
    """What one value of `parallel.attention` can do, as diffusers 0.42 calls it.

    Attributes:
        diffusers: Its name there; None leaves the processors as they are.
        trains: Has a backward.
        masks: Takes a text mask [B, 1, 1, N].
        ulysses: Works inside diffusers' sequence parallelism. Ours ("replicated_text") exchanges
            outside the kernel and works with all of them.
        ulysses_masks: Takes a text mask there.
        narrow: Takes bfloat16 and float16 only.
        cuda: Needs a GPU.
        package: Module it imports, if it is not PyTorch's own.
        install: How to get that.
    """

    diffusers: str | None
    trains: bool = True
    masks: bool = True
    ulysses: bool = True
    ulysses_masks: bool = True
    narrow: bool = False
    cuda: bool = True
    package: str = ""
    install: str = ""


BACKENDS = {
    "default": Backend(None, cuda=False),
    "native": Backend("native", cuda=False),
    # Split, diffusers calls cuDNN past SDPA, which is what turns a bool mask into one to be added.
    "cudnn": Backend("_native_cudnn", ulysses_masks=False, narrow=True),
    "flash": Backend(
        "flash", masks=False, narrow=True, package="flash_attn", install="flash-attn>=2.6.3"
    ),
    # A locally built flash-attn 3: diffusers wraps its forward in an operator without a backward.
    "flash_3": Backend(
        "_flash_3", trains=False, masks=False, ulysses=False, narrow=True,
        package="flash_attn_interface", install="flash-attn 3, built from its hopper folder",
    ),
    # The same kernels as a package of the hub, fetched at the first use; these have one.
    "flash_3_hub": Backend(
        "_flash_3_hub", masks=False, narrow=True, package="kernels", install="kernels>=0.12"
    ),
    # Its 4-axis bool masks would be added to the scores as 0 and 1: no error, wrong numbers.
    "xformers": Backend(
        "xformers", masks=False, ulysses=False, package="xformers", install="xformers>=0.0.29"
    ),
}  # fmt: skip


def check_attention(
    name: str,
    *,
    network: str,
    kind: str,
    degree: int,
    masked: bool,
    trained: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse a backend that cannot do what the run needs; to be called before loading.

    Args:
        name: `parallel.attention`.
        network: The network's class name.
        kind: Its sequence parallelism, "ulysses", "replicated_text" or "".
        degree: `parallel.sp`.
        masked: Whether the text given to the network has padding that a mask hides. False for
            HunyuanVideo is a promise that its text is trimmed.
        trained: Whether gradients are computed through it.
        dtype: Of the network's arithmetic.
        device: Where it runs.

    Raises:
        UserError: Every reason, and the backends that would do.
    """

    def reasons(row: Backend) -> list[str]:
        split = degree > 1 and kind == "ulysses"
        by = f"{network} is split by diffusers (parallel.sp = {degree}), which cannot use it"
        no_mask = not row.masks or (split and not row.ulysses_masks)
        fixed = network in _WITHOUT_DISPATCHER and row.diffusers is not None
        found = [
            (fixed, f"{network} always calls PyTorch's SDPA"),
            (trained and not row.trains, "it has no backward and this network is trained"),
            (masked and no_mask, f"{network} masks its text and it takes no such mask"),
            (split and not row.ulysses, by),
            (row.narrow and dtype == torch.float32, "it does not compute in float32"),
            (row.cuda and device.type != "cuda", f"it needs a GPU and this is {device.type}"),
            (bool(row.package) and find_spec(row.package) is None, f"it needs {row.install}"),
        ]
        return [reason for applies, reason in found if applies]

    if name not in BACKENDS:
        raise UserError(f"parallel.attention = {name}: must be one of {', '.join(BACKENDS)}")
    if stated := reasons(BACKENDS[name]):
        fitting = [other for other, row in BACKENDS.items() if not reasons(row)]
        raise UserError(
            f"parallel.attention = {name}: {'; '.join(stated)}; use {' or '.join(fitting)}"
        )


def set_attention(module: Any, name: str, *, masked: bool) -> None:
    """Choose the attention of one loaded diffusers transformer, before or after it is split.

    Args:
        module: The bare network.
        name: A key of `BACKENDS`; what it can do is for `check_attention` to decide.
        masked: As in `check_attention`. False makes HunyuanVideo leave out its mask, which also
            SDPA computes faster without; a prompt with padding then stops the forward.
    """
    row = BACKENDS[name]
    if not masked and type(module).__name__ in _ALWAYS_MASKED:
        processor = joint_attention(module)
        if processor.takes_mask:
            processor.takes_mask = False
            module.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
    if row.diffusers is None:
        return
    joint = type(module).__name__ in JOINT_NETWORKS
    if joint:
        joint_attention(module)  # SD3's stock processor never asks for a backend.
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
        _maybe_download_kernel_for_backend,
    )

    backend = AttentionBackendName(row.diffusers)
    _check_attention_backend_requirements(backend)
    _maybe_download_kernel_for_backend(backend)
    processors = _processors(module)
    assert processors, f"{type(module).__name__} has no attention that takes a backend"
    for processor in processors:
        processor._attention_backend = backend
    if name != "native" and not joint:  # SDPA and our processor see to it themselves.
        equal_dtypes(module)


def equal_dtypes(module: nn.Module) -> None:
    """Under autocast, round q and k to autocast's dtype at their norms, as bfloat16 weights would.

    A norm with float32 weights returns float32 and leaves q and k wider than v, which SDPA under
    autocast accepts and other kernels, and diffusers' sequence-parallel backward, do not.
    """
    for part in module.modules():
        for name in _NORMS:
            norm = getattr(part, name, None)
            if isinstance(norm, nn.Module) and _narrowed not in norm._forward_hooks.values():
                norm.register_forward_hook(_narrowed)


def _narrowed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    device = output.device.type
    if not torch.is_autocast_enabled(device):
        return output
    return output.to(torch.get_autocast_dtype(device))


def _refuse_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The promise that the mask is all true, checked without waiting for the GPU."""
    if joint_attention(module).takes_mask:  # A stock pipeline at work: it pads, and is masked.
        return
    mask = kwargs["encoder_attention_mask"] if len(args) < 4 else args[3]
    torch._assert_async(mask.bool().all(), "text with padding, and attention was set without mask")


def _processors(module: nn.Module) -> list[Any]:
    """The attention processors that ask diffusers' dispatcher."""
    found = (getattr(part, "processor", None) for part in module.modules())
    return [processor for processor in found if hasattr(processor, "_attention_backend")]
