from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastlm.ops import attention
from fastlm.ops.decode_attention import decode_attention, reference
from tests.ops.guarded import guarded
from tests.ops.helpers import assert_as_exact_as, poisoned_memory


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
        for cache in (k, v):
            cache[ids] = torch.randn(count, block_size, kv_heads, head_dim).to(cache_dtype)
            if count:
                cache[ids[-1], length - (count - 1) * block_size :] = torch.nan
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
    with pytest.raises(ValueError, match=r"sinks must be \(4,\)"):
        decode_attention(q, k, v, table, lengths, sinks=torch.zeros(2))
    scale = torch.ones(2)
    with pytest.raises(ValueError, match="k_scale must be given for int8 and fp8 caches and for no others"):
        decode_attention(q, k, v, table, lengths, k_scale=scale, v_scale=scale)
    k, v = k.nan_to_num().to(torch.int8), v.nan_to_num().to(torch.int8)
    with pytest.raises(ValueError, match="v_scale must be given"):
        decode_attention(q, k, v, table, lengths, k_scale=scale)
    with pytest.raises(ValueError, match="k_scale must be fp32 and broadcast"):
        decode_attention(q, k, v, table, lengths, k_scale=torch.ones(3), v_scale=scale)
    with pytest.raises(ValueError, match="v_scale must be fp32 and broadcast"):
        decode_attention(q, k, v, table, lengths, k_scale=scale, v_scale=scale.double())


def test_a_gradient_is_refused_rather_than_left_out():
    q, k, v, table, lengths = paged(
        [9, 4], query_len=1, heads=4, kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32
    )
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        decode_attention(q.requires_grad_(), k, v, table, lengths).sum().backward()


def exact(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, **options) -> Tensor:
    options = {"scale": q.shape[-1] ** -0.5, "window": None, "softcap": None} | options
    return reference.decode_attention(q.double(), k.double(), v.double(), table, lengths, **options)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)  # Triton's does not look: its own tests
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
        [30, 5], query_len=2, heads=4, kv_heads=2, head_dim=16, block_size=4, dtype=torch.float32
    )
    expected = exact(q, k, v, table, lengths, window=6)
    table[0, :5] = -1  # the first query of row 0, at position 28, sees tokens 23 and later: slot 3 of block 5
    k[table[0, 5], :3] = v[table[0, 5], :3] = torch.nan
    torch.testing.assert_close(decode_attention(q, k, v, table, lengths, window=6), expected.float())


