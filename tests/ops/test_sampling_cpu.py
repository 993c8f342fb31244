"""What is special to sampling on the CPU: agreement with the definition where its shortcuts end, and equal bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.ops import sample
from fastlm.ops.sampling import Sample, cpu, reference
from tests.ops.helpers import poisoned_memory

VOCAB_SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["flat", "normal", "peaked", "equal", "two levels", "masked", "huge", "one finite"]
NAMES = [
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("prompt_ids", "output_ids", "seed", "position"),
]


@pytest.fixture(autouse=True)
def on_the_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")


def logits_of(kind: str, vocab_size: int) -> Tensor:
    x = torch.randn(vocab_size)
    if kind == "flat":
        return x * 0.01
    if kind == "peaked":
        x[torch.randint(vocab_size, (20,))] += 12
        return x
    if kind == "equal":
        return torch.full_like(x, -3.25)
    if kind == "two levels":
        return (x > 0).float() * 2
    if kind == "masked":
        return torch.where(torch.rand(vocab_size) < 0.7, -math.inf, x).index_fill(0, torch.tensor(0), 0.5)
    if kind == "huge":
        return x * 1e4
    if kind == "one finite":
        return torch.full_like(x, -math.inf).index_fill(0, torch.randint(vocab_size, (1,)), 1.0)
    return x


def random_settings(batch: int, vocab_size: int, history: int = 40) -> dict[str, Tensor | None]:
    """A value a row for every setting, neutral ones among them, and some settings left out."""

    def some(values: Tensor, neutral: float) -> Tensor:
        return torch.where(torch.rand(batch) < 0.3, torch.full_like(values, neutral), values)

    settings: dict[str, Tensor | None] = {
        "temperature": some(torch.rand(batch) * 2 + 0.05, 0.0),
        "top_k": some(torch.randint(1, vocab_size + 3, (batch,)), 0),
        "top_p": some(torch.rand(batch), 1.0),
        "min_p": some(torch.rand(batch) ** 4, 0.0),
        "repetition_penalty": some(torch.rand(batch) + 0.5, 1.0),
        "presence_penalty": some(torch.randn(batch), 0.0),
        "frequency_penalty": some(torch.randn(batch), 0.0),
        "prompt_ids": torch.randint(-2, vocab_size + 2, (batch, history)),
        "output_ids": torch.randint(-2, vocab_size + 2, (batch, history)),
        "seed": torch.randint(-(2**63), 2**63 - 1, (batch,)),
        "position": torch.randint(0, 2**40, (batch,)),
    }
    for name in NAMES[1:9]:
        if torch.rand(()) < 0.3:
            settings[name] = None
    return settings


def run(logits: Tensor, settings: dict[str, Any], **kwargs: Any) -> Sample:
    return sample(logits, **settings, return_logprobs=True, **kwargs)


def assert_agrees(logits: Tensor, settings: dict[str, Any], order: str = "hf", num_logprobs: int = 0) -> None:
    """Ours equals the definition's answer, save where rounding decides between two tokens."""
    with poisoned_memory():
        ours = run(logits, settings, order=order, num_logprobs=num_logprobs)
    full = {"temperature": torch.ones(logits.shape[0])} | settings
    exact = Sample(*reference.sample(logits, *(full.get(n) for n in NAMES), order == "vllm", True, num_logprobs))
    assert torch.equal(ours.valid, exact.valid)
    same = (ours.ids == exact.ids) & (ours.processed_logprobs - exact.processed_logprobs).abs().le(1e-6)
    for row in (ours.valid & ~same).nonzero()[:, 0].tolist():
        own = {n: v[row : row + 1] for n, v in full.items() if v is not None}
        assert distance_from_a_border(logits[row : row + 1], own, order) < 1e-6
    same |= ~ours.valid
    assert torch.equal(ours.ids[same], exact.ids[same])
    torch.testing.assert_close(ours.logprobs[same], exact.logprobs[same], rtol=1e-6, atol=1e-6, equal_nan=True)
    if num_logprobs:
        assert torch.equal(ours.top_ids, exact.top_ids)
        torch.testing.assert_close(ours.top_logprobs, exact.top_logprobs, rtol=1e-6, atol=1e-6, equal_nan=True)


