"""Can the text that the prompt quotes be read in the picture?"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.rewards.interface import SpecReward
from dancegrpo_fast.rewards.preprocess import to_uint8

_QUOTED = re.compile('"([^"]+)"|\u201c([^\u201d]+)\u201d')


def distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def plain(text: str) -> str:
    """Without spaces and capitals, which OCR and typesetting do not keep."""
    return "".join(text.split()).lower()


def similarity(read: str, wanted: str) -> float:
    """Flow-GRPO's score: 1 if `wanted` stands in `read`, else 1 - distance / length, at least 0."""
    read, wanted = plain(read), plain(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(distance(read, wanted), len(wanted)) / len(wanted)


class Ocr(SpecReward):
    """Edit similarity of what is read and the first text in double quotes (or `text` of metadata).

    The reader is RapidOCR on the CPU: slow (about a second per image and core).
    """

    name = "ocr"

    def __init__(self) -> None:
        self.read = rapid_reader()

    def spec(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """See `SpecReward.spec`."""
        match = _QUOTED.search(prompt)
        wanted = str(metadata.get("text") or (match and (match[1] or match[2])) or "")
        if not plain(wanted):
            raise ValueError("the prompt quotes no text and its metadata has none")
        return wanted

    def score_frames(self, images: Tensor, spec: str) -> Tensor:
        """See `SpecReward.score_frames`."""
        return torch.tensor([similarity(self.read(p), spec) for p in to_uint8(images).cpu()])


def rapid_reader() -> Callable[[Tensor], str]:
    """Reads all text of an image [3, H, W] uint8, box after box.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        package = importlib.import_module("rapidocr_onnxruntime")
    except ImportError as error:
        raise ImportError(
            f"{error}; install it with: pip install 'dancegrpo-fast[ocr]' (Python below 3.13)"
        ) from error
    engine = package.RapidOCR()

    def read(image: Tensor) -> str:
        bgr = image.flip(0).permute(1, 2, 0).contiguous().numpy()  # OpenCV's order.
        found, _ = engine(bgr)
        return "".join(text for _, text, _ in found or ())

    return read
