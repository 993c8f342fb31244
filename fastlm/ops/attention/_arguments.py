"""Checks of attention's arguments, and the walk over packed sequences that the plain-torch backends share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout: float,
) -> None:
    """Raises ValueError, naming the argument, when shapes, dtypes or options do not fit one another."""
    packed = cu_seqlens_q is not None
    dims = 3 if packed else 4
    if q.dim() != dims or k.dim() != dims or v.dim() != dims:
        layout = "(tokens, heads, head_dim) with cu_seqlens" if packed else "(batch, seq, heads, head_dim)"
        raise ValueError(f"q, k and v must be {layout}, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or (not packed and q.shape[0] != k.shape[0]):
        raise ValueError(
            "k and v must have one shape, with q's batch and head_dim, "
            f"not {tuple(k.shape)} and {tuple(v.shape)} for q {tuple(q.shape)}"
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, not {heads} and {kv_heads}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1 and needs causal=True, not window={window}, causal={causal}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, not {softcap}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be ({heads},), one for each query head, not {tuple(sinks.shape)}")
    if bias is not None:
        if packed:
            raise ValueError("bias has no meaning for packed sequences; leave one of bias and cu_seqlens_q out")
        full = (q.shape[0], heads, q.shape[1], k.shape[1])
        if bias.dim() > 4 or any(b not in (1, f) for b, f in zip(bias.shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"bias must broadcast to (batch, heads, seq_q, seq_k) = {full}, not {tuple(bias.shape)}")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens is None:
            continue
        if not packed:
            raise ValueError("cu_seqlens_k needs cu_seqlens_q")
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device:
            raise ValueError(
                f"{name} must be (sequences + 1,) of int32 on {q.device}, "
                f"not {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype} on {cu_seqlens.device}"
            )
        if cu_seqlens.shape[0] == 0 or (cu_seqlens_q is not None and cu_seqlens.shape != cu_seqlens_q.shape):
            raise ValueError(f"{name} must hold sequences + 1 offsets, as many as cu_seqlens_q")


def per_sequence(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Iterator[tuple[slice, slice]]:
    """(rows of q, rows of k) of each sequence.

    Raises ValueError when the offsets fall, leave the tensor, or hold a sequence longer than promised.
    """
    offsets_q = _offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    offsets_k = _offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    for i in range(len(offsets_q) - 1):
        yield slice(offsets_q[i], offsets_q[i + 1]), slice(offsets_k[i], offsets_k[i + 1])


def _offsets(name: str, cu_seqlens: Tensor, tokens: int, longest: int | None) -> list[int]:
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] < 0 or offsets[-1] > tokens or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"{name} must not fall and must stay within the {tokens} tokens, not {_short(offsets)}")
    if longest is not None and any(b - a > longest for a, b in pairwise(offsets)):
        raise ValueError(f"{name} holds a sequence longer than the maximum given, {longest}: {_short(offsets)}")
    return offsets


def _short(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) <= 8 else f"[{', '.join(map(str, offsets[:8]))}, …]"