def distance_from_a_border(logits: Tensor, settings: dict[str, Tensor], order: str) -> float:
    """How near the drawn point, or top_p's share, is to where another token begins, as a share of all weights."""
    get = settings.get
    x = reference.penalized(logits.float(), *(get(n) for n in NAMES[4:9]))
    top_k, top_p, min_p = (get(n) for n in NAMES[1:4])
    kept, weights = reference.filtered(x, settings["temperature"], top_k, top_p, min_p, order == "vllm")
    running = (weights * kept).cumsum(1)[0]
    point = reference.uniform(settings["seed"], settings["position"]) * running[-1]
    distance = ((running - point).abs() / running[-1]).min().item()
    if top_p is not None:
        first = (top_k, None, min_p) if order == "vllm" else (top_k, None, None)
        kept, weights = reference.filtered(x, settings["temperature"], *first, order == "vllm")
        shares = (weights * kept).sort(descending=True).values.cumsum(1)[0]
        distance = min(distance, (shares / shares[-1] - top_p).abs().min().item())
    return distance


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["hf", "vllm"])
def test_it_agrees_with_the_definition(vocab_size: int, dtype: torch.dtype, order: str) -> None:
    for _ in range(2):
        logits = torch.stack([logits_of(kind, vocab_size) for kind in KINDS * 2]).to(dtype)
        assert_agrees(logits, random_settings(len(logits), vocab_size), order, num_logprobs=min(vocab_size, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_the_definition_on_a_large_vocabulary(kind: str) -> None:
    vocab_size = 152064
    logits = torch.stack([logits_of(kind, vocab_size)] * 6)
    for settings in (
        {"top_p": torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999, 1 - 2**-24])},
        {"top_k": torch.tensor([1, 50, 600, 10_000, 60_000, vocab_size])},
        {"top_p": torch.full((6,), 0.9), "temperature": torch.tensor([1e-30, 0.1, 1.0, 10.0, 1e4, 1e38])},
        random_settings(6, vocab_size, 1000),
    ):
        draws = {"seed": torch.arange(6), "position": torch.arange(6)}
        assert_agrees(logits, {**settings, **draws}, num_logprobs=20)


@pytest.mark.parametrize("prompt_length", [0, 1, 300, 5000])
@pytest.mark.parametrize("output_length", [0, 1, 300, 5000])
def test_histories_of_any_length_agree_with_the_definition(prompt_length: int, output_length: int) -> None:
    batch, vocab_size = 3, 4097
    settings = random_settings(batch, vocab_size)
    settings |= {name: torch.rand(batch) + 0.5 for name in NAMES[4:7]}
    settings["prompt_ids"] = torch.randint(-5, vocab_size + 5, (batch, prompt_length))
    settings["output_ids"] = torch.randint(-5, 400, (batch, output_length))  # many times the same
    assert_agrees(torch.randn(batch, vocab_size) * 3, settings)


def test_ids_far_outside_the_vocabulary_are_padding() -> None:
    logits = torch.randn(1, 300)
    ids = torch.tensor([[-(2**63), -1, 300, 2**31, 2**32 + 5, 2**63 - 1]])
    settings = {"repetition_penalty": 1e-3, "frequency_penalty": 50.0, "seed": 3, "position": 4}
    plain = run(logits, {"seed": 3, "position": 4})
    padded = run(logits, {**settings, "prompt_ids": ids, "output_ids": ids})
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], padded[:4], strict=True))


