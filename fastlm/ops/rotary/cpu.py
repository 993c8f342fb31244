"""On the CPU: `csrc/cpu/rotary.cpp`, which reads each head once and writes it once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm._core import native, native_missing

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, positions: Tensor | None
) -> str | None:
    if q.dtype not in DTYPES:
        return f"supports fp32 and bf16, not {q.dtype}"
    if cos.dtype != torch.float32:
        return f"supports fp32 tables, not {cos.dtype}"
    return native_missing()


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.contiguous(), sin.contiguous()
    strides = (0, 0)
    if positions is not None:
        positions = positions.long()
        strides = (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
    rotated = []
    for x in (q, k):
        y = torch.empty(x.shape, dtype=x.dtype)
        rotated.append(y)
        x = x if x.stride(-1) == 1 else x.contiguous()
        x = x if x.dim() == 4 else x[None]
        native().rotary(
            DTYPES[x.dtype],
            x.data_ptr(),
            y.data_ptr(),
            x.shape,
            x.stride()[:3],
            cos.data_ptr(),
            sin.data_ptr(),
            *cos.shape,
            0 if positions is None else positions.data_ptr(),
            strides,
            interleaved,
            inverse,
            torch.get_num_threads(),
        )
    return rotated[0], rotated[1]
