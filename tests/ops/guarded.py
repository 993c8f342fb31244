"""Tensors that end where memory ends, so that a kernel which reads past them stops the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(t: Tensor) -> Tensor:
    """A contiguous copy of `t` whose last byte lies just before a page that may not be touched."""
    size = t.numel() * t.element_size()
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory, length))
    if _libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return t.clone()
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=length - size)
    return copy.copy_(t.flatten()).view(t.shape)
