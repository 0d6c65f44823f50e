"""Sequence parallelism: the tokens of one sample over several ranks.

Two kinds, declared by each family. "ulysses" is diffusers' own (FLUX, Wan, Qwen-Image): image
tokens and, in joint attention, text tokens are split evenly. "replicated_text" is ours
(`joint_attention`) for HunyuanVideo, SkyReels and SD3: image tokens are split, unevenly where need
be, and every rank holds the text.

One convention for both. All ranks of a group get the same inputs and the whole gathered output, and
each computes the whole loss from it. A rank then holds one part of every parameter's gradient: the
gradient is the SUM over the ranks of the group. Nothing is to be scaled by the degree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dancegrpo_fast.config import UserError
from dancegrpo_fast.parallel.attention import equal_dtypes
from dancegrpo_fast.parallel.joint_attention import (
    JOINT_NETWORKS,
    GatherTokens,
    TokenSplit,
    joint_attention,
)

KINDS = ("ulysses", "replicated_text")


def check_sequence(
    network: Mapping[str, Any], kind: str, degree: int, tokens: int, text_tokens: int
) -> None:
    """Refuse a degree that the network cannot be split into; reads configurations only.

    Args:
        network: The network's config.json: `_class_name` and `num_attention_heads` are read.
        kind: "ulysses", "replicated_text", or "" for a family that cannot be split.
        degree: `parallel.sp`.
        tokens: Image tokens of one sample, after patching.
        text_tokens: Text tokens that the network is given, with their padding.

    Raises:
        UserError: Names every reason, and the degrees that would fit.
    """
    if degree == 1:
        return
    field, name = f"parallel.sp = {degree}", network["_class_name"]
    if kind not in KINDS:
        raise UserError(f"{field}: {name} has no sequence-parallel form; use 1 and shard instead")
    if network.get("image_condition_type") == "token_replace":
        raise UserError(
            f"{field}: {name} with image_condition_type token_replace treats its first frame's "
            "tokens apart and cannot be split; use 1"
        )
    limits = _limits(network, kind, tokens, text_tokens)
    reasons = [reason for fits, reason in limits if not fits(degree)]
    if not reasons:
        return
    heads = network["num_attention_heads"]
    fitting = [d for d in range(1, heads + 1) if all(fits(d) for fits, _ in limits)]
    listed = " or ".join(str(d) for d in fitting)
    raise UserError(f"{field}: {name} has {' and '.join(reasons)}; use {listed}")


def _limits(
    network: Mapping[str, Any], kind: str, tokens: int, text_tokens: int
) -> list[tuple[Any, str]]:
    """(whether a degree fits, what does not) of each quantity that is split."""

    def divides(number: int, what: str) -> tuple[Any, str]:
        return lambda degree: number % degree == 0, f"{number} {what}, which it must divide"

    heads = divides(network["num_attention_heads"], "attention heads")
    if kind == "replicated_text":
        return [heads, (lambda degree: tokens >= degree, f"only {tokens} image tokens")]
    limits = [heads, divides(tokens, "image tokens")]
    if _splits_text(network["_class_name"]):
        limits.append(divides(text_tokens, "text tokens"))
    return limits


def _splits_text(class_name: str) -> bool:
    """Whether diffusers' plan for a class splits the text as well (Wan's does not)."""
    import diffusers

    plan = getattr(diffusers, class_name)._cp_plan
    return any("encoder_hidden_states" in entry for entry in plan.values() if type(entry) is dict)


def split_sequence(module: Any, kind: str, mesh: DeviceMesh) -> None:
    """Turn a loaded network into its sequence-parallel form, in place.

    To be called on the bare diffusers model: after adapters and copies, before or after
    checkpointing is switched on, before `fully_shard` or another engine.

    Args:
        module: A diffusers transformer.
        kind: "ulysses" or "replicated_text".
        mesh: With axes "ring" (of size 1) and "ulysses" among its own.
    """
    assert kind in KINDS, kind
    assert mesh["ring"].size() == 1, "ring attention has no backward on CPU and is not used"
    degree = mesh["ulysses"].size()
    if degree == 1:
        return
    if kind == "ulysses":
        _split_ulysses(module, mesh, degree)
    else:
        _split_image(module, TokenSplit(mesh["ulysses"]))


def _split_ulysses(module: Any, mesh: DeviceMesh, degree: int) -> None:
    from diffusers import ContextParallelConfig

    if mesh.device_type == "cpu":
        module._resolve_parallel_config = lambda config: _resolved_on_cpu(module, config, mesh)
    module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))
    if mesh.device_type == "cpu":
        del module._resolve_parallel_config
    module.__deepcopy__ = _refuse_copy
    # The backward of diffusers' SDPA runs outside autocast and refuses q and k wider than v.
    equal_dtypes(module)


def _refuse_copy(memo: dict[int, Any]) -> Any:
    """diffusers' hooks keep the module that they were made for: a copy would run its weights."""
    raise RuntimeError("copy the network before split_sequence: a copy would run the original")


def _resolved_on_cpu(module: Any, config: Any, mesh: DeviceMesh) -> Any:
    """What diffusers does with a configuration, without asking for an accelerator."""
    from diffusers.models._modeling_parallel import ParallelConfig

    module._parallel_config = ParallelConfig(context_parallel_config=config)
    device = torch.device("cpu")
    module._parallel_config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    return module._parallel_config


def _split_image(module: Any, split: TokenSplit) -> None:
    """Our kind: image tokens are split after their embedding and gathered after `proj_out`.

    The number of tokens travels with the inputs of each block, never in a variable: a checkpointed
    block may be computed again after a forward of another size.
    """
    name = type(module).__name__
    if name not in JOINT_NETWORKS:
        raise ValueError(f"kind = replicated_text: must be one of {JOINT_NETWORKS}, not {name}")
    hooks = _Hooks(split)
    joint_attention(module).split = split
    if name == "SD3Transformer2DModel":
        module.register_forward_pre_hook(hooks.tell_tokens, with_kwargs=True)
        module.pos_embed.register_forward_hook(hooks.split_output)
    else:  # Its root measures the mask by the whole image, and its rope tells each block its size.
        module.transformer_blocks[0].register_forward_pre_hook(hooks.split_first)
    module.proj_out.register_forward_hook(hooks.gather)


class _Hooks:
    """The hooks of one network; an object, no closures, so that a copied network has its own."""

    def __init__(self, split: TokenSplit) -> None:
        self.split = split
        self.tokens = 0  # Of the forward that is running: set on the way in, read on the way out.

    def tell_tokens(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """SD3: the whole number of tokens goes to every attention of every block."""
        latents = args[0] if args else kwargs["hidden_states"]
        patch = module.config.patch_size
        tokens = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)
        given = kwargs.get("joint_attention_kwargs") or {}
        return args, kwargs | {"joint_attention_kwargs": given | {"image_tokens": tokens}}

    def split_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._own(output)

    def split_first(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._own(args[0]), *args[1:]

    def gather(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return GatherTokens.apply(output, self.tokens, self.split)

    def _own(self, image: Tensor) -> Tensor:
        self.tokens = image.shape[1]
        return image[:, self.split.own(self.tokens)]
