"""Verifiable rewards against closed forms and drawings whose answer is known."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from tiny_reward_models import images_of

from dancegrpo_fast.rewards import REWARDS, Samples
from dancegrpo_fast.rewards.motion import Flicker, MotionAmplitude, MotionSmoothness
from dancegrpo_fast.rewards.objects import Counting, Position, count_things
from dancegrpo_fast.rewards.ocr import Ocr, distance, similarity
from dancegrpo_fast.rewards.pixels import (
    PALETTE,
    Colour,
    Colourfulness,
    JpegCompressibility,
    JpegIncompressibility,
    colour_shares,
    colour_words,
)


def flat(*rgb: float, size: tuple[int, int] = (12, 10)) -> torch.Tensor:
    """One picture of one colour, [1, 3, H, W]."""
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, *size).clone()


def drawing(size: tuple[int, int], *shapes: tuple[str, tuple[int, ...], str]) -> torch.Tensor:
    """Shapes (kind, box, colour) on black, uint8 [1, 3, H, W]; size is (width, height)."""
    image = Image.new("RGB", size, (8, 8, 8))
    pen = ImageDraw.Draw(image)
    for kind, box, colour in shapes:
        getattr(pen, kind)(box, fill=tuple(round(255 * c) for c in PALETTE[colour]))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size[1], size[0], 3).permute(2, 0, 1)[None]


# ---- one image -----------------------------------------------------------------------------------


def test_jpeg_sizes_are_those_of_the_file():
    images = images_of((33, 50), 3)
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    sizes = torch.tensor(sizes, dtype=torch.float64)
    prompts = ["", "", ""]
    more = JpegIncompressibility()(images[:, None], prompts)
    torch.testing.assert_close(more.double(), sizes / 1000, rtol=1e-6, atol=0)
    less = JpegCompressibility()(images[:, None].float() / 255, prompts)
    torch.testing.assert_close(less.double(), -sizes / 500_000, rtol=1e-6, atol=0)
    assert float(JpegCompressibility()(flat(0.5, 0.5, 0.5)[:, None], [""])) > float(less.max())


def test_colourfulness_closed_forms():
    half = flat(1.0, 0.0, 0.0)
    half[..., 5:] = 0  # Half red, half black: rg = 1 or 0, yb = 1/2 or 0.
    grey = flat(0.3, 0.3, 0.3)
    scores = Colourfulness()(torch.stack([half, grey, flat(0.0, 0.0, 1.0)]), ["", "", ""])
    spread, mean = (0.5**2 + 0.25**2) ** 0.5, (0.5**2 + 0.25**2) ** 0.5
    expected = torch.tensor([spread + 0.3 * mean, 0.0, 0.3])
    # 1e-12 under a root is 1e-6 where the truth is 0.
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=3e-6)
    grey = grey.requires_grad_()
    Colourfulness().gradient_scores(Samples(grey, [""])).sum().backward()
    assert grey.grad.isfinite().all()


def test_colours_by_name():
    assert colour_words("A Red cube, gray sky, reddish, red") == ["red", "grey"]
    for name, rgb in PALETTE.items():
        shares = colour_shares(flat(*rgb), list(PALETTE))[0, :, 0, 0]
        assert list(PALETTE)[int(shares.argmax())] == name
        assert shares[list(PALETTE).index(name)] > 0.55
    picture = flat(*PALETTE["red"], size=(8, 8))
    picture[..., 4:] = torch.tensor(PALETTE["black"]).view(3, 1, 1)
    scored = Colour().score(
        Samples(picture.expand(4, -1, -1, -1), ["a red ball", "blue", "red and black", "a cat"])
    )
    red = float(colour_shares(flat(*PALETTE["red"]), ["red"]).mean())
    assert float(scored.values[0]) == pytest.approx(red / 2, abs=1e-3)
    assert scored.values[1] < 0.05 and scored.values[2] > 0.8
    assert scored.values[3].isnan() and "names no colour" in scored.errors[3]
    enough = Colour(enough=0.4).score(Samples(picture, ["red"]))
    assert float(enough.values[0]) == pytest.approx(min(red / 2 / 0.4, 1), abs=1e-3)
    told = Samples(picture, ["a cat"], metadata=[{"colours": ["red"]}])
    assert float(Colour().score(told).values[0]) == pytest.approx(red / 2, abs=1e-3)


# ---- motion --------------------------------------------------------------------------------------


def clip_of(brightness: torch.Tensor) -> torch.Tensor:
    """[1, F, 3, 2, 4]: the left half at 0.5 + b, the right at 0.5 - b, grey."""
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0])
    return (0.5 + brightness.view(1, -1, 1, 1, 1) * sign).expand(1, -1, 3, 2, 4).clone()


def test_motion_closed_forms():
    time = torch.arange(9) / 10
    linear, wave = clip_of(time / 4), clip_of(torch.tensor([0.1, -0.1] * 4 + [0.1]))
    still, flash = clip_of(torch.zeros(9)), torch.full((1, 9, 3, 2, 4), 0.4)
    flash[:, ::2] += 0.2
    fade = 0.1 + time.view(1, -1, 1, 1, 1).expand(1, -1, 3, 2, 4)
    videos = torch.cat([linear, wave, still, flash, fade])
    expected = {
        MotionAmplitude(cap=0.15): [0.025, 0.15, 0, 0, 0],
        MotionSmoothness(): [0, -0.4, 0, 0, 0],
        Flicker(): [0, 0, 0, -0.4, 0],
    }
    for reward, values in expected.items():
        scores = reward(videos, [""] * 5)
        torch.testing.assert_close(scores, torch.tensor(values), rtol=0, atol=1e-6)
        eight_bit = reward((videos * 255).round().to(torch.uint8), [""] * 5)
        torch.testing.assert_close(eight_bit, scores, rtol=0, atol=4 / 255)
        leaf = videos.clone().requires_grad_()
        values = reward.gradient_scores(Samples(leaf, [""] * 5))
        torch.testing.assert_close(values.detach(), scores, rtol=0, atol=1e-6)
        values.sum().backward()
        assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0


def test_motion_needs_frames():
    for reward in (MotionSmoothness(), Flicker()):
        with pytest.raises(ValueError, match="needs 3 frames, not 2"):
            reward(torch.rand(1, 2, 3, 4, 4), [""])
    assert MotionAmplitude()(torch.rand(1, 2, 3, 4, 4), [""]).isfinite().all()


# ---- things --------------------------------------------------------------------------------------

THREE = drawing((160, 100), ("rectangle", (10, 10, 40, 40), "red"),
                ("ellipse", (60, 20, 90, 60), "blue"), ("rectangle", (110, 50, 150, 90), "green"),
                ("rectangle", (2, 95, 3, 96), "white"))  # fmt: skip


def test_things_are_counted():
    assert count_things(THREE.float() / 255, 0.25, 0.002).tolist() == [3]  # The speck is too small.
    assert count_things(THREE.float() / 255, 0.25, 0.0).tolist() == [4]
    big = drawing((700, 400), ("rectangle", (100, 100, 200, 300), "red"),
                  ("rectangle", (400, 100, 500, 300), "red"))  # fmt: skip
    ring = drawing((60, 60), ("rectangle", (5, 5, 50, 50), "red"),
                   ("rectangle", (10, 10, 45, 45), "black"))  # fmt: skip
    diagonal = torch.zeros(1, 3, 16, 16)
    diagonal[:, :, range(4, 12), range(4, 12)] = 1  # Connected over the corners.
    for picture, count in ((big, 2), (ring, 1), (diagonal * 255, 1), (flat(0.4, 0.4, 0.9), 0)):
        scale = 255 if picture.max() > 1 else 1
        assert count_things(picture.float() / scale, 0.25, 0.002).tolist() == [count]


def test_counting():
    prompts = ["three shapes", "4 shapes", "two shapes", "shapes", "a pair", "10 of 3"]
    videos = THREE[:, None].expand(6, 2, -1, -1, -1)
    scored = Counting().score(Samples(videos, prompts))
    torch.testing.assert_close(scored.values[[0, 1, 2, 5]], torch.tensor([1.0, 0.75, 0.5, 0.3]))
    assert scored.values[3].isnan() and "holds no number" in scored.errors[3]
    assert float(scored.values[4]) == 0  # "a" asks for one; three is two too many.
    strict = Counting(strict=True)(videos, prompts)
    assert strict[[0, 1, 2]].tolist() == [1, 0, 0]
    told = Counting().score(Samples(videos[:2], ["", ""], metadata=[{"count": 3}, {"count": 0}]))
    assert float(told.values[0]) == 1 and "must be 1 or more" in told.errors[1]


def test_position():
    prompts = [
        "a red square left of a blue circle", "a red square to the right of the blue one",
        "a blue circle is above the green square", "a green thing above a red thing",
        "a yellow thing left of a blue one", "a red square", "red left of another red",
    ]  # fmt: skip
    scored = Position().score(Samples(THREE.expand(7, -1, -1, -1), prompts))
    assert scored.values[:5].tolist() == [1, 0, 1, 0, pytest.approx(0, abs=0.01)]
    assert "relates no two colours" in scored.errors[5] and "same colour" in scored.errors[6]
    # Half way: centres 0.05 apart in x score 1/2 + 0.05 / (2 * 0.1).
    near = drawing((200, 100), ("rectangle", (50, 5, 89, 40), "red"),
                   ("rectangle", (60, 60, 99, 95), "blue"))  # fmt: skip
    values = Position()(near[:, None], ["red left of blue"])
    assert float(values) == pytest.approx(0.75, abs=0.02)
    told = Samples(near, [""], metadata=[{"relation": ["red", "above", "blue"]}])
    assert float(Position().score(told).values) == 1
    wrong = Samples(near, [""], metadata=[{"relation": ["red", "near", "blue"]}])
    assert "needs colours and left of" in Position().score(wrong).errors[0]


# ---- OCR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_edit_distance(a, b, expected):
    assert distance(a, b) == distance(b, a) == expected


def test_similarity():
    assert similarity("xx H el LO yy", "hello") == 1
    assert similarity("hallo", "hello") == pytest.approx(0.8)
    assert similarity("", "hello") == 0
    assert similarity("something else entirely, much longer", "hello") == 0


def test_ocr_with_a_stand_in(monkeypatch):
    seen = []

    def engine(bgr):
        seen.append(bgr)
        return ([[None, "HEL", 0.9], [None, "L0", 0.8]] if len(seen) == 1 else None), None

    package = SimpleNamespace(RapidOCR=lambda: engine)
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", package)
    images = images_of((9, 12), 4)
    prompts = ['a sign "hello" and "bye"', "says \u201chello\u201d", "no text", 'an empty ""']
    scored = Ocr().score(Samples(images, prompts))
    assert scored.values[:2].tolist() == [pytest.approx(0.8), 0]
    assert all("quotes no text" in why for why in scored.errors[2:])
    assert (seen[0][..., 2] == images[0, 0].numpy()).all()  # Blue first, red last.
    told = Samples(images[:1], ["x"], metadata=[{"text": "y"}])
    assert float(Ocr().score(told).values) == 0


def test_ocr_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'dancegrpo-fast\[ocr\]'"):
        Ocr()


def test_ocr_reads():
    pytest.importorskip("rapidocr_onnxruntime")
    image = Image.new("RGB", (320, 96), "white")
    font = ImageFont.load_default(size=48)
    ImageDraw.Draw(image).text((20, 20), "NASA 2049", fill="black", font=font)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(96, 320, 3).permute(2, 0, 1)[None]
    scores = Ocr()(pixels.expand(2, -1, -1, -1)[:, None], ['"nasa 2049"', '"hello world"'])
    assert scores[0] == 1 and scores[1] < 0.5


@pytest.mark.parametrize("name", ["jpeg_compressibility", "colourfulness", "motion_smoothness",
                                  "motion_amplitude", "flicker", "colour", "counting"])  # fmt: skip
def test_batches_are_singles(name):
    reward, videos = REWARDS[name](), images_of((20, 24), 12).reshape(4, 3, 3, 20, 24)
    prompts = ["one red thing", "two blue things", "a green thing", "3 white things"]
    together = reward(videos, prompts)
    singles = torch.cat([reward(videos[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    # Means over other batches may sum in another order.
    torch.testing.assert_close(together, singles, rtol=1e-6, atol=1e-7)
    order = [2, 0, 3, 1]
    moved = reward(videos[order], [prompts[i] for i in order])
    torch.testing.assert_close(moved, together[order], rtol=1e-6, atol=1e-7)
    videos = videos.float() / 255
    videos[1, 1] = torch.nan
    scored = reward.score(Samples(videos, prompts))
    assert scored.values.isnan().tolist() == [False, True, False, False]
    assert scored.errors[1] == "a pixel is not finite"
