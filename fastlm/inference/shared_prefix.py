"""How many tokens at the start a step's sequences have in the same blocks, as prefix caching leaves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORTHWHILE = 128  # tokens, of the smallest split: of less no kernel reads anything together


def num_shared_tokens(tables: Sequence[list[int]], lengths: Sequence[int], block_size: int) -> int:
    """Of sequences with `tables` of blocks and `lengths` in tokens, in whole blocks; 0 for one sequence."""
    if len(tables) < 2:
        return 0
    low, high = min(tables), max(tables)  # in the order of words: what these two share, all between them share
    blocks = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(blocks, min(lengths) // block_size) * block_size


def for_kernels(
    tables: Sequence[list[int]], lengths: Sequence[int], block_size: int, device: torch.device
) -> Tensor | None:
    """The same as `decode_attention` takes it. None for too few tokens, and on the CPU, where no kernel uses it."""
    if device.type == "cpu":
        return None
    count = num_shared_tokens(tables, lengths, block_size)
    return torch.tensor(count, dtype=torch.int32, device=device) if count >= WORTHWHILE else None
