"""Judges with questions of ours: scores, comparisons, and the probability of a yes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.rewards.chat import Asked, pictures_of, yes_probability
from dancegrpo_fast.rewards.files import read
from dancegrpo_fast.rewards.interface import SampleReward, Samples, Scored
from dancegrpo_fast.rewards.judge import NUMBER, Judge, Pairs, Points, kind_of, short, within
from dancegrpo_fast.rewards.judge_prompts import PAIR, SCORE, YES, YES_REFERENCE, fill
from dancegrpo_fast.rewards.transport import Unanswered

logger = logging.getLogger(__name__)

_ARTICLE = {"image": "an image", "video": "a video"}


class JudgeScore(Points):
    """Any model that follows instructions rates the sample, 0 to 10.

    Args:
        path: Address of a server, or a folder.
        question: Instead of ours; with `{prompt}`, and a reply that ends in "Score: X".
        **settings: See `judge.Settings`.
    """

    name = "judge_score"

    def __init__(self, path: str, *, question: str | None = None, **settings: Any) -> None:
        super().__init__(path, settings)
        self.question = _question(question, SCORE)

    def text(self, prompt: str, kind: str) -> str:
        """See `Judge.text`."""
        return fill(self.question.replace("{what}", _ARTICLE[kind]), prompt)

    def value(self, reply: str) -> float:
        """See `Points.value`: the last one counts, reasons may mention others."""
        found = re.findall(rf"Score:\s*\**{NUMBER}", reply)
        return within(found[-1], 0, 10) if found else math.nan


class JudgePair(Pairs):
    """Any model that follows instructions says which of two samples is better.

    Args:
        path: Address of a server, or a folder.
        question: Instead of ours; with `{prompt}`, and a reply with <answer>1, 2 or tie</answer>.
        **settings: See `judge.Settings`.
    """

    name = "judge_pair"

    def __init__(self, path: str, *, question: str | None = None, **settings: Any) -> None:
        super().__init__(path, settings)
        self.question = _question(question, PAIR)

    def text(self, prompt: str, kind: str) -> str:
        """See `Judge.text`."""
        asked = self.question.replace("{what}", kind).replace("{frames}", str(self.frames))
        return fill(asked, prompt)

    def first_wins(self, reply: str) -> float:
        """See `Pairs.first_wins`."""
        found = re.findall(r"<answer>\s*(1|2|tie)\s*</answer>", reply, re.IGNORECASE)
        return {"1": 1.0, "2": 0.0}.get(found[-1], 0.5) if found else 0.5


class YesProbability(Judge, SampleReward):
    """Probability that the model says yes: RewardDance's (arXiv 2509.08826) and OneReward's form.

    With `references` each sample is compared with a picture named by `reference` in its prompt's
    metadata, in both orders: (P(yes | sample, reference) + 1 - P(yes | reference, sample)) / 2.

    Args:
        path: Address of a server, or a folder.
        criterion: What is asked, as one sentence.
        references: Folder of the reference pictures.
        **settings: See `judge.Settings`.
    """

    name = "yes_probability"

    def __init__(
        self,
        path: str,
        *,
        criterion: str = "Does it show everything that the request names, without mistakes?",
        references: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, settings)
        if references is not None and not Path(references).is_dir():
            raise ValueError(f"options.references = {references!r}: is no folder")
        self.criterion, self.references = criterion, references

    def text(self, prompt: str, kind: str) -> str:
        """See `Judge.text`."""
        if self.references is not None:
            question = YES_REFERENCE.replace("{what}", kind)
        else:
            question = YES.replace("{what}", _ARTICLE[kind])
        return fill(question.replace("{criterion}", self.criterion), prompt)

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        pictures, errors = pictures_of(samples, self.frames)
        metadata = samples.metadata or [{}] * len(samples)
        asked: list[Asked] = []
        rows: list[tuple[int, bool]] = []
        for i, prompt in enumerate(samples.prompts):
            if i in errors:
                continue
            text = self.text(prompt, kind_of(samples))
            if self.references is None:
                asked.append(Asked(pictures[i], text))
                rows.append((i, False))
                continue
            try:
                other = (_reference(Path(self.references), metadata[i]),)
            except (ValueError, OSError) as error:
                errors[i] = str(error)
                continue
            asked += [Asked(pictures[i] + other, text), Asked(other + pictures[i], text)]
            rows += [(i, False), (i, True)]
        found: dict[int, list[float]] = {}
        floored = 0
        for (i, turned), reply in zip(rows, self.chat.ask(asked, log_probs=True), strict=True):
            if isinstance(reply, Unanswered):
                errors[i] = str(reply)
            elif (likely := yes_probability(reply.first)) is None:
                errors[i] = f"neither yes nor no is likely: {short(reply.text)}"
            else:
                probability, missed = likely
                floored += missed
                found.setdefault(i, []).append(1 - probability if turned else probability)
        if floored:
            self.chat.counts["floored"] += floored
            logger.warning("%s: yes or no not among the likeliest tokens of %d of %d replies: "
                           "bounded from above", self.name, floored, len(asked))  # fmt: skip
        values = torch.tensor([sum(v) / len(v) if (v := found.get(i)) else math.nan
                               for i in range(len(samples))])  # fmt: skip
        return Scored.of(values, errors)


def _question(given: str | None, ours: str) -> str:
    if given is not None and "{prompt}" not in given:
        raise ValueError("options.question: must hold {prompt}")
    return given or ours


def _reference(folder: Path, metadata: Mapping[str, Any]) -> Tensor:
    """A reference picture [3, H, W] uint8.

    Raises:
        ValueError: None is named, or it lies outside the folder.
        OSError: It cannot be read.
    """
    name = metadata.get("reference")
    if not isinstance(name, str):
        raise ValueError("its prompt's metadata name no reference")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"reference {name!r} lies outside {folder}")
    frames, _ = read(path)
    return frames[0]
