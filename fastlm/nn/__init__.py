"""Drop-in torch modules over the ops. Their parameter names are those of Hugging Face's Llama and Qwen layers."""

from fastlm.nn.attention import Attention
from fastlm.nn.kv_cache import Cache, KVCache
from fastlm.nn.lora import LoRALinear
from fastlm.nn.loss import LinearCrossEntropyLoss
from fastlm.nn.mlp import MLP, SwiGLU
from fastlm.nn.normalization import LayerNorm, RMSNorm
from fastlm.nn.projections import can_recompute, norm_and_project
from fastlm.nn.quantized import QuantizedEmbedding, QuantizedLinear

__all__ = [
    "MLP",
    "Attention",
    "Cache",
    "KVCache",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "SwiGLU",
    "can_recompute",
    "norm_and_project",
]
