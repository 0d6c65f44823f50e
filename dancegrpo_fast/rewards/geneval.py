"""GenEval (Ghosh et al. 2023): are the things there, as many, so coloured, and so placed?

The detector is Mask2Former in transformers' layout, without mmdet; colours are told by CLIP on what
a mask leaves of the picture. What is asked comes from GenEval's metadata in the prompts' file:
`{"tag": ..., "include": [{"class": ..., "count": ..., "color"?: ..., "position"?: ["left of", 0]}],
"exclude": [{"class": ..., "count": ...}]}`, which Flow-GRPO's files have, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

from dancegrpo_fast.rewards.clip import Clip, Dtype, load_clip
from dancegrpo_fast.rewards.interface import SpecReward, WithWeights
from dancegrpo_fast.rewards.preprocess import to_uint8
from dancegrpo_fast.rewards.weights import DTYPES, from_folder

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
#: GenEval's names of COCO's classes, where they differ.
NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
SURE, SURE_OF_COUNTS = 0.3, 0.9  # Detections below are dropped; the second where one counts.
MOST = 16  # Detections of a class.
APART = 0.1  # Of the sizes of two things: closer centres stand in no relation.
RELATIONS = ("left of", "right of", "above", "below")
GROUND = 153  # Grey where the mask is not.


@dataclass(frozen=True)
class Thing:
    """A detection: box (left, top, right, bottom) in pixels, mask [H, W] bool, confidence."""

    box: tuple[int, int, int, int]
    mask: Tensor
    sure: float


#: Colours of things of a class, by name.
Colours = Callable[[Sequence[Thing], str], list[str]]


class GenEval(WithWeights, SpecReward):
    """How far a picture has what its metadata ask for; videos: the mean over their frames.

    Args:
        path: Folder or hub id of a Mask2Former trained on COCO's instances.
        clip: Tells colours.
        measure: `clauses` is Flow-GRPO's training reward, the mean over counts (1 - |found - asked|
            / asked, negative for more than twice as many), colours and positions; `strict` is 1
            if all is exactly so; `benchmark` is GenEval's own correctness, where more are allowed
            unless the metadata exclude them.
        dtype: Of both models.
    """

    name = "geneval"

    def __init__(
        self,
        path: str = "facebook/mask2former-swin-small-coco-instance",
        *,
        clip: str = "openai/clip-vit-large-patch14",
        measure: Literal["clauses", "strict", "benchmark"] = "clauses",
        dtype: Dtype = "float32",
    ) -> None:
        self.detector = from_folder(Mask2FormerForUniversalSegmentation, path, DTYPES[dtype])
        self.processor = Mask2FormerImageProcessorPil.from_pretrained(path)
        self.clip, self.measure = load_clip(clip, dtype=dtype), measure
        labels = self.detector.config.id2label
        self.classes = [NAMES.get(labels[i], labels[i]) for i in range(len(labels))]

    def modules(self) -> list[nn.Module]:
        """See `WithWeights.modules`."""
        return [self.detector, self.clip.model]

    def spec(self, prompt: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """See `SpecReward.spec`."""
        if not metadata.get("include"):
            raise ValueError("its prompt's metadata have no GenEval `include`")
        for clause in [*metadata["include"], *(metadata.get("exclude") or ())]:
            if not isinstance(clause, Mapping):
                raise ValueError(f"GenEval: clause {clause!r} is no mapping")
            name, count = clause.get("class"), clause.get("count")
            if name not in self.classes:
                raise ValueError(f"GenEval: class {name!r} is none of the detector's")
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"GenEval: count {count!r} must be 1 or more")
            if clause.get("color", COLOURS[0]) not in COLOURS:
                raise ValueError(f"GenEval: colour {clause['color']!r} is none of {COLOURS}")
        for number, clause in enumerate(metadata["include"]):
            relation, target = clause.get("position") or ("above", None)
            if relation not in RELATIONS or target not in (None, *range(number)):
                raise ValueError(f"GenEval: position {clause['position']} names no earlier clause")
        return dict(metadata)

    def score_frames(self, images: Tensor, spec: Any) -> Tensor:
        """See `SpecReward.score_frames`."""
        least = SURE_OF_COUNTS if spec.get("tag") == "counting" else SURE
        pictures = to_uint8(images).cpu()
        scores = []
        for picture, things in zip(pictures, self.detect(pictures, least), strict=True):

            def colours(some: Sequence[Thing], name: str, picture: Tensor = picture) -> list[str]:
                return colours_of(self.clip, picture, some, name)

            if self.measure == "benchmark":
                scores.append(float(correct(things, spec, colours)))
                continue
            found = clauses(things, spec, colours)
            whole = float(all(value == 1 for value in found))
            scores.append(whole if self.measure == "strict" else sum(found) / len(found))
        return torch.tensor(scores)

    def detect(self, pictures: Tensor, least: float) -> list[dict[str, list[Thing]]]:
        """Things by class, the surest first, of pictures [F, 3, H, W] uint8."""
        rows = [picture.numpy() for picture in pictures]
        inputs = self.processor(rows, return_tensors="pt", input_data_format="channels_first")
        pixels = inputs["pixel_values"].to(self.detector.device, self.detector.dtype)
        seen = self.detector(pixel_values=pixels)
        found, sizes = [], [pixels.shape[-2:], pictures.shape[-2:]]
        for words, shapes in zip(
            seen.class_queries_logits.float(), seen.masks_queries_logits.float(), strict=True
        ):
            found.append(self._things(words, shapes, sizes, least))
        return found

    def _things(
        self, words: Tensor, shapes: Tensor, sizes: Sequence[Sequence[int]], least: float
    ) -> dict[str, list[Thing]]:
        """From class logits [Q, classes + 1] and mask logits [Q, h, w] of one picture.

        Masks are resized to the size of the input and then of the picture, as mmdet does.
        """
        classes = words.shape[1] - 1
        sure, places = words.softmax(dim=1)[:, :-1].flatten().topk(min(100, len(words) * classes))
        things: dict[str, list[Thing]] = {}
        for value, place in zip(sure.tolist(), places.tolist(), strict=True):
            if value <= least:  # The product below is no larger.
                break
            shape = shapes[place // classes][None, None]
            for size in sizes:
                shape = F.interpolate(shape, tuple(size), mode="bilinear")
            shape = shape[0, 0]
            mask = shape > 0
            if not bool(mask.any()):
                continue
            thing = Thing(box_of(mask), mask.cpu(), value * float(shape[mask].sigmoid().mean()))
            if thing.sure > least:
                things.setdefault(self.classes[place % classes], []).append(thing)
        return {
            name: sorted(some, key=lambda thing: -thing.sure)[:MOST]
            for name, some in things.items()
        }


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is set in a mask [H, W]; the last two are outside."""
    x, y = (mask.any(dim=k).nonzero().flatten().tolist() for k in (0, 1))
    return x[0], y[0], x[-1] + 1, y[-1] + 1


