"""The CUDA core's decode attention: its own source run on the CPU, and what nvcc makes of it. No GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.errors import BackendError
from fastlm.ops import _registry, decode_attention, explain
from fastlm.ops._registry import missing
from fastlm.ops.decode_attention import cuda
from tests.ops.cuda_on_cpu import CSRC
from tests.ops.guarded import guarded
from tests.ops.helpers import assert_as_exact_as, poisoned_memory
from tests.ops.test_decode_attention import paged
from tests.ops.test_decode_attention_triton import definition, low_precision

# query_len, heads, kv_heads, head_dim, block_size, options
CASES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "one query": (1, 4, 2, 64, 16, {}),
    "no groups, padded head_dim": (1, 3, 3, 24, 5, {}),
    "speculative, blocks of one token": (8, 5, 1, 16, 1, {}),
    "more rows than two tiles": (7, 16, 1, 72, 32, {"window": 1000}),
    "head_dim 128": (2, 6, 2, 128, 16, {}),
    "head_dim 256": (5, 8, 2, 256, 16, {"softcap": 4.0}),
    "head_dim 200": (1, 16, 1, 200, 32, {"sinks": True}),
    "window": (3, 4, 1, 32, 16, {"window": 137}),
    "window of one": (2, 2, 1, 16, 4, {"window": 1}),
    "window beyond every length": (2, 2, 1, 16, 4, {"window": 2**31 - 1}),
    "sinks, softcap, window": (4, 6, 2, 40, 7, {"sinks": True, "softcap": 3.0, "window": 350}),
    "negative scale": (6, 2, 2, 16, 8, {"scale": -0.3}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def core(cuda_on_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Has the op's CUDA backend serve CPU tensors by the core that runs there."""
    monkeypatch.setattr(cuda, "cuda", lambda: cuda_on_cpu)
    monkeypatch.setattr(cuda, "_counters", {})
    monkeypatch.setattr(_registry, "_wrong_device", lambda backend, device: None)
    monkeypatch.setattr(_registry, "missing", lambda backend: None)
    monkeypatch.setenv("FASTLM_BACKEND", "cuda")
    return cuda_on_cpu


