"""Questions to servers: one deadline for a batch, retries, several servers, nothing invented.

A question that gets no usable answer comes back as `Unanswered` with the reason. Requests run in
an event loop of a thread of its own: only there can a deadline cut off a server that hangs while
connecting, while reading, or that sends one byte at a time.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

TOKEN_VARIABLE = "DANCEGRPO_FAST_TOKEN"
_RETRIED = {408, 429}  # And every 5xx.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # Seconds.
_EJECT_AFTER, _LONGEST_EJECTION = 2, 60.0  # Failures in a row; seconds.


class Unanswered(Exception):
    """No usable answer; the text says why."""


@dataclass
class Question(Generic[T]):
    """One request.

    Attributes:
        path: Below a server's address.
        body: Makes the content, given the seconds left; None asks with GET. Called in a thread
            when the request's turn comes, so that waiting requests hold no pixels.
        read: Turns the answer's bytes into what is wanted.
            Raises ValueError for an answer that is none.
        content_type: Of the content.
        largest: Bytes of the answer that are read.
    """

    path: str
    body: Callable[[float], bytes] | None
    read: Callable[[bytes], T]
    content_type: str = "application/json"
    largest: int = 4 * 2**20


@dataclass
class _Server:
    url: str
    busy: int = 0
    failures: int = 0  # In a row.
    ejected_until: float = 0.0


@dataclass
class Pool:
    """Servers that are asked in turn.

    Attributes:
        urls: Addresses of the servers, all alike.
        token: Sent as a bearer token; None sends none.
        seconds: Longest time for all questions of one `ask`. After an `ask` that nobody answered
            the next have a tenth of it, until one is answered: an iteration of many batches must
            not wait for a dead server once per batch.
        concurrency: Requests at once.
        counts: Requests, retries and unanswered questions so far.
    """

    urls: Sequence[str]
    token: str | None
    seconds: float
    concurrency: int
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
                raise ValueError(f"{url!r} is no address such as http://127.0.0.1:8000")
        self._servers = [_Server(url.rstrip("/")) for url in self.urls]
        self._silent = False
        self._client: tuple[int, Any] | None = None  # (process, client): a fork shares no socket.

    def ask(self, questions: Sequence[Question[T]]) -> list[T | Unanswered]:
        """Each question's answer, or why there is none; returns by the deadline."""
        if not questions:
            return []
        seconds = self.seconds / 10 if self._silent else self.seconds
        # The loop keeps the deadline; the second guards against a loop that is held up itself.
        answers: list[T | Unanswered] = _run(self._ask_all(questions, seconds), seconds + 1.0)
        unanswered = sum(isinstance(answer, Unanswered) for answer in answers)
        self.counts["unanswered"] += unanswered
        self._silent = unanswered == len(questions)
        return answers

    async def _ask_all(
        self, questions: Sequence[Question[T]], seconds: float
    ) -> list[T | Unanswered]:
        gate = asyncio.Semaphore(self.concurrency)
        deadline = time.monotonic() + seconds
        tasks = []
        for number, question in enumerate(questions):
            one = self._ask_one(number, question, gate, deadline, seconds)
            tasks.append(asyncio.create_task(one))
        return [await task for task in tasks]

    async def _ask_one(
        self,
        number: int,
        question: Question[T],
        gate: asyncio.Semaphore,
        deadline: float,
        seconds: float,
    ) -> T | Unanswered:
        why = ["no request had its turn"]
        try:
            async with asyncio.timeout(deadline - time.monotonic()), gate:
                return await self._insist(number, question, deadline, why)
        except TimeoutError:
            return Unanswered(f"no answer within {seconds:g} s; last: {why[-1]}")
        except Unanswered as error:
            return error
        except Exception as error:  # Of one question, such as one whose body cannot be made.
            return Unanswered(f"{type(error).__name__}: {error}")

    async def _insist(
        self, number: int, question: Question[T], deadline: float, why: list[str]
    ) -> T:
        """Ask until there is an answer; reasons of the failures are added to `why`."""
        attempt = 0
        while True:
            server, pause = self._choose(), 0.0
            # With another server to turn to, none may take all of the time.
            left = (deadline - time.monotonic()) / (1 if len(self._servers) == 1 else 2)
            why.append(f"{server.url} is silent")
            server.busy += 1
            try:
                async with asyncio.timeout(left):
                    answer = await self._request(server, question, left)
                server.failures = 0
                return answer
            except _TryAgain as error:
                why[-1], pause = str(error), error.pause
            except TimeoutError:
                pass
            except Unanswered:
                self._failed(server)
                raise
            finally:
                server.busy -= 1
            self._failed(server)
            self.counts["retries"] += 1
            # Spread by the question's number, so that a burst does not come back as a burst.
            spread = 0.5 + (number * 0.618) % 1 / 2
            pause = max(pause, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * spread)
            attempt += 1
            await asyncio.sleep(pause)

    def _choose(self) -> _Server:
        """The least busy of those that are not ejected; of none, the first to come back."""
        now = time.monotonic()
        good = [server for server in self._servers if server.ejected_until <= now]
        if good:
            return min(good, key=lambda server: server.busy)
        return min(self._servers, key=lambda server: server.ejected_until)

    @staticmethod
    def _failed(server: _Server) -> None:
        server.failures += 1
        if server.failures >= _EJECT_AFTER:
            rest = min(_LONGEST_EJECTION, 2.0 ** min(server.failures, 10))
            server.ejected_until = time.monotonic() + rest

    async def _request(self, server: _Server, question: Question[T], left: float) -> T:
        import httpx2

        headers = {"Accept-Encoding": "identity"}  # Nothing is unpacked: no bombs.
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        content, method = None, "GET"
        if question.body is not None:
            content, method = await asyncio.to_thread(question.body, left), "POST"
            headers["Content-Type"] = question.content_type
        self.counts["requests"] += 1
        url = server.url + question.path
        try:
            async with self._session().stream(
                method, url, content=content, headers=headers
            ) as answer:
                status = answer.status_code
                text = await _limited(answer, question.largest if status == 200 else 2000)
        except httpx2.TransportError as error:
            # Refused, reset, closed or cut off: scoring again changes nothing, so ask again.
            raise _TryAgain(f"{server.url}: {str(error) or type(error).__name__}") from None
        if status == 200:
            try:
                return question.read(text)
            except ValueError as error:
                raise Unanswered(f"{server.url} answered what is no answer: {error}") from None
        said = text[:200].decode("utf-8", "replace").strip()
        if status in _RETRIED or status >= 500:
            asked = answer.headers.get("retry-after", "")
            pause = float(asked) if asked.isdecimal() and len(asked) < 6 else 0.0
            raise _TryAgain(f"{server.url} answered {status}: {said}", pause)
        raise Unanswered(f"{server.url} answered {status}: {said}")

    def _session(self) -> Any:
        """A client of this process. Proxies of the environment are not for us."""
        import httpx2

        if self._client is None or self._client[0] != os.getpid():
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
            client = httpx2.AsyncClient(
                timeout=None, limits=limits, trust_env=False, follow_redirects=False
            )
            self._client = os.getpid(), client
        return self._client[1]


