from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.errors import BackendError
from fastlm.ops import attention, explain
from fastlm.ops.attention import reference
from tests.ops.helpers import assert_as_exact_as, poisoned_memory

# seq_q, seq_k, heads, kv_heads, head_dim, options. The interpreter's tiles are 16 and 32 long.
CASES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "full": (40, 50, 2, 2, 16, {}),
    "full, tile": (32, 32, 1, 1, 16, {}),
    "causal": (67, 67, 1, 1, 32, {"causal": True}),
    "causal, gqa": (49, 49, 4, 2, 16, {"causal": True}),
    "causal, tile - 1": (31, 31, 2, 1, 16, {"causal": True}),
    "causal, gqa, tile + 1, padded head_dim": (33, 33, 4, 2, 24, {"causal": True}),
    "mqa": (33, 37, 3, 1, 16, {"scale": 0.5}),
    "more keys": (33, 71, 2, 1, 16, {"causal": True}),
    "more queries": (71, 33, 2, 1, 16, {"causal": True}),
    "window": (70, 70, 2, 1, 16, {"causal": True, "window": 20}),
    "window, more keys": (20, 71, 2, 1, 16, {"causal": True, "window": 37}),
    "window, more queries": (61, 40, 2, 2, 16, {"causal": True, "window": 5}),
    "window beyond the sequence": (47, 47, 2, 2, 16, {"causal": True, "window": 1000}),
    "one query": (1, 53, 4, 2, 16, {"causal": True}),
    "head_dim 80": (35, 35, 1, 1, 80, {"causal": True}),
    "head_dim 256": (17, 33, 1, 1, 256, {}),
    "head_dim 512": (17, 33, 1, 1, 512, {"causal": True}),
    "softcap": (40, 40, 2, 2, 16, {"softcap": 2.0}),
    "softcap, window, gqa": (40, 50, 4, 2, 16, {"causal": True, "window": 20, "softcap": 5.0}),
    "sinks": (50, 50, 4, 2, 16, {"causal": True, "sinks": True}),
    "sinks, window, more queries": (60, 40, 2, 2, 16, {"causal": True, "window": 9, "sinks": True}),
    "bias": (23, 41, 2, 1, 16, {"bias": (2, 2, 23, 41)}),
    "bias, shared, causal": (23, 23, 2, 2, 16, {"causal": True, "bias": (1, 2, 1, 23)}),
    "bias, of one sequence, window, softcap": (
        40,
        50,
        2,
        1,
        16,
        {"causal": True, "window": 20, "softcap": 3.0, "bias": (2, 40, 50)},
    ),
    "dropout": (40, 50, 4, 2, 16, {"dropout": 0.3, "seed": 2**62 + 5}),
    "dropout, causal, sinks, more queries": (
        50,
        37,
        2,
        1,
        24,
        {"causal": True, "sinks": True, "dropout": 0.6, "seed": -3},
    ),
    "dropout, bias": (33, 41, 2, 1, 16, {"bias": (2, 1, 33, 41), "dropout": 0.2, "seed": 9}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW_PRECISION_CASES = [
    "causal, gqa, tile + 1, padded head_dim", "softcap, window, gqa", "sinks", "full", "bias", "dropout",
]  # fmt: skip


def refused(backend: str, options: dict[str, Any]) -> bool:
    return backend == "cpu" and ("softcap" in options or "dropout" in options)


def dtypes_of(case: str) -> list[torch.dtype]:
    if CASES[case][4] > 256:
        return [torch.bfloat16]
    return DTYPES if case in LOW_PRECISION_CASES else [torch.float32]


SERVED = [
    pytest.param(backend, case, dtype, id=f"{backend}, {case}, {str(dtype).removeprefix('torch.')}")
    for case in CASES
    for backend in ("reference", "cpu", "triton")
    for dtype in DTYPES
    if not refused(backend, CASES[case][-1]) and dtype in dtypes_of(case)
]


def use(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu" and device == "cuda":
        pytest.skip("the cpu backend has nothing to run on a GPU")
    monkeypatch.setenv("FASTLM_BACKEND", backend)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, device, monkeypatch)
    return request.param


def plain_attention(
    q, k, v, *, causal=False, window=None, softcap=None, sinks=None, bias=None, scale=None, dropout=0.0, seed=0
):
    """The formula in plain PyTorch, in q's dtype, from masks of ones; a second opinion beside the reference.

    Which weights dropout keeps is the reference's word, which has a test of its own.
    """
    (_, seq_q, heads, head_dim), seq_k = q.shape, k.shape[1]
    k, v = (t.repeat_interleave(heads // t.shape[2], 2).transpose(1, 2) for t in (k, v))
    logits = q.transpose(1, 2) @ k.mT * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(seq_k - seq_q)
    if window is not None:
        seen = seen.triu(seq_k - seq_q - window + 1)
    kept = 1.0
    if dropout:
        seed = torch.tensor(seed, device=q.device)
        kept = reference.kept(tuple(logits.shape), dropout, seed).to(logits.dtype) / (1 - dropout)
    empty = ~seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen & ~empty, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(q.shape[0], heads, seq_q, 1)
        logits = torch.cat([logits.masked_fill(empty, -torch.inf), column], -1)
        return (logits.softmax(-1)[..., :-1] * kept @ v).transpose(1, 2), logits.logsumexp(-1)
    weights = logits.softmax(-1).masked_fill(empty, 0.0) * kept
    return (weights @ v).transpose(1, 2), logits.logsumexp(-1).masked_fill(empty[:, 0], -torch.inf)


def make(case: str, dtype: torch.dtype, device: str, batch: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v as views of (batch, heads, seq, head_dim), and the options. On a GPU sequences are 13 times as long."""
    seq_q, seq_k, heads, kv_heads, head_dim, options = CASES[case]
    longer = 1 if device == "cpu" else 13
    options = dict(options)
    if "window" in options:
        options["window"] *= longer

    def draw(seq: int, heads: int) -> Tensor:
        return torch.randn(batch, heads, seq * longer, head_dim, device=device).to(dtype).transpose(1, 2)

    if "sinks" in options:
        options["sinks"] = torch.randn(heads, device=device).to(dtype)
    if "bias" in options:
        *lead, rows, columns = options["bias"]
        bias = torch.randn(*lead, rows if rows == 1 else rows * longer, columns * longer, device=device).to(dtype)
        options["bias"] = bias.masked_fill(torch.rand(bias.shape, device=device) < 0.2, -torch.inf)
        options["bias"][..., 0] = 0.5  # every row sees a key
    return [draw(seq_q, heads), draw(seq_k, kv_heads), draw(seq_k, kv_heads)], options


def run(
    function, tensors: list[Tensor], options: dict[str, Any], grads: list[Tensor], dtype: torch.dtype | None = None
):
    """[out, lse, and the gradients of q, k, v, sinks, bias], computed in `dtype`."""
    dtype = dtype or tensors[0].dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    options = dict(options)
    for name in ("sinks", "bias"):
        if name in options:
            options[name] = options[name].detach().to(dtype).requires_grad_()
            leaves.append(options[name])
    out, lse = function(*leaves[:3], **options)
    visible = torch.isfinite(lse)
    torch.autograd.backward(
        [out, lse.masked_fill(~visible, 0.0)], [grads[0].to(out.dtype), (grads[1] * visible).to(lse.dtype)]
    )
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


def with_lse(*tensors, **options):
    return attention(*tensors, **options, return_lse=True)


@pytest.mark.parametrize(("backend", "case", "dtype"), SERVED)
def test_forward_and_backward_match_float64(backend, case, dtype, device, monkeypatch):
    use(backend, device, monkeypatch)
    tensors, options = make(case, dtype, device)
    q = tensors[0]
    grads = [torch.randn(q.shape, device=device).to(dtype), torch.randn(q.shape[0], q.shape[2], q.shape[1]).to(device)]
    if case in LOW_PRECISION_CASES:
        grads[1].zero_()  # otherwise the gradient through lse hides that through out
    with poisoned_memory():
        ours = run(with_lse, tensors, options, grads)
    plain = run(plain_attention, tensors, options, grads)
    exact = run(plain_attention, tensors, options, grads, torch.float64)
    empty = exact[1] == -torch.inf
    assert torch.equal(ours[1] == -torch.inf, empty)
    for results in (ours, plain, exact):
        results[1] = results[1].masked_fill(empty, 0.0)
    for name, a, b, c in zip(("out", "lse", "q", "k", "v", "option"), ours, plain, exact, strict=False):
        assert a.dtype == (torch.float32 if name == "lse" else dtype)
        # A sink's gradient is a sum that nearly cancels, over delta of the rounded out, and sinks are few.
        floor = 4 * torch.finfo(dtype).eps if name == "option" and "sinks" in options else 1e-6
        assert_as_exact_as(a, b, c, floor=floor)


VISIBLE = [
    (5, 5, True, None, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    (2, 5, True, None, [[0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    (5, 2, True, None, [[], [], [], [0], [0, 1]]),
    (4, 4, True, 1, [[0], [1], [2], [3]]),
    (4, 4, True, 2, [[0], [0, 1], [1, 2], [2, 3]]),
    (2, 5, True, 3, [[1, 2, 3], [2, 3, 4]]),
    (5, 3, True, 2, [[], [], [0], [0, 1], [1, 2]]),
    (2, 3, False, None, [[0, 1, 2], [0, 1, 2]]),
]


@pytest.mark.parametrize(("seq_q", "seq_k", "causal", "window", "keys"), VISIBLE)
def test_each_query_sees_exactly_the_keys_of_the_definition(backend, device, seq_q, seq_k, causal, window, keys):
    q = torch.zeros(1, seq_q, 1, 16, device=device)
    k = torch.randn(1, seq_k, 1, 16, device=device)
    v = torch.eye(seq_k, 16, device=device)[None, :, None]
    out, lse = attention(q, k, v, causal=causal, window=window, return_lse=True)
    expected = torch.zeros(seq_q, 16)
    for row, its_keys in enumerate(keys):
        expected[row, its_keys] = 1 / max(len(its_keys), 1)
    torch.testing.assert_close(out[0, :, 0].cpu(), expected)
    torch.testing.assert_close(lse[0, 0].cpu(), torch.tensor([float(len(k)) for k in keys]).log())
    torch.testing.assert_close(attention(q, k, v, causal=causal, window=window), out)


def test_rows_without_a_key_give_zero_and_pass_no_gradient(backend, device):
    q, k, v = (torch.randn(1, s, 2, 16, device=device, requires_grad=True) for s in (40, 7, 7))
    with poisoned_memory():
        out, lse = attention(q, k, v, causal=True, return_lse=True)
        out.sum().backward()
    assert torch.equal(out[:, :33], torch.zeros_like(out[:, :33]))
    assert (lse[..., :33] == -torch.inf).all()
    assert torch.isfinite(lse[..., 33:]).all()
    assert torch.equal(q.grad[:, :33], torch.zeros_like(q.grad[:, :33]))
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_a_row_whose_bias_hides_every_key_gives_zero(backend, device):
    q, k, v = (torch.randn(1, 40, 2, 16, device=device, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 40, 40, device=device)
    bias[..., 2, :] = -torch.inf
    bias[..., 5, :33] = -torch.inf  # all but its last tile of keys
    bias.requires_grad_()
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    out.square().sum().backward()
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert (lse[..., 2] == -torch.inf).all()
    assert torch.isfinite(lse[..., 5]).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v, bias))


def test_what_is_kept_is_a_fair_draw_that_seed_and_place_decide(device):
    shape, seed = (2, 3, 40, 51), torch.tensor(int(torch.randint(2**62, ())), device=device)
    for dropout in (0.1, 0.5, 0.9):
        kept = reference.kept(shape, dropout, seed)
        sigma = (dropout * (1 - dropout) / kept.numel()) ** 0.5
        assert abs(kept.float().mean().item() - (1 - dropout)) < 5 * sigma
    kept = reference.kept(shape, 0.5, seed)
    assert torch.equal(reference.kept(shape, 0.5, seed), kept)
    assert torch.equal(reference.kept((1, 3, 40, 51), 0.5, seed, 3)[0], kept[1])  # the second sequence's planes
    assert torch.equal(reference.kept((2, 3, 7, 12), 0.5, seed), kept[:, :, :7, :12])
    for other in (reference.kept(shape, 0.5, seed + 1), kept.roll(1, -1), kept.roll(1, -2), kept.roll(1, 1)):
        assert abs((other == kept).float().mean().item() - 0.5) < 5 * 0.5 / kept.numel() ** 0.5
    assert reference.kept(shape, 0.0, seed).all()


def test_dropout_repeats_with_its_seed_and_else_follows_torchs_generator(device):
    q, k, v = (torch.randn(1, 20, 2, 16, device=device) for _ in range(3))
    first = attention(q, k, v, dropout=0.5, seed=1)
    assert torch.equal(attention(q, k, v, dropout=0.5, seed=torch.tensor(1, device=device)), first)
    assert not torch.equal(attention(q, k, v, dropout=0.5, seed=2), first)
    draws = []
    for generator_seed in (3, 3, 4):
        torch.manual_seed(generator_seed)
        draws.append(attention(q, k, v, dropout=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    mean = torch.stack([attention(q, k, v, dropout=0.2, seed=i) for i in range(400)]).mean(0)
    torch.testing.assert_close(mean, attention(q, k, v), rtol=0.0, atol=0.15)
    assert torch.equal(attention(q, k, v, dropout=0.0, seed=1), attention(q, k, v))
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
            attention(q, k, v, dropout=wrong)
    with pytest.raises(ValueError, match="seed must be an int, or int64 of no dimension"):
        attention(q, k, v, dropout=0.1, seed=torch.zeros(1, dtype=torch.int64, device=device))


def test_packed_dropout_is_the_same_on_every_backend(device, monkeypatch):
    q, k, v = (torch.randn(40, heads, 16, device=device, requires_grad=True) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 17, 17, 40], dtype=torch.int32, device=device)
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("FASTLM_BACKEND", backend)
        out = attention(q, k, v, causal=True, cu_seqlens_q=offsets, dropout=0.4, seed=11)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 11, "sinks": True}, {}])
def test_packed_sequences_equal_each_sequence_alone(backend, device, options):
    longer = 1 if device == "cpu" else 13
    lengths = [(33, 33), (0, 3), (5, 0), (1, 1), (7, 19), (20, 6)]
    lengths = [(a * longer, b * longer) for a, b in lengths]
    outside = 3  # tokens at the end that belong to no sequence
    cu_q, cu_k = (
        torch.tensor([0, *each], dtype=torch.int32).cumsum(0, dtype=torch.int32) for each in zip(*lengths, strict=True)
    )
    q = torch.randn(int(cu_q[-1]) + outside, 2, 16, device=device, requires_grad=True)
    k, v = (torch.randn(int(cu_k[-1]) + outside, 1, 16, device=device, requires_grad=True) for _ in range(2))
    if "sinks" in options:
        options = options | {"sinks": torch.randn(2, device=device, requires_grad=True)}
    leaves = [q, k, v] + ([options["sinks"]] if "sinks" in options else [])
    grad_out, grad_lse = torch.randn(q.shape, device=device), torch.randn(2, q.shape[0], device=device)
    longest = {"max_seqlen_q": max(a for a, _ in lengths), "max_seqlen_k": max(b for _, b in lengths)}
    with poisoned_memory():
        out, lse = attention(
            q, k, v, **options, cu_seqlens_q=cu_q.to(device), cu_seqlens_k=cu_k.to(device), return_lse=True, **longest
        )
        grads = torch.autograd.grad((out, torch.where(lse > -torch.inf, lse, 0)), leaves, (grad_out, grad_lse))

    alone_out, alone_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for rows, keys in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        rows, keys = slice(*rows), slice(*keys)
        its_out, its_lse = plain_attention(q[None, rows], k[None, keys], v[None, keys], **options)
        if rows.stop > rows.start and (keys.stop > keys.start or "sinks" in options):
            alone_out[rows], alone_lse[:, rows] = its_out[0], its_lse[0]
    expected = torch.autograd.grad(
        (alone_out, torch.where(alone_lse > -torch.inf, alone_lse, 0)), leaves, (grad_out, grad_lse)
    )
    for a, b in zip((out, lse, *grads), (alone_out, alone_lse, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(out[-outside:], torch.zeros_like(out[-outside:]))


def test_self_attention_needs_one_set_of_offsets_and_no_maximum(backend, device):
    q, k, v = (torch.randn(30, 2, 16, device=device) for _ in range(3))
    cu_seqlens = torch.tensor([0, 10, 30], dtype=torch.int32, device=device)
    out = attention(q, k, v, causal=True, cu_seqlens_q=cu_seqlens)
    for rows in (slice(0, 10), slice(10, 30)):
        expected, _ = plain_attention(q[None, rows], k[None, rows], v[None, rows], causal=True)
        torch.testing.assert_close(out[rows], expected[0], rtol=1e-5, atol=1e-5)


def test_strided_inputs_are_read_without_a_wrong_element(backend, device):
    fused = torch.randn(2, 37, 3, 2, 40, device=device)  # (batch, seq, q | k | v, heads, more than head_dim)
    q, k, v = (t[..., 5:29] for t in fused.unbind(2))
    expected, _ = plain_attention(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True).double(), expected, rtol=1e-5, atol=1e-5)
    q, k, v = (torch.randn(2, 2, 24, 37, device=device).permute(0, 3, 1, 2) for _ in range(3))  # seq contiguous
    out, grads = run_with_strided_gradient(q, k, v)
    exact_out, exact_grads = run_with_strided_gradient(q.double(), k.double(), v.double(), plain_attention)
    for a, b in zip((out, *grads), (exact_out, *exact_grads), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def run_with_strided_gradient(q, k, v, function=with_lse):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, _ = function(*leaves, causal=True)
    grad = (
        torch.arange(out.numel(), device=out.device, dtype=out.dtype)
        .sin()
        .view(*reversed(out.shape))
        .permute(3, 2, 1, 0)
    )
    return out.detach(), torch.autograd.grad(out, leaves, grad)


def test_offsets_beyond_31_bits_are_reached(device, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    stride, tokens = 2**22, 530
    storage = torch.empty(tokens * stride, dtype=torch.float16, device=device)  # 4 GiB, of which few pages are touched
    k = storage.as_strided((1, tokens, 1, 16), (0, stride, 16, 1))
    v = storage.as_strided((1, tokens, 1, 16), (0, stride, 16, 1), 16)
    k.copy_(torch.randn(k.shape))
    v.copy_(torch.randn(v.shape))
    q = torch.randn(1, 1, 1, 16, dtype=torch.float16, device=device)
    expected, _ = plain_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attention(q, k, v).double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("batch", "seq_q", "seq_k"), [(1, 0, 5), (1, 5, 0), (0, 5, 5), (1, 0, 0)])
def test_no_queries_or_no_keys_give_zeros(device, monkeypatch, batch, seq_q, seq_k):
    for backend in ("reference", "triton", ""):
        monkeypatch.setenv("FASTLM_BACKEND", backend)
        q, k, v = (torch.randn(batch, s, 2, 16, device=device, requires_grad=True) for s in (seq_q, seq_k, seq_k))
        out, lse = attention(q, k, v, return_lse=True)
        out.sum().backward()
        assert torch.equal(out, torch.zeros(batch, seq_q, 2, 16, device=device))
        assert torch.equal(lse, torch.full((batch, 2, seq_q), -torch.inf, device=device))
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (q, k, v))


def test_backward_gives_the_same_bits_at_every_run(backend, device):
    tensors, options = make("causal, gqa, tile + 1, padded head_dim", torch.bfloat16, device)
    grads = [torch.randn(tensors[0].shape, device=device), torch.randn(2, 4, tensors[0].shape[1], device=device)]
    first, second = (run(with_lse, tensors, options, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_sequence_gives_the_same_bits_whatever_shares_its_batch(device, monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    q, k, v = (torch.randn(3, 40, 2, 16, device=device) for _ in range(3))
    together = attention(q, k, v, causal=True)
    assert torch.equal(together[1:2], attention(q[1:2], k[1:2], v[1:2], causal=True))


def test_the_direct_call_on_cpu_equals_the_registered_op(monkeypatch):
    monkeypatch.setenv("FASTLM_BACKEND", "cpu")
    tensors, options = make("causal, gqa, tile + 1, padded head_dim", torch.float32, "cpu")
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn(tensors[0].shape)
    direct, registered = attention(*leaves, **options), with_lse(*leaves, **options)[0]
    assert "Attention" not in type(direct.grad_fn).__name__.replace("ScaledDotProduct", "")
    for a, b in zip(
        torch.autograd.grad(direct, leaves, grad), torch.autograd.grad(registered, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(direct, registered)


OPCHECKS = ["causal, gqa, tile + 1, padded head_dim", "sinks", "bias, shared, causal"]


@pytest.mark.parametrize("case", OPCHECKS)
def test_torch_accepts_the_registration(device, case):
    tensors, options = make(case, torch.float32, device)
    tensors = [t.detach().requires_grad_() for t in tensors]
    sinks, bias = (options.get(name) for name in ("sinks", "bias"))
    arguments = (*tensors, bias, sinks, None, None, None, None, True, None, None, 0.25)
    torch.library.opcheck(torch.ops.fastlm.attention.default, arguments)


def test_torch_accepts_the_registration_for_packed_sequences(device):
    q, k, v = (torch.randn(20, 2, 16, device=device, requires_grad=True) for _ in range(3))
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
    arguments = (q, k, v, None, None, cu_seqlens, cu_seqlens, 13, 13, True, 4, None, 0.25)
    torch.library.opcheck(torch.ops.fastlm.attention.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_traces_into_one_graph_with_its_backward(device, compiler):
    tensors, options = make("causal, gqa, tile + 1, padded head_dim", torch.float32, device)
    grads = [torch.randn(tensors[0].shape, device=device), torch.zeros(2, 4, tensors[0].shape[1], device=device)]
    compiled = torch.compile(with_lse, fullgraph=True, backend=compiler)
    for a, b in zip(run(compiled, tensors, options, grads), run(with_lse, tensors, options, grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["causal, gqa", "softcap, window, gqa", "sinks", "bias, shared, causal", "packed"])
def test_second_derivatives_match_those_of_plain_pytorch_and_a_warning_tells_the_cost(device, case):
    if case == "packed":
        tensors = [torch.randn(12, heads, 16, device=device) for heads in (2, 1, 1)]
        options: dict[str, Any] = {
            "causal": True,
            "cu_seqlens_q": torch.tensor([0, 5, 12], dtype=torch.int32).to(device),
        }
    else:
        tensors, options = make(case, torch.float32, device, batch=1)
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    for name in ("sinks", "bias"):
        if name in options:
            options[name] = options[name].double().requires_grad_()
            leaves.append(options[name])

    def plain(q, k, v, **options):
        offsets = options.pop("cu_seqlens_q", None)
        if offsets is None:
            return plain_attention(q, k, v, **options)
        parts = [plain_attention(*(t[None, a:b] for t in (q, k, v)), **options) for a, b in pairwise(offsets.tolist())]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)

    def penalty(function):
        out, lse = function(*leaves[:3], **options)
        grads = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g.nan_to_num() ** 2).sum() for g in grads), leaves)

    with pytest.warns(UserWarning, match="come from the reference, which holds up to"):
        ours = penalty(with_lse)
    for a, b in zip(ours, penalty(plain), strict=True):
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=1e-6, atol=1e-8)


def test_one_tensor_as_queries_and_keys_counts_once_for_each(device):
    x = torch.randn(1, 6, 2, 16, device=device, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="come from the reference"):
        (ours,) = torch.autograd.grad(with_lse(x, x, x)[0].sin().sum(), x, create_graph=True)
    (exact,) = torch.autograd.grad(plain_attention(x, x, x)[0].sin().sum(), x)
    torch.testing.assert_close(ours, exact)


def test_arguments_that_do_not_fit_are_named():
    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape).to(dtype)

    q, k = draw(1, 4, 4, 16), draw(1, 6, 2, 16)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    packed = {"cu_seqlens_q": offsets}
    for arguments, options, message in [
        ((q[0], k, k), {}, r"must be \(batch, seq, heads, head_dim\)"),
        ((q, k, k), packed, r"must be \(tokens, heads, head_dim\) with cu_seqlens"),
        ((q, k, draw(1, 5, 2, 16)), {}, "k and v must have one shape"),
        ((q, draw(1, 6, 3, 16), draw(1, 6, 3, 16)), {}, "heads must be a multiple of kv_heads, not 4 and 3"),
        ((q, k.half(), k), {}, "one floating dtype"),
        ((q, k, k), {"window": 3}, "needs causal=True"),
        ((q, k, k), {"window": 0, "causal": True}, "window must be at least 1"),
        ((q, k, k), {"softcap": 0.0}, "softcap must be positive"),
        ((q, k, k), {"sinks": draw(2)}, r"sinks must be \(4,\)"),
        ((q, k, k), {"bias": draw(4, 5)}, "bias must broadcast"),
        ((q, k, k), {"cu_seqlens_k": offsets}, "cu_seqlens_k needs cu_seqlens_q"),
        ((q[0], k[0], k[0]), {"cu_seqlens_q": offsets.long()}, "of int32"),
        ((q[0], k[0], k[0]), packed | {"cu_seqlens_k": offsets[:1]}, "as many as cu_seqlens_q"),
        ((q[0], k[0], k[0]), packed | {"bias": draw(4, 6)}, "bias has no meaning for packed"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(*arguments, **options)


@pytest.mark.parametrize("offsets", [[0, 5, 3, 8], [0, 4, 9], [-1, 8], [0, 8]])
def test_offsets_that_make_no_sense_are_refused_on_cpu_and_cut_on_the_gpu(device, monkeypatch, offsets):
    q = torch.randn(8, 2, 16, device=device)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    for backend in ("reference",) if device == "cuda" else ("reference", "cpu"):
        monkeypatch.setenv("FASTLM_BACKEND", backend)
        with pytest.raises(ValueError, match="cu_seqlens_q"):
            attention(q, q, q, cu_seqlens_q=cu_seqlens, max_seqlen_q=7)
    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    with poisoned_memory():
        assert torch.isfinite(attention(q, q, q, cu_seqlens_q=cu_seqlens, max_seqlen_q=7)).all()


def test_a_backend_that_cannot_says_why(device, monkeypatch):
    q = torch.randn(1, 4, 2, 16, device=device)
    monkeypatch.setenv("FASTLM_BACKEND", "triton")
    with pytest.raises(BackendError, match="steps of 8, not 12"):
        attention(q[..., :12], q[..., :12], q[..., :12])
    wide = torch.zeros(1, 4, 2, 512, device=device)
    with pytest.raises(BackendError, match=r"needs bf16 or fp16, and compute capability 8\.0, for head_dim 512"):
        attention(wide, wide, wide)
    with pytest.raises(BackendError, match="positive scale"):
        attention(q, q, q, scale=-1.0)
    monkeypatch.delenv("FASTLM_BACKEND")
    if device == "cpu":
        assert explain("attention", q, q, q).chosen == "cpu"
        assert "has no softcap" in explain("attention", q, q, q, softcap=1.0).reasons["cpu"]
        assert explain("attention", q, q, q, softcap=1.0).chosen == "reference"
