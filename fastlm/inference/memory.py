"""How much memory keys and values may take."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from fastlm.errors import CapacityError

SHARE_OF_FREE_MEMORY = 0.25  # of the machine's, when no size is given
SHARE_OF_FREE_GPU_MEMORY = 0.8


def blocks_in(memory: int | None, bytes_per_block: int, enough: int, device: torch.device) -> int:
    """How many blocks `memory` holds; without it, `enough`, or what the free memory allows."""
    if memory is None:
        if device.type == "cuda":
            memory = int(SHARE_OF_FREE_GPU_MEMORY * torch.cuda.mem_get_info(device)[0])
        else:
            memory = int(SHARE_OF_FREE_MEMORY * _free_memory())
        return max(1, min(enough, memory // bytes_per_block))
    if memory < bytes_per_block:
        raise CapacityError(f"memory={memory} bytes holds no block, which takes {bytes_per_block}; give more")
    return memory // bytes_per_block


def _free_memory() -> int:
    """Bytes; where the system does not say what is free, half of all."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
