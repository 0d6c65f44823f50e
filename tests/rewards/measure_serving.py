"""Milliseconds per image that a reward server adds, by size of request; not a test.

    PYTHONPATH=. python tests/rewards/measure_serving.py [--images 1000] [--side 512]

The server is a process on this machine. The reward looks at one pixel, so that what is left is
client, transport and server.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from serving import Server

from dancegrpo_fast.rewards import Samples
from dancegrpo_fast.rewards.remote import Remote

CORNER = '''
from dancegrpo_fast.rewards import SampleReward, Scored

class Corner(SampleReward):
    name = "corner"
    def score(self, samples):
        return Scored.of(samples.videos[:, 0, 0, 0, 0] / 255)
'''


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = (args.images, 1, 3, args.side, args.side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    samples = Samples(images, ["a prompt"] * args.images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corner.py").write_text(CORNER)
        server = Server(folder, f"{folder / 'corner.py'}:Corner").ready()
        try:
            for batch, concurrency in ((8, 4), (8, 1), (1, 4), (32, 4)):
                remote = Remote(server.url, batch_size=batch, concurrency=concurrency)
                start = time.perf_counter()
                scored = remote.score(samples)
                taken = time.perf_counter() - start
                assert torch.equal(scored.values, images[:, 0, 0, 0, 0].float() / 255)
                each = 1000 * taken / args.images
                print(f"{batch} per request, {concurrency} at once: {each:.2f} ms an image")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
