"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path | None:
    """A directory of larger real texts beside the checkout, or None. Tests use it when it is there."""
    return SHARED_DATA if SHARED_DATA.is_dir() else None
