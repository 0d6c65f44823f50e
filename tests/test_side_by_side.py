"""The page of `evaluate`: which samples it shows, how, and how large it may become."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import decode

from dancegrpo_fast.report import page
from dancegrpo_fast.report.audit import Finding
from dancegrpo_fast.report.comparison import Results
from dancegrpo_fast.report.side_by_side import SHOWN, shown, write_page


def results(scores: np.ndarray, **changes) -> Results:
    """Of scores [M, P, S, R]."""
    models, prompts, _, rewards = scores.shape
    values = {
        "note": f"{prompts} prompts", "prompts": tuple(f"prompt {p}" for p in range(prompts)),
        "groups": (), "models": ("base", "a <b>", "c")[:models],
        "rewards": ("first", "second")[:rewards], "scores": scores, "counts": (), "findings": {},
        "settings": {},
    }  # fmt: skip
    return Results(**{**values, **changes})


def flat(frames: int, size: int):
    """Grey videos: frame f has the level 10 (prompt + 1) + the model's position + 3 f."""

    def videos(m: int, jobs):
        levels = torch.tensor([10 * (p + 1) + m for p, _ in jobs])[:, None] + 3 * torch.arange(
            frames
        )
        whole = levels.to(torch.uint8)[:, :, None, None, None]
        return whole.expand(-1, -1, 3, size, size).contiguous()

    return videos


def pictures(path: Path) -> list[bytes]:
    """The page's pictures, in order."""
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', path.read_text())
    return [base64.b64decode(text) for text in found]


def test_gains_losses_and_some_between():
    change = np.linspace(-1, 1, 100)
    scores = np.stack([np.zeros(100), change])[:, :, None, None]
    found = shown(results(scores))
    assert len(found) == SHOWN == len(set(found))
    assert found[:8] == list(range(99, 91, -1)) and found[-8:] == list(range(7, -1, -1))


def test_samples_stand_side_by_side_by_change(tmp_path):
    """Of each prompt all models in their order, prompts that gained most first, pixel by pixel."""
    scores = np.zeros((3, 4, 2, 1))
    scores[2, :, 0, 0] = [0.25, -1, 3, math.nan]  # No score is no change.
    path = write_page(results(scores), flat(1, 8), tmp_path / "p.html", fps=[8, 8, 8])
    levels = [int(decode(picture)[0, 0, 0, 0]) for picture in pictures(path)]
    assert levels == [10 * (p + 1) + m for p in (2, 0, 3, 1) for m in range(3)]
    text = path.read_text()
    assert "a &lt;b&gt;, c against base" in text and "a <b>" not in text
    assert "<b>c</b> first 3<" in text and "<b>c</b> first nan<" in text


@pytest.mark.parametrize(("frames", "fps"), [(5, 8), (40, 16), (40, 7.5)])
def test_a_video_takes_as_long_as_it_is(tmp_path, frames, fps):
    """At each model's own rate; at most 16 frames of it. WebP counts in milliseconds a frame."""
    scores = np.zeros((2, 1, 1, 1))
    path = write_page(results(scores), flat(frames, 8), tmp_path / "p.html", fps=[fps, 2 * fps])
    for picture, rate in zip(pictures(path), (fps, 2 * fps), strict=True):
        image = Image.open(io.BytesIO(picture))
        seconds = 0.0
        for number in range(image.n_frames):
            image.seek(number)
            image.load()
            seconds += image.info["duration"] / 1000
        assert image.n_frames == min(frames, 16)
        assert seconds == pytest.approx(frames / rate, abs=0.5e-3 * 16)


@pytest.mark.parametrize(("frames", "longest"), [(1, 384), (3, 256)])
def test_large_samples_are_made_small(tmp_path, frames, longest):
    path = write_page(
        results(np.zeros((1, 1, 1, 1))), flat(frames, 500), tmp_path / "p.html", fps=[8]
    )
    (picture,) = pictures(path)
    assert Image.open(io.BytesIO(picture)).size == (longest, longest)


def test_pictures_beyond_the_limit_are_counted_and_said(tmp_path, monkeypatch):
    scores = np.zeros((2, 20, 1, 1))
    path = write_page(results(scores), flat(1, 8), tmp_path / "p.html", fps=[8, 8])
    one = len(base64.b64encode(pictures(path)[0]))
    monkeypatch.setattr(page.Pictures.__init__, "__defaults__", (7 * one,))
    path = write_page(results(scores), flat(1, 8), tmp_path / "p.html", fps=[8, 8])
    shown, text = pictures(path), path.read_text()
    assert sum(len(base64.b64encode(picture)) for picture in shown) <= 7 * one
    assert f">{40 - len(shown)} pictures were left out" in text and "they are in samples/." in text
    assert text.count("no room") == 40 - len(shown) > 0


def test_a_page_is_replaced_whole(tmp_path, monkeypatch):
    """Who reads the page while it is written sees the old one."""
    path = tmp_path / "page.html"
    path.write_text("old")

    def torn(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("dancegrpo_fast.report.page.os.replace", torn)
    with pytest.raises(KeyboardInterrupt):
        write_page(results(np.zeros((1, 1, 1, 1))), flat(1, 8), path, fps=[8])
    assert path.read_text() == "old"


def test_the_audit_says_what_to_try_only_where_it_flags(tmp_path):
    found = [
        Finding("motion", 0.5, 0.001, "below 0.6", True, "pay for motion"),
        Finding("grid", 0.25, math.nan, "above +0.7", False, "advice that nobody needs"),
    ]
    told = results(np.zeros((2, 1, 1, 1)), findings={"a <b>": found})
    text = write_page(told, flat(1, 8), tmp_path / "p.html", fps=[8, 8]).read_text()
    assert "<h2>Audit of a &lt;b&gt;</h2>" in text and text.count('class="flag"') == 1
    assert "<td>0.5</td><td>0.001</td>" in text and "<td>0.25</td><td></td>" in text
    assert "pay for motion" in text and "nobody needs" not in text


def test_one_model_has_means_and_no_comparison(tmp_path):
    scores = np.array([[1.0, 3.0], [5.0, math.nan]]).reshape(1, 2, 2, 1)
    told = results(scores, counts=(1, 2))
    text = write_page(told, flat(1, 8), tmp_path / "p.html", fps=[8]).read_text()
    # Prompt means 2 and 5; the best of two is known for the first prompt alone.
    assert "<tr><td>base</td><td>first</td><td>3.5</td></tr>" in text and "win rate" not in text
    assert "<td>2 (nan)</td><td>3 (nan)</td>" in text
