"""A server of rewards: what may be asked, by whom, how much at once, and how it stops.

    GET  /health      200 while it serves, 503 while it stops; open to all
    GET  /v1/rewards  names of the rewards, and whether they compare the samples of a prompt
    POST /v1/score    scores of samples (`wire`)
    GET  /metrics     counts, in Prometheus' text format

Every request but /health needs the token, if there is one. Nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dancegrpo_fast.config import UserError
from dancegrpo_fast.rewards import wire
from dancegrpo_fast.rewards.engine import Engine, Expired, Job, Stopped

logger = logging.getLogger(__name__)

_DRAIN_SECONDS, _DRAIN_BYTES = 2.0, 64 * 2**20


@dataclass(frozen=True)
class Limits:
    """What a client may cost.

    Attributes:
        body_bytes: Of one request.
        pending_bytes: Of all requests that are being read, wait or are scored.
        body_seconds: Time to send a body.
        stop_seconds: Time for running requests when the server is told to stop.
    """

    body_bytes: int = 512 * 2**20
    pending_bytes: int = 4 * 2**30
    body_seconds: float = 60.0
    stop_seconds: float = 30.0


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Service:
    """The requests' side of the server."""

    def __init__(self, engines: Mapping[str, Engine], limits: Limits, token: str | None) -> None:
        self.engines, self.limits = dict(engines), limits
        self.token = None if token is None else token.encode("utf-8")
        self.pending, self.stopping = 0, False
        self.statuses: Counter[int] = Counter()

    def app(self) -> Any:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        @contextlib.asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.stop)

        routes = [
            Route("/health", self._handler(self.health, open_to_all=True)),
            Route("/v1/rewards", self._handler(self.rewards)),
            Route("/metrics", self._handler(self.metrics)),
            Route("/v1/score", self._handler(self.score), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    def stop(self) -> None:
        """Stop the engines."""
        self.stopping = True
        for engine in self.engines.values():
            engine.stop(self.limits.stop_seconds)

    def _handler(self, answer: Any, *, open_to_all: bool = False) -> Any:
        """A handler that turns refusals into their status."""
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import Response

        async def handle(request: Request) -> Response:
            kind = "application/json"
            try:
                if not open_to_all:
                    self._authorise(request)
                status, content = 200, await answer(request)
                if answer == self.metrics:
                    kind = "text/plain; version=0.0.4"
            except _Refused as refused:
                if refused.status != 408:
                    await _drain(request)
                status = refused.status
                content = json.dumps({"error": str(refused)}).encode("ascii")
            except ClientDisconnect:
                status, content = 400, b""  # Nobody reads it.
            self.statuses[status] += 1
            headers = {"Retry-After": "1"} if status == 503 else {}
            if status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            if status >= 400:
                headers["Connection"] = "close"  # An unread body must not be taken for a request.
            return Response(content, status, headers, kind)

        return handle

    def _authorise(self, request: Any) -> None:
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are latin-1; the comparison takes equally long wherever the texts differ.
        equal = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.token)
        if scheme.lower() != "bearer" or not equal:
            raise _Refused(401, "the token is missing or wrong")

    async def health(self, request: Any) -> bytes:
        """Whether it serves."""
        if self.stopping:
            raise _Refused(503, "stopping")
        return b'{"status": "ok"}'

    async def rewards(self, request: Any) -> bytes:
        """What it serves."""
        known = {name: {"groupwise": e.groupwise} for name, e in self.engines.items()}
        return json.dumps({"rewards": known}).encode("ascii")

    async def metrics(self, request: Any) -> bytes:
        """Counts since the start."""
        lines = []
        for status, count in sorted(self.statuses.items()):
            lines.append(f'dancegrpo_fast_requests_total{{status="{status}"}} {count}')
        lines.append(f"dancegrpo_fast_pending_bytes {self.pending}")
        for name, engine in self.engines.items():
            label = "{reward=" + json.dumps(name) + "}"
            for what, count in engine.counts.items():
                lines.append(f"dancegrpo_fast_{what}_total{label} {count}")
            lines.append(f"dancegrpo_fast_seconds_total{label} {engine.seconds:.6f}")
            lines.append(f"dancegrpo_fast_waiting{label} {engine.waiting}")
        return ("\n".join(lines) + "\n").encode("utf-8")

    async def score(self, request: Any) -> bytes:
        """Scores of the request's samples."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != wire.CONTENT_TYPE:
            raise _Refused(415, f"content-type must be {wire.CONTENT_TYPE}")
        held = [0]
        try:
            body = await self._body(request, held)
            try:
                message = wire.decode(body)
            except ValueError as error:
                raise _Refused(400, str(error)) from None
            engine = self.engines.get(message.reward)
            if engine is None:
                raise _Refused(404, f"no reward {message.reward!r}; {', '.join(self.engines)}")
            job = Job(message.samples, time.monotonic() + message.seconds)
            try:
                engine.submit(job)
                return wire.encode_scores(await asyncio.wrap_future(job.done))
            except Expired:
                raise _Refused(503, "busy: not begun in the client's time") from None
            except Stopped:
                raise _Refused(503, "stopping") from None
        finally:
            self.pending -= held[0]

    async def _body(self, request: Any, held: list[int]) -> bytearray:
        """The content; `held` says how many bytes of it are counted as pending."""
        limits, body = self.limits, bytearray()
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > limits.body_bytes:
            raise _Refused(413, f"a request may have {limits.body_bytes} bytes")
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    if len(body) + len(part) > limits.body_bytes:
                        raise _Refused(413, f"a request may have {limits.body_bytes} bytes")
                    if self.pending + len(part) > limits.pending_bytes:
                        raise _Refused(503, "busy: too many bytes wait")
                    self.pending += len(part)
                    held[0] += len(part)
                    body += part
        except TimeoutError:
            raise _Refused(408, f"the body took over {limits.body_seconds:g} s") from None
        return body


async def _drain(request: Any) -> None:
    """Reads on for a while after a refusal: a client that still sends would see a reset instead."""
    from starlette.requests import ClientDisconnect

    drained = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):  # Already consumed.
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for part in request.stream():
                drained += len(part)
                if drained > _DRAIN_BYTES:
                    return


def bound_socket(host: str, port: int, *, has_token: bool) -> socket.socket:
    """A socket to serve on.

    Raises:
        UserError: The address cannot be had, or others can reach it and there is no token.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # A zone (fe80::1%eth0) is no part of the address.
        if not (ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback or has_token):
            raise UserError(
                f"--host = {host!r}: others can reach it; give --token-file, or serve on 127.0.0.1"
            )
        # With its protocol named: asyncio turns off Nagle's 40 ms on such sockets only.
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        return found
    except OSError as error:
        raise UserError(f"--host = {host!r}, --port = {port}: {error.strerror or error}") from None


def serve(service: Service, listening: socket.socket, *, ready: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; running requests are finished first.

    Args:
        service: What is served.
        listening: A bound socket.
        ready: Lines to print once requests are accepted.
    """
    import uvicorn

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print("\n".join(ready), flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.stopping = True  # /health says so on connections that stay open.
            await super().shutdown(sockets)

    config = uvicorn.Config(
        service.app(),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(service.limits.stop_seconds)),
    )
    # uvicorn raises the signal again when it is done: without a handler that would be its end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    Announced(config).run(sockets=[listening])
