"""Images that samples start from: read from a file, brought to the sample's size, as a tensor.

The rule, the same for every image-to-video family:

- Turned as its EXIF orientation says.
- Colours: 8-bit RGB, greyscale, palette and CMYK become RGB (Pillow's conversion, embedded colour
  profiles are not applied); transparency is laid on white. 16-bit, float and Lab files are refused
  (their conversion would clip), and so are files of several frames.
- Size: scaled (Lanczos) until it covers the sample, then cropped around the centre; one that has
  the sample's size keeps every pixel. Refused where that would enlarge over `MAX_ENLARGED` times
  or keep less than `MIN_KEPT` of the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.config import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ENLARGED = 4.0
MIN_KEPT = 0.3  # A 9:16 portrait keeps .32 in a 16:9 sample, a square .56.

_READABLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def load_image(path: str | Path) -> Image:
    """The picture of a file, upright, as RGB.

    Raises:
        UserError: The file cannot be read as one 8-bit picture.
    """
    from PIL import Image, ImageOps

    where = f"image = {str(path)!r}"
    try:
        with Image.open(path) as file:
            # Cameras append previews to a JPEG (MPO); its first picture is the photograph.
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            mode = file.mode
            file.load()
            picture = file.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot be read as an image ({error})") from None
    if frames > 1:
        raise UserError(f"{where}: holds {frames} frames; save the one to start from")
    if mode not in _READABLE:
        raise UserError(f"{where}: has pixels of mode {mode}; save it as 8-bit RGB")
    picture = ImageOps.exif_transpose(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    over = picture.convert("RGBA")
    white = Image.new("RGBA", over.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, over).convert("RGB")


def fit(image: Image, height: int, width: int, *, name: str = "image") -> Image:
    """Scaled until it covers height x width pixels, cropped around the centre.

    Args:
        image: RGB.
        height: Of the result.
        width: Of the result.
        name: What errors call it.

    Raises:
        UserError: It is too small, or of too different a shape.
    """
    from PIL import Image, ImageOps

    if image.size == (width, height):
        return image.copy()
    across, down = width / image.width, height / image.height
    enlarged, kept = max(across, down), min(across, down) / max(across, down)
    given = f"{name}: {image.width} x {image.height} pixels"
    if enlarged > MAX_ENLARGED:
        least = f"{-(-width // int(MAX_ENLARGED))} x {-(-height // int(MAX_ENLARGED))}"
        raise UserError(
            f"{given} are too few for a sample of {width} x {height} (enlarged {enlarged:.1f} "
            f"times); give at least {least}"
        )
    if kept < MIN_KEPT:
        raise UserError(
            f"{given}: only {kept:.0%} of it would be left in a sample of {width} x {height}; "
            "crop it nearer to that shape"
        )
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def to_tensor(image: Image) -> Tensor:
    """[3, H, W] float32 in [-1, 1] of an RGB image, as diffusers' image processor makes it."""
    pixels = np.asarray(image, dtype=np.float32) / 255.0
    return 2.0 * torch.from_numpy(pixels).permute(2, 0, 1).contiguous() - 1.0


def load_fitted(path: str | Path, height: int, width: int) -> Image:
    """`load_image` and `fit`, errors naming the file."""
    return fit(load_image(path), height, width, name=f"image = {str(path)!r}")
