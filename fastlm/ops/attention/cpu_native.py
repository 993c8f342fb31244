"""Attention over whole sequences by `csrc/cpu/attention.cpp`, for processors with AVX-512.

It computes in fp32 whatever the dtype, and needs no mask for windows or alignments. torch's own kernel makes its
products by MKL, which on AMD's processors does without AVX-512, and in bf16 without AMX by way of many small
conversions. Where AMX is there, bf16 is left to torch.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastlm._core import native, native_missing

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
Spans = list[tuple[int, int, int, int]]  # first query, end, first key, end

MIN_LOGITS = 64 * 64  # a head; below, the call itself takes the time. A batch has no say: rows keep their bits in any
MAX_HEAD_DIM = 256


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether this kernel is the one for q and k, `(batch, seq, heads, head_dim)`, when nothing is added to logits."""
    return (
        q.dtype in DTYPES
        and q.device.type == "cpu"
        and q.shape[1] * k.shape[1] >= MIN_LOGITS
        and q.shape[3] <= MAX_HEAD_DIM
        and q.shape[0] * q.shape[2] > 0
        and _is_fast(q.dtype)
    )


def serves_packed(q: Tensor, k: Tensor) -> bool:
    """The same for packed sequences, `(tokens, heads, head_dim)`, whatever their lengths: one call serves them all."""
    return (
        q.dtype in DTYPES
        and q.device.type == "cpu"
        and q.shape[2] <= MAX_HEAD_DIM
        and 0 not in (q.shape[0], k.shape[0], q.shape[1])
        and _is_fast(q.dtype)
    )


@cache
def _is_fast(dtype: torch.dtype) -> bool:
    if native_missing() or not native().cpu_features()["avx512"]:
        return False
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


def _shape(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]


def _parts(t: Tensor) -> tuple[int, tuple[int, ...]]:
    return t.data_ptr(), t.stride()[:3]


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, spans: Spans | None = None
) -> tuple[Tensor, Tensor]:
    """out like q, contiguous, and lse (batch, heads, seq_q). The last dimension of each input is contiguous.

    `spans`: of each of the sequences that are packed in a batch of one. Elsewhere out is 0 and lse -inf.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    if spans is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    options = (causal, window or 0, scale)
    tensors = (*_parts(q), *_parts(k), *_parts(v), *_parts(out))
    native().attention_forward(
        DTYPES[q.dtype], _shape(q, k), *options, *tensors, lse.data_ptr(), torch.get_num_threads(), spans
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    spans: Spans | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q, k and v, contiguous. The last dimension of each input is contiguous. `spans` as in `forward`."""
    new = torch.empty if spans is None else torch.zeros
    grad_q, grad_k, grad_v = (new(t.shape, dtype=t.dtype) for t in (q, k, v))
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    native().attention_backward(
        DTYPES[q.dtype],
        _shape(q, k),
        *(causal, window or 0, scale),
        *(*_parts(q), *_parts(k), *_parts(v), *_parts(out), *_parts(grad_out)),
        lse.data_ptr(),
        0 if grad_lse is None else grad_lse.data_ptr(),
        *(*_parts(grad_q), *_parts(grad_k), *_parts(grad_v)),
        torch.get_num_threads(),
        spans,
    )
    return grad_q, grad_k, grad_v
