"""On the CPU: chunks of rows, their products by torch, and `csrc/cpu/sampling.cpp` for the draw."""

from __future__ import annotations

from torch import Tensor

from fastlm._core import native_missing
from fastlm.ops.fused_linear_sample.chunked import fused_linear_sample

__all__ = ["fused_linear_sample", "supports"]


def supports(hidden: Tensor, weight: Tensor, **settings: object) -> str | None:
    if weight.shape[0] >= 2**31:
        return f"supports vocabularies under 2^31, not {weight.shape[0]}"
    return native_missing()
