"""Rewards from CLIP models: CLIP score, PickScore, HPS-v2 and v2.1.

All are a cosine between image and text features, computed in float32: the samples of one prompt
differ by about 0.01, and bfloat16 steps by 0.002 there. Checkpoints are read in transformers' or
open_clip's layout; a prompt's text features are computed once and kept.
"""

from __future__ import annotations

import html
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import ftfy
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from dancegrpo_fast.rewards.interface import FrameReward, WithWeights
from dancegrpo_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from dancegrpo_fast.rewards.weights import (
    DTYPES,
    State,
    build,
    find_file,
    load_tokenizer,
    need_file,
    read_json,
    read_state,
)

Dtype = Literal["float32", "bfloat16", "float16"]
BatchSize = Annotated[int, Field(ge=1)]

#: open_clip's `model_cfg` of HPS-v2 and v2.1, whose repository holds no configuration.
VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24,
    },
}  # fmt: skip
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
#: Text features that are kept; 4096 of 1024 floats are 16 MB.
_KEPT_TEXTS = 4096


@dataclass
class Clip:
    """A CLIP model with its tokenizer and preprocessing.

    Attributes:
        model: transformers' `CLIPModel`.
        tokenizer: Of the text.
        preprocess: Of the pixels.
        clean: Unescape and repair prompts first, as open_clip's tokenizer does.
    """

    model: CLIPModel
    tokenizer: Any
    preprocess: Preprocess
    clean: bool

    def __post_init__(self) -> None:
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors [N, D] float32 of images [N, 3, H, W]."""
        vision = self.model.vision_model
        pixels = self.preprocess(images.to(vision.device))
        pooled = vision(pixel_values=pixels.to(vision.dtype)).pooler_output
        projection = self.model.visual_projection.weight
        return F.normalize(F.linear(pooled.float(), projection.float()), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] float32 of N prompts, each distinct prompt computed once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for start in range(0, len(new), 32):
            batch = new[start : start + 32]
            self._texts.update(zip(batch, self._encode(batch), strict=True))
        for prompt in prompts:
            self._texts.move_to_end(prompt)
        features = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > _KEPT_TEXTS:
            self._texts.popitem(last=False)
        return features.to(self.model.device)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        if self.clean:
            prompts = [html.unescape(html.unescape(ftfy.fix_text(p))).strip() for p in prompts]
        text = self.model.text_model
        tokens = self.tokenizer(
            prompts,
            # One length for all: the features of a prompt do not depend on its neighbours.
            padding="max_length",
            truncation=True,
            max_length=text.config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        # The text tower is causal and read at the end token: padding after it has no effect.
        pooled = text(input_ids=tokens["input_ids"]).pooler_output
        projection = self.model.text_projection.weight
        return F.normalize(F.linear(pooled.float(), projection.float()), dim=-1).cpu()

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] float32 cosine of each image with its prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)


def load_clip(source: str, layout: str = "auto", dtype: Dtype = "float32") -> Clip:
    """A CLIP model of a folder or hub id.

    Args:
        source: Folder or hub id.
        layout: `transformers`, `open_clip`, or `auto`: open_clip where `open_clip_config.json` is
            found, since its preprocessing is what such a model was published with.
        dtype: Of the two towers; projection and cosine are float32.

    Raises:
        ValueError: Missing files, a model of another class, or weights that do not fit.
    """
    config = find_file(source, ["open_clip_config.json"]) if layout != "transformers" else None
    if layout == "open_clip" and config is None:
        raise ValueError(f"{source!r} holds no open_clip_config.json")
    if config is not None:
        settings = read_json(config)
        state = read_state(need_file(source, _OPEN_CLIP_FILES))
        model_cfg = settings["model_cfg"]
        return Clip(
            open_clip_model(model_cfg, state, dtype),
            load_tokenizer(source),
            Preprocess.from_open_clip(
                settings.get("preprocess_cfg", {}), model_cfg["vision_cfg"]["image_size"]
            ),
            clean=True,
        )
    settings = read_json(need_file(source, ["config.json"]))
    if settings.get("model_type") != "clip":
        raise ValueError(f"{source!r} is a {settings.get('model_type')} model, not clip")
    clip_config = CLIPConfig.from_pretrained(source)
    state = read_state(need_file(source, _TRANSFORMERS_FILES))
    return Clip(
        _build(clip_config, state, dtype),
        load_tokenizer(source),
        transformers_preprocess(source, clip_config.vision_config.image_size),
        clean=False,
    )


def _build(config: CLIPConfig, state: State, dtype: Dtype) -> CLIPModel:
    # Older files keep the positions 0, 1, 2, ... as a weight.
    state = {k: v for k, v in state.items() if not k.endswith("embeddings.position_ids")}
    model = build(lambda: CLIPModel(config), state, torch.float32)
    model.vision_model.to(DTYPES[dtype])  # The projections and the scale stay float32.
    model.text_model.to(DTYPES[dtype])
    return model


def transformers_preprocess(source: str, default_size: int) -> Preprocess:
    """The preprocessing that a folder's image processor describes."""
    found = find_file(source, ["preprocessor_config.json", "processor_config.json"])
    settings = {} if found is None else read_json(found)
    return Preprocess.from_transformers(settings.get("image_processor", settings), default_size)


