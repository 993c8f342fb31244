"""fastlm: fused kernels, an exact C++ BPE tokenizer and a thin transformer for language models.

Importing it imports nothing else; each name below loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastlm._version import __version__

_HOME = {
    "LLM": "fastlm.inference",
    "BpeTrainer": "fastlm.tokenizer",
    "SamplingParams": "fastlm.inference",
    "Tokenizer": "fastlm.tokenizer",
    "explain": "fastlm.ops",
    "patch": "fastlm.compat.patching",
    "unpatch": "fastlm.compat.patching",
}
_MODULES = ("compat", "errors", "inference", "model", "nn", "ops", "tokenizer", "training")

if TYPE_CHECKING:
    from fastlm import compat, errors, inference, model, nn, ops, tokenizer, training
    from fastlm.compat.patching import patch, unpatch
    from fastlm.inference import LLM, SamplingParams
    from fastlm.ops import explain
    from fastlm.tokenizer import BpeTrainer, Tokenizer

__all__ = [
    "LLM",
    "BpeTrainer",
    "SamplingParams",
    "Tokenizer",
    "__version__",
    "compat",
    "errors",
    "explain",
    "inference",
    "model",
    "nn",
    "ops",
    "patch",
    "tokenizer",
    "training",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastlm.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
