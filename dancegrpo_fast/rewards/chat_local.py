"""Questions with pictures to a Qwen2-VL or Qwen2.5-VL in this process, without a server.

Unlike the two reward models of `qwen` these use Qwen's own three-axis positions. Replies are
greedy: no sampling and no repetition penalty, whatever the folder's generation settings say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from dancegrpo_fast.rewards.chat import TOP, Asked, Model, Reply
from dancegrpo_fast.rewards.preprocess import resize_uint8
from dancegrpo_fast.rewards.qwen import MERGE, patches, smart_size, unfit
from dancegrpo_fast.rewards.transport import Cache, Unanswered
from dancegrpo_fast.rewards.weights import from_folder, read_json

_CLASSES: dict[str, Any] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
}
_PICTURE = "<|image_pad|>"


class LocalChat(Model):
    """A model of a folder.

    Args:
        folder: As `save_pretrained` writes it: configuration, tokenizer, safetensors.
        cache: Replies that are kept.
        max_tokens: Of a reply.
        batch_size: Questions at once.
        dtype: Of the weights.

    Raises:
        ValueError: Another class of model, or weights that do not fit.
    """

    def __init__(
        self, folder: str, *, cache: int, max_tokens: int, batch_size: int, dtype: torch.dtype
    ) -> None:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in _CLASSES:
            raise ValueError(
                f"{folder!r} is a {kind} model; in this process run {' and '.join(_CLASSES)}, "
                "others behind a server: give its address as path"
            )
        self.cache, self.counts = Cache[Reply](cache), Counter[str]()
        self.model = from_folder(_CLASSES[kind], folder, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.picture = self.tokenizer.convert_tokens_to_ids(_PICTURE)
        self.batch_size, self.bounds = batch_size, _bounds(Path(folder))
        ends = self.model.generation_config.eos_token_id
        self.generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=self.tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        # `generate` fills gaps of its argument from the model's own settings, such as sampling.
        self.model.generation_config = self.generation

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked], log_probs: bool) -> Sequence[Reply | Unanswered]:
        """See `Model.answers`."""
        bad = unfit(self.tokenizer, [one.before + one.text for one in asked])
        found: list[Reply | Unanswered] = [Unanswered(bad.get(i, "")) for i in range(len(asked))]
        good = [i for i in range(len(asked)) if i not in bad]
        for start in range(0, len(good), self.batch_size):
            rows = good[start : start + self.batch_size]
            inputs = self._inputs([asked[i] for i in rows])
            replies = self._likely(inputs) if log_probs else self._written(inputs)
            for i, reply in zip(rows, replies, strict=True):
                found[i] = reply
        return found

    def _inputs(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """Tokens, padded on the left, and patches on the model's device."""
        device = self.model.device
        pixels, grids, chats = [], [], []
        for one in asked:
            shown = []
            for picture in one.pictures:
                height, width = picture.shape[-2:]
                size = smart_size(height, width, *self.bounds)
                flat, grid = patches(resize_uint8(picture[None], size).to(device))
                pixels.append(flat)
                grids.append(grid)
                pads = _PICTURE * (math.prod(grid) // MERGE**2)
                shown.append(f"<|vision_start|>{pads}<|vision_end|>")
            chats.append(
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                f"{one.before}{''.join(shown)}{one.text}<|im_end|>\n"
                f"<|im_start|>assistant\n{one.answer}"
            )
        tokens = self.tokenizer(chats, padding=True, padding_side="left", return_tensors="pt")
        ids = tokens["input_ids"].to(device)
        return {
            "input_ids": ids,
            "attention_mask": tokens["attention_mask"].to(device),
            "mm_token_type_ids": (ids == self.picture).int(),
            "pixel_values": torch.cat(pixels).to(self.model.dtype),
            "image_grid_thw": torch.tensor(grids, device=device),
        }

    def _written(self, inputs: dict[str, Tensor]) -> list[Reply]:
        length = inputs["input_ids"].shape[1]
        written = self.model.generate(**inputs, generation_config=self.generation)[:, length:]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Reply(text, ()) for text in texts]

    def _likely(self, inputs: dict[str, Tensor]) -> list[Reply]:
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        top = logits.log_softmax(dim=-1).topk(min(TOP, logits.shape[-1]))
        replies = []
        for values, ids in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            words = [self.tokenizer.decode([token]) for token in ids]
            replies.append(Reply(words[0], tuple(zip(words, values, strict=True))))
        return replies


def _bounds(folder: Path) -> tuple[int, int]:
    """Smallest and largest area of a picture in pixels, from the folder or Qwen's defaults."""
    file = folder / "preprocessor_config.json"
    settings = read_json(file) if file.is_file() else {}
    size = settings.get("size") or {}
    smallest = settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    largest = settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    return int(smallest), int(largest)
