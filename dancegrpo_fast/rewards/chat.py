"""Questions with pictures to an OpenAI-compatible server (vLLM, SGLang)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    """One question: pictures [3, H, W] uint8 in CPU memory, then the text."""

    pictures: tuple[Tensor, ...]
    text: str


@dataclass(frozen=True)
class Reply:
    """What the model said.

    Attributes:
        text: All of it.
        first: Log-probability of the likeliest first tokens; empty if not asked for.
    """

    text: str
    first: tuple[tuple[str, float], ...]


class Chat:
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
        self.cache = Cache[Reply](cache)
        self.model, self.image, self.max_tokens = model, image, max_tokens

    def ask(self, asked: Sequence[Asked], *, log_probs: bool = False) -> list[Reply | Unanswered]:
        """Replies in order; equal questions are asked once."""
        keys = [self._key(one, log_probs) for one in asked]
        known = {key: kept for key in keys if (kept := self.cache.get(key)) is not None}
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in known}
        self.pool.counts["cached"] += len(asked) - len(new)
        questions = [self._question(one, log_probs) for one in new.values()]
        found = self.pool.ask(questions)
        answers: dict[bytes, Reply | Unanswered] = {**known}
        for key, answer in zip(new, found, strict=True):
            answers[key] = answer
            if isinstance(answer, Reply):
                self.cache.put(key, answer)
        return [answers[key] for key in keys]

    def _key(self, asked: Asked, log_probs: bool) -> bytes:
        """Of the pixels, not of the encoded picture: encoding is what a hit saves."""
        digest = hashlib.sha256(json.dumps([asked.text, log_probs]).encode("ascii"))
        for picture in asked.pictures:
            digest.update(str(tuple(picture.shape)).encode("ascii"))
            digest.update(picture.contiguous().numpy().data)
        return digest.digest()

    def _question(self, asked: Asked, log_probs: bool) -> Question[Reply]:
        def body(seconds: float) -> bytes:
            return json.dumps(self._fields(asked, log_probs)).encode("ascii")

        return Question("/v1/chat/completions", body, lambda text: read(text, log_probs))

    def _fields(self, asked: Asked, log_probs: bool) -> dict[str, Any]:
        """The request; the pictures come before the text, as these models were trained."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(picture, self.image)}}
            for picture in asked.pictures
        ]
        content.append({"type": "text", "text": asked.text})
        fields = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            # Said explicitly: servers take other defaults from the model's own configuration.
            "temperature": 0,
            "seed": 0,
            "max_tokens": 1 if log_probs else self.max_tokens,
        }
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


def yes_probability(first: Sequence[tuple[str, float]]) -> tuple[float, bool] | None:
    """P(yes) / (P(yes) + P(no)) of the first token, over the ways to write either.

    A word that is not among the likeliest tokens is less likely than the last of them: it gets
    that one's probability, a bound and no zero.

    Returns:
        The probability, and whether a word was missing; None if both were.
    """
    sums: dict[str, list[float]] = {"yes": [], "no": []}
    for token, log_probability in first:
        # Byte-level vocabularies write a space as one of these.
        word = token.strip(" \t\n.,!\u0120\u2581").lower()
        if word in sums:
            sums[word].append(math.exp(log_probability))
    if not sums["yes"] and not sums["no"]:
        return None
    missed = not (sums["yes"] and sums["no"])
    floor = math.exp(min(log_probability for _, log_probability in first))
    yes, no = (sum(sums[word]) if sums[word] else floor for word in ("yes", "no"))
    return (yes / (yes + no), missed) if yes + no > 0 else None


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
