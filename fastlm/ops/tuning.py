"""What `fastlm warmup --tune` found to be right and fastest on a GPU, kept as a file a chip.

    ~/.cache/fastlm/tuned/<device>-<triton version>.json
    {"device": "NVIDIA H100 80GB HBM3", "triton": "3.7.1", "fastlm": "0.1.0",
     "backends": {"attention forward 128 causal": "gluon"},
     "tiles": {"forward 128 16-bit": [128, 64, 4, 3]}}

A record counts only on the chip that it names, with the versions that it names: kernels that were right and fast in
another version have shown nothing about this one. Without a record nothing is chosen, and defaults hold.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastlm._files import write_atomic
from fastlm._version import __version__


def directory() -> Path:
    """`fastlm/tuned` in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm" / "tuned"


def chip(device: torch.device) -> dict[str, str]:
    """What a record must name to count on `device`."""
    import triton

    return {"device": torch.cuda.get_device_name(device), "triton": triton.__version__, "fastlm": __version__}


def path(named: dict[str, str]) -> Path:
    """Where the record of that chip is kept."""
    name = "-".join(re.sub(r"[^a-z0-9.+]+", "-", named[key].lower()).strip("-") for key in ("device", "triton"))
    return directory() / f"{name}.json"


def problem_with(record: Any, named: dict[str, str]) -> str | None:
    """Why `record` does not count on that chip, or None."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    for key, value in named.items():
        if record.get(key) != value:
            return f"is of {key} {record.get(key)}, not {value}"
    backends, tiles = record.get("backends"), record.get("tiles")
    if not isinstance(backends, dict) or not all(isinstance(name, str) for name in backends.values()):
        return "has no table of backends"
    if not isinstance(tiles, dict) or not all(
        isinstance(cut, list) and len(cut) == 4 and all(type(n) is int and n > 0 for n in cut) for cut in tiles.values()
    ):
        return "has no table of tiles, each four numbers above 0"
    return None


def load(named: dict[str, str]) -> dict[str, Any] | None:
    """The record of that chip; None where there is none. One that does not count is told and left aside."""
    file = path(named)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} cannot be read ({error}); run fastlm warmup --tune again, or delete it", stacklevel=2)
        return None
    problem = problem_with(record, named)
    if problem is not None:
        warnings.warn(f"{file} {problem}; run fastlm warmup --tune again, or delete it", stacklevel=2)
        return None
    return record


def save(named: dict[str, str], backends: dict[str, str], tiles: dict[str, list[int]]) -> Path:
    """Writes the record of that chip; what an earlier one says of other kernels is kept. Returns its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what does not count is written over
        before = load(named) or {"backends": {}, "tiles": {}}
    record = named | {"backends": before["backends"] | backends, "tiles": before["tiles"] | tiles}
    file = path(named)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(record, indent=1) + "\n")
    _of.cache_clear()
    return file


@cache
def _of(index: int) -> dict[str, Any] | None:
    return load(chip(torch.device("cuda", index)))


def record(device: torch.device) -> dict[str, Any] | None:
    """The record that counts on `device`, read once a process; None on a CPU, and for fake tensors on no GPU."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    return _of(torch.cuda.current_device() if device.index is None else device.index)


def backend_key(direction: str, head_dim: int, causal: bool) -> str:
    """`direction`: "forward" or "backward", of attention."""
    return f"attention {direction} {head_dim} {'causal' if causal else 'full'}"


def tiles_key(kernel: str, head_dim: int) -> str:
    """`kernel`: as tiles.py names it. Kernels of fp32 are not tuned."""
    return f"{kernel} {next(limit for limit in (64, 128, 256, 512) if head_dim <= limit)} 16-bit"


def backend(device: torch.device, direction: str, head_dim: int, causal: bool) -> str | None:
    """The backend that tuning chose for attention of 16 bits, or None."""
    found = record(device)
    return None if found is None else found["backends"].get(backend_key(direction, head_dim, causal))


def tiles(device: torch.device, kernel: str, head_dim: int, dtype: torch.dtype) -> list[int] | None:
    """The tiles that tuning chose for a Triton kernel, or None."""
    found = record(device) if dtype in (torch.bfloat16, torch.float16) else None
    return None if found is None else found["tiles"].get(tiles_key(kernel, head_dim))
