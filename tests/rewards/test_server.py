"""`dancegrpo-fast serve-reward` as a real process: scores, refusals, batches, stopping."""

from __future__ import annotations

import json
import pickle
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from serving import Server
from tiny_reward_models import images_of

from dancegrpo_fast.cli import main
from dancegrpo_fast.rewards import REWARDS, Samples, Scored, score, wire
from dancegrpo_fast.rewards.engine import Engine, Job
from dancegrpo_fast.rewards.remote import Remote
from dancegrpo_fast.rewards.transport import read_token

TOKEN = "a-token-of-tests"
BODY_MB = 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    names = ["told.py:Told", "told.py:Seen", "told.py:Wrong", "told.py:Rank", "colourfulness"]
    limits = ["--body-mb", str(BODY_MB), "--body-seconds", "1", "--pending-mb", "8"]
    started = Server(folder, *names, *limits, token=TOKEN).ready()
    yield started
    assert started.stop() == 0
    assert "Traceback" not in started.log.read_text()


@pytest.fixture
def client(server, monkeypatch):
    """Makes `Remote`s of the server."""
    monkeypatch.setenv("DANCEGRPO_FAST_TOKEN", TOKEN)
    return lambda reward, **options: Remote(server.url, reward=reward, **options)


def post(server, body, *, headers=None, token=TOKEN, path="/v1/score") -> httpx2.Response:
    given = {"Content-Type": wire.CONTENT_TYPE} | (headers or {})
    if token is not None:
        given["Authorization"] = f"Bearer {token}"
    return httpx2.post(server.url + path, content=body, headers=given, trust_env=False, timeout=30)


def message(reward="told", prompts=("a",), seconds=30.0, **other) -> bytes:
    pixels = torch.rand(len(prompts), 1, 3, 4, 4)
    return wire.encode(wire.Message(reward, Samples(pixels, list(prompts), **other), seconds))


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_those_of_this_process_bit_for_bit(client, dtype):
    images = images_of((37, 51), 13)  # Odd sizes, and no multiple of the batch.
    videos = images if dtype == torch.uint8 else (images / 255).to(dtype)
    samples = Samples(videos, [f"p{i // 3}" for i in range(13)])
    far = client("colourfulness", batch_size=4).score(samples)
    near = score(REWARDS["colourfulness"](), samples)
    assert far.errors == near.errors and len(set(far.values.tolist())) == 13
    assert torch.equal(far.values, near.values)


def test_pixels_that_are_not_contiguous_and_8_bits(client):
    images = images_of((20, 24), 6).reshape(3, 2, 3, 20, 24)
    turned = images.transpose(3, 4)
    assert not turned.is_contiguous()
    reward = REWARDS["colourfulness"]()
    far = client("colourfulness").score(Samples(turned, ["a"] * 3))
    assert torch.equal(far.values, reward.score(Samples(turned, ["a"] * 3)).values)
    floats = Samples((images / 255 + 0.001).clamp(0, 1), ["a"] * 3)
    rounded = client("colourfulness", pixels="uint8").score(floats)
    assert torch.equal(rounded.values, reward.score(Samples(images, ["a"] * 3)).values)


def test_reasons_metadata_rate_and_groups_arrive(client):
    videos = torch.full((4, 2, 3, 4, 4), 0.5)
    videos[3, 1, 0, 0, 0] = torch.nan
    told = client("told", batch_size=2, pixels="uint8").score(
        Samples(videos, ["a", "none", "b", "c"])
    )
    assert told.errors == ("", "told to", "", "a pixel is not finite")
    assert told.values.isnan().tolist() == [False, True, False, True]
    seen = client("seen").score(
        Samples(videos[:2], ["a", "a"], 8.0, [{"count": 3}, {"count": 4}], [7, 9])
    )
    assert seen.values.tolist() == [308.0, 1408.0]


def test_a_reward_that_raises_or_gives_a_wrong_number_of_scores(client):
    samples = Samples(torch.rand(3, 1, 3, 4, 4), ["crash", "a", "a"])
    crashed = client("told", batch_size=1).score(samples)
    assert crashed.errors == ("RuntimeError: told to", "", "")
    wrong = client("wrong").score(samples)
    assert wrong.values.isnan().all() and "returned shape (4,)" in wrong.errors[0]


