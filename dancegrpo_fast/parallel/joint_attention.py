"""Joint image-text attention with the text on every rank: HunyuanVideo, SkyReels and SD3.

Between the attentions a rank holds some of the image tokens (split unevenly where need be) and all
text tokens; inside, it holds all tokens for some of the heads, so the network's own [image, text]
mask stays valid. Text hidden states are equal on all ranks, but what a rank's backward knows of
them comes from its own heads and image tokens only: the gather of the text heads has a
reduce-scatter as its backward. Returning just the own slice, as public code does, drops the other
ranks' part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

JOINT_NETWORKS = ("HunyuanVideoTransformer3DModel", "SD3Transformer2DModel")


class TokenSplit:
    """Which image tokens each rank of a one-axis mesh holds; the first ranks may hold one more.

    Attributes:
        mesh: The one-axis mesh.
        degree: Its number of ranks.
        rank: This one's place among them.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.degree, self.rank = mesh, mesh.size(), mesh.get_local_rank()

    def sizes(self, tokens: int) -> list[int]:
        """Tokens of each rank."""
        assert tokens >= self.degree, f"{tokens} tokens for {self.degree} ranks: check_sequence"
        return [tokens // self.degree + (r < tokens % self.degree) for r in range(self.degree)]

    def own(self, tokens: int) -> slice:
        """This rank's tokens."""
        sizes = self.sizes(tokens)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])


def tokens_to_heads(parts: tuple[Tensor, ...], tokens: int, split: TokenSplit) -> list[Tensor]:
    """From own tokens of all heads to all tokens of own heads, in one exchange.

    Args:
        parts: N tensors [B, own tokens, heads, D] of one dtype.
        tokens: Image tokens of all ranks.

    Returns:
        N tensors [B, tokens, heads / degree, D]; differentiable.
    """
    sizes = split.sizes(tokens)
    by_rank = (t.unflatten(2, (split.degree, -1)).permute(2, 1, 0, 3, 4) for t in parts)
    sent = torch.stack(list(by_rank), 3).flatten(0, 1)  # [degree * own, B, N, h, D]
    own = [sizes[split.rank]] * split.degree
    got = collectives.all_to_all_single_autograd(sent, sizes, own, split.mesh)
    return [t.transpose(0, 1) for t in collectives.wait_tensor(got).unbind(2)]


