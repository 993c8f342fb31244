"""The launches of attention's backward on Hopper. delta, the row sums of out · grad, is Triton's kernel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastlm.ops.attention.gluon import Launch, Tiles, describe, readable_by_tma
from fastlm.ops.attention.gluon_backward_kernels import keys_kernel, queries_kernel
from fastlm.ops.attention.gluon_kernels import CONSUMERS, ROWS
from fastlm.ops.attention.triton_backward import row_deltas

# By head_dim: queries a tile of the kernel of dK and dV, and keys a tile of that of dQ. With head_dim 256 a consumer's
# 240 registers cannot hold dK and dV, so that Triton's kernels serve it.
KEYS_TILES = {64: Tiles(64, 4), 128: Tiles(64, 3)}
QUERIES_TILES = {64: Tiles(128, 3), 128: Tiles(128, 2)}
LAYOUT_OF_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


class Call(NamedTuple):
    """What both kernels take."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    lse: Tensor  # (batch, heads, seq_q), contiguous, as delta
    delta: Tensor
    causal: bool
    scale: float


def describe_rows(t: Tensor, rows: int) -> TensorDescriptor:
    """TMA's view of lse or delta in a row, in blocks of `rows`. Every head starts on 16 bytes, as TMA needs."""
    if t.shape[-1] % 4:
        t = torch.nn.functional.pad(t, (0, -t.shape[-1] % 4))
    return TensorDescriptor(t, [t.numel()], [1], [rows], LAYOUT_OF_ROWS)


def plan_keys(call: Call, grad_k: Tensor, grad_v: Tensor, tiles: Tiles) -> Launch:
    batch, seq_q, heads, head_dim = call.q.shape
    seq_k, kv_heads = call.k.shape[1:3]
    rows = ROWS.value
    return Launch(
        grid=(batch * kv_heads, -(-seq_k // (rows * CONSUMERS.value))),
        args=(
            describe(call.q, tiles.block), describe(call.grad_out, tiles.block),
            describe(call.k, rows), describe(call.v, rows),
            describe_rows(call.lse, tiles.block), describe_rows(call.delta, tiles.block),
            describe(grad_k, rows), describe(grad_v, rows),
            kv_heads, heads // kv_heads, seq_q, seq_k, call.scale / math.log(2), call.scale,
        ),
        constants={"CAUSAL": call.causal, "HEAD_DIM": head_dim, "BLOCK_M": tiles.block, "STAGES": tiles.stages},
    )  # fmt: skip


def plan_queries(call: Call, grad_q: Tensor, tiles: Tiles) -> Launch:
    batch, seq_q, heads, head_dim = call.q.shape
    seq_k, kv_heads = call.k.shape[1:3]
    rows = ROWS.value
    return Launch(
        grid=(batch * heads, -(-seq_q // (rows * CONSUMERS.value))),
        args=(
            describe(call.q, rows), describe(call.grad_out, rows),
            describe(call.k, tiles.block), describe(call.v, tiles.block), describe(grad_q, rows),
            call.lse, call.delta, heads, heads // kv_heads, seq_q, seq_k, call.scale / math.log(2), call.scale,
        ),
        constants={"CAUSAL": call.causal, "HEAD_DIM": head_dim, "BLOCK_N": tiles.block, "STAGES": tiles.stages},
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_q, grad_k, grad_v) of a call that `gluon.supports` takes, with head_dim 64 or 128."""
    grad_out = readable_by_tma(grad_out)
    lse = lse.contiguous()
    delta = row_deltas(out, grad_out, grad_lse, lse, packed=False)
    call = Call(q, k, v, grad_out, lse, delta, causal, scale)
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    kernels: tuple[tuple[Any, Launch], ...] = (
        (keys_kernel, plan_keys(call, grad_k, grad_v, KEYS_TILES[q.shape[-1]])),
        (queries_kernel, plan_queries(call, grad_q, QUERIES_TILES[q.shape[-1]])),
    )
    for kernel, launch in kernels:
        kernel[launch.grid](*launch.args, **launch.constants, num_warps=4)
    return grad_q, grad_k, grad_v
