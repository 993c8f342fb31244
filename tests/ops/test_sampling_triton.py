"""What is special to sampling in Triton: the search for a threshold, tiles, Philox's words, what chips make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops import sample
from fastlm.ops.sampling import Sample, reference
from fastlm.ops.sampling import triton as kernels
from fastlm.ops.sampling.triton_penalties import penalized
from fastlm.ops.sampling.triton_search import INFINITY_KEY, search, to_key, to_value
from fastlm.ops.sampling.triton_top import top_kernel
from tests.ops.helpers import compile_for_chips, poisoned_memory

BLOCK = kernels.LANES * kernels.ELEMENTS_PER_THREAD
VOCAB_SIZES = [1, 7, kernels.LANES - 1, kernels.LANES, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1000]
KINDS = ["normal", "peaked", "flat", "equal", "two levels", "masked", "huge", "bf16 in fp32"]


@pytest.fixture(autouse=True)
def on_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLM_BACKEND", "triton")


def logits_of(kind: str, vocab_size: int) -> Tensor:
    x = torch.randn(vocab_size)
    match kind:
        case "peaked":
            x[torch.randint(vocab_size, (20,))] += 12
        case "flat":
            x *= 0.01
        case "equal":
            x.fill_(-3.25)
        case "two levels":
            x = (x > 0).float() * 2
        case "masked":
            x[torch.rand(vocab_size) < 0.7] = -math.inf
            x[0] = 0.5
        case "huge":
            x *= 1e4
        case "bf16 in fp32":
            x = (x * 3).bfloat16().float()
    return x


def row_settings(batch: int, vocab_size: int, device: str) -> dict[str, Tensor]:
    """A value a row for each setting, neutral and extreme ones among them."""

    def one_of(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (batch,))].to(device)

    return {
        "temperature": one_of([0.0, 1e-3, 0.5, 1.0, 1.0, 3.0]),
        "top_k": one_of([0, 1, 3, 50, max(vocab_size // 2, 1), vocab_size, vocab_size + 5], torch.int64),
        "top_p": one_of([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": one_of([0.0, 0.0, 0.01, 0.3]),
        "seed": torch.randint(-(2**63), 2**63 - 1, (batch,), device=device),
        "position": torch.randint(-(2**63), 2**63 - 1, (batch,), device=device),
    }


def definition(logits: Tensor, settings: dict[str, Any], **kwargs: Any) -> Sample:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_BACKEND", "reference")
        return sample(logits, **settings, **kwargs)


def assert_agrees(logits: Tensor, settings: dict[str, Any], **kwargs: Any) -> None:
    """The definition's answer, save where rounding decides: u at the bound of two tokens, a token at the edge of p.

    The log-probability of what was drawn has the kept set in it, as its sum.
    """
    with poisoned_memory():
        ours = sample(logits, **settings, return_logprobs=True, **kwargs)
    exact = definition(logits, settings, return_logprobs=True, **kwargs)
    assert torch.equal(ours.valid, exact.valid)
    same = ours.ids == exact.ids
    # Chance at most 1e-5 a row; a neighbour then, drawn at u within rounding of the bound. One row may be so.
    assert same.sum() >= len(same) - 1, (ours.ids, exact.ids)
    torch.testing.assert_close(ours.logprobs[same], exact.logprobs[same], rtol=1e-5, atol=1e-5, equal_nan=True)
    close = torch.isclose(ours.processed_logprobs, exact.processed_logprobs, rtol=1e-5, atol=3e-5, equal_nan=True)
    assert close[same].sum() >= same.sum() - 1, (ours.processed_logprobs, exact.processed_logprobs)


@pytest.mark.parametrize("order", ["hf", "vllm"])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_draws_and_kept_sets_are_those_of_the_definition(device, vocab_size, order):
    logits = torch.stack([logits_of(kind, vocab_size) for kind in KINDS]).to(device)
    for dtype in (torch.float32, torch.bfloat16) if vocab_size <= BLOCK else (torch.float32,):
        assert_agrees(logits.to(dtype), row_settings(len(KINDS), vocab_size, device), order=order)


@pytest.mark.parametrize("vocab_size", [300, BLOCK + 8])
def test_fp16_and_penalties_together_are_those_of_the_definition(device, vocab_size):
    logits = (torch.randn(4, vocab_size, device=device) * 3).half()
    settings = row_settings(4, vocab_size, device) | {
        "repetition_penalty": torch.rand(4, device=device) + 0.5,
        "presence_penalty": torch.randn(4, device=device),
        "frequency_penalty": torch.randn(4, device=device),
        "prompt_ids": torch.randint(-2, vocab_size + 2, (4, 30), device=device),
        "output_ids": torch.randint(-2, vocab_size + 2, (4, 50), device=device),
    }
    assert_agrees(logits, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalized_logits_have_the_bits_of_the_definition(device, dtype):
    logits = (torch.randn(3, 1500, device=device) * 4).to(dtype)
    logits[:, 5] = -math.inf
    repetition, presence, frequency = torch.rand(3, device=device) + 0.5, *torch.randn(2, 3, device=device)
    prompt = torch.randint(-5, 1600, (2000, 3), device=device).t()
    output = torch.randint(-5, 40, (3, 1100), device=device)
    for ids in ((prompt, output), (None, output), (prompt, None), (prompt[:, :0], output[:, :1])):
        ours = penalized(logits, repetition, presence, frequency, *ids)
        assert torch.equal(ours, reference.penalized(logits.float(), repetition, presence, frequency, *ids))
    bias, mask = torch.randn(3, 1500, device=device), torch.randint(-(2**31), 2**31 - 1, (3, 47), device=device)
    mask = mask.to(torch.int32)
    ours = penalized(logits, repetition, presence, frequency, prompt, output, bias[:1].expand(3, -1), mask)
    adjusted = reference.adjusted(logits.float(), bias[:1], mask)
    assert torch.equal(ours, reference.penalized(adjusted, repetition, presence, frequency, prompt, output))
    ours = penalized(logits, None, presence, None, prompt, output)
    assert torch.equal(ours, reference.penalized(logits.float(), None, presence, None, prompt, output))


def test_top_k_is_exact_where_logits_are_neighbouring_floats(device):
    """Every logit is one unit in the last place from the next, around a power of two and across zero."""
    vocab_size = BLOCK + 500
    steps = torch.randperm(vocab_size)
    near_one = (steps.int() + 0x3F7FF000).view(torch.float32)
    across_zero = torch.where(steps % 2 == 0, steps.int(), steps.int() - 2**31).view(torch.float32)
    far_apart = torch.where(steps < 40, near_one * 1e38, -near_one * 3e38)
    logits = torch.stack([near_one, across_zero, far_apart]).to(device)
    for k in (1, 37, BLOCK + 1):
        # So hot that the kept are alike, but for those of the last row whose distance is beyond fp32.
        temperature = torch.tensor([1e30, 1e30, 3e38], device=device)
        out = sample(logits, temperature=temperature, top_k=k, seed=1, position=2, return_logprobs=True)
        kept = torch.stack([(x >= x.sort(descending=True).values[k - 1]).sum() for x in logits])
        kept[2] = kept[2].clamp(max=40)
        torch.testing.assert_close(out.processed_logprobs, -kept.float().log(), rtol=1e-5, atol=1e-5)
        ranks = (logits > logits.gather(1, out.ids[:, None])).sum(1)
        assert (ranks < k).all()


def test_largest_logits_that_share_a_position_of_the_tiles_are_all_found(device):
    """The first pass keeps the largest of each position: here the others are not seen there."""
    vocab_size = 4 * BLOCK
    logits = torch.randn(1, vocab_size, device=device)
    together = torch.tensor([5, BLOCK + 5, 2 * BLOCK + 5, 3 * BLOCK + 5])
    logits[0, together] = torch.tensor([20.0, 21.0, 20.5, 22.0], device=device)
    weights = logits[0, together].exp()
    for filters, kept in (({"top_k": 4}, 4), ({"top_k": 3}, 3), ({"top_p": 0.99}, 4), ({"top_k": 4, "top_p": 0.8}, 3)):
        out = sample(logits, seed=3, position=4, return_logprobs=True, **filters)
        shares = weights.sort(descending=True).values[:kept]
        expected = (logits[0, out.ids[0]].exp() / shares.sum()).log()
        torch.testing.assert_close(out.processed_logprobs[0], expected, rtol=1e-4, atol=1e-4)


@triton.jit
def _keys_kernel(x_ptr, keys_ptr, back_ptr, COUNT: tl.constexpr):
    ids = tl.arange(0, COUNT)
    keys = to_key(tl.load(x_ptr + ids))
    tl.store(keys_ptr + ids, keys)
    tl.store(back_ptr + ids, to_value(keys))


def test_keys_order_all_floats_and_give_them_back(device):
    special = [0.0, -0.0, 1e-45, -1e-45, 1.17e-38, -1.17e-38, 3.4e38, -3.4e38, math.inf, -math.inf]
    bits = torch.randint(-(2**31), 2**31 - 1, (2048,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(special), bits[bits.isfinite()]])[:1024].to(device)
    keys, back = torch.empty_like(x, dtype=torch.int32), torch.empty_like(x)
    _keys_kernel[(1,)](x, keys, back, COUNT=1024)
    assert torch.equal(back, x)
    assert torch.equal(x[:, None] < x[None, :], keys[:, None] < keys[None, :])
    assert keys[x == math.inf].item() == INFINITY_KEY.value


@triton.jit
def _uniform_kernel(seed_ptr, position_ptr, u_ptr):
    row = tl.program_id(0)
    tl.store(u_ptr + row, kernels._uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row)))


def test_uniform_numbers_have_the_bits_of_the_definition(device):
    seed, position = torch.randint(-(2**63), 2**63 - 1, (2, 40), device=device)
    seed[:3] = torch.tensor([0, -1, 2**32])
    u = torch.empty(40, dtype=torch.float64, device=device)
    _uniform_kernel[(40,)](seed, position, u)
    assert torch.equal(u, reference.uniform(seed, position))


@triton.jit
def _search_kernel(x_ptr, vocab_size, low, high, k, out_ptr, LANES: tl.constexpr):
    low, high, count, _ = search(
        x_ptr, vocab_size, low + tl.program_id(0), high, k, 0.0, 1.0, 0.0, False, False, False, 1, LANES, 1
    )  # fmt: skip
    tl.store(out_ptr, low)
    tl.store(out_ptr + 1, high)
    tl.store(out_ptr + 2, count)


def test_search_ends_with_the_k_th_largest_between_its_bounds(device):
    vocab_size = 700
    for kind in ("normal", "two levels", "bf16 in fp32", "huge"):
        x = logits_of(kind, vocab_size).to(device)
        keys = torch.where(x < 0, -(x.view(torch.int32) & 0x7FFFFFFF), x.view(torch.int32))
        for k in (1, 20, vocab_size):
            out = torch.empty(3, dtype=torch.int32, device=device)
            _search_kernel[(1,)](x, vocab_size, keys.min().item(), keys.max().item() + 1, k, out, LANES=512)
            low, high, above = out.tolist()
            expected = keys.sort(descending=True).values[k - 1].item()
            assert ((keys >= low) == (keys >= expected)).all()
            assert above == (keys >= high).sum().item() < k


@pytest.mark.parametrize(("vocab_size", "n"), [(90, 90), (BLOCK + 100, 70), (BLOCK + 100, 2)])
def test_most_probable_tokens_beyond_one_group_and_with_ties_at_the_edge(device, vocab_size, n):
    logits = (torch.randn(3, vocab_size, device=device) * 2).bfloat16()  # with many equal logits
    logits[1] = 0.5
    logits[2, 40:] = -math.inf
    out = sample(logits, seed=0, position=0, num_logprobs=n)
    order = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :n]
    assert torch.equal(out.top_ids, order)
    expected = logits.double().log_softmax(1).gather(1, order).float()
    torch.testing.assert_close(out.top_logprobs, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_start_anywhere_give_the_bits_of_aligned_ones(device):
    vocab_size = 2048
    wide = torch.randn(3, vocab_size + 3, device=device)
    settings = row_settings(3, vocab_size, device) | {"temperature": 0.7}
    shifted = sample(wide[:, 1 : vocab_size + 1], **settings, return_logprobs=True, num_logprobs=3)
    aligned = sample(wide[:, 1 : vocab_size + 1].contiguous(), **settings, return_logprobs=True, num_logprobs=3)
    assert all(torch.equal(a, b) for a, b in zip(shifted, aligned, strict=True))


@pytest.mark.gpu
def test_call_is_captured_in_a_cuda_graph():
    logits = torch.randn(8, 50_000, device="cuda")
    position = torch.zeros(8, dtype=torch.int64, device="cuda")
    ids = torch.randint(0, 50_000, (8, 100), device="cuda")
    ones = torch.ones(8, device="cuda")
    settings = {"temperature": ones * 0.8, "top_k": ones.long() * 50, "top_p": ones * 0.9, "repetition_penalty": ones}
    settings |= {"seed": torch.arange(8, device="cuda"), "position": position, "prompt_ids": ids}

    def draw() -> Sample:
        return sample(logits, **settings, return_logprobs=True, num_logprobs=5)

    draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw()
    for step in range(3):
        position.fill_(step)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, draw(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [50_257, 131_072, 151_936])
def test_large_vocabularies_agree_with_the_definition(vocab_size):
    logits = torch.stack([logits_of(kind, vocab_size) for kind in KINDS]).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        settings = row_settings(len(KINDS), vocab_size, "cuda")
        ours = sample(logits.to(dtype), **settings, return_logprobs=True)
        exact = definition(logits.to(dtype), settings, return_logprobs=True)
        assert torch.equal(ours.valid, exact.valid)
        assert (ours.ids == exact.ids).sum() >= len(KINDS) - 1
        torch.testing.assert_close(ours.processed_logprobs, exact.processed_logprobs, rtol=1e-3, atol=1e-3)


SPILLS = {("fp32", 4, 100): 32}  # bytes; zero where not named


def sample_signature(dtype: str) -> dict[str, str]:
    names = kernels._sample_kernel.arg_names
    signature = {n: "*fp32" for n in names if n.endswith("_ptr")} | {"logits_ptr": f"*{dtype}", "valid_ptr": "*i1"}
    signature |= dict.fromkeys(["top_k_ptr", "seed_ptr", "position_ptr", "ids_ptr"], "*i64")
    return signature | dict.fromkeys(["row_stride", "raw_stride", "vocab_size"], "i32")


@pytest.mark.aot
@pytest.mark.parametrize(("dtype", "vector"), [("fp32", 4), ("bf16", 8), ("bf16", 1)])
def test_sampling_compiles_with_every_option_and_without_spills(dtype, vector):
    signature = sample_signature(dtype) | {"raw_ptr": f"*{dtype}"}
    constants = {"MIN_P_FIRST": False, "BLOCKS": 32, "TILES": kernels.ELEMENTS_PER_THREAD // vector}
    constants |= {"LANES": kernels.LANES, "VECTOR": vector}
    for chip in (80, 90, 100):
        (compiled,) = compile_for_chips(
            kernels._sample_kernel, signature, constants, num_warps=kernels.NUM_WARPS, capabilities=[chip]
        )
        assert compiled.spill_bytes <= SPILLS.get((dtype, vector, chip), 0), (chip, compiled.spill_bytes)
        assert compiled.registers <= 128  # 512 threads
        if vector > 1:
            assert "ld.global.v4" in compiled.ptx


@pytest.mark.aot
def test_top_k_and_top_p_alone_compile_without_spills():
    signature = sample_signature("bf16")
    left_out = ["raw_ptr", "min_p_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr", "logprobs_ptr"]
    constants: dict[str, Any] = dict.fromkeys(left_out)
    constants |= {"MIN_P_FIRST": True, "BLOCKS": 32, "TILES": 1, "LANES": kernels.LANES, "VECTOR": 8}
    signature = {name: kind for name, kind in signature.items() if name not in left_out}
    for compiled in compile_for_chips(kernels._sample_kernel, signature, constants, num_warps=kernels.NUM_WARPS):
        assert compiled.spill_bytes == 0, compiled.chip


@pytest.mark.aot
def test_top_logprobs_compile_without_spills():
    signature = {n: "*i64" for n in top_kernel.arg_names if n.endswith("_ptr")}
    signature |= {"logits_ptr": "*bf16", "logprobs_ptr": "*fp32", "valid_ptr": "*i1"}
    signature |= dict.fromkeys(["row_stride", "vocab_size", "n"], "i32")
    constants = {"TILES": 1, "LANES": kernels.LANES, "VECTOR": 8}
    for compiled in compile_for_chips(top_kernel, signature, constants, num_warps=kernels.NUM_WARPS):
        assert compiled.spill_bytes == 0, compiled.chip
