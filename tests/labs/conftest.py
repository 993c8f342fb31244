from __future__ import annotations

from pathlib import Path

import pytest

from fastlm.labs.workbench import Workbench

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def lab(tmp_path: Path) -> Workbench:
    """A workbench whose data directory may be missing."""
    return Workbench(tmp_path, lang="en", data=DATA)
