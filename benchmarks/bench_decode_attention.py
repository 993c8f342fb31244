"""Decode attention over a paged cache beside SDPA over a contiguous one (which spares it the gathering of blocks)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor

from fastlm.ops import decode_attention

BLOCK_SIZE = 16  # tokens


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """q `(batch, 1, heads, head_dim)`; k and v `(batch, tokens, kv_heads, head_dim)`."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def check(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 1e-5 if ours.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# batch, heads, kv_heads, head_dim, tokens: Llama 3 8B alone and in a batch, Gemma 3 270M, a model without grouping
SHAPES = [(1, 32, 8, 128, 16384), (8, 32, 8, 128, 2048), (8, 4, 1, 256, 2048), (1, 32, 32, 128, 4096)]


def cases(device: str) -> Iterable[Case]:
    for batch, heads, kv_heads, head_dim, tokens in SHAPES:
        for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,):
            blocks = batch * tokens // BLOCK_SIZE
            q = torch.randn(batch, 1, heads, head_dim, device=device).to(dtype)
            k, v = (torch.randn(blocks, BLOCK_SIZE, kv_heads, head_dim, device=device).to(dtype) for _ in range(2))
            table = torch.randperm(blocks, device=device).to(torch.int32).view(batch, -1)
            lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
            dense_k, dense_v = (t[table.long()].flatten(1, 2) for t in (k, v))
            yield Case(
                name=f"{batch} × {tokens} tokens, heads {heads}/{kv_heads} of {head_dim}, "
                + str(dtype).removeprefix("torch."),
                ours=lambda a=(q, k, v, table, lengths): decode_attention(*a),
                peers={"SDPA": sdpa(q, dense_k, dense_v)},
                check=check,
                bound=Bound(bytes=2 * k.numel() * k.element_size()),
                work=2 * k.numel() * k.element_size(),
                unit="bytes",
            )
