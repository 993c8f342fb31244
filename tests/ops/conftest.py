"""The CUDA core on the CPU, which the tests of more than one op use."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.ops import cuda_on_cpu as machine


@pytest.fixture(scope="session")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return machine.build(tmp_path_factory.mktemp("cuda_on_cpu"))
