"""Images that samples start from: every file a user may bring, brought to one form or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.images import fit, load_fitted, load_image, to_tensor


def picture(height: int = 20, width: int = 30) -> Image.Image:
    """Random RGB pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_read_as_it_is(tmp_path):
    image = picture()
    assert (array(load_image(saved(image, tmp_path / "a.png"))) == np.asarray(image)).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colour_spaces_become_rgb(tmp_path, mode):
    """As Pillow converts them; a palette of 256 colours holds what was put in it."""
    ending = "tif" if mode in ("CMYK", "YCbCr") else "png"
    image = picture().convert(mode)
    found = array(load_image(saved(image, tmp_path / f"a.{ending}")))
    assert (found == np.asarray(image.convert("RGB"))).all()
    if mode in ("L", "1"):
        assert (found == found[..., :1]).all()


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    """Nearly no ink is nearly white."""
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 10))
    found = array(load_image(saved(image, tmp_path / "a.jpg", quality=100)))
    assert np.abs(found.astype(int) - 245).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    """The colour under a transparent pixel does not show, half of a half-transparent one does."""
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (0, 0, 0, alpha))
    if mode == "P":  # Palettes know transparent and opaque.
        image = image.convert("P")
        image.info["transparency"] = image.getpixel((0, 0))
        assert load_image(saved(image, tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)
        return
    found = array(load_image(saved(image.convert(mode), tmp_path / "a.png")))
    assert found[0, :, 0].tolist() == [255, 127, 0] and (found == found[..., :1]).all()


@pytest.mark.parametrize("orientation, turned", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_followed(tmp_path, orientation, turned):
    """6: a camera held upright stores rows as columns; the picture is turned clockwise."""
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = array(load_image(saved(image, tmp_path / "a.png", exif=exif)))
    assert (found == np.rot90(np.asarray(image), turned)).all()


@pytest.mark.parametrize("ending", ["jpg", "tif", "webp"])
def test_every_format_is_turned_once(tmp_path, ending):
    """Wide as stored, tall as shown; bright on the left as stored, on top as shown."""
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = array(load_image(saved(image, tmp_path / f"a.{ending}", exif=exif))).astype(int)
    assert found.shape == (32, 16, 3)
    assert found[:14].min() > 200 and found[18:].max() < 50  # Lossy formats blur the edge.


def test_previews_of_a_camera_are_passed_over(tmp_path):
    first, preview = Image.new("RGB", (32, 16), "white"), Image.new("RGB", (8, 4))
    path = saved(first, tmp_path / "a.mpo", save_all=True, append_images=[preview])
    assert Image.open(path).n_frames == 2
    found = load_image(path)
    assert found.size == (32, 16) and found.getpixel((0, 0)) == (255, 255, 255)


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_fitted(path, 16, 16)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_what_cannot_be_used_is_refused_by_name(tmp_path):
    deep = Image.fromarray(np.zeros((20, 20), np.uint16))
    refused(saved(deep, tmp_path / "deep.png"), "mode I;16; save it as 8-bit RGB")
    real = Image.fromarray(np.zeros((20, 20), np.float32))
    refused(saved(real, tmp_path / "real.tif"), "mode F; save it as 8-bit RGB")
    frames = [picture(), picture().rotate(180)]
    several = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    refused(several, "holds 2 frames; save the one to start from")
    text = tmp_path / "text.png"
    text.write_text("no image")
    refused(text, "cannot be read as an image")
    whole = saved(picture(64, 64), tmp_path / "whole.png").read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    refused(cut, "cannot be read as an image")
    refused(tmp_path / "absent.png", "cannot be read as an image")
    refused(saved(picture(3, 3), tmp_path / "small.png"), "3 x 3 pixels are too few")
    refused(saved(picture(20, 70), tmp_path / "long.png"), "only 29% of it would be left")


def test_least_size_of_the_message_is_enough():
    with pytest.raises(UserError, match="give at least 5 x 3"):
        fit(picture(2, 4), 9, 17)
    assert fit(picture(3, 5), 9, 17).size == (17, 9)


def test_an_image_of_the_right_size_keeps_every_pixel():
    image = picture(16, 32)
    assert (np.asarray(fit(image, 16, 32)) == np.asarray(image)).all()


@pytest.mark.parametrize("height, width", [(40, 64), (32, 90), (33, 65)], ids=str)
def test_cropping_is_around_the_centre(height, width):
    """A mirrored picture gives the mirrored result, and a centred square stays in the centre."""
    image = Image.new("RGB", (width, height))
    top, left = (height - 8) // 2, (width - 8) // 2
    image.paste((255, 255, 255), (left, top, left + 8 + width % 2, top + 8 + height % 2))
    found = np.asarray(fit(image, 16, 32)).astype(int)
    assert found.shape == (16, 32, 3) and found.max() > 200
    # Lanczos rounds each pixel once across and once down.
    assert np.abs(found - found[::-1]).max() <= 2 and np.abs(found - found[:, ::-1]).max() <= 2


def test_nothing_is_stretched():
    """A circle of a third of the height stays round in a sample of another shape."""
    rows, columns = np.mgrid[:60, :60]
    disc = ((rows - 29.5) ** 2 + (columns - 29.5) ** 2 < 100).astype(np.uint8) * 255
    found = np.asarray(fit(Image.fromarray(disc).convert("RGB"), 30, 48))[..., 0] > 127
    high, wide = found.any(1).sum(), found.any(0).sum()
    assert abs(high - 16) <= 1 and abs(wide - 16) <= 1  # 20 pixels at 48/60


def test_tensor_has_the_stock_processors_bits():
    image = fit(picture(), 16, 32)
    found = to_tensor(image)
    stock = VideoProcessor(vae_scale_factor=8).preprocess(image, height=16, width=32)
    assert torch.equal(found, stock[0]) and found.dtype == torch.float32
    assert found.is_contiguous() and found.shape == (3, 16, 32)
    assert to_tensor(Image.new("RGB", (2, 2))).unique().item() == -1
    assert to_tensor(Image.new("RGB", (2, 2), "white")).unique().item() == 1
