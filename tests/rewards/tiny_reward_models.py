"""Tiny random models of the real classes, and open_clip's architecture written out once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's byte-level vocabularies."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + n) for n in range(len(others))]


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: 514 tokens, start and end last."""
    letters = byte_alphabet()
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def randomise(module: nn.Module, seed: int, scale: float = 0.3) -> None:
    """Weights large enough that every one of them matters, also biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1 if parameter.ndim == 1 else 0))


def images_of(sizes: tuple[int, int], count: int, seed: int = 0) -> Tensor:
    """Smooth uint8 images [count, 3, H, W]: noise alone would hide what a resize does."""
    rng = np.random.default_rng(seed)
    height, width = sizes
    y, x = np.mgrid[:height, :width]
    a, b, c = rng.uniform([[0.05], [0.05], [0]], [[0.6], [0.6], [6]], (3, 3 * count))
    waves = [127 + 120 * np.sin(a[i] * x + b[i] * y + c[i]) for i in range(3 * count)]
    noisy = np.stack(waves).reshape(count, 3, height, width) + rng.normal(
        0, 8, (count, 3, height, width)
    )
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


# ---- transformers' CLIP --------------------------------------------------------------------------


def tiny_clip(folder: Path, *, seed: int = 0, projection: int = 16) -> CLIPModel:
    """A CLIP folder as `save_pretrained` writes it, with an image processor's configuration."""
    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        projection_dim=projection,
        text_config={
            "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 77, "bos_token_id": 512,
            "eos_token_id": 513, "pad_token_id": 513, "projection_dim": projection,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
            "projection_dim": projection,
        },
    )  # fmt: skip
    model = CLIPModel(config).eval()
    randomise(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"resample": 3}))
    return model


# ---- open_clip's CLIP ----------------------------------------------------------------------------

OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 28, "layers": 2, "width": 32, "head_width": 8, "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 514, "width": 24, "heads": 4, "layers": 2,
    },
}  # fmt: skip


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        hidden = self.mlp.c_fc(self.ln_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        return x + self.mlp.c_proj(hidden)


class OpenClipTower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, quick: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipBlock(width, heads, quick) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self, cfg: dict[str, Any], embed: int, quick: bool) -> None:
        super().__init__()
        width, patch = cfg["width"], cfg["patch_size"]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(
            torch.zeros((cfg["image_size"] // patch) ** 2 + 1, width)
        )
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = OpenClipTower(width, width // cfg["head_width"], cfg["layers"], quick)
        self.proj = nn.Parameter(torch.zeros(width, embed))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        start = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([start, patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The names and shapes of open_clip's state dict, and its forward."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        text, quick = cfg["text_cfg"], bool(cfg.get("quick_gelu"))
        self.visual = OpenClipVision(cfg["vision_cfg"], cfg["embed_dim"], quick)
        self.transformer = OpenClipTower(text["width"], text["heads"], text["layers"], quick)
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.positional_embedding = nn.Parameter(torch.zeros(text["context_length"], text["width"]))
        self.ln_final = nn.LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.zeros(text["width"], cfg["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, tokens: Tensor) -> Tensor:
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection


def tiny_open_clip(folder: Path, *, quick: bool = False, preprocess: dict[str, Any] | None = None):
    """A folder in open_clip's layout; returns the model."""
    cfg = OPEN_CLIP | ({"quick_gelu": True} if quick else {})
    model = OpenClip(cfg).eval()
    randomise(model, 3)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": cfg, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    clip_tokenizer().save_pretrained(folder)
    return model


def open_clip_tokens(prompts: list[str]) -> Tensor:
    """As open_clip's tokenizer pads: zeros after the end token, cut to 77."""
    rows = torch.zeros(len(prompts), 77, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = clip_tokenizer()(prompt)["input_ids"][:77]
        ids[-1] = 513
        row[: len(ids)] = torch.tensor(ids)
    return rows
