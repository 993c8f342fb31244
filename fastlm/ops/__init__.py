"""The ops. Each is a folder with one public function; each backend of it is a file. See `fastlm.explain`."""

from fastlm.ops._registry import OPS, Explanation, explain
from fastlm.ops.rms_norm import rms_norm

__all__ = ["OPS", "Explanation", "explain", "rms_norm"]