def test_all_logprobs_of_every_fp16_number_come_in_the_order_of_torch_sort() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    logits = every[every.isfinite()][torch.randperm(63488)][None]
    out = sample(logits, seed=0, position=0, num_logprobs=logits.shape[1])
    expected = logits.float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(out.top_ids, expected.indices)
    lse = logits.double().logsumexp(1)
    torch.testing.assert_close(out.top_logprobs, (expected.values.double() - lse).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_at_any_stride(dtype: torch.dtype) -> None:
    vocab_size, batch = 4099, 8
    wide = torch.randn(batch, 2 * vocab_size + 3).to(dtype)
    logits = wide[:, 7 : 7 + vocab_size]
    logits[:] = torch.stack([logits_of(kind, vocab_size) for kind in KINDS])
    settings = random_settings(batch, vocab_size)
    assert logits.stride() == (2 * vocab_size + 3, 1)
    together = run(logits, settings, num_logprobs=5)
    for row in range(batch):
        own = {name: None if v is None else v[row : row + 1] for name, v in settings.items()}
        alone = run(logits[row : row + 1].clone(), own, num_logprobs=5)
        assert all(torch.equal(a[row], b[0]) or a[row].isnan().any() for a, b in zip(together, alone, strict=True))
        copies = run(
            logits[row].expand(3, -1), {n: v if v is None else v.expand(3, *v.shape[1:]) for n, v in own.items()}
        )
        assert copies.ids.tolist() == [alone.ids.item()] * 3


def test_transposed_logits_and_settings_with_strides_are_read_where_they_lie() -> None:
    logits = torch.randn(500, 6).t()
    settings = {name: torch.rand(6, 2)[:, 1] * 0.9 + 0.1 for name in ("temperature", "top_p", "min_p")}
    settings |= {"seed": torch.arange(12)[::2], "position": torch.arange(12)[1::2]}
    settings["output_ids"] = torch.randint(0, 500, (30, 6)).t()
    settings["frequency_penalty"] = torch.ones(1).expand(6)
    contiguous = {name: value.contiguous() for name, value in settings.items()}
    a, b = run(logits, settings), run(logits.contiguous(), contiguous)
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


BAD = {
    "temperature": [-1.0, math.nan, math.inf, -math.inf, -1e-45],
    "top_k": [-1, -(2**63)],
    "top_p": [-0.1, math.nan, math.inf],
    "min_p": [-0.1, 1.5, math.nan, math.inf],
    "repetition_penalty": [0.0, -1.0, math.nan, math.inf],
    "presence_penalty": [math.nan, math.inf, -math.inf],
    "frequency_penalty": [math.nan, math.inf, -math.inf],
}


@pytest.mark.parametrize("name", BAD)
def test_rows_with_settings_out_of_range_are_invalid_and_leave_the_others_alone(name: str) -> None:
    for bad in BAD[name]:
        logits = torch.randn(3, 700)
        values = torch.tensor([1.0, 0.7, 0.9]) if name != "top_k" else torch.tensor([5, 3, 4])
        settings: dict[str, Any] = {"seed": torch.arange(3), "position": torch.arange(3), name: values.clone()}
        settings["output_ids"] = torch.randint(0, 700, (3, 9))
        good = run(logits, settings, num_logprobs=3)
        settings[name][1] = bad
        with poisoned_memory():
            out = run(logits, settings, num_logprobs=3)
        assert out.valid.tolist() == [True, False, True]
        assert out.ids[1] == 0
        assert out.top_ids[1].tolist() == [0, 0, 0]
        assert all(t[1].isnan().all() for t in (out.logprobs, out.processed_logprobs, out.top_logprobs))
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(good, out, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 16, 257, 5000])
def test_one_nan_or_infinity_anywhere_makes_a_row_invalid(dtype: torch.dtype, vocab_size: int) -> None:
    places = sorted({0, vocab_size // 2, vocab_size - 1})
    for bad in (math.nan, math.inf, -math.nan):
        logits = torch.randn(len(places) + 1, vocab_size).to(dtype)
        for row, place in enumerate(places):
            logits[row, place] = bad
        assert run(logits, {"seed": 0, "position": 0}).valid.tolist() == [False] * len(places) + [True]
    assert not run(torch.full((1, vocab_size), -math.inf).to(dtype), {"seed": 0, "position": 0}).valid.any()


def test_logits_and_penalties_at_the_ends_of_the_range_agree_with_the_definition() -> None:
    big, tiny = torch.finfo(torch.float32).max, 1e-45
    logits = torch.tensor([[big, -big, 0.0, -0.0, tiny, -tiny, -math.inf, 1.0]]).repeat(6, 1)
    logits[3:, 0] = -1.0
    ids = torch.arange(8).repeat(6, 1)
    for temperature in (tiny, 1.0, big):
        for penalty in (tiny, 1.0, big):
            settings = {"seed": torch.arange(6), "position": torch.arange(6), "output_ids": ids, "prompt_ids": ids}
            settings["temperature"] = torch.full((6,), temperature)
            for name in NAMES[4:7]:
                assert_agrees(logits, {**settings, name: torch.full((6,), penalty)}, num_logprobs=8)
                assert_agrees(logits, {**settings, name: torch.full((6,), penalty), "min_p": torch.full((6,), tiny)})


def test_no_rows_give_no_rows() -> None:
    out = run(torch.empty(0, 10), {"seed": 0, "position": 0}, num_logprobs=2)
    assert [tuple(t.shape) for t in out] == [(0,)] * 4 + [(0, 2)] * 2


def test_it_serves_every_dtype_on_the_cpu() -> None:
    assert all(cpu.supports(torch.empty(1, 5, dtype=dtype)) is None for dtype in DTYPES)
