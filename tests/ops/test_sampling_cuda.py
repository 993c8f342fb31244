"""The CUDA core's sampling, where there is a GPU and the core was built."""

from __future__ import annotations

import pytest
import torch

from fastlm.ops import explain, sample
from fastlm.ops.sampling import reference


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 511, 2048, 2049, 128_256])
def test_draws_and_logprobs_are_those_of_the_definition(dtype, vocab_size, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cuda")
    logits = (torch.randn(64, vocab_size, device="cuda") * 3).to(dtype)
    logits[3] = torch.nan
    settings = {
        "temperature": torch.rand(64, device="cuda") + 0.2,
        "seed": torch.randint(-(2**63), 2**63 - 1, (64,), device="cuda"),
        "position": torch.arange(64, device="cuda"),
    }
    settings["temperature"][5] = 0
    out = sample(logits, **settings, return_logprobs=True)
    assert out.valid.tolist() == [i != 3 for i in range(64)]
    monkeypatch.setenv("FASTLM_BACKEND", "reference")
    expected = sample(logits, **settings, return_logprobs=True)
    same = out.ids == expected.ids
    torch.testing.assert_close(out.logprobs[same], expected.logprobs[same], rtol=1e-5, atol=1e-5, equal_nan=True)
    for row in (~same).nonzero().flatten().tolist():  # only where the point lies within rounding of a boundary
        x = logits[row].float()
        running = ((x - x.max()) / settings["temperature"][row]).double().exp().cumsum(0)
        u = reference.uniform(settings["seed"][row], settings["position"][row]) * running[-1]
        edge = running[min(int(out.ids[row]), int(expected.ids[row]))]
        assert abs(edge - u) < 1e-5 * running[-1]


def test_what_it_lacks_is_told_by_name():
    from fastlm.ops.sampling import cuda

    settings = {"top_p": 0.9, "temperature": 1.0, "presence_penalty": 0.1}
    reason = cuda.supports(torch.randn(1, 4), **settings, return_logprobs=False, num_logprobs=2)
    assert reason == "has no top_p, presence_penalty, num_logprobs"
    assert cuda.supports(torch.randn(1, 4), temperature=1.0, return_logprobs=True, num_logprobs=0) is None
    assert "cuda" in explain("sampling", torch.randn(1, 4), seed=0, position=0).reasons
