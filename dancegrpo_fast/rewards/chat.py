"""Questions with pictures to an OpenAI-compatible server (vLLM, SGLang)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from dancegrpo_fast.rewards.interface import Samples, checked_pixels
from dancegrpo_fast.rewards.transport import Cache, Pool, Question, Unanswered, read_token
from dancegrpo_fast.rewards.wire import parse_json

#: What servers return at most unless told otherwise (vLLM's --max-logprobs).
TOP = 20


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        pictures: [3, H, W] uint8 in CPU memory.
        text: After the pictures.
        before: Text before the pictures.
        answer: How the answer begins; the model continues it.
    """

    pictures: tuple[Tensor, ...]
    text: str
    before: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Reply:
    """What the model said.

    Attributes:
        text: All of it.
        first: Log-probability of the likeliest first tokens; empty if not asked for.
    """

    text: str
    first: tuple[tuple[str, float], ...]


class Model(ABC):
    """What can be asked.

    Attributes:
        cache: Replies that are kept, by pixels and text.
        counts: Replies from the cache (`cached`), and what judges count.
    """

    cache: Cache[Reply]
    counts: Counter[str]

    def ask(self, asked: Sequence[Asked], *, log_probs: bool = False) -> list[Reply | Unanswered]:
        """Replies in order; equal questions are asked once."""
        keys = _keys(asked, log_probs)
        known = {key: kept for key in keys if (kept := self.cache.get(key)) is not None}
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in known}
        self.counts["cached"] += len(asked) - len(new)
        answers: dict[bytes, Reply | Unanswered] = {**known}
        found = self.answers(list(new.values()), log_probs)
        for key, answer in zip(new, found, strict=True):
            answers[key] = answer
            if isinstance(answer, Reply):
                self.cache.put(key, answer)
        return [answers[key] for key in keys]

    @abstractmethod
    def answers(self, asked: Sequence[Asked], log_probs: bool) -> Sequence[Reply | Unanswered]:
        """Replies to questions that all differ; `log_probs` wants the first token's only."""


def _keys(asked: Sequence[Asked], log_probs: bool) -> list[bytes]:
    """Of the pixels, not of encoded pictures: encoding is what a hit saves."""

    @lru_cache(maxsize=256)  # Many questions may be about the same pictures.
    def pixels(picture: Tensor) -> bytes:
        shape = str(tuple(picture.shape)).encode("ascii")
        return hashlib.sha256(shape + picture.contiguous().numpy().tobytes()).digest()

    keys = []
    for one in asked:
        text = json.dumps([one.text, one.before, one.answer, log_probs])
        digest = hashlib.sha256(text.encode("ascii"))
        for picture in one.pictures:
            digest.update(pixels(picture))
        keys.append(digest.digest())
    return keys