def test_queries_that_see_nothing_give_zero(backend):
    q, k, v, table, lengths = paged(
        [2, 0], query_len=4, heads=2, kv_heads=1, head_dim=16, block_size=4, dtype=torch.float32
    )
    out = decode_attention(q, k, v, table, lengths)
    assert torch.equal(out[1], torch.zeros(4, 2, 16))
    assert torch.equal(out[0, :2], torch.zeros(2, 2, 16))
    torch.testing.assert_close(out[0, 2], v[table[0, 0], 0].expand(2, 16))  # position 0 sees one token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 64), (4, 1, 256), (6, 2, 80), (5, 5, 24), (14, 2, 7), (8, 1, 128)]
)
def test_matches_float64(dtype, cache_dtype, heads, kv_heads, head_dim, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")
    query_len, block_size = (int(torch.randint(1, high, ())) for high in (9, 40))
    lengths = [query_len, 1, 0, 17, *torch.randint(1, 700, (3,)).tolist(), 512]
    q, k, v, table, lengths = paged(
        lengths,
        query_len=query_len,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    for options in ({}, {"window": int(torch.randint(1, 300, ()))}, {"softcap": 1.5, "scale": 0.7}):
        with poisoned_memory():
            out = decode_attention(q, k, v, table, lengths, **options)
        reason = {"scale": head_dim**-0.5, "window": None, "softcap": None} | options
        plain = reference.decode_attention(q, k, v, table, lengths, **reason)
        assert out.dtype == dtype
        assert_as_exact_as(out, plain, exact(q, k, v, table, lengths, **options))


def test_a_sequence_gives_the_same_bits_whatever_shares_its_batch(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")
    for options in ({}, {"window": 100}):
        q, k, v, table, lengths = paged(
            [700, 3, 256, 1025, 90, 16],
            query_len=4,
            heads=6,
            kv_heads=2,
            head_dim=48,
            block_size=16,
            dtype=torch.bfloat16,
        )
        together = decode_attention(q, k, v, table, lengths, **options)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            for row in range(len(lengths)):
                one = slice(row, row + 1)
                alone = decode_attention(q[one], k, v, table[one], lengths[one], **options)
                assert torch.equal(alone, together[one])
                last = decode_attention(q[one, 3:], k, v, table[one], lengths[one], **options)  # the last query alone
                assert torch.equal(last, together[one, 3:])
                head = decode_attention(q[one, :, :1], k[:, :, :1], v[:, :, :1], table[one], lengths[one], **options)
                assert torch.equal(head, together[one, :, :1])
        finally:
            torch.set_num_threads(threads)


def test_views_of_a_larger_cache_are_read_in_place(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")
    q, k, v, table, lengths = paged(
        [70, 33], query_len=2, heads=4, kv_heads=2, head_dim=32, block_size=8, dtype=torch.float32
    )
    expected = decode_attention(q, k, v, table, lengths)
    layers = torch.full((k.shape[0], 3, 2, 2, 8, 32), torch.nan).transpose(3, 4)  # blocks, layers, k or v, slot, head
    layers[:, 1, 0], layers[:, 1, 1] = k, v
    assert not layers[:, 1, 0].is_contiguous()
    wide = torch.full((2, 2, 4, 40), torch.nan)
    wide[..., 3:35] = q
    strided = decode_attention(wide[..., 3:35], layers[:, 1, 0], layers[:, 1, 1], table, lengths)
    assert torch.equal(strided, expected)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(decode_attention(turned, k, v, table.T.contiguous().T, lengths), expected)


def test_reads_nothing_behind_the_caches(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (
            torch.randn(1, 1, 3, 7).to(dtype),
            torch.randn(1, 5, 1, 7).to(dtype),
            torch.randn(1, 5, 1, 7).to(dtype),
        )
        table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
        out = decode_attention(guarded(q), guarded(k), guarded(v), guarded(table), guarded(lengths))
        torch.testing.assert_close(out.double(), exact(q, k, v, table, lengths), rtol=2e-2, atol=2e-2)


def test_an_empty_batch_gives_an_empty_result(backend):
    q, cache = torch.randn(0, 1, 4, 16), torch.randn(2, 4, 2, 16)
    table, lengths = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    assert decode_attention(q, cache, cache, table, lengths).shape == (0, 1, 4, 16)
    nothing = decode_attention(
        torch.randn(2, 1, 4, 16), cache[:0], cache[:0], table.new_zeros(2, 0), table.new_zeros(2)
    )
    assert torch.equal(nothing, torch.zeros(2, 1, 4, 16))


OTHER_INSTRUCTIONS = """
import sys, torch
from fastlm.ops import decode_attention
arguments, out = torch.load(sys.argv[1], weights_only=True), sys.argv[2]
torch.save(decode_attention(*arguments, window=300, softcap=5.0), out)
"""


@pytest.mark.parametrize("features", ["avx2", "none"])
def test_machines_with_fewer_instructions_compute_the_same(tmp_path, features):
    arguments = paged([700, 33], query_len=3, heads=6, kv_heads=2, head_dim=72, block_size=16, dtype=torch.float16)
    torch.save(arguments, tmp_path / "in")
    command = [sys.executable, "-c", OTHER_INSTRUCTIONS, str(tmp_path / "in"), str(tmp_path / "out")]
    subprocess.run(command, env=os.environ | {"FASTLM_CPU_FEATURES": features}, check=True)
    options = {"scale": 72**-0.5, "window": 300, "softcap": 5.0}
    plain = reference.decode_attention(*arguments, **options)
    assert_as_exact_as(torch.load(tmp_path / "out", weights_only=True), plain, exact(*arguments, **options))
