"""The ops. Each is a folder with one public function; each backend of it is a file. See `fastlm.explain`."""

from fastlm.ops._registry import OPS, Explanation, explain
from fastlm.ops.attention import attention
from fastlm.ops.decode_attention import decode_attention
from fastlm.ops.fused_linear_sample import fused_linear_sample
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.quantized_linear import dequantize, quantized_linear
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rotary import rotary, rotary_tables
from fastlm.ops.sampling import Sample, sample
from fastlm.ops.swiglu import swiglu

__all__ = [
    "OPS",
    "Explanation",
    "Sample",
    "attention",
    "decode_attention",
    "dequantize",
    "explain",
    "fused_linear_sample",
    "linear_cross_entropy",
    "quantized_linear",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "sample",
    "swiglu",
]