class Chat(Model):
    """A model behind one server or several.

    Args:
        urls: Addresses, with or without /v1.
        model: Its name on the server.
        token_file: Holds the key.
        seconds: Longest time for one call of `ask`.
        concurrency: Requests at once.
        cache: Replies that are kept.
        image: How pictures are sent: `png` keeps them, `jpeg` (quality 95) is what some judges
            were trained on.
        max_tokens: Of a reply.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        token_file: str | None,
        seconds: float,
        concurrency: int,
        cache: int,
        image: Literal["png", "jpeg"],
        max_tokens: int,
    ) -> None:
        roots = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.pool = Pool(roots, read_token(token_file), seconds, concurrency)
        self.cache, self.counts = Cache[Reply](cache), self.pool.counts
        self.model, self.image, self.max_tokens = model, image, max_tokens

    def answers(self, asked: Sequence[Asked], log_probs: bool) -> Sequence[Reply | Unanswered]:
        """See `Model.answers`."""
        # A picture that many questions show is encoded once; the newest are kept.
        encode = lru_cache(maxsize=256)(lambda picture: data_url(picture, self.image))
        return self.pool.ask([self._question(one, log_probs, encode) for one in asked])

    def _question(
        self, asked: Asked, log_probs: bool, encode: Callable[[Tensor], str]
    ) -> Question[Reply]:
        def body(seconds: float) -> bytes:
            return json.dumps(self._fields(asked, log_probs, encode)).encode("ascii")

        return Question("/v1/chat/completions", body, lambda text: read(text, log_probs))

    def _fields(
        self, asked: Asked, log_probs: bool, encode: Callable[[Tensor], str]
    ) -> dict[str, Any]:
        """The request."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": encode(picture)}}
            for picture in asked.pictures
        ]
        if asked.before:
            content.insert(0, {"type": "text", "text": asked.before})
        if asked.text:
            content.append({"type": "text", "text": asked.text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if asked.answer:
            messages.append({"role": "assistant", "content": asked.answer})
        fields = {
            "model": self.model,
            "messages": messages,
            # Said explicitly: servers take other defaults from the model's own configuration.
            "temperature": 0,
            "seed": 0,
            "max_tokens": 1 if log_probs else self.max_tokens,
        }
        if asked.answer:  # As vLLM and SGLang name it.
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        return fields | ({"logprobs": True, "top_logprobs": TOP} if log_probs else {})


def data_url(picture: Tensor, image: str) -> str:
    """A picture [3, H, W] uint8 as a data URL."""
    buffer = io.BytesIO()
    pillow = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    if image == "png":
        pillow.save(buffer, "PNG", compress_level=1)  # Higher levels take twice the time.
    else:
        pillow.save(buffer, "JPEG", quality=95)
    return f"data:image/{image};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def read(answer: bytes, log_probs: bool) -> Reply:
    """A reply out of a server's answer.

    Raises:
        ValueError: It holds none.
    """
    fields = parse_json(answer)
    try:
        choice = fields["choices"][0]
        text = choice["message"]["content"]
        first = choice["logprobs"]["content"][0]["top_logprobs"] if log_probs else []
        pairs = tuple((entry["token"], float(entry["logprob"])) for entry in first)
    except (KeyError, IndexError, TypeError) as error:
        what = "log-probabilities" if log_probs else "text"
        raise ValueError(f"no chat completion with {what} ({type(error).__name__})") from None
    if not isinstance(text, str):
        raise ValueError("the reply has no text")
    if log_probs and (not pairs or not all(isinstance(t, str) and p <= 0 for t, p in pairs)):
        raise ValueError("the log-probabilities are none")
    return Reply(text, pairs)


def shares(
    first: Sequence[tuple[str, float]], words: Sequence[str]
) -> tuple[list[float], bool] | None:
    """How the first token's probability is divided among some words, over the ways to write each.

    A word that is not among the likeliest tokens is less likely than the last of them: it gets
    that one's probability, a bound and no zero.

    Returns:
        The words' shares, whose sum is 1, and whether a word was missing; None if all were.
    """
    sums: dict[str, list[float]] = {word: [] for word in words}
    for token, log_probability in first:
        # Byte-level vocabularies write a space as one of these.
        word = token.strip(" \t\n.,!\u0120\u2581").lower()
        if word in sums:
            sums[word].append(math.exp(log_probability))
    if not any(sums.values()):
        return None
    floor = math.exp(min(log_probability for _, log_probability in first))
    values = [sum(found) if found else floor for found in sums.values()]
    total = sum(values)
    return ([value / total for value in values], not all(sums.values())) if total > 0 else None


def yes_probability(first: Sequence[tuple[str, float]]) -> tuple[float, bool] | None:
    """P(yes) / (P(yes) + P(no)) of the first token, and whether one was missing; see `shares`."""
    found = shares(first, ("yes", "no"))
    return None if found is None else (found[0][0], found[1])


def pictures_of(samples: Samples, frames: int) -> tuple[list[tuple[Tensor, ...]], dict[int, str]]:
    """Each sample's pictures, evenly chosen frames of a video; reasons of those without any.

    Args:
        samples: N samples.
        frames: Most pictures of a video: positions int(i * F / frames).
    """
    videos, errors = checked_pixels(samples.videos)
    count = videos.shape[1]
    chosen = [i * count // frames for i in range(frames)] if count > frames else list(range(count))
    videos = videos[:, chosen]
    if videos.dtype != torch.uint8:
        videos = (videos * 255).round().clamp(0, 255).to(torch.uint8)
    return [tuple(video) for video in videos.cpu()], errors
