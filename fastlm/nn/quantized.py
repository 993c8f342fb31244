"""Linear layer and embedding over weights that stay in GGUF's block formats. They are for inference: no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlm.ops.quantized_linear import FORMATS, dequantize, quantized_linear


def row_bytes(in_features: int, quantization: str) -> int:
    """Bytes of a row of weights. Raises ValueError when `in_features` makes no whole number of blocks."""
    block = FORMATS[quantization]
    if in_features % block.block_size:
        raise ValueError(f"{quantization} rows are multiples of {block.block_size} weights, not {in_features}")
    return in_features // block.block_size * block.block_bytes


class QuantizedLinear(nn.Module):
    """x · Wᵀ + bias: `(..., in_features)` fp32 or bf16 -> `(..., out_features)` in the same dtype.

    `weight` is a buffer `(out_features, row_bytes)` uint8, see `fastlm.ops.quantized_linear`; it may view a file that
    is mapped into memory.
    """

    def __init__(self, in_features: int, out_features: int, quantization: str, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.quantization = quantization
        self.weight: Tensor
        size = row_bytes(in_features, quantization)
        self.register_buffer("weight", torch.zeros(out_features, size, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.quantization, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantization}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """Rows of a quantized table: ids `(...)` int64 -> `(..., hidden_size)` fp32."""

    def __init__(self, num_embeddings: int, hidden_size: int, quantization: str) -> None:
        super().__init__()
        self.quantization = quantization
        self.hidden_size = hidden_size
        self.weight: Tensor
        size = row_bytes(hidden_size, quantization)
        self.register_buffer("weight", torch.zeros(num_embeddings, size, dtype=torch.uint8))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight[ids.flatten()]
        return dequantize(rows, self.quantization).view(*ids.shape, self.hidden_size)

    def as_output_layer(self, hidden: Tensor) -> Tensor:
        """Logits of a model that ties its output layer to this table."""
        return quantized_linear(hidden, self.weight, self.quantization)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.hidden_size}, {self.quantization}"
