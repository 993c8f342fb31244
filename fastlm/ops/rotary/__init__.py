"""Rotary position embedding of queries and keys in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.ops._library import define_op
from fastlm.ops._registry import Op


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates pair i of each query and key head by the angle that `cos` and `sin` hold for (position, i).

    Args:
        q: `(batch, seq, heads, head_dim)`, or packed `(tokens, heads, head_dim)`; fp32, bf16 or fp16, any strides.
        k: like `q`, with its own number of heads.
        cos, sin: `(max_positions, rotary_dim // 2)`, fp32, see `rotary_tables`. `rotary_dim` may be less than
            `head_dim`: the rest of each head passes unchanged. The tables get no gradient.
        interleaved: pairs are (x[2i], x[2i + 1]) as in GPT-J; otherwise (x[i], x[i + rotary_dim // 2]) as in GPT-NeoX
            and Llama.
        positions: int64 or int32, `(seq,)` or `(batch, seq)`, `(tokens,)` when packed; None counts from 0 along the
            sequence.

    Returns:
        The rotated q and k, new and contiguous, in their dtypes. Arithmetic is fp32. Differentiable in q and k, to any
        order: the backward is the rotation by the negative angle.

    Raises:
        ValueError: when shapes or dtypes do not fit, or, on the CPU, when a position lies outside the tables. A GPU
            does not wait to look: there the head of such a position is NaN.

    Su et al., "RoFormer", arXiv 2104.09864, equation 34.
    """
    if q.dim() not in (3, 4) or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1] or k.dtype != q.dtype:
        raise ValueError(
            "q and k must be (batch, seq, heads, head_dim) or (tokens, heads, head_dim), alike but for heads, "
            f"not {tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype != sin.dtype or not cos.is_floating_point():
        raise ValueError(
            f"cos and sin must be alike, (max_positions, rotary_dim // 2), not {tuple(cos.shape)} {cos.dtype} "
            f"and {tuple(sin.shape)} {sin.dtype}"
        )
    if 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(f"tables rotate {2 * cos.shape[1]} dimensions, but head_dim is {q.shape[-1]}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient; detach them")
    seq = q.shape[-3]
    if positions is None:
        if seq > cos.shape[0]:
            raise ValueError(f"the tables hold {cos.shape[0]} positions, but q has {seq}")
    elif positions.shape not in ((seq,), q.shape[:-2]) or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"positions must be int64 or int32, ({seq},) or {tuple(q.shape[:-2])}, "
            f"not {positions.dtype} {tuple(positions.shape)}"
        )
    return _rotate(q, k, cos, sin, positions, interleaved, False)


def rotary_tables(
    rotary_dim: int,
    max_positions: int,
    base: float = 10000.0,
    *,
    frequencies: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tables (cos, sin) for `rotary`, each `(max_positions, rotary_dim // 2)`, fp32: of the angle
    position · base^(-2i / rotary_dim), taken in fp64 and rounded once.

    `frequencies`, `(rotary_dim // 2,)` radians a position, replaces the powers of `base` (for scaled variants).

    Raises:
        ValueError: when `rotary_dim` is odd or not positive, or `frequencies` does not fit it.

    Su et al., "RoFormer", arXiv 2104.09864, section 3.2.2.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and positive, not {rotary_dim}")
    if frequencies is None:
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
        frequencies = base**-exponents
    elif frequencies.shape != (rotary_dim // 2,):
        raise ValueError(f"frequencies must be ({rotary_dim // 2},), not {tuple(frequencies.shape)}")
    positions = torch.arange(max_positions, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies.to(positions)
    return angles.cos().float(), angles.sin().float()


OP = Op("rotary", rotary, ("triton", "cpu", "reference"))


def _run(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    if positions is not None and positions.device.type == "cpu" and positions.numel():
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions must lie in [0, {cos.shape[0]}), the tables' length; got {low} to {high}")
    backend = OP.select(q, k, cos, sin, interleaved=interleaved, positions=positions)
    return backend.rotate(q, k, cos, sin, positions, interleaved, inverse)


def _fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    rotated_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return rotated_q, torch.empty(k.shape, dtype=k.dtype, device=k.device)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.inverse = interleaved, inverse
        return _rotate(q, k, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
        cos, sin, positions = ctx.saved_tensors
        grads = _rotate(grad_q, grad_k, cos, sin, positions, ctx.interleaved, not ctx.inverse)
        return *grads, None, None, None, None, None


_rotate = define_op(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
    _Rotary,
)