def heads_to_tokens(x: Tensor, tokens: int, split: TokenSplit) -> Tensor:
    """The way back: [B, tokens, heads / degree, D] to [B, own tokens, heads, D]."""
    sizes = split.sizes(tokens)
    own = [sizes[split.rank]] * split.degree
    sent = x.transpose(0, 1).contiguous()
    got = collectives.wait_tensor(
        collectives.all_to_all_single_autograd(sent, own, sizes, split.mesh)
    )
    return got.unflatten(0, (split.degree, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)


class GatherHeads(torch.autograd.Function):
    """[B, T, heads / degree, D] of each rank to [B, T, heads, D] on every rank.

    Its backward sums over the ranks, in float32 at least: each holds a different part of the
    gradient of these replicated tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return _gathered(x, mesh).permute(1, 2, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        by_rank = wide.unflatten(2, (ctx.mesh.size(), -1)).permute(2, 0, 1, 3, 4).contiguous()
        own = torch.empty_like(by_rank[0])
        dist.reduce_scatter_tensor(own, by_rank.flatten(0, 1), group=ctx.mesh.get_group())
        return own.to(gradient.dtype), None


class GatherTokens(torch.autograd.Function):
    """[B, own tokens, C] to [B, tokens, C] on every rank.

    Every rank goes on to compute the whole loss from the result, so the own slice of its gradient
    is the gradient: summing here would count the loss once per rank.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, split: TokenSplit) -> Tensor:
        ctx.own = split.own(tokens)
        sizes = split.sizes(tokens)
        # Collectives gather equal shapes only.
        parts = _gathered(F.pad(x, (0, 0, 0, max(sizes) - x.shape[1])), split.mesh)
        return torch.cat([part[:, :n] for part, n in zip(parts, sizes, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][:, ctx.own].contiguous(), None, None


def _gathered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[ranks, *x.shape]: the tensors of all ranks."""
    out = x.new_empty(mesh.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=mesh.get_group())
    return out.unflatten(0, (mesh.size(), -1))


class JointAttention:
    """The attention processor of HunyuanVideo's and SD3's blocks; one instance per network.

    Without a split it computes what the stock processors do, through diffusers' dispatcher (SD3's
    stock one calls SDPA directly and would ignore an attention backend).

    Attributes:
        split: How image tokens are split, or None.
        takes_mask: False: the text was trimmed, the all-true mask of HunyuanVideo is left out.
    """

    # Names that diffusers looks for. The exchange is ours, so its own must stay off.
    _parallel_config = None
    _attention_backend: Any = None

    def __init__(self) -> None:
        self.split: TokenSplit | None = None
        self.takes_mask = True

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        image_tokens: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attention of one block.

        Args:
            attn: diffusers' `Attention`: projections and norms.
            hidden_states: [B, own image tokens, C].
            encoder_hidden_states: [B, T, C] text, or None (SD3's second attention).
            attention_mask: [B, 1, 1, image tokens + T] bool, or None.
            image_rotary_emb: cos and sin, [image tokens, D] each: of all ranks' tokens.
            image_tokens: Of all ranks, where there is no rotary embedding to tell it.

        Returns:
            Image [B, own image tokens, C] and text [B, T, C]; without text the image alone. The
            text of a block that drops it (`context_pre_only`) is None.
        """
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states
        image, joined = _projected(attn, hidden_states, text)
        tokens = hidden_states.shape[1] if image_tokens is None else image_tokens
        if image_rotary_emb is not None:
            tokens = image_rotary_emb[0].shape[0]
            own = self.split.own(tokens) if self.split else slice(None)
            rows = tuple(table[own] for table in image_rotary_emb)
            for i in (0, 1):
                image[i] = apply_rotary_emb(image[i], rows, sequence_dim=1)
        wide = image[0].dtype
        # Under autocast the norms return float32 and SDPA would round: here it halves the exchange.
        image, joined = ([t.to(part[2].dtype) for t in part] for part in (image, joined))
        out = self._attend(image, joined, attention_mask, tokens)
        if text is None:
            return _project_out(attn, out[0].flatten(2).to(wide))
        if attn.context_pre_only:
            return _project_out(attn, out[0].flatten(2).to(wide)), None
        words = self._gathered(out[1]).flatten(2).to(wide)
        if getattr(attn, "to_add_out", None) is not None:
            words = attn.to_add_out(words)
        return _project_out(attn, out[0].flatten(2).to(wide)), words

    def _attend(
        self, image: list[Tensor], text: list[Tensor], mask: Tensor | None, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Attention outputs: image [B, own tokens, heads, D] and text [B, T, own heads, D]."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if self.split:
            image = tokens_to_heads(tuple(image), tokens, self.split)
            text = [t.chunk(self.split.degree, 2)[self.split.rank] for t in text]
        q, k, v = (torch.cat(pair, 1) for pair in zip(image, text, strict=True)) if text else image
        out = dispatch_attention_fn(
            q, k, v, attn_mask=mask if self.takes_mask else None, backend=self._attention_backend
        )
        of_image, of_text = out[:, :tokens], out[:, tokens:]
        return heads_to_tokens(of_image, tokens, self.split) if self.split else of_image, of_text

    def _gathered(self, text: Tensor) -> Tensor:
        return GatherHeads.apply(text, self.split.mesh) if self.split else text


def _projected(
    attn: Any, image: Tensor, text: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Normalised [q, k, v] of image and text, [B, tokens, heads, D]; [] for no text."""

    def heads(x: Tensor, layers: tuple[Any, ...], norms: tuple[Any, ...]) -> list[Tensor]:
        parts = [layer(x).unflatten(2, (attn.heads, -1)) for layer in layers]
        normed = [t if norm is None else norm(t) for t, norm in zip(parts, norms, strict=False)]
        return [*normed, parts[2]]

    own = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    if text is None:
        return heads(image, *own), []
    if attn.add_q_proj is None:  # HunyuanVideo's single-stream blocks: one set of weights for both.
        parts = heads(torch.cat([image, text], 1), *own)
        n = image.shape[1]
        return [t[:, :n] for t in parts], [t[:, n:] for t in parts]
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return heads(image, *own), heads(text, added, (attn.norm_added_q, attn.norm_added_k))


def _project_out(attn: Any, image: Tensor) -> Tensor:
    if getattr(attn, "to_out", None) is None:  # Single-stream blocks project after their MLP.
        return image
    return attn.to_out[1](attn.to_out[0](image))


def joint_attention(module: nn.Module) -> JointAttention:
    """The network's `JointAttention`, put in place of the stock processors at the first call."""
    name = type(module).__name__.removeprefix("FSDP")  # fully_shard renames the class.
    assert name in JOINT_NETWORKS, name
    blocks = [
        *getattr(module, "transformer_blocks", []),
        *getattr(module, "single_transformer_blocks", []),
    ]
    attentions = [
        attention
        for block in blocks
        for attention in (block.attn, getattr(block, "attn2", None))
        if attention is not None
    ]
    found = attentions[0].processor
    if isinstance(found, JointAttention):
        return found
    processor = JointAttention()
    for attention in attentions:
        attention.set_processor(processor)
    return processor
