"""The native core's threads: the same bits for every number of them, from many callers, and after a fork."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastlm.ops import rms_norm, rotary, rotary_tables, sample, swiglu


@pytest.fixture(autouse=True)
def cpu_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_all(seed: int) -> list[Tensor]:
    """Every op that is the native core's own, forward and backward, large enough for several parts."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad = (torch.randn(700, 256, generator=generator) for _ in range(3))
    weight = torch.rand(256, generator=generator).requires_grad_()
    x.requires_grad_()
    y, h = rms_norm(x, weight, residual=residual)
    z = swiglu(y, h)
    z.backward(grad)
    q = torch.randn(4, 100, 8, 64, generator=generator)
    rotated = rotary(q, q[:, :, :2], *rotary_tables(64, 100))
    logits = torch.randn(9, 20_000, generator=generator) * 3
    drawn = sample(logits, seed=seed, position=torch.arange(9), top_p=0.9, top_k=100, return_logprobs=True)
    assert x.grad is not None
    assert weight.grad is not None
    return [z.detach(), x.grad, weight.grad, *rotated, drawn.ids, drawn.processed_logprobs]


def test_every_number_of_threads_gives_the_same_bits() -> None:
    torch.set_num_threads(1)
    expected = run_all(1)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(run_all(1), expected, strict=True))


def test_many_callers_at_once_get_their_own_results() -> None:
    torch.set_num_threads(3)
    expected = [run_all(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for seed, result in zip(list(range(4)) * 20, pool.map(run_all, list(range(4)) * 20), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, expected[seed], strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    logits = torch.randn(9, 20_000)
    expected = sample(logits, seed=1, position=2, top_p=0.9).ids
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a deadlock ends the child, and its status shows it
        same = torch.equal(sample(logits, seed=1, position=2, top_p=0.9).ids, expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(sample(logits, seed=1, position=2, top_p=0.9).ids, expected)