def make(case: str, dtype: torch.dtype, lengths: list[int] | None = None) -> tuple[list[Tensor], dict[str, Any]]:
    """Lengths: nothing, fewer tokens than queries, a tile and a split and their neighbours, and several splits."""
    query_len, heads, kv_heads, head_dim, block_size, options = CASES[case]
    shape = {"query_len": query_len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    lengths = lengths or [0, 1, query_len, 64, 127, 128, 129, 257 + int(torch.randint(300, ()))]
    tensors = paged(lengths, **shape, block_size=block_size, dtype=dtype)
    options = {"scale": head_dim**-0.5} | options
    if "sinks" in options:
        options["sinks"] = torch.randn(heads).to(dtype) * 2
    return list(tensors), options


def counted() -> int:
    """Counters that a call has left at something other than zero."""
    assert cuda._counters
    return sum(int(counters.count_nonzero()) for _, counters in cuda._counters.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64_and_leaves_the_counters_at_zero(case, dtype, core):
    tensors, options = make(case, dtype)
    with poisoned_memory():
        out = decode_attention(*tensors, **options)
    assert out.dtype == dtype
    assert_as_exact_as(out, low_precision(tensors, options), definition(tensors, options, torch.float64))
    assert counted() == 0


@pytest.mark.parametrize("window", [None, 9000])
def test_a_long_sequence_has_longer_splits(window, core):
    """Beyond 64 splits of 128 tokens, and with a window that starts inside a split."""
    q, k, v, table, lengths = paged(
        [8192, 9900, 70], query_len=2, heads=2, kv_heads=1, head_dim=16, block_size=16, dtype=torch.float32
    )
    options = {"scale": 0.25, "window": window}
    exact = definition([q, k, v, table, lengths], options, torch.float64)
    out = decode_attention(q, k, v, table, lengths, **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    assert counted() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["one query", "sinks, softcap, window", "more rows than two tiles"])
def test_a_sequence_gives_the_same_bits_whatever_shares_its_batch(case, dtype, core):
    """Blocks run in an order drawn anew for each call, so that another one is the last."""
    (q, k, v, table, lengths), options = make(case, dtype, [400, 3, 128, 700, 90])
    together = decode_attention(q, k, v, table, lengths, **options)
    assert torch.equal(decode_attention(q, k, v, table, lengths, **options), together)
    for row, length in enumerate(lengths.tolist()):
        one, width = slice(row, row + 1), -(-length // k.shape[1])
        alone = decode_attention(q[one], k, v, table[one, :width], lengths[one], **options)
        assert torch.equal(alone, together[one]), length
    order = torch.randperm(len(lengths))
    turned = decode_attention(q[order], k, v, table[order], lengths[order], **options)
    assert torch.equal(turned, together[order])


def test_tables_and_lengths_that_lead_outside_the_cache_give_nan_and_no_other_row_does(core):
    tensors, options = make("one query", torch.bfloat16, [200, 33, 150])
    q, k, v, table, lengths = tensors
    expected = decode_attention(*tensors, **options)
    for bad in (-1, len(k), 2**31 - 1, -(2**31)):
        broken = table.clone()
        broken[0, 2] = bad
        out = decode_attention(q, k, v, broken, lengths, **options)
        assert out[0].isnan().all()
        assert torch.equal(out[1:], expected[1:])
        assert decode_attention(q, k, v, broken, lengths, **options, window=8).isfinite().all()  # sees no block 2
    for bad in (-1, table.shape[1] * 16 + 1, 2**31 - 1):
        wrong = torch.tensor([200, bad, 150], dtype=torch.int32)
        out = decode_attention(q, k, v, table, wrong, **options)
        assert out[1].isnan().all()
        assert torch.equal(out[::2], expected[::2])
    assert counted() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reads_nothing_behind_its_tensors(dtype, core):
    """A read beyond a tensor's end would stop the process. Full blocks, so that the caches end with the last token."""
    q, k, v = torch.randn(1, 2, 3, 40).to(dtype), *(torch.randn(40, 4, 1, 40).to(dtype) for _ in range(2))
    table, lengths = torch.randperm(40, dtype=torch.int32)[None], torch.tensor([160], dtype=torch.int32)
    sinks = torch.randn(3).to(dtype)
    options = {"scale": 0.3, "window": 150}
    exact = definition([q, k, v, table, lengths], options | {"sinks": sinks}, torch.float64)
    tensors = [guarded(t) for t in (q, k, v, table, lengths)]
    out = decode_attention(*tensors, **options, sinks=guarded(sinks))
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-3)


def test_what_the_window_hides_may_be_freed_or_poisoned(core):
    (q, k, v, table, lengths), options = make("window", torch.bfloat16, [400, 5])
    expected = decode_attention(q, k, v, table, lengths, **options)
    table[0, : (400 - 3 - 137 + 1) // 16] = -1
    k[table[0, 16], : 261 - 256] = v[table[0, 16], : 261 - 256] = torch.nan  # the first query sees tokens 261 and later
    assert torch.equal(decode_attention(q, k, v, table, lengths, **options), expected)


def test_views_of_a_larger_cache_are_read_in_place(core):
    (q, k, v, table, lengths), options = make("sinks, softcap, window", torch.bfloat16)
    expected = decode_attention(q, k, v, table, lengths, **options)
    blocks, block_size, kv_heads, head_dim = k.shape
    layers = torch.full((blocks, 3, 2, kv_heads, block_size, head_dim), torch.nan, dtype=k.dtype).transpose(3, 4)
    layers[:, 1, 0], layers[:, 1, 1] = k, v
    wide = torch.full((*q.shape[:3], head_dim + 8), torch.nan, dtype=q.dtype)
    wide[..., 3 : 3 + head_dim] = q
    tables = torch.full((*table.shape, 2), -1, dtype=torch.int32)
    tables[..., 1] = table
    options["sinks"] = options["sinks"].float()
    strided = decode_attention(
        wide[..., 3 : 3 + head_dim], layers[:, 1, 0], layers[:, 1, 1], tables[..., 1], lengths, **options
    )
    assert torch.equal(strided, expected)


def test_queries_and_caches_of_nothing(core):
    cache = torch.randn(2, 4, 2, 16)
    table, lengths = torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    assert torch.equal(
        decode_attention(torch.randn(2, 1, 4, 16), cache[:0], cache[:0], table, lengths), torch.zeros(2, 1, 4, 16)
    )
    assert decode_attention(torch.randn(0, 1, 4, 16), cache, cache, table[:0], lengths[:0]).shape == (0, 1, 4, 16)


def test_a_call_that_it_cannot_serve_is_told_why(core, monkeypatch):
    (q, k, v, table, lengths), _ = make("one query", torch.float32, [9, 3])
    with pytest.raises(BackendError, match=r"caches of q's dtype alone, torch.bfloat16, not torch.float32"):
        decode_attention(q.bfloat16(), k, v, table, lengths)
    with pytest.raises(BackendError, match="steps of 8, not 12"):
        decode_attention(q[..., :12], k[..., :12], v[..., :12], table, lengths)
    with pytest.raises(BackendError, match="multiples of 16 bytes"):
        decode_attention(q[..., :32], k[..., 2:34], v[..., 2:34], table, lengths)
    monkeypatch.delenv("FASTLM_BACKEND")
    assert explain("decode_attention", q, k, v, table, lengths).reasons["cuda"] == "could, but triton comes first"


def test_workspaces_that_are_too_small_are_refused(core):
    (q, k, v, table, lengths), _ = make("one query", torch.float32, [300])
    arguments: list[Any] = [
        "float32", 0, 0, q.data_ptr(), q.shape, q.stride(), k.data_ptr(), v.data_ptr(), k.shape, k.stride(), v.stride(),
        table.data_ptr(), table.shape[1], table.stride(0), lengths.data_ptr(), 0.1, 0, 0.0, 0, False,
        torch.empty_like(q).data_ptr(), 0, 0, 0, 0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the workspace is too small"):
        core.decode_attention(*arguments)
    arguments[-4:-2] = [torch.empty(10**5).data_ptr(), 10**5]
    with pytest.raises(ValueError, match="too few counters"):
        core.decode_attention(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(missing("cuda") is not None, reason=str(missing("cuda")))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64_on_a_gpu(case, dtype, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cuda")
    tensors, options = make(case, dtype)
    on_gpu = [t.cuda() for t in tensors]
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    out = decode_attention(*on_gpu, **moved)
    assert_as_exact_as(out.cpu(), low_precision(tensors, options), definition(tensors, options, torch.float64))
    assert all(torch.equal(decode_attention(*on_gpu, **moved), out) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(*on_gpu, **moved)
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured, out)


@pytest.mark.aot
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_compiles_for_every_chip_without_spills(chip: int, tmp_path: Path) -> None:
    command = ["nvcc", "-O3", "-std=c++20", f"-I{CSRC}", "-Xptxas=-v", f"-gencode=arch=compute_{chip},code=sm_{chip}"]
    command += ["-c", str(CSRC / "cuda/decode_attention.cu"), "-o", str(tmp_path / "o")]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    text = said.stdout + said.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", text)]
    assert len(spills) == len(registers) == 15  # three head sizes; fp32; bf16 and fp16 with one and two groups of rows
    assert all(pair == ("0", "0") for pair in spills), text
    assert max(registers) <= 192, registers  # shared memory lets two or three blocks of 128 threads share 64 Ki of them