def test_samples_of_a_prompt_stay_together_for_rewards_that_compare_them(client):
    worth = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.2, 0.7])
    videos = worth.view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 2, 2)
    remote = client("rank", batch_size=1)
    assert remote.groupwise
    scored = remote.score(Samples(videos, list("ababab")))
    assert scored.values.tolist() == [0, 2, 2, 0, 1, 1]


def test_the_cache_answers_what_was_asked_before(client):
    remote, videos = client("told", cache=2), torch.rand(2, 1, 3, 4, 4)
    prompts = ["a", "none"]
    first = remote.score(Samples(videos, prompts))
    before = remote.pool.counts["requests"]
    again = remote.score(Samples(videos[:1], prompts[:1]))
    assert torch.equal(again.values, first.values[:1])
    assert remote.pool.counts["requests"] == before
    remote.score(Samples(videos, prompts))  # A failure is asked again, a number is not.
    assert remote.pool.counts["requests"] == before + 1
    for changed in (Samples(videos[:1] + 0.001, ["a"]), Samples(videos[:1], ["b"]),
                    Samples(videos[:1], ["a"], 8.0)):  # fmt: skip
        before = remote.pool.counts["requests"]
        remote.score(changed)
        assert remote.pool.counts["requests"] == before + 1


# ---- refusals ------------------------------------------------------------------------------------


def test_no_token_no_answer(server):
    for token in (None, "wrong", TOKEN + "x", "\u00e9", ""):
        headers = {"Authorization": f"Bearer {token}".encode("latin-1")} if token else {}
        for path in ("/v1/rewards", "/metrics"):
            url = server.url + path
            assert httpx2.get(url, headers=headers, trust_env=False).status_code == 401
        assert post(server, message(), headers=headers, token=None).status_code == 401
    basic = {"Authorization": f"Basic {TOKEN}"}
    assert post(server, message(), headers=basic, token=None).status_code == 401
    assert httpx2.get(server.url + "/health", trust_env=False).json() == {"status": "ok"}


def test_a_pickle_is_no_message(server):
    class Bad:
        def __reduce__(self):
            return (print, ("unpickled",))

    body = pickle.dumps(Bad())
    assert post(server, body).status_code == 400
    assert post(server, body, headers={"Content-Type": "application/pickle"}).status_code == 415


def test_too_much_is_refused(server):
    assert post(server, bytes(BODY_MB * 2**20 + 1)).status_code == 413

    def parts():
        for _ in range(BODY_MB * 16 + 1):
            yield bytes(65536)

    assert post(server, parts()).status_code == 413  # Chunked: no length is declared.
    lying = {"Content-Length": "99999999999999999999999"}
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: {wire.CONTENT_TYPE}\r\n"
        raw.sendall((head + f"Content-Length: {lying['Content-Length']}\r\n\r\n").encode())
        assert raw.recv(64).split()[1] in (b"413", b"400")


def test_a_slow_body_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: {wire.CONTENT_TYPE}\r\nContent-Length: 1000\r\n\r\n"
        raw.sendall(head.encode() + b"DGFAST1\n")
        raw.settimeout(20)
        assert raw.recv(64).split()[1] == b"408"