def open_clip_model(model_cfg: dict[str, Any], state: State, dtype: Dtype) -> CLIPModel:
    """transformers' CLIP with open_clip's weights.

    Raises:
        ValueError: A model that is no plain CLIP with two transformers, or weights that do not fit.
    """
    return _build(open_clip_config(model_cfg), from_open_clip(state), dtype)


def open_clip_config(model_cfg: dict[str, Any]) -> CLIPConfig:
    """transformers' configuration of open_clip's `model_cfg`.

    Raises:
        ValueError: A model that is no plain CLIP with two transformers.
    """
    vision, text, width = model_cfg["vision_cfg"], model_cfg["text_cfg"], model_cfg["embed_dim"]
    known = {
        "vision": {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"},
        "text": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
        "model": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    }
    for part, settings in (("vision", vision), ("text", text), ("model", model_cfg)):
        if other := sorted(settings.keys() - known[part]):
            raise ValueError(f"open_clip: {part} settings {', '.join(other)} are not implemented")
    if not isinstance(vision["layers"], int):
        raise ValueError("open_clip: the vision tower is a ResNet; only transformers are read")
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=width,
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": width,
            "hidden_act": activation,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "projection_dim": width,
            "hidden_act": activation,
            # The vocabulary ends with the start and the end token.
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
        },
    )


def from_open_clip(state: State) -> State:
    """Names and shapes of open_clip's CLIP turned into those of transformers."""
    converted: State = {}
    for name, value in state.items():
        visual = name.startswith("visual.")
        model = "vision_model" if visual else "text_model"
        rest = name.removeprefix("visual.")
        block = rest.removeprefix("transformer.resblocks.")
        if block != rest:
            index, _, leaf = block.partition(".")
            for new, part in _block(leaf, value):
                converted[f"{model}.encoder.layers.{index}.{new}"] = part
        elif name in ("visual.proj", "text_projection"):  # Stored to multiply from the right.
            projection = "visual_projection" if visual else "text_projection"
            converted[f"{projection}.weight"] = value.T.contiguous()
        else:
            converted[_TOP.get(name, name)] = value
    return converted


_TOP = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_LEAF = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def _block(leaf: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """One weight of a transformer block; query, key and value are stored as one."""
    if leaf.startswith("attn.in_proj_"):
        kind = leaf.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return [(f"self_attn.{letter}_proj.{kind}", part.contiguous()) for letter, part in parts]
    module, _, kind = leaf.rpartition(".")
    return [(f"{_LEAF.get(module, module)}.{kind}", value)]


class _ClipReward(WithWeights, FrameReward):
    clip: Clip
    differentiable = True

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.clip.model]


class ClipScore(_ClipReward):
    """Cosine of image and text features (Hessel et al. 2021, without its factor 2.5 and clamp)."""

    name = "clip_score"

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        *,
        layout: Literal["auto", "transformers", "open_clip"] = "auto",
        dtype: Dtype = "float32",
        batch_size: BatchSize = 32,
    ) -> None:
        self.clip, self.batch_size = load_clip(path, layout, dtype), batch_size

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        return self.clip.cosine(images, prompts)


class PickScore(_ClipReward):
    """PickScore (Kirstain et al. 2023): exp(logit_scale) * cosine, about 18 to 26.

    Args:
        path: The model.
        processor: Tokenizer and preprocessing, where the model's own folder has none.
        scale: `logits`, or `cosine` for the cosine alone (as DanceGRPO and Pref-GRPO use it).
    """

    name = "pickscore"

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        *,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scale: Literal["logits", "cosine"] = "logits",
        dtype: Dtype = "float32",
        batch_size: BatchSize = 32,
    ) -> None:
        config = CLIPConfig.from_pretrained(path)
        state = read_state(need_file(path, _TRANSFORMERS_FILES))
        model = _build(config, state, dtype)
        preprocess = transformers_preprocess(processor, config.vision_config.image_size)
        self.clip = Clip(model, load_tokenizer(processor), preprocess, clean=False)
        self.batch_size, self.scale = batch_size, scale

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        cosine = self.clip.cosine(images, prompts)
        return cosine if self.scale == "cosine" else cosine * self.clip.model.logit_scale.exp()


class Hps2(_ClipReward):
    """HPS-v2 and v2.1 (Wu et al. 2023): the cosine, about 0.2 to 0.36; the versions do not compare.

    The images are not cut: the longer side is scaled to 224 and the rest is black.

    Args:
        path: Folder or hub id that holds `HPS_v2.1_compressed.pt` (or `HPS_v2_compressed.pt`).
        version: Which of them.
        tokenizer: Any with CLIP's vocabulary.
    """

    name = "hpsv2"

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        *,
        version: Literal["2.1", "2.0"] = "2.1",
        tokenizer: str = "openai/clip-vit-large-patch14",
        dtype: Dtype = "float32",
        batch_size: BatchSize = 32,
    ) -> None:
        file = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}[version]
        state = read_state(need_file(path, [file]))
        # A model of another size (tests, or one of your own training) says so beside its weights.
        beside = Path(path) / "open_clip_config.json"
        config = read_json(beside)["model_cfg"] if beside.is_file() else VIT_H_14
        model = open_clip_model(config, state, dtype)
        side = config["vision_cfg"]["image_size"]
        preprocess = Preprocess((side, side), mode="longest", mean=CLIP_MEAN, std=CLIP_STD)
        self.clip = Clip(model, load_tokenizer(tokenizer), preprocess, clean=True)
        self.batch_size = batch_size

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        return self.clip.cosine(images, prompts)
