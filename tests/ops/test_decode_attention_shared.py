"""Decode attention over a prefix that all sequences share: the same bits as without sharing, by fewer reads."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlm.ops import decode_attention
from tests.ops.helpers import poisoned_memory
from tests.ops.test_decode_attention import paged
from tests.ops.test_decode_attention_triton import assert_fast, compile_split, quantize

# query_len, heads, kv_heads, head_dim, block_size, shared tokens, lengths, options
CASES: dict[str, tuple[int, int, int, int, int, int, list[int], dict[str, Any]]] = {
    "one query without groups": (1, 2, 2, 16, 8, 64, [70, 64, 65, 79, 80, 66, 71], {}),
    "groups, rows of a sequence in two tiles": (2, 6, 2, 24, 16, 32, [37, 34, 60, 33, 48], {}),
    "splits of two sizes": (1, 4, 1, 16, 4, 64, [70, 200, 75, 130, 66], {"softcap": 2.0}),
    "the first is the long one": (1, 4, 1, 16, 4, 64, [200, 70, 199, 198], {"sinks": True}),
    "the prefix ends inside a split": (3, 2, 1, 40, 5, 45, [60, 48, 45, 77], {}),
    "queries inside the prefix": (8, 1, 1, 16, 16, 48, [48, 50, 48], {}),
    "more rows than a tile": (8, 10, 1, 16, 16, 32, [50, 40, 41], {}),
    "window": (1, 2, 1, 16, 16, 48, [50, 70, 49], {"window": 30}),
}


@pytest.fixture(autouse=True)
def on_the_triton_backend(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """By splits so small that the interpreter's short sequences have several, and long ones have longer.

    The interpreter multiplies by BLAS, which sums the last rows of a matrix in another order than the first; tensor
    cores treat all rows alike, and so does the product that stands in for it here.
    """
    from fastlm.ops.decode_attention import triton as kernels

    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(kernels, "MIN_SPLIT", 16)
        monkeypatch.setattr(kernels, "MAX_SPLITS", 5)
        monkeypatch.setattr(kernels, "COMBINED", 4)
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b[None]).sum(1, dtype=dtype))


def tokens(count: int) -> Tensor:
    return torch.tensor(count, dtype=torch.int32)


def make(case: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """As `paged` makes them, the first blocks being the first sequence's for all. On a GPU eight times as long."""
    query_len, heads, kv_heads, head_dim, block_size, shared, lengths, options = CASES[case]
    if device == "cuda":
        shared, lengths = 8 * shared, [8 * length for length in lengths]
    shape = {"query_len": query_len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    q, k, v, table, context_lens = paged(lengths, **shape, block_size=block_size, dtype=dtype)
    table[:, : shared // block_size] = table[0, : shared // block_size]
    k[table[0, : shared // block_size].long()], v[table[0, : shared // block_size].long()] = (
        torch.randn(shared // block_size, block_size, kv_heads, head_dim).to(dtype) for _ in range(2)
    )
    if "sinks" in options:
        options = options | {"sinks": torch.randn(heads, device=device).to(dtype)}
    return [t.to(device) for t in (q, k, v, table, context_lens)], tokens(shared).to(device), options


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gives_the_same_bits_as_without_sharing(case, dtype, device):
    tensors, shared, options = make(case, dtype, device)
    expected = decode_attention(*tensors, **options)
    with poisoned_memory():
        out = decode_attention(*tensors, **options, num_shared_tokens=shared)
    assert expected.isfinite().all()
    assert torch.equal(out, expected)


def test_no_program_writes_what_is_anothers(device, monkeypatch):
    """Else the order of programs would decide, which on a GPU is any."""
    if device == "cuda":
        pytest.skip("the interpreter alone can be told the order")
    from triton.runtime.interpreter import interpreter_builder as builder

    tensors, shared, options = make("splits of two sizes", torch.float32, device)
    expected = decode_attention(*tensors, **options, num_shared_tokens=shared)
    forward = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: forward(builder.grid_dim[0] - 1 - x, y, z))
    assert torch.equal(decode_attention(*tensors, **options, num_shared_tokens=shared), expected)


def test_quantized_caches_share_too(device):
    (q, k, v, table, lengths), shared, _ = make("one query without groups", torch.float32, device)
    (k, k_scale), (v, v_scale) = (quantize(t, torch.int8, "token") for t in (k, v))
    options = {"k_scale": k_scale, "v_scale": v_scale}
    expected = decode_attention(q, k, v, table, lengths, **options)
    assert torch.equal(decode_attention(q, k, v, table, lengths, **options, num_shared_tokens=shared), expected)


def own_tables_spoiled(tensors: list[Tensor], shared: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Outputs with the shared part of every table but the first leading nowhere, and of the untouched tables."""
    from fastlm.ops.decode_attention import triton as kernels

    q, k, v, table, lengths = tensors
    spoiled = table.clone()
    spoiled[1:, : int(shared) // k.shape[1]] = -1
    full = {"scale": q.shape[-1] ** -0.5, "window": None, "softcap": None, "sinks": None} | options

    def run(table: Tensor) -> Tensor:
        rest = (*full.values(), None, None, shared)
        return kernels.decode_attention(q, k, v, table, lengths, *rest)

    return run(spoiled), run(table)


def test_the_prefix_is_read_by_the_first_sequences_table_alone(device):
    for case in ("one query without groups", "groups, rows of a sequence in two tiles"):
        spoiled, expected = own_tables_spoiled(*make(case, torch.float32, device))
        assert torch.equal(spoiled, expected)


def test_sequences_with_longer_splits_read_their_own(device):
    if device == "cuda":
        pytest.skip("the lengths at which splits grow are those of small_splits")
    tensors, shared, options = make("splits of two sizes", torch.float32, device)
    spoiled, expected = own_tables_spoiled(tensors, shared, options)
    longer = tensors[4] > 5 * 16
    assert longer.any()
    assert spoiled[longer].isnan().all()
    assert torch.equal(spoiled[~longer], expected[~longer])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_other_backends_take_the_promise_and_give_the_same(backend, device, monkeypatch):
    if device == "cuda":
        pytest.skip("these backends' own device is the CPU")
    monkeypatch.setenv("FASTLM_BACKEND", backend)
    tensors, shared, options = make("one query without groups", torch.float32, device)
    expected = decode_attention(*tensors, **options)
    assert torch.equal(decode_attention(*tensors, **options, num_shared_tokens=shared), expected)


def test_a_promise_that_is_not_kept_is_told_on_the_cpu():
    (q, k, v, table, lengths), _, _ = make("one query without groups", torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"must be \(\) int32, not \(1,\) torch.int64"):
        decode_attention(q, k, v, table, lengths, num_shared_tokens=torch.tensor([16]))
    with pytest.raises(ValueError, match="is 65, but a sequence has only 64 tokens"):
        decode_attention(q, k, v, table, lengths, num_shared_tokens=tokens(65))
    table[2, 1] += 1
    with pytest.raises(ValueError, match="is 9, but the first 2 blocks differ"):
        decode_attention(q, k, v, table, lengths, num_shared_tokens=tokens(9))


@pytest.mark.parametrize("shared", [-5, 0, 1, 40, 63])
def test_any_part_of_the_prefix_may_be_promised_and_sequences_of_no_tokens_do_not_count(shared, device):
    (q, k, v, table, lengths), _, _ = make("one query without groups", torch.float32, device)
    for empty in (1, 0):
        lengths[empty], table[empty] = 0, -1
        expected = decode_attention(q, k, v, table, lengths)
        promise = tokens(shared).to(device)
        assert torch.equal(decode_attention(q, k, v, table, lengths, num_shared_tokens=promise), expected)


@pytest.mark.aot
@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize(
    ("head_dim", "rows", "cache"),
    [(64, 1, "bf16"), (128, 4, "bf16"), (128, 8, "i8"), (256, 8, "i8"), (256, 12, "bf16")],
)
def test_the_shared_kernel_multiplies_and_adds_as_the_plain_one_does(chip, head_dim, rows, cache):
    options = {"SOFTCAP": head_dim != 128}
    shared, plain = (compile_split(chip, head_dim, rows, "bf16", cache, CASCADE=c, **options) for c in (True, False))
    assert_fast(shared, chip)
    for instruction in (r"mma\.sync\S+", r"wgmma\.mma_async\S+", r"tcgen05\.mma\S+", r"shfl\.sync\S+", r"ex2\S+"):
        assert re.findall(instruction, shared.ptx) == re.findall(instruction, plain.ptx)
