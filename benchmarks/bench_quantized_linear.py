"""A linear layer over GGUF weights beside torch over the same weights as fp32 and bf16, and ggml's own product.

One row is decoding, where the bytes of the weights limit; 128 rows are reading a prompt. The first shape is the output
embedding of Gemma 3 270M, larger than any cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from fastlm.benchmarks.ggml_peer import matrix_product
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor

from fastlm.ops import dequantize, quantized_linear
from fastlm.ops.quantized_linear import FORMATS


def random_weight(quantization: str, rows: int, columns: int) -> Tensor:
    """Random bits with scales of about 0.01."""
    block = FORMATS[quantization]
    blocks = np.random.default_rng(0).integers(
        0, 256, (rows, columns // block.block_size, block.block_bytes), dtype=np.uint8
    )
    for at in {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}.get(quantization, (0,)):
        blocks[..., at : at + 2] = np.array([0.01], dtype=np.float16).view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def check(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs.float()).norm() / theirs.float().norm()
    assert error < 0.02, f"relative error {error:.3f}"


def case(quantization: str, out_features: int, in_features: int, rows: int) -> Case:
    weight, x = random_weight(quantization, out_features, in_features), torch.randn(rows, in_features)
    full = dequantize(weight, quantization)
    half, half_x = full.bfloat16(), x.bfloat16()
    peers = {
        "torch fp32": lambda: torch.nn.functional.linear(x, full),
        "torch bf16": lambda: torch.nn.functional.linear(half_x, half),
    }
    ggml = matrix_product(x, weight, quantization)
    if ggml is not None:
        peers["ggml"] = ggml
    return Case(
        name=f"{quantization} {out_features}×{in_features}, {rows} row{'s' if rows > 1 else ''}",
        ours=lambda: quantized_linear(x, weight, quantization),
        peers=peers,
        check=check,
        bound=Bound(bytes=weight.numel()),
        work=rows,
        unit="tokens",
    )


def cases(device: str) -> Iterable[Case]:
    if device != "cpu":
        return
    for rows in (1, 8, 128):
        yield case("q8_0", 262144, 640, rows) if rows == 1 else case("q8_0", 2048, 2048, rows)
        for quantization in FORMATS:
            if quantization != "q8_0":
                yield case(quantization, 2048, 2048, rows)
