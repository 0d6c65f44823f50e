"""Servers for tests: our own as a real process, and a scripted one that answers as it is told."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Rewards of which each test knows the score; the prompt says what they do.
REWARDS = '''
import os
import time
import torch
from dancegrpo_fast.rewards import SampleReward, Scored

class Told(SampleReward):
    """The mean pixel; prompts may ask to wait, to crash or to have no score."""
    name = "told"
    def score(self, samples):
        means = samples.videos.float().mean(dim=(1, 2, 3, 4))
        if any(p.startswith("crash") for p in samples.prompts):
            raise RuntimeError("told to")
        for prompt in samples.prompts:
            if prompt.startswith("wait "):
                time.sleep(float(prompt.split()[1]))
        missing = {i: "told to" for i, p in enumerate(samples.prompts) if p == "none"}
        return Scored.of(means, missing)

class Seen(SampleReward):
    """Frame rate, metadata, groups and size of the batch in one number."""
    name = "seen"
    def score(self, samples):
        counts = [m.get("count", 0) for m in samples.metadata] or [0] * len(samples)
        first = samples.groups[0]
        return Scored.of(torch.tensor([
            (samples.fps or 0) + 100 * c + 1000 * (g != first) for c, g in
            zip(counts, samples.groups)]))

class Wrong:
    """Gives one score too many."""
    name = "wrong"
    def __call__(self, videos, prompts):
        return torch.zeros(len(prompts) + 1)

class Rank(SampleReward):
    """Compares the samples of a prompt: how many of them are darker."""
    name = "rank"
    groupwise = True
    def score(self, samples):
        means = samples.videos.float().mean(dim=(1, 2, 3, 4))
        same = torch.tensor(samples.groups)[:, None] == torch.tensor(samples.groups)
        return Scored.of(((means[:, None] > means) & same).sum(dim=1).float())
'''


class Server:
    """`dancegrpo-fast serve-reward` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str, token: str | None = None) -> None:
        file = folder / "told.py"
        file.write_text(REWARDS)
        names = [word.replace("told.py", str(file)) for word in arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("DANCEGRPO_FAST_TOKEN", None)
        if token is not None:
            environment["DANCEGRPO_FAST_TOKEN"] = token
        if "--port" not in names:
            names += ["--port", "0"]
        self.log = folder / f"server-{time.monotonic_ns()}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dancegrpo_fast", "serve-reward", *names],
                env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.url = ""

    def ready(self, seconds: float = 120.0) -> Server:
        """Waits for the line that says where it serves."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        assert " on http://" in line, (line, self.log.read_text()[-3000:])
        self.url = line.split(" on ")[1].split()[0]
        return self

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(60)


@contextmanager
def scripted(answer: Callable[[int, bytes, bytes], object]) -> Iterator[str]:
    """A server of raw bytes on loopback; yields its address.

    Args:
        answer: Called with the request's number (from 0), its head and its body. Returns bytes
            that are sent (the connection then closes), or an iterator of bytes and of seconds to
            wait; None hangs until the test is over.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    over, lock, count = threading.Event(), threading.Lock(), [0]

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                data = b""
                while b"\r\n\r\n" not in data:
                    part = connection.recv(65536)
                    if not part:
                        return
                    data += part
                head, _, body = data.partition(b"\r\n\r\n")
                lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n")
                           if line.startswith(b"content-length:")]  # fmt: skip
                while len(body) < int(lengths[0] if lengths else 0):
                    body += connection.recv(65536)
                with lock:
                    number, count[0] = count[0], count[0] + 1
                found = answer(number, head, body)
                if found is None:
                    over.wait()
                elif isinstance(found, bytes):
                    connection.sendall(found)
                else:
                    for part in found:
                        if isinstance(part, bytes):
                            connection.sendall(part)
                        elif over.wait(part):
                            return
            except OSError:
                pass  # The client has gone, which is what many of these tests are about.

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        over.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def http(body: bytes, status: int = 200, *, length: int | None = None, extra: str = "") -> bytes:
    """An answer; `length` may lie."""
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {size}\r\nConnection: close\r\n{extra}\r\n"
    return head.encode() + body
