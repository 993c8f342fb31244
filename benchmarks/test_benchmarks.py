"""Each side of each case under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Inputs may be large, so cases are made one at a time, in the order in which pytest runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastlm.benchmarks import harness
from fastlm.benchmarks.harness import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Cursor:
    """The case made last, and the generator that makes the ones after it."""

    def __init__(self) -> None:
        self.benchmark = ""
        self.index = -1
        self.cases: Iterator[Case] = iter(())
        self.case: Case | None = None

    def move_to(self, benchmark: str, index: int) -> Case:
        if benchmark != self.benchmark or index < self.index:
            self.benchmark, self.index, self.cases = benchmark, -1, harness.load(benchmark, DEVICE)
        while self.index < index:
            self.case = None
            self.case = next(self.cases)
            self.index += 1
        assert self.case is not None
        return self.case


_cursor = _Cursor()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sides = [
        pytest.param(name, index, side, id=f"{name}-{case.name}-{side}")
        for name in harness.available()
        for index, case in enumerate(harness.load(name, DEVICE))
        for side in ("ours", *case.peers)
    ]
    metafunc.parametrize(("name", "index", "side"), sides)


def test_side(benchmark: Callable[..., Any], name: str, index: int, side: str) -> None:
    case = _cursor.move_to(name, index)
    benchmark(case.ours if side == "ours" else case.peers[side])
