"""One thing to draw: what data files hold, families embed and rewards judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One thing to draw.

    Attributes:
        text: The prompt.
        image: File of the image that a family starts from, or None.
        metadata: What rewards are told beside the text.
    """

    text: str
    image: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
