"""The CUDA core's sampling: its own source run on the CPU, and on a GPU where there is one and the core was built."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastlm.ops import _cuda, _registry, explain, sample
from fastlm.ops._registry import missing
from fastlm.ops.sampling import Sample, cuda, reference
from tests.ops.helpers import poisoned_memory

BATCH = 64


@pytest.fixture
def core(device: str, cuda_on_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The core for the device. On the CPU, the op's CUDA backend serves CPU tensors by it."""
    if device == "cuda":
        if missing("cuda"):
            pytest.skip(str(missing("cuda")))
        return _cuda.cuda()
    monkeypatch.setattr(cuda, "cuda", lambda: cuda_on_cpu)
    monkeypatch.setattr(_registry, "_wrong_device", lambda backend, device: None)
    monkeypatch.setattr(_registry, "missing", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return cuda_on_cpu


def row_settings(device: str) -> dict[str, Tensor]:
    def one_of(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[torch.randint(len(values), (BATCH,), device=device)]

    return {
        "temperature": one_of([0.0, 1e-3, 0.5, 1.0, 3.0]),
        "top_k": one_of([0, 1, 3, 50, 1000, 10**9], torch.int64),
        "top_p": one_of([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": one_of([0.0, 0.0, 0.01, 0.3]),
        "seed": torch.randint(-(2**63), 2**63 - 1, (BATCH,), device=device),
        "position": torch.arange(BATCH, device=device),
    }


def logits_of(vocab_size: int, device: str) -> Tensor:
    """Rows of every kind: normal, peaked, equal, of few values, masked, neighbouring floats, and one with a NaN."""
    x = torch.randn(BATCH, vocab_size, device=device) * 3
    x[8:16, torch.randint(vocab_size, (20,), device=device)] += 12
    x[16:20] = -3.25
    x[20:30] = x[20:30].round()
    x[30:40] = torch.where(torch.rand_like(x[30:40]) < 0.7, -torch.inf, x[30:40])
    x[30:40, 0] = 0.5
    x[40:44] = (torch.randperm(vocab_size, device=device).int() + 0x3F7FF000).view(torch.float32)
    x[3] = torch.nan
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 7, 511, 4096, 4097, 50_257, 128_256])
@pytest.mark.parametrize("order", ["hf", "vllm"])
def test_draws_and_kept_sets_are_those_of_the_definition(dtype, vocab_size, order, device, core, monkeypatch):
    if device == "cpu" and (vocab_size > 5000 or (order == "vllm") != (dtype == torch.float16)):
        pytest.skip("takes long without a GPU")
    logits, settings = logits_of(vocab_size, device).to(dtype), row_settings(device)

    def run(backend: str) -> Sample:
        monkeypatch.setenv("FASTLM_BACKEND", backend)
        return sample(logits, **settings, order=order, return_logprobs=True)

    with poisoned_memory():
        ours = run("cuda")
    exact = run("reference")
    assert torch.equal(ours.valid, exact.valid)
    assert not ours.valid[3]
    same = ours.ids == exact.ids
    # Rounding decides between two tokens where u or p falls on the bound of one: in large flat rows, now and then.
    assert same.sum() >= BATCH - 3, (ours.ids, exact.ids)
    torch.testing.assert_close(ours.logprobs[same], exact.logprobs[same], rtol=1e-5, atol=1e-5, equal_nan=True)
    close = torch.isclose(ours.processed_logprobs, exact.processed_logprobs, rtol=1e-5, atol=3e-5, equal_nan=True)
    assert close[same].sum() >= same.sum() - 3, (ours.processed_logprobs, exact.processed_logprobs)


def test_rows_that_start_anywhere_and_stand_anywhere_give_the_same_bits(device, core, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cuda")
    wide, settings = logits_of(4203, device), row_settings(device)
    logits = wide[:, 1:4201]
    first = sample(logits, **settings, return_logprobs=True)
    aligned = sample(logits.contiguous(), **settings, return_logprobs=True)
    order = torch.randperm(BATCH, device=device)
    shuffled = sample(logits[order], **{k: v[order] for k, v in settings.items()}, return_logprobs=True)
    for a, b, c in zip(first[:4], aligned[:4], shuffled[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(a[order], c, rtol=0, atol=0, equal_nan=True)


def test_numbers_it_draws_by_are_those_of_the_definition(core):
    seed, position = torch.randint(-(2**63), 2**63 - 1, (2, 50))
    ours = [core.uniform(s, p) for s, p in zip(seed.tolist(), position.tolist(), strict=True)]
    assert ours == reference.uniform(seed, position).tolist()


def test_what_it_lacks_is_told_by_name():
    settings = {"top_p": 0.9, "temperature": 1.0, "presence_penalty": 0.1, "repetition_penalty": None}
    assert cuda.supports(torch.randn(1, 4), **settings, num_logprobs=2) == "has no presence_penalty, num_logprobs"
    assert cuda.supports(torch.randn(1, 4), temperature=1.0, top_k=3, return_logprobs=True, num_logprobs=0) is None
    assert "cuda" in explain("sampling", torch.randn(1, 4), seed=0, position=0).reasons


def test_a_chip_that_was_not_built_for_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr(_cuda, "cuda", lambda: SimpleNamespace(archs=[80, 90]))
    for capability, fits in (((8, 0), True), ((8, 9), True), ((9, 0), True), ((7, 5), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        reason = _cuda.not_built_for.__wrapped__(torch.device("cuda"))
        assert (reason is None) == fits
    assert reason == ("was built for sm_80 sm_90, not for sm_120 (install with FASTLM_CUDA=1 FASTLM_CUDA_ARCHS=120)")
