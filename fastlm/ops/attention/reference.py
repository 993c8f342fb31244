"""The definition, in plain torch: every logit is materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.attention._arguments import per_sequence
from fastlm.ops.sampling.reference import WORD, philox


def supports(q: Tensor, k: Tensor, v: Tensor, **options: object) -> str | None:
    return None


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
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    first_plane: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of a batch that is not packed; differentiable by autograd, -inf in `bias` included.

    Computes in fp32, or in fp64 for fp64 input.
    """
    logits, _ = _logits(q, k, causal, window, softcap, bias, scale)
    batch, heads, seq_q, _ = logits.shape
    # The sink is one more key, whose value is zero; without sinks its logit is -inf.
    sink = logits.new_full((heads,), -torch.inf) if sinks is None else sinks.to(logits.dtype)
    logits = torch.cat([logits, sink.view(1, heads, 1, 1).expand(batch, heads, seq_q, 1)], -1)
    highest = logits.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(logits - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    shares = _dropped(weights[..., :-1] / total, dropout, seed, first_plane)
    out = shares @ _for_each_head(v, heads).to(logits.dtype)
    lse = (highest + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)
    return out.transpose(1, 2).to(q.dtype), lse


def dropout_threshold(dropout: float) -> int:
    """31 bits: a random number of as many is kept when it is not below."""
    return min(round(dropout * 2**31), 2**31 - 1)


def kept(shape: tuple[int, ...], dropout: float, seed: Tensor, first_plane: int = 0) -> Tensor:
    """Which weights dropout keeps: `shape` (batch, heads, seq_q, seq_k), of bool.

    The upper 31 bits of word j mod 4 of Philox4x32-10 with key `seed` (int64) and counter (j // 4, i, plane, 0) are
    below the threshold for what is dropped; i and j count within a sequence, planes are batch · heads + head.
    """
    batch, heads, seq_q, seq_k = shape
    planes = torch.arange(first_plane, first_plane + batch * heads, device=seed.device)[:, None, None]
    rows = torch.arange(seq_q, device=seed.device)[:, None]
    quads = torch.arange((seq_k + 3) // 4, device=seed.device)
    full = (batch * heads, seq_q, len(quads))
    counter = [t.expand(full) for t in (quads, rows, planes, torch.zeros_like(quads))]
    words = torch.stack(philox(counter, [seed & WORD, (seed >> 32) & WORD]), -1).flatten(-2)[..., :seq_k]
    return ((words & WORD) >> 1 >= dropout_threshold(dropout)).view(shape)


def _dropped(weights: Tensor, dropout: float, seed: Tensor | None, first_plane: int) -> Tensor:
    """Weights, or their gradients, `(batch, heads, seq_q, seq_k)`, after dropout."""
    if dropout == 0 or seed is None:
        return weights
    return torch.where(kept(tuple(weights.shape), dropout, seed, first_plane), weights / (1 - dropout), 0.0)


def _for_each_head(t: Tensor, heads: int) -> Tensor:
    """(batch, seq, kv_heads, head_dim) -> (batch, heads, seq, head_dim): query head h reads KV head h // group."""
    return t.repeat_interleave(heads // t.shape[2], dim=2).transpose(1, 2)


def visible(seq_q: int, seq_k: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(seq_q, seq_k) of bool: which keys each query may see."""
    query = torch.arange(seq_q, device=device)[:, None] + (seq_k - seq_q)
    key = torch.arange(seq_k, device=device)[None, :]
    seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= key > query - window
    return seen


def _logits(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Masked logits (batch, heads, seq_q, seq_k) and, with `softcap`, the tanh inside them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[2]
    logits = (q.to(wide).transpose(1, 2) @ _for_each_head(k, heads).to(wide).mT) * scale
    squashed = None
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        logits = softcap * squashed
    if bias is not None:
        logits = logits + bias.to(wide)
    if causal or window is not None:
        logits = logits.masked_fill(~visible(q.shape[1], k.shape[1], causal, window, q.device), -torch.inf)
    return logits, squashed


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
    softcap: float | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    options = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks, "scale": scale}
    options |= {"dropout": dropout, "seed": seed}
    if cu_seqlens_q is None or cu_seqlens_k is None:
        out, lse = attention(q, k, v, bias=bias, **options)  # type: ignore[arg-type]
        return out.contiguous(), lse.contiguous()
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(
        (q.shape[1], q.shape[0]),
        -torch.inf,
        dtype=torch.promote_types(q.dtype, torch.float32),
        device=q.device,
    )
    sequences = per_sequence(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    for i, (rows, keys) in enumerate(sequences):
        plane = i * q.shape[1]
        its_out, its_lse = attention(q[None, rows], k[None, keys], v[None, keys], first_plane=plane, **options)  # type: ignore[arg-type]
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
    softcap: float | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks, "scale": scale}
    options |= {"dropout": dropout, "seed": seed}
    if cu_seqlens_q is None or cu_seqlens_k is None:
        grads = _dense_backward(grad_out, grad_lse, q, k, v, out, lse, bias, bias_grad=bias_grad, **options)  # type: ignore[arg-type]
        grad_q, grad_k, grad_v, grad_bias, grad_sinks = grads
    else:
        grad_q, grad_k, grad_v = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        grad_bias = q.new_empty(0)
        grad_sinks = q.new_empty(0) if sinks is None else lse.new_zeros(q.shape[1])
        sequences = per_sequence(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        for i, (rows, keys) in enumerate(sequences):
            its_q, its_k, its_v, _, its_sinks = _dense_backward(
                grad_out[None, rows], None if grad_lse is None else grad_lse[None, :, rows],
                q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows],
                None, bias_grad=False, first_plane=i * q.shape[1], **options,  # type: ignore[arg-type]
            )  # fmt: skip
            grad_q[rows], grad_k[keys], grad_v[keys] = its_q[0], its_k[0], its_v[0]
            grad_sinks = grad_sinks + its_sinks
    if sinks is not None:
        grad_sinks = grad_sinks.to(sinks.dtype)
    return grad_q, grad_k, grad_v, grad_bias, grad_sinks


def _dense_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    bias_grad: bool,
    first_plane: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, kv_heads = q.shape[2], k.shape[2]
    logits, squashed = _logits(q, k, causal, window, softcap, bias, scale)
    wide = logits.dtype
    grad = grad_out.to(wide).transpose(1, 2)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]  # a row with no key has no weight to compute
    weights = torch.exp(logits - shift)
    delta = row_delta(grad_out, grad_lse, out)[..., None]
    grad_weights = _dropped(grad @ _for_each_head(v, heads).to(wide).mT, dropout, seed, first_plane)
    grad_logits = weights * (grad_weights - delta)
    grad_bias = grad_logits.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and bias_grad else q.new_empty(0)
    if squashed is not None:
        grad_logits = grad_logits * (1 - squashed.square())
    grad_q = (grad_logits @ _for_each_head(k, heads).to(wide)) * scale
    grad_k = (grad_logits.mT @ q.to(wide).transpose(1, 2)) * scale
    grad_v = _dropped(weights, dropout, seed, first_plane).mT @ grad
    return (
        grad_q.transpose(1, 2).to(q.dtype).contiguous(),
        _sum_groups(grad_k, kv_heads).to(k.dtype),
        _sum_groups(grad_v, kv_heads).to(v.dtype),
        grad_bias,
        q.new_empty(0) if sinks is None else sinks_gradient(delta.squeeze(-1), lse, sinks),
    )


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, seq, head_dim) -> (batch, seq, kv_heads, head_dim)."""
    return grad.unflatten(1, (kv_heads, grad.shape[1] // kv_heads)).sum(2).transpose(1, 2).contiguous()


def row_delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    """(batch, heads, seq): what every logit's gradient in a row has subtracted before it is weighted."""
    wide = torch.promote_types(out.dtype, torch.float32)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1).transpose(-1, -2)
    return delta if grad_lse is None else delta - grad_lse


def sinks_gradient(delta: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(heads,) in delta's dtype. `delta` and `lse` are (batch, heads, seq), or (heads, tokens) when packed.

    Tokens outside every sequence have lse -inf and delta zero; they weigh nothing.
    """
    weight = torch.exp(sinks.to(delta.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    grad = -(weight * delta).sum(-1)
    return grad if grad.dim() == 1 else grad.sum(0)
