"""The row of attention's Gluon kernels in its benchmark."""

from __future__ import annotations

import os

import pytest
import torch
from fastlm.benchmarks import bench_attention


@pytest.mark.parametrize("before", [None, "triton"])
def test_the_row_is_served_by_gluon_and_leaves_the_others_alone(before, monkeypatch):
    monkeypatch.delenv("FASTLM_BACKEND", raising=False)
    if before is not None:
        monkeypatch.setenv("FASTLM_BACKEND", before)
    seen = []

    def step() -> tuple[torch.Tensor, ...]:
        seen.append(os.environ.get("FASTLM_BACKEND"))
        if len(seen) == 2:
            raise RuntimeError("a kernel that fails")
        return ()

    row = bench_attention.on_gluon(step)
    assert row() == ()
    assert os.environ.get("FASTLM_BACKEND") == before
    with pytest.raises(RuntimeError):
        row()
    assert os.environ.get("FASTLM_BACKEND") == before
    assert seen == ["gluon", "gluon"]


def test_the_row_is_there_on_hopper_alone(monkeypatch):
    monkeypatch.delenv("FASTLM_BENCH_GLUON", raising=False)
    monkeypatch.setattr(bench_attention, "missing", lambda backend: None)
    for major, there in ((8, False), (9, True), (10, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        assert bench_attention.has_gluon("cuda") == there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not bench_attention.has_gluon("cpu")
    monkeypatch.setenv("FASTLM_BENCH_GLUON", "0")
    assert not bench_attention.has_gluon("cuda")
