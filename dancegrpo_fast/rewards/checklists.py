"""DeQA-Score and VisionReward: judges whose score is computed from many words or many answers.

Questions and weights are read from the authors' files at pinned versions; see `templates`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards.chat import Asked, pictures_of, shares
from dancegrpo_fast.rewards.interface import SampleReward, Samples, Scored
from dancegrpo_fast.rewards.judge import Judge, kind_of, short, with_model
from dancegrpo_fast.rewards.preprocess import CLIP_MEAN
from dancegrpo_fast.rewards.templates import Template, constant, load_source
from dancegrpo_fast.rewards.transport import Unanswered

logger = logging.getLogger(__name__)

#: DeQA's ratings and what each is worth.
LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
DEQA = Template(
    source="zhiyuanyou/DeQA-Score @ 8e4abc82, src/evaluate/scorer.py",
    url="https://raw.githubusercontent.com/zhiyuanyou/DeQA-Score/"
    "8e4abc826ed84a15f7c0bc3ac119e8b9245c7b2f/src/evaluate/scorer.py",
    member="",
    sha256="fd0eba83e1b0f9a34fe9b19e0474508ade6f71fe397a950017a4f6c78cd1fc11",
    constants=("prompt",),
)


class Deqa(Judge, SampleReward):
    """DeQA-Score's quality of a picture (arXiv 2501.11561), 1 to 5; the prompt is not read.

    The mean of the five ratings under the model's distribution of the word that ends the answer.
    Videos are worth the mean over their frames.

    Args:
        path: Address of a server, or a folder.
        template: The authors' `scorer.py`; fetched if null.
        **settings: See `judge.Settings`.
    """

    name = "deqa"

    def __init__(self, path: str, *, template: str | None = None, **settings: Any) -> None:
        super().__init__(path, with_model(path, "DeQA-Score") | settings)
        official = "".join(constant(load_source(DEQA, template), n) for n in DEQA.constants)
        found = re.fullmatch(r"USER: (.*)\n<\|image\|>\nASSISTANT: (.*)", official, re.DOTALL)
        if found is None:
            raise ValueError("the template file's prompt is not of the form USER, image, ASSISTANT")
        self.question, self.answer = found[1], found[2]

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        pictures, errors = pictures_of(samples, self.frames)
        rows = [i for i in range(len(samples)) if i not in errors for _ in pictures[i]]
        shown = [square(p) for i, some in enumerate(pictures) if i not in errors for p in some]
        asked = [Asked((p,), "", f"{self.question}\n", self.answer) for p in shown]
        found: dict[int, list[float]] = {}
        floored = 0
        for i, reply in zip(rows, self.chat.ask(asked, log_probs=True), strict=True):
            if isinstance(reply, Unanswered):
                errors[i] = str(reply)
            elif (divided := shares(reply.first, tuple(LEVELS))) is None:
                errors[i] = f"no rating is likely: {short(reply.text)}"
            else:
                floored += divided[1]
                worth = zip(divided[0], LEVELS.values(), strict=True)
                found.setdefault(i, []).append(sum(share * value for share, value in worth))
        if floored:
            self.chat.counts["floored"] += floored
            logger.warning("%s: a rating is not among the likeliest tokens of %d of %d replies: "
                           "bounded from above", self.name, floored, len(asked))  # fmt: skip
        values = [sum(v) / len(v) if (v := found.get(i)) else math.nan for i in range(len(samples))]
        return Scored.of(torch.tensor(values), errors)


def square(picture: Tensor) -> Tensor:
    """A picture [3, H, W] uint8 in the middle of a square of CLIP's mean colour."""
    height, width = picture.shape[-2:]
    side = max(height, width)
    ground = torch.tensor([int(value * 255) for value in CLIP_MEAN], dtype=torch.uint8)
    whole = ground.view(3, 1, 1).repeat(1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    whole[:, top : top + height, left : left + width] = picture
    return whole


# ---- VisionReward --------------------------------------------------------------------------------

_COMMIT = "511960d61a777b2008cd486a85a090ba96792a32"


def _vision(path: str, sha256: str) -> Template:
    return Template(
        source=f"THUDM/VisionReward @ {_COMMIT[:8]}, {path}",
        url=f"https://raw.githubusercontent.com/THUDM/VisionReward/{_COMMIT}/{path}",
        member="",
        sha256=sha256,
        constants=(),
    )


#: Questions and weights, by kind of sample.
VISION_REWARD: dict[str, tuple[Template, Template]] = {
    "image": (
        _vision(
            "VisionReward_Image/VisionReward_image_qa_select.txt",
            "2b603df2f4e30fe8879d85e1bf38f30ad8292278b939e31bf88bf7cf9ff22c33",
        ),
        _vision(
            "VisionReward_Image/weight_select.json",
            "4b60192fa96e0dda0c9101ed61141f89b85bb9669479e3b8eb42cc10611a68c9",
        ),
    ),
    "video": (
        _vision(
            "VisionReward_Video/VisionReward_video_qa_select.txt",
            "79de7f5e135a7957144826056a83be63fd6ddcbc61ba6460e09a0b09da580ee3",
        ),
        _vision(
            "VisionReward_Video/weight.json",
            "0c6367f244ae64fa881e93f0033f2a4362176893ed2f946223ec64a57e3c9204",
        ),
    ),
}
#: Of the images' 30 questions: the first three ask whether there is a body, a face, hands, and have
#: no weight; what depends on an answer of no counts nothing.
MASKS = {0: (22, 23, 24, 28, 29), 1: (25, 26), 2: (27,)}
MAX_FRAMES = 24


@dataclass(frozen=True)
class Checklist:
    """Questions with `[[prompt]]`, the weight of each, and the weight of the alignment."""

    questions: tuple[str, ...]
    weights: tuple[float, ...]
    intercept: float = 0.0
    alignment: float = 0.0

    @classmethod
    def load(cls, kind: str, folder: str | None) -> Checklist:
        """The authors' list for images or videos; from a copy of their repository, if given."""
        texts = []
        for template in VISION_REWARD[kind]:
            path = template.url.partition(f"{_COMMIT}/")[2]
            texts.append(load_source(template, None if folder is None else Path(folder) / path))
        weights = json.loads(texts[1])
        if kind == "video":
            # Officially a question keeps the end of its line.
            return cls(tuple(texts[0].splitlines(keepends=True)), tuple(weights))
        questions = tuple(line.strip() for line in texts[0].splitlines())
        alignment, *others = weights["coef"]
        all_weights = (0.0,) * len(MASKS) + tuple(others)
        return cls(questions, all_weights, weights["intercept"][0], alignment)

    def score(self, answers: Sequence[bool], kind: str) -> float:
        """Of one sample's answers, without the alignment.

        A yes is 1 and a no -1. Videos: the mean of answers times weights. Images: their sum, with
        the answers of `MASKS`, and the intercept.
        """
        signs = [1.0 if answer else -1.0 for answer in answers]
        if kind == "image":
            for asked, depending in MASKS.items():
                for i in depending:
                    signs[i] *= answers[asked]
        total = sum(sign * weight for sign, weight in zip(signs, self.weights, strict=True))
        return total + self.intercept if kind == "image" else total / len(signs)


class VisionReward(Judge, SampleReward):
    """VisionReward's checklist (arXiv 2412.21059): 30 (videos: 29) questions, answered yes or no.

    An image's official score has one more term, 2.35 times how well the picture fits the prompt by
    another model (CLIP-FlanT5-XXL), which no chat gives: `alignment` names a reward server that
    holds a stand-in with values in [0, 1]; without one the term is left out.

    Args:
        path: Address of a server, or a folder.
        template: A copy of the authors' repository; what it needs of it is fetched if null.
        fps: Frames per second of the videos, where the caller does not know.
        alignment: Address of a server of `dancegrpo-fast serve-reward` with one reward.
        **settings: See `judge.Settings`; `frames` is at most 24, one a second.
    """

    name = "vision_reward"

    def __init__(
        self,
        path: str,
        *,
        template: str | None = None,
        fps: Annotated[float, Field(gt=0)] | None = None,
        alignment: str | None = None,
        **settings: Any,
    ) -> None:
        defaults = {"frames": MAX_FRAMES, "max_tokens": 4}
        super().__init__(path, defaults | with_model(path, "VisionReward") | settings)
        self.lists, problems = {}, []
        for kind in VISION_REWARD:
            try:
                self.lists[kind] = Checklist.load(kind, template)
            except ValueError as error:
                problems.append(f"{kind}s: {error}")
        if not self.lists:
            raise ValueError("; ".join(problems))
        self.fps, self.alignment = fps, None
        if alignment is not None:
            from dancegrpo_fast.rewards.remote import Remote

            self.alignment = Remote(alignment)

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        kind = kind_of(samples)
        if kind not in self.lists:
            raise UserError(f"{self.name}: options.template holds no checklist for {kind}s")
        checklist = self.lists[kind]
        pictures, errors = pictures_of(self._seconds(samples), self.frames)
        good = [i for i in range(len(samples)) if i not in errors]
        asked = [
            Asked(pictures[i], question.replace("[[prompt]]", samples.prompts[i]))
            for i in good
            for question in checklist.questions
        ]
        replies = iter(self.chat.ask(asked))
        values = torch.full((len(samples),), math.nan)
        for i in good:
            answers = []
            for _ in checklist.questions:
                reply = next(replies)
                if isinstance(reply, Unanswered):
                    errors[i] = str(reply)
                elif (said := re.match(r"\W*(yes|no)\b", reply.text, re.IGNORECASE)) is None:
                    errors[i] = f"neither yes nor no: {short(reply.text)}"
                else:
                    answers.append(said[1].lower() == "yes")
            if i not in errors:
                values[i] = checklist.score(answers, kind)
        if self.alignment is not None and kind == "image":
            fit = self.alignment.score(samples)
            values = values + checklist.alignment * fit.values
            errors = {i: why for i, why in enumerate(fit.errors) if why} | errors
        return Scored.of(values, errors)

    def _seconds(self, samples: Samples) -> Samples:
        """The frames nearest to each whole second, for videos."""
        if samples.videos.shape[1] == 1:
            return samples
        fps = samples.fps or self.fps
        if fps is None:
            raise UserError(
                f"{self.name}: nobody says how many frames a second the videos have; set "
                "options.fps"
            )
        chosen = whole_seconds(samples.videos.shape[1], fps)[: self.frames]
        return Samples(samples.videos[:, chosen], samples.prompts)


def whole_seconds(count: int, fps: float) -> list[int]:
    """Positions of the frames nearest to 0, 1, 2, ... seconds, the earlier of two alike."""
    starts = [i / fps for i in range(count)]
    return [
        min(range(count), key=lambda i: abs(starts[i] - second))
        for second in range(round(starts[-1]) + 1)
    ]

