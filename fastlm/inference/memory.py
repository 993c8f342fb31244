"""How much memory keys and values may take, and how layers with a window share it with the others."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm.errors import CapacityError
from fastlm.inference.block_manager import blocks_touched
from fastlm.inference.paged_cache import PagedCache
from fastlm.model import Transformer

SHARE_OF_FREE_MEMORY = 0.25  # of the machine's, when no size is given
SHARE_OF_FREE_GPU_MEMORY = 0.8


@dataclass(frozen=True)
class CacheLayout:
    """What blocks of `block_size` tokens take, in bytes, in the layers that keep all tokens and in those with a window.

    window: how many tokens the windowed layers keep. None where no layer has a window, or none that its context
        exceeds: then all keep all tokens.
    """

    block_size: int
    full_bytes: int
    window_bytes: int
    window: int | None

    @classmethod
    def of(cls, model: Transformer, block_size: int) -> CacheLayout:
        config = model.config
        windows = [w for w in map(config.window, range(config.num_layers)) if w is not None]
        window = max(windows, default=config.context_length)
        if window >= config.context_length:
            return cls(block_size, PagedCache.bytes_per_block(model, block_size), 0, None)
        full, windowed = (
            PagedCache.bytes_per_block(model, block_size, num_layers)
            for num_layers in (config.num_layers - len(windows), len(windows))
        )
        return cls(block_size, full, windowed, window)

    def blocks_for(self, sequences: int, length: int, max_chunk: int) -> tuple[int, int]:
        """Full and windowed blocks for `sequences` of `length` tokens, of which a step computes up to `max_chunk`."""
        full = sequences * -(-length // self.block_size)
        if self.window is None:
            return full, 0
        # A step's tokens are parted among the sequences; a block more for each, as windows begin within one.
        windowed = sequences * (-(-self.window // self.block_size) + 1) + -(-max_chunk // self.block_size)
        return full, min(full, windowed)

    def bytes_for(self, sequences: int, length: int, max_chunk: int) -> int:
        full, windowed = self.blocks_for(sequences, length, max_chunk)
        return full * self.full_bytes + windowed * self.window_bytes

    def split(self, memory: int, sequences: int, length: int, max_chunk: int) -> tuple[int, int]:
        """The full and windowed blocks that `memory` bytes are best parted into, never more windowed than full.

        A sequence within the window needs as many of each, a long one mostly full blocks, and nobody knows which will
        come. So each kind gets half of the memory: the longest sequence, and the number of short ones, are at least
        half of what they would be if all was done for them. From there on, windowed blocks are no more than `sequences`
        of `length` need as long as full ones are fewer than these need, and at least what one such sequence needs.
        """
        if self.window is None:
            return memory // self.full_bytes, 0
        full, windowed = self.blocks_for(sequences, length, max_chunk)
        _, least = self.blocks_for(1, length, max_chunk)
        half = memory // (2 * self.window_bytes)
        beyond_full = (memory - full * self.full_bytes) // self.window_bytes
        as_many_of_each = memory // (self.full_bytes + self.window_bytes)
        windowed = min(as_many_of_each, max(least, min(half, windowed), beyond_full))
        if windowed < min(least, blocks_touched(self.window, self.block_size)):  # a sequence is as long as they last
            return windowed, windowed
        if self.full_bytes == 0:  # all layers have a window: full blocks are numbers for the prefixes alone
            return max(full, windowed), windowed
        return (memory - windowed * self.window_bytes) // self.full_bytes, windowed


def cache_bytes(memory: int | None, per_block: int, enough: int, device: torch.device) -> int:
    """How many bytes keys and values get: `memory`; without it, `enough`, or what the free memory allows.

    Raises:
        CapacityError: `memory` holds no block of `per_block` bytes.
    """
    if memory is None:
        if device.type == "cuda":
            memory = int(SHARE_OF_FREE_GPU_MEMORY * torch.cuda.mem_get_info(device)[0])
        else:
            memory = int(SHARE_OF_FREE_MEMORY * _free_memory())
        return max(per_block, min(enough, memory))
    if memory < per_block:
        raise CapacityError(f"memory={memory} bytes holds no block, which takes {per_block}; give more")
    return memory


def _free_memory() -> int:
    """Bytes; where the system does not say what is free, half of all."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
