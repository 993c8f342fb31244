"""Fixtures that every test may use, and the choice between Triton's interpreter and its compiler."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests import quick_interpreter

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run in Triton's interpreter unless the run selects the tests that compile them.

    This must happen before any module with a kernel is imported: `triton.jit` looks at the variable once.
    """
    expression = config.getoption("markexpr") or ""
    if expression.strip() not in ("aot", "gpu"):
        os.environ["TRITON_INTERPRET"] = "1"
        quick_interpreter.install()


@pytest.fixture(scope="session")
def shared_data() -> Path | None:
    """A directory of larger real texts beside the checkout, or None. Tests use it when it is there."""
    return SHARED_DATA if SHARED_DATA.is_dir() else None


@pytest.fixture(params=[pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" in the default run, where Triton kernels are interpreted; "cuda" under `pytest -m gpu`."""
    return request.param


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> int:
    """Every test draws fresh inputs; a failure prints the seed, and FASTLM_TEST_SEED repeats it."""
    seed = int(os.environ.get("FASTLM_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    return seed


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = (yield).get_result()
    if report.failed:
        for name, value in item.user_properties:
            report.sections.append(("inputs", f"FASTLM_TEST_SEED={value}" if name == "seed" else f"{name}={value}"))
