"""The tests of `test_<family>.py` verify that family; recipes and cases carry their own marks."""

from __future__ import annotations

import pytest

from dancegrpo_fast.models import FAMILIES
from dancegrpo_fast.report.verification import TWIN


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        family = item.path.stem.removeprefix("test_")
        if family in (*FAMILIES, "custom_family"):
            item.add_marker(pytest.mark.verifies(f"family:{family}", TWIN))
