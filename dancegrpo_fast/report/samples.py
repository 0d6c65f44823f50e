"""Samples as files: images as PNG, videos as MP4, and a contact sheet of all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image, ImageDraw
from torch import Tensor

_THUMBNAIL, _GAP, _LINE = 160, 6, 14  # Pixels.
_MOST_ROWS = 100  # A picture much taller is opened by nothing.


def write_png(path: Path, image: Tensor) -> None:
    """Writes [3, H, W] uint8, without loss."""
    _picture(image).save(path)


def write_mp4(path: Path, video: Tensor, *, fps: int) -> None:
    """Writes [F, 3, H, W] uint8 as H.264, of high quality and playable everywhere.

    Args:
        path: File to write.
        video: Pixels. Odd heights and widths are stored with whole colour (yuv444p), which some
            players refuse.
        fps: Frames per second.
    """
    height, width = video.shape[-2:]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        for frame in video:
            pixels = frame.permute(1, 2, 0).contiguous().cpu().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@dataclass(frozen=True)
class Row:
    """One prompt of a contact sheet.

    Attributes:
        text: The prompt.
        samples: Videos [F, 3, H, W] uint8, or what is `shown` of them; F = 1 is an image.
        captions: Below each sample.
    """

    text: str
    samples: Sequence[Tensor]
    captions: Sequence[str]


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """A row of thumbnails per prompt, under its text; of a video first, middle and last frame.

    The first 100 prompts are shown.
    """
    rows = rows[:_MOST_ROWS]
    width = max(sum(_strip_width(video) for video in row.samples) for row in rows) + _GAP
    width = max(width, 360)
    wrapped = [textwrap.wrap(row.text, width // 7, max_lines=3) or [""] for row in rows]
    heights = [
        _LINE * (len(lines) + 2) + _GAP + max(_thumbnail(v[0]).height for v in row.samples)
        for row, lines in zip(rows, wrapped, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    pen, top = ImageDraw.Draw(sheet), _GAP
    for row, lines, height in zip(rows, wrapped, heights, strict=True):
        pen.text((_GAP, top), "\n".join(lines), fill="black")
        left, below = _GAP, top + _LINE * len(lines) + _GAP // 2
        for video, caption in zip(row.samples, row.captions, strict=True):
            x = left
            for number in shown(video):
                picture = _thumbnail(video[number])
                sheet.paste(picture, (x, below))
                x += picture.width
            pen.text((left, below + picture.height), caption, fill="gray")
            left += _strip_width(video)
        top += height
    return sheet


def shown(video: Tensor) -> list[int]:
    """Positions of the frames of a video that a contact sheet shows."""
    return sorted({0, len(video) // 2, len(video) - 1})


def _strip_width(video: Tensor) -> int:
    return len(shown(video)) * _thumbnail(video[0]).width + _GAP


def _thumbnail(image: Tensor) -> Image.Image:
    picture = _picture(image)
    scale = _THUMBNAIL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # Small ones are enlarged too, pixel by pixel: a sheet of specks shows nothing.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize((width, height), method)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
