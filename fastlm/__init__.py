"""fastlm: fused kernels, an exact C++ BPE tokenizer and a thin transformer for language models."""

from fastlm._version import __version__

__all__ = ["__version__"]
