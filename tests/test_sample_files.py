"""What `sample` writes: images, videos and the sheet of all of them."""

from __future__ import annotations

import av
import numpy as np
import torch
from PIL import Image

from dancegrpo_fast.report.samples import Row, contact_sheet, shown, write_mp4, write_png


def test_odd_sizes_and_every_colour(tmp_path):
    """A PNG keeps every bit; an odd video keeps its size, its colours up to the coder's loss."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 7, 11), generator=generator, dtype=torch.uint8)
    write_png(tmp_path / "a.png", image.transpose(1, 2))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image.permute(2, 1, 0))
    video = torch.zeros(3, 3, 33, 17, dtype=torch.uint8)
    for frame, colour in enumerate(([250, 10, 10], [10, 250, 10], [10, 10, 250])):
        video[frame] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    write_mp4(tmp_path / "a.mp4", video, fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(found).shape == (3, 33, 17, 3)
    assert np.abs(np.stack(found).transpose(0, 3, 1, 2) - video.numpy().astype(int)).max() < 12


def test_contact_sheet(tmp_path):
    """Each prompt's samples in a row, in order; any text; not more rows than a picture holds."""
    red, blue = (torch.zeros(1, 3, 8, 16, dtype=torch.uint8) for _ in range(2))
    red[:, 0], blue[:, 2] = 255, 255
    rows = [
        Row("red, then blue \u4e2d\u6587 \U0001f600 " + "long " * 200, [red, blue], ["1", "2"]),
        Row("", [blue], ["seed 0: 0.5"]),
    ]
    sheet = np.asarray(contact_sheet(rows)).astype(int)
    colours = {
        name: np.argwhere((sheet == colour).all(axis=-1))
        for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items()
    }
    assert len(colours["red"]) == 160 * 80 and len(colours["blue"]) == 2 * 160 * 80
    first = colours["blue"][colours["blue"][:, 0] <= colours["red"][:, 0].max()]
    assert first[:, 1].min() > colours["red"][:, 1].max()
    tall = contact_sheet([Row("a", [red], ["seed 0"])] * 300)
    assert tall.height == contact_sheet([Row("a", [red], ["seed 0"])] * 100).height
    video = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    assert shown(video) == [0, 4, 8] and shown(video[:1]) == [0] and shown(video[:2]) == [0, 1]
