"""Vision-language models as judges: what they have in common.

Pairwise judges (`compare`) become rewards by `win_rate`, whose two orders also correct a judge's
liking for the first picture. A score that cannot be read out of a reply is NaN; a comparison whose
reply says neither is a tie; no reply is NaN.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dancegrpo_fast.rewards.chat import Asked, Chat, Model, Reply, pictures_of
from dancegrpo_fast.rewards.interface import SampleReward, Samples, Scored
from dancegrpo_fast.rewards.remote import Count, Seconds
from dancegrpo_fast.rewards.transport import Unanswered
from dancegrpo_fast.rewards.weights import DTYPES

logger = logging.getLogger(__name__)

#: A number in a reply.
NUMBER = r"([0-9]+(?:\.[0-9]+)?)"


class Settings(BaseModel):
    """Options that every judge takes, beside its own.

    The first six are for servers, `dtype` and `batch_size` for a model in this process.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = "UnifiedReward"
    """The model's name on the server."""
    others: list[str] = []
    """Addresses of more servers with the same model."""
    token_file: str | None = None
    """Holds the servers' key; without it `DANCEGRPO_FAST_TOKEN` of the environment."""
    seconds: Seconds = 600.0
    """Longest time for one batch."""
    concurrency: Count = 32
    """Requests at once."""
    image: Literal["png", "jpeg"] = "png"
    """How pictures are sent; jpeg has quality 95."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights."""
    batch_size: Count = 4
    """Questions at once."""
    cache: Annotated[int, Field(ge=0)] = 4096
    """Replies that are kept, by pixels and text."""
    frames: Count = 8
    """Most pictures of a video."""
    max_tokens: Count = 1024
    """Of a reply; a chain of thought that is cut off is no answer."""


_SERVERS = {"model", "others", "token_file", "seconds", "concurrency", "image"}
_HERE = {"dtype", "batch_size"}


class Judge:
    """A model behind a server, or of a folder in this process.

    Args:
        path: Address of a server, or a folder.
        settings: Those of `Settings` that are not the default.

    Raises:
        ValueError: A setting that does not exist or has no effect, or a value it cannot have.
    """

    name: str

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        try:
            given = Settings(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            known = f"; known: {', '.join(Settings.model_fields)}"
            more = known if first["type"] == "extra_forbidden" else ""
            raise ValueError(f"options.{first['loc'][0]}: {first['msg']}{more}") from None
        self.frames = given.frames
        served = is_address(path)
        if idle := sorted(given.model_fields_set & (_HERE if served else _SERVERS)):
            where = "a server" if served else "a model in this process"
            raise ValueError(f"options.{idle[0]}: has no effect on {where}; leave it out")
        self.chat = _served(path, given) if served else self._local(path, given)

    def _local(self, path: str, given: Settings) -> Model:
        from dancegrpo_fast.rewards.chat_local import LocalChat

        if not Path(path).is_dir():
            raise ValueError(
                f"path = {path!r}: is neither an address such as http://127.0.0.1:8000 nor a folder"
            )
        chat = LocalChat(
            path, cache=given.cache, max_tokens=given.max_tokens, batch_size=given.batch_size,
            dtype=DTYPES[given.dtype],
        )  # fmt: skip
        # Only with these it is `Movable`: behind a server there are no weights to move.
        self.offload, self.place = False, chat.model.to
        return chat

    def text(self, prompt: str, kind: str) -> str:
        """What is asked about samples of a prompt; `kind` is image or video."""
        raise NotImplementedError


class Points(Judge, SampleReward):
    """Scores read out of replies."""

    def value(self, reply: str) -> float:
        """The score in a reply; NaN if there is none."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        pictures, errors = pictures_of(samples, self.frames)
        good = [i for i in range(len(samples)) if i not in errors]
        asked = [Asked(pictures[i], self.text(samples.prompts[i], kind_of(samples))) for i in good]
        values = torch.full((len(samples),), math.nan)
        for i, reply in zip(good, self.chat.ask(asked), strict=True):
            if isinstance(reply, Unanswered):
                errors[i] = str(reply)
                continue
            values[i] = self.value(reply.text)
            if values[i].isnan():
                errors[i] = f"no score in the reply {short(reply.text)}"
        return Scored.of(values, errors)


class Pairs(Judge):
    """Comparisons read out of replies."""

    def first_wins(self, reply: str) -> float:
        """How far the first wins, in [0, 1]; 0.5 for a reply that says neither."""
        raise NotImplementedError

    @torch.no_grad()
    def compare(self, first: Samples, second: Samples) -> Tensor:
        """See `Judge.compare`."""
        (ours, bad), (theirs, worse) = (pictures_of(s, self.frames) for s in (first, second))
        won = torch.full((len(first),), math.nan)
        good = [i for i in range(len(first)) if i not in bad and i not in worse]
        kind = kind_of(first)
        asked = [Asked(ours[i] + theirs[i], self.text(first.prompts[i], kind)) for i in good]
        replies = self.chat.ask(asked)
        lost = [reply for reply in replies if isinstance(reply, Unanswered)]
        if lost:
            logger.warning("%s: %d pairs without a reply: %s", self.name, len(lost), lost[0])
        for i, reply in zip(good, replies, strict=True):
            if isinstance(reply, Reply):
                won[i] = self.first_wins(reply.text)
        return won


def is_address(path: str) -> bool:
    """Of a server; anything else is a folder."""
    return path.startswith(("http://", "https://"))


def with_model(path: str, model: str) -> dict[str, Any]:
    """The setting of a judge's usual name on its server."""
    return {"model": model} if is_address(path) else {}


def _served(path: str, given: Settings) -> Chat:
    return Chat(
        [path, *given.others], given.model, token_file=given.token_file, seconds=given.seconds,
        concurrency=given.concurrency, cache=given.cache, image=given.image,
        max_tokens=given.max_tokens,
    )  # fmt: skip


def kind_of(samples: Samples) -> str:
    """image or video."""
    return "image" if samples.videos.shape[1] == 1 else "video"


def within(text: str, low: float, high: float) -> float:
    """The number, or NaN if it lies outside."""
    return value if low <= (value := float(text)) <= high else math.nan


def better(text: str) -> float:
    """ "Image 1 is better" is 1, "Video 2 is better" 0, both or neither a tie."""
    said = set(re.findall(r"(?:image|video)\s*([12])\s+is\s+better", text, re.IGNORECASE))
    return {("1",): 1.0, ("2",): 0.0}.get(tuple(said), 0.5)


def short(text: str) -> str:
    """The beginning and the end, quoted."""
    return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}")
