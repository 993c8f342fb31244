"""Scaled dot-product attention: causal, grouped, windowed, soft-capped, with sinks or bias, dense or packed."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op
from fastlm.ops.attention import cpu, reference
from fastlm.ops.attention._arguments import check


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = dropout(softmax(cap(q · kᵀ · scale) + bias)) · v, over the keys that each query may see.

    Query i of seq_q stands at key position p = i + seq_k - seq_q, that is, the last query beside the last key. It sees
    key j when j ≤ p (`causal`) and j > p - window (`window`), so window counts the query's own position.
    A query that sees no key gives zero and passes no gradient.

    Args:
        q: `(batch, seq_q, heads, head_dim)`, or packed `(tokens, heads, head_dim)` with `cu_seqlens_q`. Any strides,
            the last dimension contiguous for the fast backends.
        k, v: `(batch, seq_k, kv_heads, head_dim)` or packed, in q's dtype. Query head h reads KV head
            h // (heads / kv_heads).
        causal: no query sees a later key.
        window: tokens each query sees, itself included; needs `causal`.
        softcap: logits become softcap · tanh(logits / softcap), as in Gemma 2.
        sinks: `(heads,)`, a logit a head that joins the softmax's denominator and brings no value, as in gpt-oss.
        bias: added to the logits after softcap; broadcasts to `(batch, heads, seq_q, seq_k)`; -inf hides a key.
        scale: of q · kᵀ; 1 / sqrt(head_dim) by default.
        cu_seqlens_q, cu_seqlens_k: `(sequences + 1,)` int32 on q's device: sequence i holds tokens
            cu_seqlens[i] … cu_seqlens[i + 1] - 1. `cu_seqlens_k` is `cu_seqlens_q` by default. Tokens outside every
            sequence give zero.
        max_seqlen_q, max_seqlen_k: no sequence is longer; spares the GPU empty programs. On a GPU, where reading
            `cu_seqlens` would wait for the device, it is trusted: queries beyond it give zero.
        return_lse: also return lse.
        dropout: share of the softmax's weights set to zero, the others divided by 1 - dropout; in [0, 1).
        seed: of dropout: the same seed drops the same weights. An int, or int64 of no dimension on q's device; drawn
            from torch's generator by default.

    Returns:
        out, like q. With `return_lse`, the pair (out, lse): lse `(batch, heads, seq_q)`, or `(heads, tokens)` when
        packed, is the logarithm of the softmax's denominator, sink included, fp32 (fp64 for fp64 input), and -inf
        where that is empty. Differentiable in q, k, v, sinks and bias, through out and lse. Gradients taken with
        `create_graph`, for second derivatives, come from the reference, which holds every logit, and a warning says
        so; the call that goes straight to torch on the CPU has none (with return_lse it has).

    Raises:
        ValueError: when shapes, dtypes or options do not fit.

    Dao, "FlashAttention-2", 2023 (arXiv 2307.08691), section 3.1; the causal alignment is FlashAttention's since 2.1.
    """
    check(q, k, v, causal, window, softcap, sinks, bias, cu_seqlens_q, cu_seqlens_k, dropout)
    if (
        not torch.compiler.is_compiling()
        and cpu.serves_directly(q, k, causal, window, softcap, sinks, bias, cu_seqlens_q, return_lse, dropout)
        and os.environ.get("FASTLM_BACKEND", "") in ("", "cpu")
    ):
        return cpu.direct(q, k, v, causal, scale)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    out, lse = _forward(
        q, k, v, bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale,
        dropout, _seed_tensor(seed, q) if dropout else None,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _seed_tensor(seed: int | Tensor | None, q: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    if not isinstance(seed, Tensor):
        return torch.tensor(seed, dtype=torch.int64, device=q.device)
    if seed.shape != () or seed.dtype != torch.int64 or seed.device != q.device:
        raise ValueError(
            f"seed must be an int, or int64 of no dimension on {q.device}, not {tuple(seed.shape)} {seed.dtype} "
            f"on {seed.device}"
        )
    return seed


OP = Op("attention", attention, ("gluon", "triton", "cpu", "reference"))


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None,
    causal: bool, window: int | None, softcap: float | None, scale: float, dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    backend = OP.select(
        q, k, v, causal=causal, window=window, softcap=softcap, sinks=sinks, bias=bias, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        return_lse=True, dropout=dropout, seed=seed,
    )  # fmt: skip
    return backend.forward(
        q, k, v, bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale,
        dropout, seed,
    )  # fmt: skip


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None,
    causal: bool, window: int | None, softcap: float | None, scale: float, dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(lse_shape, dtype=lse_dtype, device=q.device)


def _run_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bias: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None,
    causal: bool, window: int | None, softcap: float | None, scale: float, dropout: float, seed: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # Every backend leaves the same out and lse, so the backward need not be the forward's.
    backend = OP.select(
        q, k, v, causal=causal, window=window, softcap=softcap, sinks=sinks, bias=bias, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        return_lse=grad_lse is not None, dropout=dropout, seed=seed,
    )  # fmt: skip
    return backend.backward(
        grad_out, grad_lse, q, k, v, out, lse, bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, window, softcap, scale, dropout, seed, bias_grad,
    )  # fmt: skip


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    bias: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None,
    causal: bool, window: int | None, softcap: float | None, scale: float, dropout: float, seed: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return q.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return like(q), like(k), like(v), like(bias if bias_grad else None), like(sinks)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None,
                cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None,
                max_seqlen_k: int | None, causal: bool, window: int | None, softcap: float | None, scale: float,
                dropout: float = 0.0, seed: Tensor | None = None) -> Any:  # fmt: skip
        options = (max_seqlen_q, max_seqlen_k, causal, window, softcap, scale, dropout)
        out, lse = _forward(q, k, v, bias, sinks, cu_seqlens_q, cu_seqlens_k, *options, seed)
        ctx.save_for_backward(q, k, v, out, lse, bias, sinks, cu_seqlens_q, cu_seqlens_k, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        if grad_out is None and grad_lse is None:
            return (None,) * 15
        if torch.is_grad_enabled():  # create_graph
            return _differentiable_backward(ctx, grad_out, grad_lse)
        q, k, v, out, lse, bias, sinks, cu_seqlens_q, cu_seqlens_k, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        bias_grad, sinks_grad = ctx.needs_input_grad[3:5]
        grad_q, grad_k, grad_v, grad_bias, grad_sinks = _backward(
            grad_out, grad_lse, q, k, v, out, lse, bias, sinks, cu_seqlens_q, cu_seqlens_k, *ctx.options, seed,
            bias_grad,
        )  # fmt: skip
        optional = (grad_bias if bias_grad else None, grad_sinks if sinks_grad else None)
        return grad_q, grad_k, grad_v, *optional, *(None,) * 10


def _differentiable_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients as functions that autograd knows, of the inputs and of grad_out and grad_lse."""
    q, k, v, _, _, bias, sinks, cu_seqlens_q, cu_seqlens_k, seed = ctx.saved_tensors
    seq_q, heads = q.shape[-3:-1]
    logits = heads * seq_q * k.shape[-3] * (q.shape[0] if q.dim() == 4 else 1)
    warnings.warn(
        f"attention: gradients with create_graph=True come from the reference, which holds up to {logits:,} logits "
        "several times; leave create_graph out where no second derivative is needed",
        stacklevel=2,
    )
    inputs = [q, k, v, bias, sinks]  # as views, each its own even where the caller gave one tensor twice
    inputs = [t if t is None else t.view_as(t) for t in inputs]
    arguments: tuple[Any, ...] = (*inputs, cu_seqlens_q, cu_seqlens_k, *ctx.options, seed)
    outputs = reference.forward(*arguments)
    used = [(out, grad) for out, grad in zip(outputs, (grad_out, grad_lse), strict=True) if grad is not None]
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[:5], strict=True) if t is not None and needed]
    found = iter(
        torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], create_graph=True, allow_unused=True)
    )
    needed = zip(inputs, ctx.needs_input_grad[:5], strict=True)
    return (*(next(found) if t is not None and n else None for t, n in needed), *(None,) * 10)


_INPUTS = (
    "Tensor? bias, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, bool causal, SymInt? window, float? softcap, float scale"
)
_forward = define_op(
    f"attention(Tensor q, Tensor k, Tensor v, {_INPUTS}, float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    _Attention,
)
_backward = define_op(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_INPUTS}, float dropout, Tensor? seed, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
