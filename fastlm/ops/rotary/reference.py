"""The definition, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, positions: Tensor | None
) -> str | None:
    return None


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable by autograd. Computes in fp32, or fp64 for fp64 input."""
    seq = q.shape[-3]
    rows = slice(seq) if positions is None else positions.long()
    cos_at, sin_at = cos[rows][..., None, :], sin[rows][..., None, :]  # (..., seq, 1, rotary_dim // 2)
    return _rotate_one(q, cos_at, sin_at, interleaved), _rotate_one(k, cos_at, sin_at, interleaved)


def _rotate_one(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    rotated, passed = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    cos, sin = cos.to(wide), sin.to(wide)
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((joined.to(x.dtype), passed), -1)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    rotated = rotary(q, k, cos, -sin if inverse else sin, interleaved=interleaved, positions=positions)
    return rotated[0].contiguous(), rotated[1].contiguous()
