"""How the Triton kernels cut their problem, by chip and head_dim.

Chosen as the largest tiles that the compiler fits into registers; `pytest -m aot` holds them to it. What
`fastlm warmup --tune` measured on this chip comes before them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlm.ops import tuning


class Tiles(NamedTuple):
    """Queries and keys a tile, warps a program, tiles in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# kernel -> tiles for head_dim up to 64, 128, 256
_DATACENTER = {  # Hopper and datacenter Blackwell: wgmma or tcgen05, 227 KiB of shared memory
    "forward": (Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 2), Tiles(128, 32, 8, 2)),
    "keys": (Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 1)),
    "queries": (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2)),
}
_BLACKWELL_KEYS_128 = Tiles(64, 128, 8, 1)  # tensor memory holds the products, so one stage leaves room for more rows
_AMPERE = {  # and Ada and consumer Blackwell, whose shared memory ends at 99 KiB
    "forward": (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2)),
    "keys": (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2)),
    "queries": (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1)),
}
_ELEMENTS = {  # with a bias or dropout, whose own tiles need registers too; on every chip with tensor cores
    "forward": (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
    "keys": (Tiles(16, 64, 8, 2), Tiles(16, 64, 8, 2), Tiles(16, 32, 8, 1)),
    "queries": (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
}
_512 = {  # on every chip with tensor cores: what a row has in registers leaves room for no other shape
    "forward": Tiles(32, 16, 8, 2),
    "keys": Tiles(16, 16, 8, 1),
    "queries": Tiles(32, 16, 8, 1),
}
_NO_TENSOR_CORES = {  # exact fp32, and Turing, whose tensor cores Triton does not use
    "forward": (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    "keys": (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    "queries": (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
}
_INTERPRETER = {"forward": Tiles(32, 16, 1, 1), "keys": Tiles(16, 32, 1, 1), "queries": Tiles(32, 16, 1, 1)}


def tiles(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    chip: int,
    elements: bool = False,
    device: torch.device | None = None,
) -> Tiles:
    """`kernel`: "forward", "keys" (grad_k and grad_v) or "queries" (grad_q). `chip`: 80 for sm_80, 0 if interpreted.
    `elements`: with a bias or dropout, whose tiles are not tuned. `device`: whose record of tuning counts, if any.
    """
    tuned = None if device is None or elements else tuning.tiles(device, kernel, head_dim, dtype)
    if tuned is not None:
        return Tiles(*tuned)
    if chip == 0:
        return _INTERPRETER[kernel]
    if head_dim > 256:
        return _512[kernel]
    column = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if dtype == torch.float32 or chip < 80:
        return _NO_TENSOR_CORES[kernel][column]
    if elements:
        return _ELEMENTS[kernel][column]
    if 100 <= chip < 110 and kernel == "keys" and column == 1:
        return _BLACKWELL_KEYS_128
    return (_DATACENTER if 90 <= chip < 110 else _AMPERE)[kernel][column]
