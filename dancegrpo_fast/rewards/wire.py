"""Samples as bytes, between a reward's client and its server: a JSON header, then the raw pixels.

    magic (8 bytes) | length of the header (uint32, little endian) | header | pixels

Nothing here can run code on the other side. The pixels keep their dtype and so their bits.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dancegrpo_fast.rewards.interface import Samples, Scored

CONTENT_TYPE = "application/vnd.dancegrpo-fast.samples"
_MAGIC = b"DGFAST1\n"
_ALIGN = 16  # Pixels begin at a multiple: they are read in place.
_START = len(_MAGIC) + 4
_DTYPES = {
    "uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FIELDS = {"reward", "seconds", "dtype", "shape", "prompts", "fps", "metadata", "groups"}
_LARGEST_HEADER = 16 * 2**20
_MOST_SAMPLES = 65536


@dataclass(frozen=True)
class Message:
    """What a client asks.

    Attributes:
        reward: Name of a reward that the server holds.
        samples: What to score.
        seconds: For how long the client will wait.
    """

    reward: str
    samples: Samples
    seconds: float


def encode(message: Message) -> bytes:
    """The bytes of a message.

    Raises:
        ValueError: Metadata that JSON cannot hold.
    """
    samples = message.samples
    videos = samples.videos.detach().cpu().contiguous()
    if videos.dtype not in _NAMES:  # float64: no reward computes with more than float32.
        videos = videos.float()
    fields = {
        "reward": message.reward,
        "seconds": message.seconds,
        "dtype": _NAMES[videos.dtype],
        "shape": list(videos.shape),
        "prompts": list(samples.prompts),
        "fps": samples.fps,
        "metadata": [dict(entry) for entry in samples.metadata],
        "groups": list(samples.groups),
    }
    try:
        header = json.dumps(fields, allow_nan=False).encode("ascii")
    except TypeError as error:
        raise ValueError(f"metadata cannot be sent: {error}") from None
    header += b" " * (-(_START + len(header)) % _ALIGN)
    pixels = videos.flatten().view(torch.uint8).numpy()
    return b"".join([_MAGIC, struct.pack("<I", len(header)), header, pixels.data])


def decode(body: bytearray) -> Message:
    """The message that some bytes hold; the pixels are not copied.

    Raises:
        ValueError: Anything else than what `encode` writes.
    """
    if len(body) < _START or bytes(body[: len(_MAGIC)]) != _MAGIC:
        raise ValueError(f"the body does not begin with {_MAGIC!r} and a length")
    (length,) = struct.unpack_from("<I", body, len(_MAGIC))
    start = _START + length
    if length > _LARGEST_HEADER or start > len(body):
        raise ValueError(f"the header has {length} bytes, the body {len(body)}")
    if start % _ALIGN:
        raise ValueError(f"pixels begin at byte {start}, no multiple of {_ALIGN}")
    fields = parse_json(bytes(body[_START:start]))
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise ValueError(f"the header is no object of {', '.join(sorted(_FIELDS))}")
    reward, seconds = fields["reward"], fields["seconds"]
    if not isinstance(reward, str) or not _is_number(seconds):
        raise ValueError("reward must be a text, seconds a number")
    videos = _pixels(body, start, fields["dtype"], fields["shape"])
    return Message(reward, _samples(videos, fields), float(seconds))


def _pixels(body: bytearray, start: int, dtype: Any, shape: Any) -> Tensor:
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}")
    if not (isinstance(shape, list) and len(shape) == 5 and all(map(_is_count, shape))):
        raise ValueError("shape must be [N, F, 3, H, W]")
    if not 1 <= shape[0] <= _MOST_SAMPLES or shape[2] != 3:
        raise ValueError(f"shape must be [N, F, 3, H, W] with N from 1 to {_MOST_SAMPLES}")
    elements, size = math.prod(shape), _DTYPES[dtype].itemsize
    if elements == 0 or elements * size != len(body) - start:
        raise ValueError(f"{len(body) - start} bytes of pixels for shape {shape} of {dtype}")
    flat = torch.frombuffer(body, dtype=_DTYPES[dtype], count=elements, offset=start)
    return flat.reshape(shape)


def _samples(videos: Tensor, fields: Mapping[str, Any]) -> Samples:
    prompts, metadata, groups = fields["prompts"], fields["metadata"], fields["groups"]
    for name, value, kind in (
        ("prompts", prompts, str), ("metadata", metadata, dict), ("groups", groups, int),
    ):  # fmt: skip
        if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
            raise ValueError(f"{name} must be a list of {kind.__name__}")
    if fields["fps"] is not None and not (_is_number(fields["fps"]) and fields["fps"] > 0):
        raise ValueError("fps must be a positive number or null")
    return Samples(videos, prompts, fields["fps"], metadata, groups)


def parse_json(text: bytes) -> Any:
    """What JSON says, without the numbers and texts that JSON and UTF-8 do not have.

    Raises:
        ValueError: No such JSON.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(text.decode("utf-8"), parse_constant=refuse)
        # An escaped lone surrogate parses, but no tokenizer and no answer can encode it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no valid JSON: {str(error)[:200]}") from None
    return value


def encode_scores(scored: Scored) -> bytes:
    """A server's answer. float32 as a decimal of float64 comes back bit for bit."""
    values = [value if math.isfinite(value) else None for value in scored.values.tolist()]
    return json.dumps({"scores": values, "errors": list(scored.errors)}).encode("ascii")


def decode_scores(answer: bytes, count: int) -> Scored:
    """What a server answered for `count` samples.

    Raises:
        ValueError: Anything but that many numbers (or null with a reason).
    """
    fields = parse_json(answer)
    if not isinstance(fields, dict) or not {"scores", "errors"} <= fields.keys():
        raise ValueError("the answer has no scores and errors")
    scores, errors = fields["scores"], fields["errors"]
    if not (isinstance(scores, list) and isinstance(errors, list)):
        raise ValueError("scores and errors are not lists")
    if len(scores) != count or len(errors) != count:
        raise ValueError(f"{len(scores)} scores and {len(errors)} errors for {count} samples")
    if not all(value is None or _is_number(value) for value in scores):
        raise ValueError("a score is no finite number")
    if not all(isinstance(why, str) for why in errors):
        raise ValueError("an error is no text")
    values = torch.tensor([math.nan if value is None else value for value in scores])
    # An error beside a number: which of the two is wrong cannot be known, so there is no score.
    reasons = {i: why or "no reason given" for i, why in enumerate(errors)
               if why or scores[i] is None}  # fmt: skip
    return Scored.of(values, reasons)


def _is_number(value: Any) -> bool:
    """A finite number of JSON that fits a float; `true` is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e300 < value < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
