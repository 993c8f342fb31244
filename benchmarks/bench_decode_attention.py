"""Decode attention over a paged cache beside SDPA over a contiguous one (which spares it the gathering of blocks).

On a GPU also beside FlexAttention, flash-attn (contiguous as well) and FlashInfer (paged), where they are installed,
and beside our own CUDA core; a prefix that sequences share, beside the same call without the promise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from fastlm.benchmarks.harness import Bound, Case, leave_out, optional
from torch import Tensor

from fastlm.ops import OPS, decode_attention, explain

BLOCK_SIZE = 16  # tokens


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    query_len: int = 1
    cache: torch.dtype | None = None  # q's, or int8 with a scale a token and head
    shared: int = 0  # tokens at the start that all sequences have in the same blocks


# Llama 3 8B alone and in a batch, Gemma 3 270M, a model without grouping
SHAPES = [
    Shape(1, 32, 8, 128, 16384),
    Shape(8, 32, 8, 128, 2048),
    Shape(8, 4, 1, 256, 2048),
    Shape(1, 32, 32, 128, 4096),
]
GPU_SHAPES = [
    Shape(1, 32, 8, 128, 1024),
    Shape(64, 32, 8, 128, 8192),
    Shape(1, 32, 8, 128, 131072),
    Shape(8, 32, 8, 128, 2048, query_len=4),
    Shape(64, 32, 8, 128, 8192, cache=torch.int8),
    Shape(1, 32, 8, 128, 256),
    Shape(8, 32, 8, 128, 512),
    Shape(64, 32, 8, 128, 4096, shared=3584),
    Shape(64, 32, 32, 128, 2048, shared=1792),
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor  # (blocks, block_size, kv_heads, head_dim)
    v: Tensor
    table: Tensor
    lengths: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    dense_k: Tensor  # (batch, tokens, kv_heads, head_dim), in q's dtype
    dense_v: Tensor
    num_shared_tokens: Tensor | None


def make(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    blocks = shape.batch * shape.tokens // BLOCK_SIZE
    q = torch.randn(shape.batch, shape.query_len, shape.heads, shape.head_dim, device=device).to(dtype)
    size = (blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    table = torch.randperm(blocks, device=device).to(torch.int32).view(shape.batch, -1)
    table[:, : shape.shared // BLOCK_SIZE] = table[0, : shape.shared // BLOCK_SIZE]
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device)
    k_scale = v_scale = None
    if shape.cache == torch.int8:
        k, v = (torch.randint(-127, 128, size, device=device, dtype=torch.int8) for _ in range(2))
        k_scale, v_scale = (torch.rand(size[:3], device=device) / 60 for _ in range(2))
        wide_k, wide_v = ((t * scale[..., None]).to(dtype) for t, scale in ((k, k_scale), (v, v_scale)))
    else:
        k, v = (torch.randn(size, device=device).to(dtype) for _ in range(2))
        wide_k, wide_v = k, v
    dense_k, dense_v = (t[table.long()].flatten(1, 2) for t in (wide_k, wide_v))
    shared = torch.tensor(shape.shared, dtype=torch.int32, device=device) if shape.shared else None
    return Inputs(q, k, v, table, lengths, k_scale, v_scale, dense_k, dense_v, shared)


def ours(x: Inputs) -> Tensor:
    return decode_attention(
        x.q, x.k, x.v, x.table, x.lengths, k_scale=x.k_scale, v_scale=x.v_scale, num_shared_tokens=x.num_shared_tokens
    )


def cuda_core(x: Inputs) -> Callable[[], Tensor]:
    """The backend itself, which the environment alone would choose."""
    reason = explain("decode_attention", x.q, x.k, x.v, x.table, x.lengths).reasons["cuda"]
    if not reason.startswith("could"):
        raise NotImplementedError(reason)
    function = OPS["decode_attention"].module("cuda").decode_attention
    return partial(
        function, x.q, x.k, x.v, x.table, x.lengths, x.q.shape[-1] ** -0.5, None, None, None, x.k_scale, x.v_scale
    )


def causal_mask(x: Inputs) -> Tensor | None:
    """None for one query, which sees everything."""
    query_len, tokens = x.q.shape[1], x.dense_k.shape[1]
    if query_len == 1:
        return None
    return torch.ones(query_len, tokens, dtype=torch.bool, device=x.q.device).tril(tokens - query_len)


def sdpa(x: Inputs) -> Callable[[], Tensor]:
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.dense_k, x.dense_v))
    call = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, attn_mask=causal_mask(x), enable_gqa=True)
    return lambda: call().transpose(1, 2)


def flex(x: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (t.transpose(1, 2) for t in (x.q, x.dense_k, x.dense_v))
    query_len, tokens = x.q.shape[1], x.dense_k.shape[1]
    mask = None
    if query_len > 1:
        shift = tokens - query_len
        mask = create_block_mask(
            lambda b, h, i, j: i + shift >= j, None, None, query_len, tokens, device=x.q.device.type
        )
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def flash_attn(x: Inputs) -> Callable[[], Tensor]:
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache
    return partial(function, x.q, x.dense_k, x.dense_v, cache_seqlens=x.lengths, causal=True)


def flashinfer(x: Inputs) -> Callable[[], Tensor]:
    library = importlib.import_module("flashinfer")
    (batch, query_len, heads, head_dim), kv_heads = x.q.shape, x.k.shape[2]
    if query_len > 1 or x.k_scale is not None:
        raise NotImplementedError("this benchmark has it for one query and unscaled caches alone")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**27, dtype=torch.uint8, device=x.q.device), "NHD"
    )
    pages = torch.arange(batch + 1, dtype=torch.int32, device=x.q.device) * x.table.shape[1]
    last = torch.full((batch,), BLOCK_SIZE, dtype=torch.int32, device=x.q.device)
    wrapper.plan(
        pages, x.table.flatten(), last, heads, kv_heads, head_dim, BLOCK_SIZE, q_data_type=x.q.dtype,
        kv_data_type=x.k.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(x.q[:, 0], (x.k, x.v))[:, None]


def peers(x: Inputs, name: str) -> dict[str, Callable[[], Tensor]]:
    """Those that are installed and take the case; why others do not is told."""
    found = {"SDPA": sdpa(x)}
    if x.q.is_cuda:
        candidates: dict[str, Callable[[Inputs], Callable[[], Tensor]]] = {
            "FlexAttention": flex,
            "CUDA core": cuda_core,
        }
        if x.num_shared_tokens is not None:
            candidates["not shared"] = lambda x: partial(ours, x._replace(num_shared_tokens=None))
        candidates |= {p: f for p, f in (("flash_attn", flash_attn), ("flashinfer", flashinfer)) if optional(p)}
        for peer, function in candidates.items():
            try:
                call = function(x)
                call()
            except Exception as error:
                leave_out(f"{peer}, {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            else:
                found[peer] = call
    return found


def check(a: Tensor, b: Tensor) -> None:
    tolerance = 1e-5 if a.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def cases(device: str) -> Iterable[Case]:
    gpu = device.startswith("cuda")
    for shape in [*SHAPES, *GPU_SHAPES] if gpu else SHAPES:
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            x = make(shape, dtype, device)
            name = f"{shape.batch} × {shape.tokens} tokens, heads {shape.heads}/{shape.kv_heads} of {shape.head_dim}"
            name += f", {shape.query_len} queries" if shape.query_len > 1 else ""
            name += f", {str(shape.cache or dtype).removeprefix('torch.')}"
            name += f", first {shape.shared} shared" if shape.shared else ""
            read = 2 * x.k.numel() * x.k.element_size() + (0 if x.k_scale is None else 8 * x.k_scale.numel())
            read -= read * (shape.batch - 1) * shape.shared // (shape.batch * shape.tokens)
            yield Case(
                name=name,
                ours=partial(ours, x),
                peers=peers(x, name),
                check=check,
                bound=Bound(bytes=read),
                work=read,
                unit="bytes",
            )