def test_a_client_that_leaves_costs_nothing(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: {wire.CONTENT_TYPE}\r\nContent-Length: 99\r\n\r\n"
        raw.sendall(head.encode() + b"x")
    assert post(server, message()).status_code == 200
    headers = {"Authorization": f"Bearer {TOKEN}"}
    deadline = time.monotonic() + 20
    while "pending_bytes 0" not in (
        metrics := httpx2.get(server.url + "/metrics", headers=headers, trust_env=False).text
    ):
        assert time.monotonic() < deadline, metrics
        time.sleep(0.05)
    assert 'dancegrpo_fast_requests_total{status="200"}' in metrics
    assert 'dancegrpo_fast_samples_total{reward="told"}' in metrics


def mutated(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A message with something wrong with it: bytes, lengths, types and values of its fields."""
    fields = {
        "reward": "told", "seconds": 5.0, "dtype": "uint8", "shape": [1, 1, 3, 4, 4],
        "prompts": ["a"], "fps": None, "metadata": [], "groups": [0],
    }  # fmt: skip
    values = [
        None, True, -1, 0, 1, 10**400, 1e308, -0.0, "", "x" * 2000, "\x00", [], [[]], {}, [None],
        [1, 1, 3, 2**40, 2**40], [0, 1, 3, 4, 4], [1, 1, 3, 4], ["a", "b"], [True], {"a": {}},
        [{"a": "\ud800"}], ["\ud800"], [-5], [2**70], "float32", "bfloat16", "complex64",
    ]  # fmt: skip
    for _ in range(rng.randint(0, 3)):
        name = rng.choice(list(fields))
        if rng.random() < 0.15:
            del fields[name]
        else:
            fields[name] = rng.choice(values)
        fields = fields if fields else {"reward": "told"}
    header = json.dumps(fields).encode()
    if rng.random() < 0.2:
        header = rng.choice([b"", b"[" * 100000, b"NaN", b"\xff\xfe", header[:-3], b'{"a": NaN}'])
    header += b" " * (-(12 + len(header)) % 16)
    length = len(header) if rng.random() < 0.8 else rng.choice([0, 4, 2**31, len(header) + 16])
    body = bytearray(b"DGFAST1\n" + struct.pack("<I", length) + header + rng.randbytes(48))
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        body[rng.randrange(len(body))] = rng.randrange(256)
    cut = rng.choice([len(body)] * 6 + [0, 7, 12, 40, len(body) - 1])
    kinds = [wire.CONTENT_TYPE] * 8 + ["", "text/html; charset=x", wire.CONTENT_TYPE + "; a=b"]
    return bytes(body[:cut]), {"Content-Type": rng.choice(kinds)}


def test_fuzzed_requests_find_no_defect(server):
    """A fixed set of 600 broken requests: 4xx, or 200 where nothing was broken; never 500."""
    rng = random.Random(0)
    statuses: dict[int, int] = {}
    with httpx2.Client(trust_env=False, timeout=30) as client:
        for _ in range(600):
            body, headers = mutated(rng)
            headers["Authorization"] = f"Bearer {TOKEN}"
            method = rng.choice(["POST"] * 12 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
            path = rng.choice(["/v1/score"] * 12 + ["/", "/health", "/metrics", "/v1/%00", "//"])
            if (method, path) != ("POST", "/v1/score"):
                body = b""
            answer = client.request(method, server.url + path, content=body, headers=headers)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            # 503: a message whose seconds are over (0, -1) when it would be begun.
            assert answer.status_code < 500 or answer.status_code == 503, (method, path, body)
    assert {200, 400, 404, 405, 415} <= statuses.keys()


# ---- batches, devices, stopping ------------------------------------------------------------------


class Slow:
    """Counts its batches; the first waits until it is let go."""

    name = "slow"

    def __init__(self) -> None:
        self.go, self.started, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, videos, prompts):
        self.batches.append(len(prompts))
        self.started.set()
        self.go.wait(20)
        if "bad" in prompts:
            raise ValueError("bad")
        return videos.mean(dim=(1, 2, 3, 4))


def job(count: int, size: int = 2, prompt: str = "a", seconds: float = 60.0) -> Job:
    samples = Samples(torch.rand(count, 1, 3, size, size), [prompt] * count)
    return Job(samples, time.monotonic() + seconds)


def test_jobs_that_wait_are_scored_together_and_apart_if_one_is_bad():
    slow = Slow()
    engine = Engine([slow], [torch.device("cpu")], largest_batch=8)
    jobs = [job(1)]
    engine.submit(jobs[0])
    assert slow.started.wait(20)
    # Behind it: two that fit, one of another size, a third that fits, one that would be too many.
    jobs += [job(2), job(3), job(1, size=4), job(3), job(5)]
    for other in jobs[1:]:
        engine.submit(other)
    late = job(1, seconds=-1.0)
    engine.submit(late)
    slow.go.set()
    for done in jobs:
        expected = done.samples.videos.mean(dim=(1, 2, 3, 4))
        assert torch.equal(done.done.result(20).values, expected)
    assert slow.batches == [1, 8, 1, 5]
    assert type(late.done.exception(20)).__name__ == "Expired"
    slow.go.clear()
    slow.started.clear()
    engine.submit(job(1))
    assert slow.started.wait(20)
    good, bad = job(2), job(1, prompt="bad")
    engine.submit(bad)
    engine.submit(good)
    slow.go.set()
    assert bad.done.result(20).errors == ("ValueError: bad",)
    assert good.done.result(20).errors == ("", "")
    assert engine.counts["failed"] == 1 and engine.counts["expired"] == 1
    engine.stop(5)


def test_two_devices_work_at_once_and_stop():
    both = [Slow(), Slow()]
    engine = Engine(both, [torch.device("cpu")] * 2, largest_batch=1)
    jobs = [job(1) for _ in range(3)]
    for one in jobs:
        engine.submit(one)
    assert all(slow.started.wait(20) for slow in both)  # Neither waits for the other.
    stopping = threading.Thread(target=engine.stop, args=(20,))
    stopping.start()
    assert type(jobs[2].done.exception(20)).__name__ == "Stopped"
    for slow in both:
        slow.go.set()
    assert all(len(one.done.result(20).values) == 1 for one in jobs[:2])
    stopping.join(20)
    assert not stopping.is_alive()


def test_a_gpu_without_a_number_is_the_first(monkeypatch):
    """`torch.cuda.set_device` refuses it, in a thread whose end nobody would see."""
    chosen, placed = [], threading.Event()

    class Placed(Slow):
        offload = False

        def place(self, device):
            placed.set()

    number = torch.cuda._utils._get_device_index  # As `set_device` reads its argument.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(number(device)))
    engine = Engine([Placed()], [torch.device("cuda")], largest_batch=1)
    assert placed.wait(20) and chosen == [0]
    engine.stop(5)


def test_a_running_request_is_finished_before_the_end(tmp_path):
    server = Server(tmp_path, "told.py:Told").ready()
    samples = Samples(torch.full((1, 1, 3, 2, 2), 0.25), ["wait 2"])
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(Remote(server.url, seconds=30.0).score, samples)
        time.sleep(0.7)
        assert server.stop() == 0  # And not by the signal.
        assert running.result(30).values.tolist() == [0.25]
    assert "stopped" in server.process.stdout.read()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), 5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["colourfulness", "--host", "0.0.0.0"], "give --token-file, or serve on 127.0.0.1"),
        (["no_such", "--port", "0"], "no such reward"),
        (["colourfulness", "colourfulness", "--port", "0"], "calls itself 'colourfulness', as"),
        (["colourfulness", "--port", "0", "--devices", "gpu"], "--devices = gpu"),
        (["colourfulness", "--batch-size", "0"], "--batch-size = 0: must be positive"),
        (["colourfulness", "--token-file", "gone"], "--token-file = 'gone': cannot be read"),
        (["colourfulness", "--port", "70000"], "--port = 70000: must be from 0 to 65535"),
        ([], "needs NAMEs or --recipe"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, arguments, line):
    monkeypatch.delenv("DANCEGRPO_FAST_TOKEN", raising=False)
    assert main(["serve-reward", *arguments]) == 2
    (found,) = capsys.readouterr().err.strip().split("\n")
    assert line in found


@pytest.mark.parametrize("token", ["a b", "caf\u00e9", "a\nb"])
def test_a_token_that_no_header_holds_is_refused(capsys, monkeypatch, token):
    monkeypatch.setenv("DANCEGRPO_FAST_TOKEN", token)
    assert main(["serve-reward", "colourfulness", "--port", "0"]) == 2
    assert "DANCEGRPO_FAST_TOKEN: must hold one line" in capsys.readouterr().err
    monkeypatch.setenv("DANCEGRPO_FAST_TOKEN", " fine\n")
    assert read_token(None) == "fine"


def test_a_taken_port_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-reward", "colourfulness", "--port", port]) == 2
    assert f"--port = {port}: Address already in use" in capsys.readouterr().err


def test_the_wire_keeps_bits_and_takes_nothing_else():
    values = torch.tensor([0.1, -0.0, 1e-45, 3.4e38, torch.nan])
    scored = wire.decode_scores(wire.encode_scores(Scored.of(values, {1: "x"})), 5)
    assert scored.errors == ("", "x", "", "", "it returned nan")
    assert torch.equal(scored.values[[0, 2, 3]], values[[0, 2, 3]])
    for answer in (
        b"", b"nonsense", b"[]", b"{}", b'{"scores": [1], "errors": []}',
        b'{"scores": [true], "errors": [""]}', b'{"scores": ["1"], "errors": [""]}',
        b'{"scores": [NaN], "errors": [""]}', b'{"scores": [1, 2], "errors": ["", ""]}',
        b'{"scores": [1e999], "errors": [""]}', b'{"scores": [1], "errors": [null]}',
    ):  # fmt: skip
        with pytest.raises(ValueError):
            wire.decode_scores(answer, 1)
    # 1e39 is finite in JSON and not in float32; a null without a reason still has none.
    odd = wire.decode_scores(b'{"scores": [1e39, null], "errors": ["", ""]}', 2)
    assert odd.values.isnan().all() and odd.errors == ("it returned inf", "no reason given")