def colours_of(clip: Clip, picture: Tensor, things: Sequence[Thing], name: str) -> list[str]:
    """The likeliest colour of each thing in a picture [3, H, W] uint8, by CLIP."""
    texts = [
        text
        for colour in COLOURS
        for text in (
            f"a photo of a {colour} {name}",
            f"a photo of a {colour}-colored {name}",
            f"a photo of a {colour} object",
        )
    ]
    words = clip.text_features(texts).view(len(COLOURS), 3, -1).mean(dim=1)
    words = F.normalize(words, dim=-1)
    found = []
    for thing in things:
        left, top, right, bottom = thing.box
        alone = torch.where(thing.mask, picture, torch.full_like(picture, GROUND))
        seen = clip.image_features(alone[None, :, top:bottom, left:right])
        found.append(COLOURS[int((seen @ words.T).argmax())])
    return found


def relations(a: Thing, b: Thing) -> set[str]:
    """Where `a` lies to `b`; nothing if their centres are too close for their sizes."""
    offset, reach = [], []
    for k in (0, 1):
        (low, high), (other_low, other_high) = (a.box[k::2], b.box[k::2])
        offset.append((low + high - other_low - other_high) / 2)
        reach.append(APART * (high - low + other_high - other_low))
    length = math.hypot(*offset)
    left = [math.copysign(max(abs(o) - r, 0.0), o) for o, r in zip(offset, reach, strict=True)]
    if not length or max(map(abs, left)) < 1e-3:
        return set()
    x, y = (value / length for value in left)
    said = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in said.items() if holds}


def clauses(
    things: Mapping[str, Sequence[Thing]], spec: Mapping[str, Any], colours: Colours
) -> list[float]:
    """What each count, colour and position is worth; those of a wrong count are worth 0.

    A wrong position is worth 0 here. In Flow-GRPO's server it adds a 0 and then a 1, by mistake.
    """
    values: list[float] = []
    matched: list[Sequence[Thing] | None] = []
    for clause in spec["include"]:
        found, count = things.get(clause["class"], ()), clause["count"]
        values.append(1 - abs(count - len(found)) / count)
        good = len(found) == count
        if not good and ("color" in clause or "position" in clause):
            values.append(0.0)
        if good and "color" in clause:
            right = colours(found, clause["class"]).count(clause["color"])
            values.append(1 - abs(count - right) / count)
            good = right == count
        if good and "position" in clause:
            good = _placed(found, clause["position"], matched)
            values.append(float(good))
        matched.append(found if good else None)
    return values


def correct(
    things: Mapping[str, Sequence[Thing]], spec: Mapping[str, Any], colours: Colours
) -> bool:
    """GenEval's correctness: at least as many, the surest of them coloured and placed as asked."""
    matched: list[Sequence[Thing] | None] = []
    for clause in spec["include"]:
        found = things.get(clause["class"], ())[: clause["count"]]
        good = len(found) == clause["count"]
        if good and "color" in clause:
            good = colours(found, clause["class"]).count(clause["color"]) == clause["count"]
        if good and "position" in clause:
            good = _placed(found, clause["position"], matched)
        matched.append(found if good else None)
    too_many = any(
        len(things.get(clause["class"], ())) >= clause["count"]
        for clause in spec.get("exclude") or ()
    )
    return not too_many and all(found is not None for found in matched)


def _placed(
    found: Sequence[Thing], position: Sequence[Any], matched: Sequence[Sequence[Thing] | None]
) -> bool:
    """Whether all stand in a relation to all of an earlier clause's, if that one holds."""
    relation, target = position
    others = matched[target]
    return others is not None and all(relation in relations(a, b) for a in found for b in others)
