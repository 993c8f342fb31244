"""The definition, in plain torch: ggml's block formats (ggml-common.h, gguf-py/gguf/quants.py), and a linear layer.

Every weight is scale · q, or scale · q - minimum, with q of 4 to 8 bits. Blocks of 32 hold one fp16 scale; blocks of
256, the K formats, an fp16 scale for groups' scales of 6 or 8 bits, groups being of 32 weights, or 16 in q6_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.ops.quantized_linear.formats import FORMATS


def supports(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> str | None:
    return None


def quantized_linear(x: Tensor, weight: Tensor, quantization: str, bias: Tensor | None) -> Tensor:
    """Computes in fp32, or in fp64 for fp64 input."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantize(weight, quantization).to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype).contiguous()


def dequantize(weight: Tensor, quantization: str) -> Tensor:
    """`(rows, row_bytes)` uint8 to `(rows, in_features)` fp32, ggml's own values to the last bit."""
    blocks = weight.reshape(-1, FORMATS[quantization].block_bytes)
    return _DEQUANTIZE[quantization](blocks).reshape(weight.shape[0], -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, as fp32 `(blocks, 1)`."""
    low, high = blocks[:, at : at + 1].to(torch.int16), blocks[:, at + 1 : at + 2].to(torch.int16)
    return (low | (high << 8)).view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """`(…, n)` bytes to `(…, 2 n)`: all low halves, then all high halves."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q5_0(blocks: Tensor) -> Tensor:
    bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth = ((blocks[:, 2:6, None] >> bit) & 1).reshape(-1, 32)
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | (fifth << 4)).float() - 16)


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of q4_k and q5_k: eight of 6 bits each, packed in bytes 4 … 15. Each is `(blocks, 8, 1)` fp32."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], -1)
    minimums = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], -1)
    return (_half(blocks, 0) * scales.float())[..., None], (_half(blocks, 2) * minimums.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks)
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scales * q.float() - minimums).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks)
    bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth = (blocks[:, None, 16:48] >> bit[:, None]) & 1
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | (fifth << 4)
    return (scales * q.float() - minimums).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift[:, None]) & 3
    q = (low.reshape(-1, 8, 32) | (high.reshape(-1, 8, 32) << 4)).reshape(-1, 16, 16)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scales[..., None] * (q.float() - 32)).flatten(1)


_DEQUANTIZE = {"q8_0": _q8_0, "q5_0": _q5_0, "q4_0": _q4_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
