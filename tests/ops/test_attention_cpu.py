"""Our own kernel for CPUs with AVX-512, on sequences of several of its blocks; what it shares with others is in
test_attention.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.ops import attention, explain
from fastlm.ops.attention import cpu_native
from tests.ops.guarded import guarded
from tests.ops.helpers import assert_as_exact_as, poisoned_memory
from tests.ops.test_attention import plain_attention, run, with_lse

pytestmark = pytest.mark.skipif(not cpu_native._is_fast(torch.float32), reason="the kernel is for AVX-512")

# seq_q, seq_k, heads, kv_heads, head_dim, options. Blocks are of 512 keys and 512 queries, tiles of 64, strips of 64.
CASES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "causal, gqa": (600, 600, 4, 2, 64, {"causal": True}),
    "causal, one more than a block": (513, 513, 2, 2, 16, {"causal": True}),
    "full, more keys": (65, 1100, 2, 1, 40, {}),
    "causal, more keys": (130, 1090, 2, 2, 72, {"causal": True, "scale": 0.3}),
    "causal, more queries": (1100, 70, 2, 1, 16, {"causal": True}),
    "window": (700, 700, 2, 1, 80, {"causal": True, "window": 130}),
    "window over blocks, more keys": (530, 1050, 2, 2, 24, {"causal": True, "window": 600}),
    "window, more queries": (700, 200, 1, 1, 20, {"causal": True, "window": 33}),
    "sinks": (600, 600, 4, 2, 64, {"causal": True, "sinks": True}),
    "head_dim 256": (70, 90, 1, 1, 256, {"causal": True}),
}


def make(case: str, dtype: torch.dtype, batch: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    seq_q, seq_k, heads, kv_heads, head_dim, options = CASES[case]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(heads).to(dtype)
    shapes = ((seq_q, heads), (seq_k, kv_heads), (seq_k, kv_heads))
    return [torch.randn(batch, h, s, head_dim).to(dtype).transpose(1, 2) for s, h in shapes], options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_match_float64(case, dtype):
    if not cpu_native._is_fast(dtype):
        pytest.skip("AMX serves bf16 here")
    tensors, options = make(case, dtype)
    q, k, _ = tensors
    assert cpu_native.serves(q, k)
    grads = [torch.randn(q.shape).to(dtype), torch.randn(q.shape[0], q.shape[2], q.shape[1])]
    grads[1] *= dtype == torch.float32  # otherwise the gradient through lse hides that through out
    with poisoned_memory():
        ours = run(with_lse, tensors, options, grads)
    plain = run(plain_attention, tensors, options, grads)
    exact = run(plain_attention, tensors, options, grads, torch.float64)
    empty = exact[1] == -torch.inf
    assert torch.equal(ours[1] == -torch.inf, empty)
    for results in (ours, plain, exact):
        results[1] = results[1].masked_fill(empty, 0.0)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_as_exact_as(a, b, c, floor=4 * torch.finfo(dtype).eps if i == 5 else 1e-6)  # few sinks, sums that cancel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_threads_nor_on_the_rest_of_the_batch(dtype):
    tensors, options = make("causal, gqa", dtype, batch=3)
    grads = [torch.randn(tensors[0].shape).to(dtype), torch.zeros(3, 4, 600)]
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(with_lse, tensors, options, grads))
    finally:
        torch.set_num_threads(threads)
    alone = run(with_lse, [t[1:2] for t in tensors], options, [g[1:2] for g in grads])
    for first, *others, its in zip(*results, alone, strict=True):
        assert all(torch.equal(first, other) for other in others)
        assert torch.equal(first[1:2], its)


def test_a_querys_bits_do_not_depend_on_the_queries_beside_it():
    (q, k, v), _ = make("causal, gqa", torch.float32)
    whole = attention(q, k, v, causal=True)
    part = attention(q[:, 201:331], k[:, :331], v[:, :331], causal=True)  # as a prompt that is read in parts
    assert torch.equal(whole[:, 201:331], part)


def test_packed_sequences_equal_each_alone():
    (q, k, v), options = make("causal, gqa", torch.float32)
    offsets = torch.tensor([0, 600, 1200], dtype=torch.int32)
    packed = attention(*(t.flatten(0, 1) for t in (q, k, v)), **options, cu_seqlens_q=offsets)
    assert torch.equal(packed, attention(q, k, v, **options).flatten(0, 1))


PACKED: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window": {"causal": True, "window": 5},
    "sinks": {"causal": True, "sinks": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", PACKED)
def test_packed_sequences_of_every_length_match_float64(case, dtype):
    """From none to more tokens than a block; without queries, without keys; tokens of no sequence at the end."""
    if not cpu_native._is_fast(dtype):
        pytest.skip("AMX serves bf16 here")
    lengths_q, lengths_k = [3, 0, 1, 70, 17, 5, 600], [3, 2, 1, 70, 40, 0, 600]
    options: dict[str, Any] = dict(PACKED[case])
    heads = 4
    if "sinks" in options:
        options["sinks"] = torch.randn(heads).to(dtype)
    q = torch.randn(sum(lengths_q) + 2, heads, 24).to(dtype)
    k, v = (torch.randn(sum(lengths_k) + 3, 2, 24).to(dtype) for _ in range(2))
    cu_seqlens = {
        f"cu_seqlens_{name}": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for name, lengths in (("q", lengths_q), ("k", lengths_k))
    }
    grads = [torch.randn(q.shape).to(dtype), torch.zeros(heads, q.shape[0])]
    assert cpu_native.serves_packed(q, k)
    with poisoned_memory():
        ours = run(with_lse, (q, k, v), {**options, **cu_seqlens}, grads)
    at_q = at_k = 0
    for seq_q, seq_k in zip(lengths_q, lengths_k, strict=True):
        rows, keys = slice(at_q, at_q + seq_q), slice(at_k, at_k + seq_k)
        at_q, at_k = rows.stop, keys.stop
        if seq_q == 0 or seq_k == 0:
            assert not ours[0][rows].any()
            assert not ours[2][rows].any()
            assert not ours[3][keys].any()
            assert not ours[4][keys].any()
            continue
        its = [q[None, rows], k[None, keys], v[None, keys]]
        its_grads = [grads[0][None, rows], grads[1][None, :, rows]]
        plain = run(plain_attention, its, options, its_grads)
        exact = run(plain_attention, its, options, its_grads, torch.float64)
        mine = [
            ours[0][None, rows],
            ours[1][None, :, rows],
            ours[2][None, rows],
            ours[3][None, keys],
            ours[4][None, keys],
        ]
        for a, b, c in zip(mine, plain, exact, strict=False):
            if not c.any():  # of one key, whose weight cannot change
                assert a.abs().max() < 8 * torch.finfo(dtype).eps
            elif not c.isinf().any():
                assert_as_exact_as(a, b, c, floor=1e-6 if dtype == torch.float32 else 1e-3)
    for tensor, used in ((ours[0], at_q), (ours[2], at_q), (ours[3], at_k), (ours[4], at_k)):
        assert not tensor[used:].any()


def test_spans_that_leave_a_tensor_are_refused_before_it_is_read():
    q = torch.randn(1, 8, 1, 16)
    for span in ((0, 9, 0, 8), (-1, 3, 0, 3), (5, 3, 0, 3), (0, 3, 7, 2**62), (0, 3, -(2**62), 3)):
        with pytest.raises(ValueError, match="leave the tensor"):
            cpu_native.forward(q, q, q, True, None, 1.0, [span])
    with pytest.raises(ValueError, match="batch of one"):
        cpu_native.forward(
            q.view(2, 4, 1, 16), q.view(2, 4, 1, 16), q.view(2, 4, 1, 16), True, None, 1.0, [(0, 4, 0, 4)]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [20, 64, 72])
def test_nothing_beyond_the_tensors_is_read(dtype, head_dim):
    q, k, v, grad = (guarded(torch.randn(1, s, 1, head_dim).to(dtype)) for s in (67, 513, 513, 67))
    out, lse = cpu_native.forward(q, k, v, True, None, 0.1)
    grads = cpu_native.backward(grad, lse, q, k, v, guarded(out), guarded(lse), True, None, 0.1)
    assert all(torch.isfinite(t).all() for t in (out, lse, *grads))


def test_a_window_needs_no_mask_however_long_the_sequence(monkeypatch):
    q = torch.empty(1, 5000, 1, 16)
    assert explain("attention", q, q, q, causal=True, window=100).chosen == "cpu"
    monkeypatch.setattr(cpu_native, "_is_fast", lambda dtype: False)
    assert "needs a mask" in explain("attention", q, q, q, causal=True, window=100).reasons["cpu"]
