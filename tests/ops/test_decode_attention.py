from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlm.ops import attention
from fastlm.ops.decode_attention import decode_attention, reference


def paged(lengths, *, query_len, heads, kv_heads, head_dim, block_size, dtype, cache_dtype=None):
    """Random q, caches whose unused slots are NaN, a shuffled table whose unused entries are invalid, and lengths."""
    counts = [-(-length // block_size) for length in lengths]
    blocks = sum(counts) + 2
    cache_dtype = cache_dtype or dtype
    k, v = (torch.full((blocks, block_size, kv_heads, head_dim), torch.nan, dtype=cache_dtype) for _ in range(2))
    table = torch.full((len(lengths), max(counts) + 1), -(2**31), dtype=torch.int32)
    order = torch.randperm(blocks).tolist()
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        ids = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(ids, dtype=torch.int32)
        for token in range(length):
            for cache in (k, v):
                cache[ids[token // block_size], token % block_size] = torch.randn(kv_heads, head_dim).to(cache_dtype)
    q = torch.randn(len(lengths), query_len, heads, head_dim).to(dtype)
    return q, k, v, table, torch.tensor(lengths, dtype=torch.int32)


def test_equals_dense_attention_over_the_gathered_tokens():
    q, k, v, table, lengths = paged(
        [37, 16, 3], query_len=3, heads=4, kv_heads=2, head_dim=24, block_size=8, dtype=torch.float32
    )
    for options in ({}, {"window": 5}, {"softcap": 2.0, "scale": 0.3}):
        out = decode_attention(q, k, v, table, lengths, **options)
        for row, length in enumerate(lengths.tolist()):
            ids = table[row, : -(-length // 8)].long()
            dense_k, dense_v = (cache[ids].flatten(0, 1)[None, :length] for cache in (k, v))
            expected = attention(q[row : row + 1], dense_k, dense_v, causal=True, **options)
            torch.testing.assert_close(out[row : row + 1], expected)


def test_torch_accepts_the_registration():
    arguments = paged([9, 4], query_len=2, heads=4, kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32)
    arguments[1].nan_to_num_()  # opcheck compares arguments before and after, and NaN is not equal to itself
    arguments[2].nan_to_num_()
    torch.library.opcheck(torch.ops.fastlm.decode_attention.default, (*arguments, 0.5, None, 3.0))


def test_traces_into_one_graph():
    arguments = paged([9, 4], query_len=1, heads=4, kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32)
    compiled = torch.compile(lambda *t: decode_attention(*t, window=3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), decode_attention(*arguments, window=3))


def test_what_does_not_fit_is_named():
    q, k, v, table, lengths = paged(
        [9, 4], query_len=1, heads=4, kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="query_len 1 to 8"):
        decode_attention(q.expand(2, 9, 4, 8), k, v, table, lengths)
    with pytest.raises(ValueError, match=r"heads \(3\) must be a multiple of kv_heads \(2\)"):
        decode_attention(q[:, :, :3], k, v, table, lengths)
    with pytest.raises(ValueError, match=r"k_cache and v_cache must be \(blocks, block_size, kv_heads, 8\)"):
        decode_attention(q, k[..., :4], v[..., :4], table, lengths)
    with pytest.raises(ValueError, match="the caches alike"):
        decode_attention(q, k, v.bfloat16(), table, lengths)
    with pytest.raises(ValueError, match=r"block_table must be \(2, max_blocks\) int32"):
        decode_attention(q, k, v, table.long(), lengths)
    with pytest.raises(ValueError, match=r"context_lens must be \(2,\) int32"):
        decode_attention(q, k, v, table, lengths[:1])
    with pytest.raises(ValueError, match="window must be 1 or more"):
        decode_attention(q, k, v, table, lengths, window=0)
    with pytest.raises(ValueError, match="softcap must be above 0"):
        decode_attention(q, k, v, table, lengths, softcap=0.0)


def exact(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, **options) -> Tensor:
    options = {"scale": q.shape[-1] ** -0.5, "window": None, "softcap": None} | options
    return reference.decode_attention(q.double(), k.double(), v.double(), table, lengths, **options)


@pytest.fixture(params=["reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    return request.param


def test_tables_and_lengths_that_lead_outside_the_cache_are_refused(backend):
    q, k, v, table, lengths = paged(
        [9, 4], query_len=1, heads=4, kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32
    )
    for bad in (-1, len(k), 2**31 - 1, -(2**31)):
        broken = table.clone()
        broken[0, 2] = bad
        with pytest.raises(ValueError, match=r"block_table\[0\] names a block outside the cache"):
            decode_attention(q, k, v, broken, lengths)
    for bad in (-1, table.shape[1] * 4 + 1, 2**31 - 1):
        with pytest.raises(ValueError, match=r"context_lens\[1\] is"):
            decode_attention(q, k, v, table, torch.tensor([9, bad], dtype=torch.int32))


def test_what_the_window_hides_may_be_freed_or_poisoned(backend):
    q, k, v, table, lengths = paged(
        [30, 5], query_len=2, heads=4, kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32
    )
    expected = exact(q, k, v, table, lengths, window=6)
    table[0, :5] = -1  # the first query of row 0, at position 28, sees tokens 23 and later: slot 3 of block 5
    k[table[0, 5], :3] = v[table[0, 5], :3] = torch.nan
    torch.testing.assert_close(decode_attention(q, k, v, table, lengths, window=6), expected.float())


def test_queries_that_see_nothing_give_zero(backend):
    q, k, v, table, lengths = paged(
        [2, 0], query_len=4, heads=2, kv_heads=1, head_dim=8, block_size=4, dtype=torch.float32
    )
    out = decode_attention(q, k, v, table, lengths)
    assert torch.equal(out[1], torch.zeros(4, 2, 8))
    assert torch.equal(out[0, :2], torch.zeros(2, 2, 8))
    torch.testing.assert_close(out[0, 2], v[table[0, 0], 0].expand(2, 8))  # position 0 sees one token