class _TryAgain(Exception):
    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


async def _limited(answer: Any, largest: int) -> bytes:
    """An answer's bytes; of a longer one the beginning and one byte more than allowed."""
    parts, size = [], 0
    async for part in answer.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > largest:
            break
    content = b"".join(parts)
    if size > largest and answer.status_code == 200:
        raise Unanswered(f"{answer.url} answered more than {largest} bytes")
    return content


# ---- one loop in one thread of this process ------------------------------------------------------

_loop: tuple[int, asyncio.AbstractEventLoop] | None = None
_lock = threading.Lock()


def _run(coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
    """A coroutine's result, computed in the loop's thread.

    Raises:
        TimeoutError: The loop itself is stuck.
    """
    global _loop
    with _lock:
        if _loop is None or _loop[0] != os.getpid():  # Threads do not survive a fork.
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="rewards-http", daemon=True).start()
            _loop = os.getpid(), loop
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop[1])
    try:
        return future.result(seconds)
    finally:
        future.cancel()  # No effect on what is done; an interrupt must not leave requests behind.


def read_token(file: str | None) -> str | None:
    """The token of a file, else of the environment; None if neither has one.

    Raises:
        ValueError: A file that cannot be read or holds none, or what no header can hold.
    """
    if file is None:
        where, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return None
    else:
        where = f"token_file = {file!r}"
        try:
            token = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: cannot be read ({error})") from None
    # Anything else cannot stand in a header.
    if not (token.isascii() and token.isprintable() and token) or " " in token:
        raise ValueError(f"{where}: must hold one line of printable ASCII characters")
    return token


class Cache(Generic[T]):
    """The last answers by a hash of what was asked; only keep what is one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[bytes, T] = OrderedDict()

    def get(self, key: bytes) -> T | None:
        """What was kept."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: bytes, value: T) -> None:
        """Keep an answer."""
        if self.size:
            self._values[key] = value
            while len(self._values) > self.size:
                self._values.popitem(last=False)
