"""The block formats of GGUF weights that ops read as they are, named as ggml names them in lower case."""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    block_size: int  # weights of one block, consecutive along in_features
    block_bytes: int


FORMATS = {
    "q8_0": Format(32, 34),
    "q5_0": Format(32, 22),
    "q4_0": Format(32, 18),
    "q4_k": Format(256, 144),
    "q5_k": Format(256, 176),
    "q6_k": Format(256, 210),
}


def in_features(quantization: str, row_bytes: int) -> int:
    """How many weights a row of `row_bytes` holds. Raises ValueError when it holds no whole number of blocks."""
    if quantization not in FORMATS:
        raise ValueError(f"quantization must be one of {', '.join(FORMATS)}, not {quantization!r}")
    block = FORMATS[quantization]
    if row_bytes % block.block_bytes:
        raise ValueError(f"{quantization} rows are multiples of {block.block_bytes} bytes, not {row_bytes}")
    return row_bytes // block.block_bytes * block.block_size
