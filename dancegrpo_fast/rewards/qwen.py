"""Qwen2-VL as a reward model: pixels to patches, prompts to tokens, hidden states of tokens.

The two models here (HPSv3, VideoReward) were trained and are served with positions 0, 1, 2, ...,
not with Qwen's own three-axis positions: their forward passed embeddings and no positions, and the
transformers of that day counted. Positions are therefore given explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from dancegrpo_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD
from dancegrpo_fast.rewards.weights import State, build, rename

PATCH, MERGE, FRAMES = 14, 2, 2  # Pixels; patches and frames that become one token's share.
FACTOR = PATCH * MERGE
#: Names in checkpoints written before transformers 5 put both towers below `model.`.
_NAMES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("visual.", "visual."),
    ("model.", "language_model."),
)


def smart_size(height: int, width: int, smallest: int, largest: int) -> tuple[int, int]:
    """Qwen's size of an image: sides are multiples of 28, the aspect is kept, the area bounded.

    Args:
        height, width: Of the image in pixels.
        smallest, largest: Area in pixels; as in the official rule, the larger bound is looked at
            first and rounding down may leave the smaller one.
    """
    tall, wide = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if tall * wide > largest:
        scale = math.sqrt(height * width / largest)
        return tuple(  # type: ignore[return-value]
            max(FACTOR, math.floor(side / scale / FACTOR) * FACTOR) for side in (height, width)
        )
    if tall * wide < smallest:
        scale = math.sqrt(smallest / (height * width))
        return tuple(  # type: ignore[return-value]
            math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width)
        )
    return tall, wide


def patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised patches of one image or video, in the order of Qwen's processor.

    Args:
        frames: [F, 3, H, W], uint8 or float with values 0 to 255; H and W multiples of 28. An odd
            last frame is repeated, as is a single image.

    Returns:
        [t * h * w, 3 * 2 * 14 * 14] float32 and the grid (t, h, w).
    """
    mean, std = (frames.new_tensor(values, dtype=torch.float32) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (frames.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    if len(pixels) % FRAMES:
        pixels = torch.cat([pixels, pixels[-1:]])
    count, _, height, width = pixels.shape
    t, h, w = count // FRAMES, height // PATCH, width // PATCH
    split = pixels.reshape(t, FRAMES, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    # (t, h, w of 28-pixel blocks, then the 2 x 2 patches of each; inside: channel, time, y, x)
    ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return ordered.reshape(t * h * w, 3 * FRAMES * PATCH * PATCH), (t, h, w)


def unfit(tokenizer: Any, prompts: Sequence[str]) -> dict[int, str]:
    """Prompts that hold a token of the model's own, such as `<|im_end|>`, by position.

    It would be read as a picture, as the end of the question or as a place to score. Other added
    tokens, such as `<think>`, steer nothing and stand in official questions.
    """
    own = sorted(token for token in tokenizer.get_added_vocab() if token.startswith("<|"))
    return {
        i: f"the prompt holds {found}, a token of the model's own"
        for i, prompt in enumerate(prompts)
        if (found := next((token for token in own if token in prompt), None)) is not None
    }


def chat(tokens: str, text: str) -> str:
    """Qwen's chat template for one user message: pictures first, then text, then the answer."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{tokens}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )


@dataclass
class QwenReader:
    """A Qwen2-VL without its language head, and its tokenizer with the reward tokens.

    Attributes:
        model: The two towers.
        tokenizer: Knows the reward tokens.
        reward_ids: Their ids, in order.
    """

    model: Qwen2VLModel
    tokenizer: Any
    reward_ids: list[int]

    @torch.no_grad()
    def states(self, pictures: Sequence[Tensor], texts: Sequence[str], *, video: bool) -> Tensor:
        """Hidden states [N, reward tokens, D] float32 at the reward tokens.

        Args:
            pictures: N images or videos [F, 3, H, W] as `patches` takes them.
            texts: N texts that hold each reward token once.
            video: Fill in Qwen's video token instead of its image token.

        Raises:
            ValueError: A text that does not hold each reward token exactly once, in order.
        """
        device = self.model.device
        pad = "<|video_pad|>" if video else "<|image_pad|>"
        pixels, grids, chats = [], [], []
        for picture, text in zip(pictures, texts, strict=True):
            flat, grid = patches(picture.to(device))
            pixels.append(flat)
            grids.append(grid)
            chats.append(chat(pad * (math.prod(grid) // MERGE**2), text))
        # Padding stands on the right: positions are then those of the unpadded text.
        tokens = self.tokenizer(
            chats, padding=True, padding_side="right", return_tensors="pt"
        ).to(device)
        ids = tokens["input_ids"]
        where = torch.isin(ids, torch.tensor(self.reward_ids, device=device))
        wanted = torch.tensor(self.reward_ids, device=device).expand(len(chats), -1)
        if int(where.sum()) != wanted.numel() or not torch.equal(
            ids[where].view_as(wanted), wanted
        ):
            names = " ".join(self.tokenizer.convert_ids_to_tokens(self.reward_ids))
            raise ValueError(f"a text must hold the reward tokens {names} once each, in order")
        kind = "_videos" if video else ""
        seen = {
            f"pixel_values{kind}": torch.cat(pixels).to(self.model.dtype),
            f"{'video' if video else 'image'}_grid_thw": torch.tensor(grids, device=device),
        }
        length = ids.shape[1]
        hidden = self.model(
            input_ids=ids,
            attention_mask=tokens["attention_mask"],
            position_ids=torch.arange(length, device=device).expand(3, len(ids), length),
            use_cache=False,
            **seen,
        ).last_hidden_state
        return hidden[where].view(len(ids), len(self.reward_ids), -1).float()


def load_reader(
    base: str, state: State, reward_tokens: Sequence[str], dtype: torch.dtype
) -> QwenReader:
    """A reader with a reward model's weights.

    Args:
        base: Folder or hub id of the Qwen2-VL whose configuration and tokenizer are used.
        state: Its weights, in the names of transformers 4 or 5, without the reward head. The
            vocabulary may be shorter than the base's: it was resized to the tokenizer's length.
        reward_tokens: Added to the tokenizer, in order.
        dtype: Of the model.

    Raises:
        ValueError: Weights that do not fit, or a vocabulary of another length.
    """
    config = AutoConfig.from_pretrained(base)
    if not isinstance(config, Qwen2VLConfig):
        raise ValueError(f"{base!r} is a {config.model_type} model, not qwen2_vl")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(reward_tokens)})
    renamed = rename({k: v for k, v in state.items() if k != "lm_head.weight"}, _NAMES)
    embeddings = renamed.get("language_model.embed_tokens.weight")
    if embeddings is None:
        raise ValueError("the checkpoint holds no token embeddings, so it is no whole model")
    if len(embeddings) != len(tokenizer):
        raise ValueError(
            f"the checkpoint has {len(embeddings)} tokens and the tokenizer of {base!r} with the "
            f"reward tokens {len(tokenizer)}; give the base it was trained from"
        )
    config.text_config.vocab_size = len(embeddings)
    model = build(lambda: Qwen2VLModel(config), renamed, dtype)
    return QwenReader(model, tokenizer, tokenizer.convert_tokens_to_ids(list(reward_tokens)))
