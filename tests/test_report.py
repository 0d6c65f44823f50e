"""Metrics file, clips and the report page, read back by independent readers."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dancegrpo_fast.config import UserError
from dancegrpo_fast.report.metrics import MetricsLog, gif_bytes, read_metrics, write_gif
from dancegrpo_fast.report.page import (
    ClipPair,
    CurvePoint,
    Measure,
    Summary,
    reward_curve,
    write_page,
)


def moving_dot(frames: int = 5, size: int = 12) -> torch.Tensor:
    """[F, 3, H, W]: a red dot that moves one pixel a frame over a gradient."""
    video = torch.linspace(0, 0.5, size).expand(frames, 3, size, size).clone()
    for frame in range(frames):
        video[frame, :, 3, frame] = torch.tensor([1.0, 0.0, 0.0])
    return video


def decode(gif: bytes) -> torch.Tensor:
    """[F, 3, H, W] bytes of a GIF, as Pillow shows them."""
    image = Image.open(io.BytesIO(gif))
    frames = [
        torch.frombuffer(bytearray(frame.convert("RGB").tobytes()), dtype=torch.uint8)
        for frame in ImageSequence.Iterator(image)
    ]
    return torch.stack(frames).reshape(-1, image.height, image.width, 3).permute(0, 3, 1, 2)


def board(run_dir, **limits) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=limits or None)
    return events.Reload()


# --- clips


def test_gif_keeps_frames_pixels_and_time():
    video = moving_dot()
    gif = gif_bytes(video, fps=8)
    # At most 256 colours a frame, so that every pixel survives.
    assert torch.equal(decode(gif), (video * 255).round().to(torch.uint8))
    image = Image.open(io.BytesIO(gif))
    assert image.info["loop"] == 0 and image.info["duration"] == 120  # 12.5 hundredths, to even


def test_gif_clamps_and_paints_nan_black():
    video = torch.tensor([-1.0, 2.0, math.nan, 0.5]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert decode(gif_bytes(video))[0, 0].tolist() == [[0, 255], [0, 128]]


def test_gif_takes_bfloat16_strided_input_with_gradient():
    video = moving_dot().to(torch.bfloat16).transpose(2, 3).requires_grad_()
    expected = (video.detach().float() * 255).round().to(torch.uint8)
    assert torch.equal(decode(gif_bytes(video)), expected)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 1, 4, 4), (0, 3, 4, 4), (1, 2, 3, 4, 4)])
def test_gif_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"shape {list(shape)}; expected [F, 3, H, W]")):
        gif_bytes(torch.zeros(shape))


def test_gif_names_a_wrong_rate():
    with pytest.raises(ValueError, match="fps = 0"):
        gif_bytes(moving_dot(), fps=0)


def test_write_gif_writes_these_bytes(tmp_path):
    write_gif(tmp_path / "a.gif", moving_dot(), fps=4)
    assert (tmp_path / "a.gif").read_bytes() == gif_bytes(moving_dot(), fps=4)


# --- metrics


def test_metrics_reach_the_file_and_tensorboard(tmp_path):
    with MetricsLog(tmp_path / "run") as log:
        log.write(1, {"reward": 0.1, "loss": torch.tensor(2.0, dtype=torch.float64)})
        log.write(2, {"reward": 1 / 3, "grad_norm": math.nan})
        # A line is on disk as soon as it is written.
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()] == [
        {"iteration": 1, "reward": 0.1, "loss": 2.0},
        {"iteration": 2, "reward": 1 / 3, "grad_norm": None},
    ]
    events = board(tmp_path / "run")
    assert [e.step for e in events.Scalars("reward")] == [1, 2]
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([0.1, 1 / 3], rel=1e-7)
    assert math.isnan(events.Scalars("grad_norm")[0].value)


def test_a_clip_is_a_file_and_the_same_gif_in_tensorboard(tmp_path):
    video = moving_dot()
    with MetricsLog(tmp_path) as log:
        path = log.add_clip("samples/a red dot, moving", video, 3, fps=5)
    assert path == tmp_path / "clips" / "samples_a_red_dot_moving_000003.gif"
    assert path.read_bytes() == gif_bytes(video, fps=5)
    (event,) = board(tmp_path).Images("samples/a red dot, moving")
    assert (event.step, event.width, event.height) == (3, 12, 12)
    assert event.encoded_image_string == path.read_bytes()


def test_resume_drops_what_will_be_written_again(tmp_path):
    with MetricsLog(tmp_path) as log:
        for iteration in range(6):
            log.write(iteration, {"x": iteration})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "x"')  # what a crash leaves
    with MetricsLog(tmp_path, resumed=3) as log:
        for iteration in (4, 5):
            log.write(iteration, {"x": 10 * iteration})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"iteration": i, "x": x} for i, x in enumerate([0, 1, 2, 3, 40, 50])
    ]
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("x")] == [
        (0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50),
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.partial"))


def test_resume_without_a_file_starts_one(tmp_path):
    with MetricsLog(tmp_path, resumed=3) as log:
        log.write(4, {"x": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 4, "x": 1.0}]


def test_a_run_is_not_written_over(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(0, {"x": 1})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        MetricsLog(tmp_path)
    assert str(caught.value) == (
        f"output = {str(tmp_path)!r}: already holds a run; "
        "continue it with --resume latest, or name another folder"
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["{", "[1]", '{"x": 1}', '{"iteration": null}', "3"])
def test_damage_in_the_middle_is_named(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text(f'{{"iteration": 0}}\n{damage}\n{{"iteration": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no JSON object with an iter"):
        MetricsLog(tmp_path, resumed=1)


# --- page


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that are not closed in order."""

    VOID = ("meta", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


CURVE = [
    CurvePoint(0, held_out=0.5, standard_error=0.02),
    CurvePoint(1, training=0.52),
    CurvePoint(2, training=0.61, held_out=0.7, standard_error=0.01),
]


def a_page(tmp_path, **changes) -> str:
    gif, still = gif_bytes(moving_dot()), gif_bytes(moving_dot(1, 200))
    values = {
        "title": "Shapes <&>",
        "reward": "moving_shape",
        "base": 0.5,
        "trained": 0.7,
        "standard_error": 0.02,
        "prompts": 64,
        "seeds": 2,
        "config": "seed: 0\noutput: <x>\n",
        "hashes": {"base": "ab" * 32, "trained": "cd" * 32},
        "measures": [Measure("diversity", 0.25, 0.2, "80% of the base")],
    } | changes
    pairs = [ClipPair('a "red" <dot>', gif, still, 0.4567, 0.7891)]
    load = 'pipe = WanPipeline.from_pretrained("runs/x/export")\n'
    path = write_page(tmp_path, Summary(**values), CURVE, pairs, {"a": 3.0, "b": 1.0}, load)
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_says_what_happened(tmp_path):
    text = Page(a_page(tmp_path)).text
    for part in (
        "Shapes <&>",
        "on 64 held-out prompts x 2 seeds",
        "0.500 before, 0.700 after; gain +0.200 ± 0.020 (10.0 standard errors).",
        "before 0.457",
        "after 0.789",
        'a "red" <dot>',
        "diversity0.2500.20080% of the base",
        "a3.0 s75%b1.0 s25%total4.0 s",
        'pipe = WanPipeline.from_pretrained("runs/x/export")',
        "output: <x>",
        "ab" * 32,
        "cd" * 32,
    ):
        assert part in text, part


def test_a_loss_is_shown_as_one_and_no_error_is_not_divided_by(tmp_path):
    text = Page(a_page(tmp_path, trained=0.4, standard_error=0.0)).text
    assert "gain -0.100 ± 0.000." in text


def test_page_is_self_contained(tmp_path):
    html = a_page(tmp_path)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/", "#")), (tag, target)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html


def test_page_holds_the_very_clips_and_enlarges_small_ones_sharply(tmp_path):
    images = [attributes for tag, attributes in Page(a_page(tmp_path)).tags if tag == "img"]
    assert [i["alt"] for i in images] == ['before: a "red" <dot>', 'after: a "red" <dot>']
    assert [i.get("class") for i in images] == ["small", None]
    for attributes, video in zip(images, (moving_dot(), moving_dot(1, 200)), strict=True):
        kind, _, encoded = str(attributes["src"]).partition(";base64,")
        assert kind == "data:image/gif"
        assert base64.b64decode(encoded) == gif_bytes(video)


def test_curve_draws_each_point_and_bars_of_one_standard_error():
    svg = ElementTree.fromstring(reward_curve(CURVE))
    space = "{http://www.w3.org/2000/svg}"

    def paths(group: str) -> list[list[tuple[float, float]]]:
        found = svg.find(f".//{space}g[@id='{group}']")
        assert found is not None, group
        return [
            [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]
            for path in found.iter(f"{space}path")
        ]

    (training,) = paths("training")
    (held_out, *_marker) = paths("held-out")
    bars = paths("held-out-error")
    assert len(training) == 2 and len(held_out) == 2 and len(bars) == 2
    # The axes are affine: two held-out points fix both, everything else must follow.
    (x0, y0), (x2, y2) = held_out

    def place(iteration: float, reward: float) -> tuple[float, float]:
        return x0 + (x2 - x0) * iteration / 2, y0 + (y2 - y0) * (reward - 0.5) / 0.2

    assert y2 < y0  # SVG counts downwards: a rising reward rises
    for point, expected in zip(training, (place(1, 0.52), place(2, 0.61)), strict=True):
        assert point == pytest.approx(expected, abs=1e-3)
    for bar, (at, mean, error) in zip(bars, ((0, 0.5, 0.02), (2, 0.7, 0.01)), strict=True):
        low, high = place(at, mean - error), place(at, mean + error)
        assert [c for point in bar for c in point] == pytest.approx([*low, *high], abs=1e-3)


def test_curve_is_deterministic_takes_the_page_s_ink_and_may_be_empty():
    assert reward_curve(CURVE) == reward_curve(CURVE)
    assert "currentColor" in reward_curve(CURVE) and "#010203" not in reward_curve(CURVE)
    ElementTree.fromstring(reward_curve([]))
    ElementTree.fromstring(reward_curve(CURVE[1:2]))
