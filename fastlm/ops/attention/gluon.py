"""Attention on Hopper: which calls the Gluon kernels serve, and their launches.

The kernels compile for sm_90 and are tested in a simulator of their barriers and copies, but no GPU has run them yet.
So they serve a call only when FASTLM_BACKEND=gluon asks for them, or when `fastlm warmup --tune` has found them right
and the fastest on this GPU.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastlm.ops import tuning
from fastlm.ops.attention.gluon_kernels import CONSUMERS, ROWS, forward_kernel


class Tiles(NamedTuple):
    """Rows of what a consumer walks over, keys in the forward, and tiles of it in shared memory at once."""

    block: int
    stages: int


# By head_dim: as many as the 227 KiB of shared memory and the 240 registers of a consumer hold.
TILES = {64: Tiles(128, 4), 128: Tiles(128, 3), 256: Tiles(64, 2)}
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


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
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        if major != 9:
            return f"needs compute capability 9.0 (Hopper), not {major}.{minor}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"supports bf16 and fp16, not {q.dtype}"
    head_dim = q.shape[-1]
    if head_dim not in TILES:
        return f"supports head_dim 64, 128 and 256, not {head_dim}"
    options = (
        ("window", window), ("softcap", softcap), ("sinks", sinks), ("bias", bias), ("packed sequences", cu_seqlens_q),
    )  # fmt: skip
    for name, value in options:
        if value is not None:
            return f"has no {name}"
    if dropout:
        return "has no dropout"
    if scale is not None and scale <= 0:
        return f"needs a positive scale, which the running maximum relies on, not {scale}"
    if q.numel() == 0 or k.numel() == 0:
        return "needs at least one query and one key"
    if os.environ.get("FASTLM_BACKEND") != "gluon":
        chosen = tuning.backend(q.device, "forward", head_dim, causal)
        if chosen is None:
            return (
                "has not been checked on this GPU yet: `fastlm warmup --tune` runs it beside Triton's kernels and "
                "keeps the one that is right and faster"
            )
        if chosen != "gluon":
            return "was wrong, or slower than Triton's kernels, when `fastlm warmup --tune` ran it on this GPU"
    for name, t in (("q", q), ("k", k), ("v", v)):
        reason = unreadable_by_tma(t)
        if reason:
            return f"reads by TMA, which needs {reason}; {name} has strides {t.stride()}: call {name}.contiguous()"
    return None


def unreadable_by_tma(t: Tensor) -> str | None:
    """What keeps TMA from reading `t`, or None."""
    if t.stride(-1) != 1:
        return "a contiguous last dimension"
    if t.data_ptr() % 16:
        return "a start on 16 bytes"
    size = t.element_size()
    for length, stride in zip(t.shape, t.stride()[:-1], strict=False):
        if length > 1 and (stride <= 0 or stride * size % 16):
            return "strides of a multiple of 16 bytes, above 0"
    return None


def readable_by_tma(t: Tensor) -> Tensor:
    return t if unreadable_by_tma(t) is None else t.contiguous()


def describe(t: Tensor, rows: int) -> TensorDescriptor:
    """TMA's view of (batch, seq, heads, head_dim), in blocks of `rows` of one head."""
    head_dim = t.shape[-1]
    strides = [stride if size > 1 else head_dim for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, rows, 1, head_dim], LAYOUT)


class Launch(NamedTuple):
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, tiles: Tiles
) -> Launch:
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1:3]
    rows = ROWS.value
    return Launch(
        grid=(batch * heads, -(-seq_q // (rows * CONSUMERS.value))),
        args=(
            describe(q, rows), describe(k, tiles.block), describe(v, tiles.block), describe(out, rows), lse,
            heads, heads // kv_heads, seq_q, seq_k, scale / math.log(2),
        ),
        constants={"CAUSAL": causal, "HEAD_DIM": head_dim, "BLOCK_N": tiles.block, "STAGES": tiles.stages},
    )  # fmt: skip


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    launch = plan_forward(q, k, v, out, lse, causal, scale, TILES[q.shape[-1]])
    forward_kernel[launch.grid](*launch.args, **launch.constants, num_warps=4)
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
    """Gluon's where it is proven, or asked for, and head_dim is 64 or 128; else Triton's, which takes the same lse."""
    from fastlm.ops.attention import gluon_backward, triton_backward  # they build on this module and on triton.py

    head_dim = q.shape[-1]
    asked = os.environ.get("FASTLM_BACKEND") == "gluon"
    if head_dim in gluon_backward.KEYS_TILES and (
        asked or tuning.backend(q.device, "backward", head_dim, causal) == "gluon"
    ):
        grads = gluon_backward.backward(grad_out, grad_lse, q, k, v, out, lse, causal, scale)
        return *grads, q.new_empty(0), q.new_empty(0)
    return triton_backward.backward(
        grad_out, grad_lse, q, k, v, out, lse, bias, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, window, softcap, scale, dropout, seed, bias_grad,
    )  # fmt: skip
