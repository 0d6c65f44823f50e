"""Tiny networks of the real diffusers classes with the inputs of one call, for splitting tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux(batch: int = 2, text: int = 8, heads: int = 4) -> Built:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=heads, joint_attention_dim=32, pooled_projection_dim=32,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return network, {
        "hidden_states": noise(batch, 16, 4, seed=0),
        "encoder_hidden_states": noise(batch, text, 32, seed=1),
        "pooled_projections": noise(batch, 32, seed=2),
        "timestep": torch.linspace(0.3, 0.7, batch),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def wan(batch: int = 2, text: int = 7, frames: int = 3) -> Built:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return network, {
        "hidden_states": noise(batch, 4, frames, 8, 8, seed=0),
        "timestep": torch.linspace(300.0, 954.5, batch),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
    }


def qwen(valid: tuple[int, ...] = (), text: int = 8) -> Built:
    from diffusers import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    batch = len(valid) or 1
    return network, {
        "hidden_states": noise(batch, 16, 16, seed=0),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "encoder_hidden_states_mask": _mask(valid, text) if valid else None,
        "timestep": torch.linspace(0.3, 0.7, batch),
        "img_shapes": [(1, 4, 4)] * batch,
    }


def hunyuan(
    valid: tuple[int, ...] = (5,),
    text: int = 7,
    size: tuple[int, int, int] = (3, 6, 6),
    channels: int = 4,
    guidance: bool = True,
) -> Built:
    """27 image tokens: 14 and 13 on two ranks, 7, 7, 7 and 6 on four."""
    from diffusers import HunyuanVideoTransformer3DModel

    network = HunyuanVideoTransformer3DModel(
        in_channels=channels, out_channels=4, num_attention_heads=4, attention_head_dim=16,
        num_layers=2, num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        guidance_embeds=guidance, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    batch = len(valid)
    inputs = {
        "hidden_states": noise(batch, channels, *size, seed=0),
        "timestep": torch.linspace(300.0, 954.5, batch),
        "encoder_hidden_states": noise(batch, text, 16, seed=1),
        "encoder_attention_mask": _mask(valid, text).long(),
        "pooled_projections": noise(batch, 8, seed=2),
    }
    return network, inputs | ({"guidance": torch.full((batch,), 6016.0)} if guidance else {})


def skyreels(size: tuple[int, int, int] = (2, 6, 8)) -> Built:
    """The image's latents beside the noisy ones: twice the channels in, no guidance input."""
    return hunyuan((7, 4), size=size, channels=8, guidance=False)


def sd3(batch: int = 2, text: int = 7, size: tuple[int, int] = (6, 10)) -> Built:
    """15 image tokens; the first block has a second attention, the last one drops its text."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return network, {
        "hidden_states": noise(batch, 4, *size, seed=0),
        "encoder_hidden_states": noise(batch, text, 32, seed=1),
        "pooled_projections": noise(batch, 64, seed=2),
        "timestep": torch.linspace(300.0, 954.5, batch),
    }


def _mask(valid: tuple[int, ...], text: int) -> Tensor:
    return torch.arange(text)[None] < torch.tensor(valid)[:, None]


def add_lora(network: Any, targets: list[str]) -> None:
    """An adapter that matters: its second factor is not zero."""
    from peft import LoraConfig

    network.requires_grad_(False)
    torch.manual_seed(1)
    network.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    )


def seeded(build: Any, dtype: torch.dtype = torch.float32, lora: list[str] | None = None) -> Built:
    """The network with the same weights everywhere and no norm or bias at its neutral value."""
    torch.manual_seed(0)
    network, inputs = build()
    for number, parameter in enumerate(network.parameters()):
        if parameter.dim() == 1:
            parameter.data += 0.1 * noise(*parameter.shape, seed=number)
    if lora:
        add_lora(network, lora)
    return network.to(dtype), {key: _cast(value, dtype) for key, value in inputs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
