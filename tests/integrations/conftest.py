"""Shared by the tests of the hosts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from counting import Counts, count

__all__ = ["Counts", "count", "counts"]


@pytest.fixture
def counts() -> Callable[[Callable[[], object]], Counts]:
    """Launches, fused calls and syncs of a call."""
    return count
