"""A reward that another process computes: the client of `dancegrpo-fast serve-reward`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from dancegrpo_fast.rewards import wire
from dancegrpo_fast.rewards.interface import SampleReward, Samples, Scored, checked_pixels
from dancegrpo_fast.rewards.transport import Cache, Pool, Question, Unanswered, read_token

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Remote(SampleReward):
    """Scores from servers; what they do not answer in time is NaN with the reason.

    Args:
        path: Address of a server, such as http://127.0.0.1:8000.
        reward: Which of its rewards; may be left out if it has one.
        others: Addresses of more servers that hold the same reward.
        token_file: Holds the servers' token; without it, `DANCEGRPO_FAST_TOKEN` of the environment.
        seconds: Longest time for one batch, retries included; keep it well below
            `parallel.timeout_seconds`.
        batch_size: Samples per request.
        concurrency: Requests at once.
        pixels: `exact` sends them as they were decoded; `uint8` rounds to 8 bits, a quarter of
            the bytes of float32.
        cache: Scores that are kept by content; 0 keeps none, as training never asks twice.

    Raises:
        ValueError: No server answers, or it holds another reward.
    """

    name = "remote"

    def __init__(
        self,
        path: str,
        *,
        reward: str | None = None,
        others: list[str] | None = None,
        token_file: str | None = None,
        seconds: Seconds = 120.0,
        batch_size: Count = 8,
        concurrency: Count = 4,
        pixels: Literal["exact", "uint8"] = "exact",
        cache: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        urls = [path, *(others or [])]
        self.pool = Pool(urls, read_token(token_file), seconds, concurrency)
        self.batch_size, self.pixels, self.cache = batch_size, pixels, Cache[float](cache)
        (known,) = self.pool.ask([Question("/v1/rewards", None, _names)])
        if isinstance(known, Unanswered):
            raise ValueError(f"{known}; start it with: dancegrpo-fast serve-reward NAME")
        if reward is None and len(known) == 1:
            (reward,) = known
        if reward is None or reward not in known:
            raise ValueError(f"options.reward = {reward!r}: the server holds {', '.join(known)}")
        self.name, self.groupwise = reward, known[reward]

    @torch.no_grad()
    def score(self, samples: Samples) -> Scored:
        """See `SampleReward.score`."""
        values = torch.full((len(samples),), torch.nan)
        # Looked for here: rounded to 8 bits, a broken pixel would be an ordinary one.
        videos, errors = checked_pixels(samples.videos)
        if self.pixels == "exact":
            videos = samples.videos
        elif videos.is_floating_point():
            videos = (videos * 255).round().clamp(0, 255).to(torch.uint8)
        videos = videos.cpu()
        keys = self._keys(samples, videos) if self.cache.size and not self.groupwise else None
        left = [i for i in range(len(samples)) if i not in errors]
        if keys is not None:
            for i in left:
                values[i] = math.nan if (kept := self.cache.get(keys[i])) is None else kept
            left = [i for i in left if values[i].isnan()]
        chunks = self._chunks(samples, left)
        answers = self.pool.ask([self._question(samples, videos, rows) for rows in chunks])
        for rows, answer in zip(chunks, answers, strict=True):
            if isinstance(answer, Unanswered):
                errors.update(dict.fromkeys(rows, str(answer)))
                continue
            values[rows] = answer.values
            errors.update({i: why for i, why in zip(rows, answer.errors, strict=True) if why})
            if keys is not None:
                for i in rows:
                    if values[i].isfinite():
                        self.cache.put(keys[i], float(values[i]))
        return Scored.of(values, errors)

    def _chunks(self, samples: Samples, left: Sequence[int]) -> list[list[int]]:
        """Positions for each request; the samples of a prompt stay together if they must."""
        if self.groupwise:
            ordered = sorted(left, key=lambda i: samples.groups[i])
            return [list(rows) for _, rows in groupby(ordered, key=lambda i: samples.groups[i])]
        return [list(left[i : i + self.batch_size]) for i in range(0, len(left), self.batch_size)]

    def _question(
        self, samples: Samples, videos: torch.Tensor, rows: Sequence[int]
    ) -> Question[Scored]:
        def body(seconds: float) -> bytes:
            # Neighbours are a view; anything else is copied.
            whole = rows[-1] - rows[0] + 1 == len(rows)
            pixels = videos[rows[0] : rows[-1] + 1] if whole else videos[list(rows)]
            part = Samples(
                pixels,
                [samples.prompts[i] for i in rows],
                samples.fps,
                [samples.metadata[i] for i in rows] if samples.metadata else (),
                [samples.groups[i] for i in rows],
            )
            return wire.encode(wire.Message(self.name, part, seconds))

        read = partial(wire.decode_scores, count=len(rows))
        return Question("/v1/score", body, read, wire.CONTENT_TYPE, 65536 + 4096 * len(rows))

    def _keys(self, samples: Samples, videos: torch.Tensor) -> list[bytes]:
        """A hash of everything that a sample's score depends on."""
        keys = []
        for i in range(len(samples)):
            one = Samples(
                videos[i : i + 1],
                samples.prompts[i : i + 1],
                samples.fps,
                samples.metadata[i : i + 1],
                [0],
            )
            keys.append(hashlib.sha256(wire.encode(wire.Message(self.name, one, 0.0))).digest())
        return keys


def _names(answer: bytes) -> dict[str, bool]:
    """Rewards of a server, and whether each compares the samples of a prompt."""
    fields: Any = wire.parse_json(answer)
    try:
        return {str(name): bool(facts["groupwise"]) for name, facts in fields["rewards"].items()}
    except (KeyError, TypeError, AttributeError):
        raise ValueError("it lists no rewards") from None
