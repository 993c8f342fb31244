"""Our own kernel where it is the faster, see `cpu_native`; otherwise torch's own FlashAttention for CPUs.

The aten op takes (batch, heads, seq, head_dim) by strides, so our layout costs a transpose of sizes and no copy. It
reads grouped KV heads as they are and hands out the log-sum-exp that its backward asks for, so no logits are kept. A
causal square, a single query row and the absence of any mask need none built; other windows and alignments pass one of
seq_q × seq_k that all heads share. Sinks are applied to (out, lse) afterwards, and because the backward's weights are
exp(logits - lse), handing it the corrected pair yields the corrected gradients.

Where neither mask nor sinks nor lse is wanted from it, `direct` calls torch's function with its autograd in C++: our
own registration around it would add 30 µs, more than a small attention takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.attention import cpu_native, reference
from fastlm.ops.attention._arguments import per_sequence

MAX_MASK_ELEMENTS = 2**24  # 64 MiB of fp32, a square of 4096

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    return_lse: bool,
    dropout: float,
    seed: int | Tensor | None,
) -> str | None:
    if dropout:
        return "has no dropout"
    if softcap is not None:
        return "has no softcap: torch's scaled_dot_product_attention, which it calls, has none"
    if q.dtype not in _DTYPES:
        return f"supports fp32, bf16, fp16 and fp64, not {q.dtype}"
    if q.numel() == 0 or k.numel() == 0:
        return "needs at least one query and one key"
    if cu_seqlens_q is not None or bias is not None or cpu_native.serves(q, k):
        return None
    if _shape_of_mask(q.shape[1], k.shape[1], causal, window) is not None:
        elements = q.shape[1] * k.shape[1]
        if elements > MAX_MASK_ELEMENTS:
            return f"needs a mask of {elements} elements for this window or alignment, above {MAX_MASK_ELEMENTS}"
    return None


def _shape_of_mask(seq_q: int, seq_k: int, causal: bool, window: int | None) -> tuple[bool, int | None] | None:
    """(causal, window) as far as a mask must express them, or None where is_causal or nothing at all does."""
    if window is not None and window >= seq_k:
        window = None
    if window is None and (not causal or seq_q in (1, seq_k)):
        return None
    return causal, window


def _mask(q: Tensor, k: Tensor, causal: bool, window: int | None, bias: Tensor | None) -> Tensor | None:
    """What is added to the logits, 4-dimensional and in q's dtype; None where `is_causal` says it all."""
    seq_q, seq_k = q.shape[1], k.shape[1]
    needed = _shape_of_mask(seq_q, seq_k, causal, window)
    if bias is not None and causal:
        needed = causal, window
    mask = None
    if needed is not None:
        hidden = ~reference.visible(seq_q, seq_k, *needed, q.device)
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype) + mask
        mask = mask.expand(*mask.shape[:-2], seq_q, seq_k)
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (batch, seq, heads, head_dim) and lse (batch, heads, seq) of one batch."""
    if bias is None and cpu_native.serves(q, k):
        out, lse = cpu_native.forward(q, k, v, causal, window, scale)
    else:
        mask = _mask(q, k, causal, window, bias)
        square = causal and mask is None and q.shape[1] > 1
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = _flash(*heads_first, 0.0, square, attn_mask=mask, scale=scale)
        out = out.transpose(1, 2)
        if mask is not None:
            lse = lse.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
    return (out, lse) if sinks is None else _with_sinks(out, lse, sinks)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (batch, seq, heads, head_dim) and lse (batch, heads, seq), with a sink of each head among the weights."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = torch.exp(lse - total).masked_fill(lse == -torch.inf, 0.0)
    return out * share.transpose(1, 2)[..., None].to(out.dtype), total


def _spans(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> cpu_native.Spans:
    pairs = per_sequence(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return [(rows.start, rows.stop, keys.start, keys.stop) for rows, keys in pairs]


def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if bias is None and cpu_native.serves(q, k):
        return cpu_native.backward(grad_out, grad_lse, q, k, v, out, lse, causal, window, scale)
    mask = _mask(q, k, causal, window, bias)
    square = causal and mask is None and q.shape[1] > 1
    if mask is not None:  # the aten op marks a row without a key by lse 0
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grad_out, out = grad_out.transpose(1, 2), out.transpose(1, 2)
    grads = _flash_backward(grad_out, q, k, v, out, lse, 0.0, square, attn_mask=mask, scale=scale)
    if grad_lse is not None:
        # d lse = weights · d logits: with keys as the values, out and the gradient of v are what q and k still lack.
        weight = (grad_lse * scale)[..., None].to(q.dtype)
        average, its_lse = _flash(q, k, k, 0.0, square, attn_mask=mask, scale=scale)
        share = torch.exp(its_lse - lse)[..., None].to(q.dtype)
        _, _, missing_k = _flash_backward(
            weight * q, q, k, k, average * share, lse, 0.0, square, attn_mask=mask, scale=scale
        )
        grads = grads[0] + weight * share * average, grads[1] + missing_k, grads[2]
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


def serves_directly(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    return_lse: bool,
    dropout: float,
) -> bool:
    """Whether torch's scaled_dot_product_attention is this very call: eager, on CPU, nothing beyond causal."""
    return (
        q.device.type == "cpu"
        and not return_lse
        and not dropout
        and softcap is None
        and sinks is None
        and bias is None
        and cu_seqlens_q is None
        and q.dtype in _DTYPES
        and q.numel() > 0
        and k.numel() > 0
        and _shape_of_mask(q.shape[1], k.shape[1], causal, window) is None
        and not torch.is_autocast_enabled("cpu")
        and not cpu_native.serves(q, k)
    )


