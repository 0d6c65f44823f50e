"""The client of remote rewards against servers that fail in every way, within its deadline."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import Server, http, scripted
from tiny_models import CPU, tiny_config, tiny_wan

from dancegrpo_fast.advantages import leaf_advantages
from dancegrpo_fast.batching import leaf_owners
from dancegrpo_fast.config import AdvantageConfig, RewardConfig, UserError
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.rewards import Samples, load_rewards
from dancegrpo_fast.rewards.remote import Remote
from dancegrpo_fast.rewards.scoring import score_latents
from dancegrpo_fast.rewards.transport import Pool, Question, Unanswered
from dancegrpo_fast.rewards.wire import decode
from dancegrpo_fast.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
LISTING = http(b'{"rewards": {"told": {"groupwise": false}}}')


def means(body: bytes) -> list[float]:
    return decode(bytearray(body)).samples.videos.float().mean(dim=(1, 2, 3, 4)).tolist()


def right(body: bytes) -> bytes:
    """What a server should answer."""
    scores = means(body)
    return http(json.dumps({"scores": scores, "errors": [""] * len(scores)}).encode())


def server_that(*answers):
    """A script: each request for scores gets the next answer, the last one for ever; a callable
    gets the body."""
    left, lock = list(answers), threading.Lock()

    def answer(number: int, head: bytes, body: bytes):
        if head.startswith(b"GET"):
            return LISTING
        with lock:
            found = left.pop(0) if len(left) > 1 else left[0]
        return found(body) if callable(found) else found

    return answer


SAMPLES = Samples(torch.rand(6, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), ["a"] * 6)
EXPECTED = SAMPLES.videos.mean(dim=(1, 2, 3, 4))
FULL = b'{"scores": [0.5], "errors": [""]}'


def drip(body: bytes):
    for byte in http(FULL):
        yield bytes([byte])
        yield 0.3


BAD = {
    "hanging": (lambda body: None, "is silent"),
    "slow drip": (drip, "is silent"),
    "garbage": (http(b"\x80\x04garbage"), "no valid JSON"),
    "empty": (http(b""), "no valid JSON"),
    "no HTTP": (b"\x00\x01\x02\x03\r\n\r\n", "illegal"),
    "truncated": (http(FULL, length=1000), "incomplete|closed"),
    "closed": (b"", "disconnected|reset"),
    "too few": (http(b'{"scores": [], "errors": []}'), "0 scores and 0 errors for 1 samples"),
    "too many": (http(b'{"scores": [1, 2], "errors": ["", ""]}'), "2 scores"),
    "no number": (http(b'{"scores": ["1"], "errors": [""]}'), "no finite number"),
    "not a number": (http(b'{"scores": [NaN], "errors": [""]}'), "no JSON number"),
    "html": (http(b"<html>proxy</html>"), "no valid JSON"),
    "redirect": (http(b"", 302, extra="Location: http://127.0.0.1:1/\r\n"), "answered 302"),
    "unauthorised": (http(b"who", 401), "answered 401: who"),
    "always 503": (http(b"busy", 503), "answered 503: busy"),
    "huge": (http(b" " * 10**6), "more than"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_server_gives_no_number_and_ends_by_the_deadline(fault):
    answer, reason = BAD[fault]
    with scripted(server_that(answer)) as url:
        remote = Remote(url, seconds=1.0, batch_size=1, concurrency=3)
        start = time.monotonic()
        scored = remote.score(SAMPLES)
        taken = time.monotonic() - start
    assert scored.values.isnan().all()
    for why in scored.errors:
        assert re.search(reason, why) or "had its turn" in why, why
    assert any(re.search(reason, why) for why in scored.errors)
    assert taken < 3.0  # The deadline, and room for a busy machine.
    asked = remote.pool.counts["requests"] - 1  # Without the one for the listing.
    final = reason.startswith(("no", "0", "2", "more", "answered 3", "answered 4"))
    assert asked == 6 if final else asked >= 3  # An answer that is final is not asked for again.


def test_one_bad_answer_among_good_ones_costs_its_own_samples():
    with scripted(server_that(http(b"garbage"), right)) as url:
        scored = Remote(url, seconds=20.0, batch_size=2, concurrency=1).score(SAMPLES)
    assert scored.values.isnan().tolist() == [True] * 2 + [False] * 4
    assert torch.equal(scored.values[2:], EXPECTED[2:])


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_burst_is_waited_out(status):
    wait = http(b"later", status, extra="Retry-After: 1\r\n" if status == 429 else "")
    with scripted(server_that(wait, b"", wait, http(FULL, length=999), right)) as url:
        remote = Remote(url, seconds=30.0, batch_size=3, concurrency=1)
        start = time.monotonic()
        scored = remote.score(SAMPLES)
    assert torch.equal(scored.values, EXPECTED)
    assert remote.pool.counts["retries"] == 4
    if status == 429:
        assert time.monotonic() - start > 2.0  # Twice it was asked to wait a second.


def test_a_silent_server_is_waited_for_once_not_once_per_batch():
    with scripted(server_that(lambda body: None, lambda body: None, right)) as url:
        remote = Remote(url, seconds=2.0, batch_size=6)
        start = time.monotonic()
        assert remote.score(SAMPLES).values.isnan().all()
        middle = time.monotonic()
        assert remote.score(SAMPLES).values.isnan().all()
        assert middle - start > 1.9 and time.monotonic() - middle < 1.5  # Then a tenth.
        assert torch.equal(remote.score(SAMPLES).values, EXPECTED)
        assert not remote.pool._silent


def test_several_servers_share_and_a_bad_one_is_left_out():
    counts = {"good": 0, "bad": 0}

    def counting(name, answer):
        def count(body):
            counts[name] += 1
            return answer(body) if callable(answer) else answer

        return server_that(count)

    with ExitStack() as stack:
        good = stack.enter_context(scripted(counting("good", right)))
        bad = stack.enter_context(scripted(counting("bad", http(b"broken", 500))))
        with socket.create_server(("127.0.0.1", 0)) as free:
            refusing = f"http://127.0.0.1:{free.getsockname()[1]}"
        remote = Remote(bad, others=[refusing, good], seconds=20.0, batch_size=1)
        for _ in range(3):
            assert torch.equal(remote.score(SAMPLES).values, EXPECTED)
    assert counts["good"] == 18 and 1 <= counts["bad"] <= 6


def test_a_hanging_server_leaves_time_for_another():
    with ExitStack() as stack:
        hanging = stack.enter_context(scripted(server_that(lambda body: None)))
        good = stack.enter_context(scripted(server_that(right)))
        remote = Remote(hanging, others=[good], seconds=4.0, batch_size=6)
        assert torch.equal(remote.score(SAMPLES).values, EXPECTED)


def test_requests_at_once_are_bounded():
    now, most, lock = [0], [0], threading.Lock()

    def slow(body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        yield 0.05
        with lock:
            now[0] -= 1
        yield right(body)

    with scripted(server_that(slow)) as url:
        remote = Remote(url, seconds=30.0, batch_size=1, concurrency=2)
        assert torch.equal(remote.score(SAMPLES).values, EXPECTED)
    assert most[0] == 2


def test_proxies_of_the_environment_are_left_alone(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with scripted(server_that(right)) as url:
        assert torch.equal(Remote(url, seconds=10.0).score(SAMPLES).values, EXPECTED)


def test_a_forked_process_asks_on_its_own():
    with scripted(server_that(right)) as url:
        remote = Remote(url, seconds=10.0)
        assert torch.equal(remote.score(SAMPLES).values, EXPECTED)
        child = os.fork()
        if not child:
            same = torch.equal(remote.score(SAMPLES).values, EXPECTED)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_question_that_cannot_be_made_costs_itself():
    def fail(seconds: float) -> bytes:
        raise ValueError("metadata cannot be sent")

    with scripted(lambda n, head, body: http(b"fine")) as url:
        pool = Pool([url], None, 10.0, 2)
        bad, good = pool.ask([Question("/", fail, bytes), Question("/", lambda s: b"", bytes)])
    assert isinstance(bad, Unanswered) and "cannot be sent" in str(bad) and good == b"fine"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"path": "http://127.0.0.1:1", "options": {"seconds": 0.3}}, "serve-reward NAME"),
        ({"path": "127.0.0.1:8000"}, "is no address such as http://127.0.0.1:8000"),
        ({"path": "http://a@b"}, "is no address"),
        ({}, "rewards.0.path: is missing"),
        ({"path": "http://x", "options": {"seconds": 0.0}}, "seconds = 0.0: must be greater than"),
        ({"path": "http://x", "options": {"secnds": 1.0}}, "did you mean seconds?"),
        ({"path": "URL", "options": {"reward": "other"}}, "the server holds told"),
        ({"path": "URL", "options": {"token_file": "gone"}}, "token_file = 'gone': cannot be read"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(settings, line):
    with scripted(server_that(right)) as url:
        if settings.get("path") == "URL":
            settings = settings | {"path": url}
        with pytest.raises(UserError) as raised:
            load_rewards([RewardConfig(name="remote", **settings)])
    assert line in str(raised.value) and "\n" not in str(raised.value)


# ---- runs ----------------------------------------------------------------------------------------


def test_a_server_killed_and_started_again_in_the_middle(tmp_path):
    first = Server(tmp_path, "told.py:Told").ready()
    remote = Remote(first.url, seconds=100.0, batch_size=1, concurrency=2)
    slow = Samples(SAMPLES.videos, ["wait 0.4"] * 6)
    threading.Timer(0.9, first.kill).start()
    second: list[Server] = []
    again = threading.Timer(
        1.2, lambda: second.append(Server(tmp_path, "told.py:Told", "--port", str(first.port)))
    )
    again.start()
    scored = remote.score(slow)
    assert scored.errors == ("",) * 6
    assert torch.equal(scored.values, EXPECTED)
    assert remote.pool.counts["retries"] >= 2
    assert second[0].stop() == 0


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("model") / "wan")


def test_a_run_goes_on_without_failed_samples_and_stops_when_all_fail(tmp_path, wan):
    state = {"mode": "some"}

    def answer(number, head, body):
        if head.startswith(b"GET"):
            return LISTING
        return http(b"gone", 410) if state["mode"] == "all" or number % 4 == 1 else right(body)

    with scripted(answer) as url:
        options = {"seconds": 5.0, "batch_size": 1, "concurrency": 1}
        rewards = [{"name": "remote", "path": url, "options": options}]
        trainer = Trainer(tiny_config(tmp_path, wan, {"rewards": rewards}), CPU)
        metrics = trainer.iteration()
        assert 0 < metrics["reward/failed"] < 0.5 and np.isfinite(metrics["reward/mean"])
        assert metrics["update/grad_norm"] > 0 and "reward/told" in metrics
        state["mode"] = "all"
        with pytest.raises(UserError, match="all 8 samples .* answered 410: gone.*--resume latest"):
            trainer.iteration()


PROMPTS, GROUP = 4, 4


def scored_on(world: World, url: str) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and advantages that a process ends with; some samples have no score."""
    owner = leaf_owners(PROMPTS, GROUP, world.size)
    own = np.flatnonzero(owner.ravel() == world.rank).tolist()
    worth = torch.rand(PROMPTS * GROUP, generator=torch.Generator().manual_seed(3))
    found = score_latents(
        worth[own].view(-1, 1, 1, 1, 1).expand(-1, 3, 1, 4, 4),
        ["none" if i in (1, 6, 13) else f"prompt {i // GROUP}" for i in own],
        lambda latents: latents.transpose(1, 2),
        [Remote(url, seconds=60.0, batch_size=1)],
        batch_size=3,
        groups=[i // GROUP for i in own],
    )
    gathered = world.gather_rewards(found.values, owner)
    return gathered, leaf_advantages(gathered, np.ones(1), AdvantageConfig()).values


def test_masks_agree_on_two_ranks(tmp_path):
    server = Server(tmp_path, "told.py:Told").ready()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/rewards")])
    done = subprocess.run(
        [*launch, __file__, str(tmp_path), server.url],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rewards, advantages = scored_on(World(0, 1, torch.device("cpu")), server.url)
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_array_equal(found["rewards"], rewards)
        np.testing.assert_array_equal(found["advantages"], advantages)
    failed = np.isnan(rewards).any(axis=-1).ravel()
    assert np.flatnonzero(failed).tolist() == [1, 6, 13]
    assert not advantages.reshape(PROMPTS * GROUP, -1)[failed].any()
    assert server.stop() == 0


if __name__ == "__main__":
    world = World.from_environment()
    rewards, advantages = scored_on(world, sys.argv[2])
    np.savez(Path(sys.argv[1]) / f"{world.rank}.npz", rewards=rewards, advantages=advantages)
    world.close()
