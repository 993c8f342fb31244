"""What the ops on the CUDA core share: the chips it was built for."""

from __future__ import annotations

from functools import cache

import torch

from fastlm._core import cuda


@cache
def not_built_for(device: torch.device) -> str | None:
    """A build holds machine code alone, which runs on later chips of the same major number."""
    major, minor = torch.cuda.get_device_capability(device)
    archs = cuda().archs
    if any(arch // 10 == major and arch % 10 <= minor for arch in archs):
        return None
    built, here = " ".join(f"sm_{arch}" for arch in archs), 10 * major + minor
    return f"was built for {built}, not for sm_{here} (install with FASTLM_CUDA=1 FASTLM_CUDA_ARCHS={here})"