def direct(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal and q.shape[1] > 1,
        scale=scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def _rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: int | None,
    softcap: None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = _attend(q, k, v, causal, window, bias, sinks, scale)
        return out.contiguous(), lse.contiguous()
    if cpu_native.serves_packed(q, k):
        spans = _spans(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = cpu_native.forward(q[None], k[None], v[None], causal, window, scale, spans)
        if sinks is not None:
            out, lse = _with_sinks(out, lse, sinks)
            first, last = (spans[0][0], spans[-1][1]) if spans else (0, 0)
            lse[..., :first] = lse[..., last:] = -torch.inf  # tokens of no sequence
        return out[0], lse[0]
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys in per_sequence(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        its_q, its_k, its_v = q[None, rows], k[None, keys], v[None, keys]
        if its_q.shape[1] == 0:
            continue
        if its_k.shape[1] == 0:
            if sinks is not None:
                lse[:, rows] = sinks.to(lse.dtype)[:, None]
            continue
        its_out, its_lse = _attend(its_q, its_k, its_v, causal, window, None, sinks, scale)
        out[rows], lse[:, rows] = its_out[0], its_lse[0]
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: int | None,
    softcap: None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if bias_grad:  # as large as the logits, so nothing is saved by not materialising them
        return reference.backward(
            grad_out, grad_lse, q, k, v, out, lse, bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            causal, window, softcap, scale, dropout, seed, bias_grad,
        )  # fmt: skip
    none = q.new_empty(0)
    grad_sinks = none
    if sinks is not None:
        grad_sinks = reference.sinks_gradient(reference.row_delta(grad_out, grad_lse, out), lse, sinks).to(sinks.dtype)
    q, k, v, grad_out = (_rows_contiguous(t) for t in (q, k, v, grad_out))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        grads = _attend_backward(grad_out, grad_lse, q, k, v, out, lse, causal, window, bias, scale)
        return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous(), none, grad_sinks
    if cpu_native.serves_packed(q, k):
        spans = _spans(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        grads = cpu_native.backward(
            grad_out[None], None if grad_lse is None else grad_lse[None], q[None], k[None], v[None], out[None],
            lse[None], causal, window, scale, spans,
        )  # fmt: skip
        return grads[0][0], grads[1][0], grads[2][0], none, grad_sinks
    grad_q, grad_k, grad_v = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
    for rows, keys in per_sequence(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        its_q, its_k, its_v = q[None, rows], k[None, keys], v[None, keys]
        if 0 in (its_q.shape[1], its_k.shape[1]):
            continue
        its_q_grad, its_k_grad, its_v_grad = _attend_backward(
            grad_out[None, rows], None if grad_lse is None else grad_lse[None, :, rows], its_q, its_k, its_v,
            out[None, rows], lse[None, :, rows], causal, window, None, scale,
        )  # fmt: skip
        grad_q[rows], grad_k[keys], grad_v[keys] = its_q_grad[0], its_k_grad[0], its_v_grad[0]
    return grad_q, grad_k, grad_v, none, grad_sinks
