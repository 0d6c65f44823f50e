"""ImageReward (Xu et al. 2023): BLIP's text encoder looks at the image, a small head scores."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from dancegrpo_fast.rewards.aesthetic import ScoreHead
from dancegrpo_fast.rewards.clip import BatchSize, Dtype
from dancegrpo_fast.rewards.interface import FrameReward, WithWeights
from dancegrpo_fast.rewards.preprocess import Preprocess
from dancegrpo_fast.rewards.weights import (
    DTYPES,
    State,
    build,
    load_tokenizer,
    need_file,
    read_json,
    read_state,
    rename,
)

#: Mean and standard deviation of the raw scores, from the authors' code.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_LENGTH = 35

_VISION_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding"),
    ("cls_token", "embeddings.class_embedding"),
    ("norm.", "post_layernorm."),
    ("blocks.", "encoder.layers."),
)
_BLOCK_NAMES = (
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class ImageReward(WithWeights, FrameReward):
    """Human preference for an image given its prompt, about -2.3 to 2.

    Args:
        path: Folder or hub id that holds `ImageReward.pt` and `med_config.json`.
        tokenizer: BERT's, uncased.
    """

    name = "imagereward"
    differentiable = True

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        *,
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: Dtype = "float32",
        batch_size: BatchSize = 32,
    ) -> None:
        state = read_state(need_file(path, ["ImageReward.pt"]))
        vision, text, head = split_state(state)
        vision_config = vision_config_of(vision)
        text_config = text_config_of(
            read_json(need_file(path, ["med_config.json"])), vision_config.hidden_size
        )
        self.vision = build(lambda: BlipVisionModel(vision_config), vision, DTYPES[dtype])
        self.text = build(
            lambda: BlipTextModel(text_config, add_pooling_layer=False), text, DTYPES[dtype]
        )
        self.head = build(lambda: ScoreHead(text_config.hidden_size), head, torch.float32)
        self.tokenizer, self.batch_size = load_tokenizer(tokenizer), batch_size
        self.preprocess = Preprocess((vision_config.image_size,) * 2, crop="even")

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.vision, self.text, self.head]

    def score_images(self, images: Tensor, prompts: list[str]) -> Tensor:
        """See `FrameReward.score_images`."""
        pixels = self.preprocess(images.to(self.vision.device)).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).to(self.vision.device)
        # `is_decoder` in the configuration creates the cross-attention; as a decoder the text
        # would be read causally, which is not how it was trained.
        states = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            is_decoder=False,
        ).last_hidden_state
        return (self.head(states[:, 0].float()) - MEAN) / STD


def split_state(state: State) -> tuple[State, State, State]:
    """The official checkpoint as the states of transformers' vision and text model and the head.

    Raises:
        ValueError: A name that belongs to none of them.
    """
    parts: dict[str, State] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for name, value in state.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"the checkpoint is no ImageReward: it holds {name}")
        if not name.endswith("embeddings.position_ids"):  # The positions 0, 1, 2, ...
            parts[prefix][name.removeprefix(prefix)] = value
    vision, text, head = parts.values()
    renamed: State = {}
    for name, value in rename(vision, _VISION_NAMES).items():
        for old, new in _BLOCK_NAMES:
            name = re.sub(old, new, name)
        renamed[name] = value
    return renamed, text, head


def vision_config_of(vision: State) -> BlipVisionConfig:
    """The vision tower's sizes, read off its weights."""
    try:
        patches = vision["embeddings.position_embedding"].shape[1] - 1
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        hidden = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the checkpoint is no ImageReward: it lacks {error}") from None
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=len({n.split(".")[2] for n in vision if n.startswith("encoder.layers.")}),
        num_attention_heads=width // 64,  # As in every ViT of BLIP.
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # timm's; transformers' default is 1e-5.
        hidden_act="gelu",
    )


def text_config_of(med: dict[str, Any], vision_width: int) -> BlipTextConfig:
    """The text encoder's configuration from `med_config.json`.

    The file's `encoder_width` is BLIP-base's; the authors' code overrides it, and so does this.
    """
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "layer_norm_eps",
        "hidden_act",
    )
    if missing := [name for name in names if name not in med]:
        raise ValueError(f"med_config.json lacks {', '.join(missing)}")
    return BlipTextConfig(
        **{name: med[name] for name in names}, encoder_hidden_size=vision_width, is_decoder=True
    )
