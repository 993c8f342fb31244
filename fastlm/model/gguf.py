"""Models in GGUF files, as llama.cpp runs them: the file is mapped into memory, and quantized weights stay as they are.

llama.cpp differs from Hugging Face in what a file holds: rows of q and k are ordered for a rotation of neighbouring
pairs in the llama architecture, norms of Gemma have their 1 added, and Llama 3's rope scaling is a tensor of factors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm._gguf import TENSOR_TYPES, GgufArray, GgufFile
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.assemble import Quantized, assemble
from fastlm.model.config import ModelConfig, RopeScaling, require_positive_values
from fastlm.model.keys import Keys
from fastlm.model.transformer import Transformer

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Keys under the architecture's name that change nothing here. "swa" is llama.cpp's word for a sliding window.
IGNORED = frozenset({
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length",
})  # fmt: skip

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "position_embd.weight": "model.embed_positions.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(path: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model in a GGUF file, checked by name, shape and type.

    Args:
        dtype: what weights are converted to; None leaves quantized ones as they are, and views the others in the file.

    Raises:
        CheckpointError: the file is missing, cut short or corrupt, or the architecture, one of its options, or the type
            of a tensor is not supported.
    """
    file = GgufFile(path)
    weights = _weights(file)
    try:
        config = config_from_gguf(file, weights)
        tensors = _to_ours(weights, config, _architecture(file))
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    return assemble(config, tensors, file.path, dtype=dtype)


def _weights(file: GgufFile) -> dict[str, Tensor | Quantized]:
    """Every tensor as a view of the file, which is mapped so that changes stay in memory."""
    data = torch.from_file(str(file.path), shared=False, size=file.size, dtype=torch.uint8)
    weights: dict[str, Tensor | Quantized] = {}
    for name, tensor in file.tensors.items():
        view = data[tensor.offset : tensor.offset + tensor.num_bytes]
        if tensor.kind in FLOATS:
            if tensor.offset % FLOATS[tensor.kind].itemsize:
                raise CheckpointError(f"{file.path} puts {name} at {tensor.offset}, misaligned for {tensor.kind}")
            weights[name] = view.view(FLOATS[tensor.kind]).view(tensor.shape)
        elif tensor.kind in {kind for kind, _, _ in TENSOR_TYPES.values()} and len(tensor.shape) == 2:
            weights[name] = Quantized(view.view(tensor.shape[0], -1), tensor.kind)
        else:
            kinds = ", ".join(kind for kind, _, _ in TENSOR_TYPES.values())
            raise CheckpointError(
                f"{file.path} holds {name} {tensor.shape} of {tensor.kind}, which is not supported; "
                f"use a file with matrices of {kinds}"
            )
    return weights


def _architecture(file: GgufFile) -> str:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in READERS:
        raise ConfigError(f"architecture {architecture!r} is not supported; it must be one of {', '.join(READERS)}")
    return architecture


def config_from_gguf(file: GgufFile, weights: dict[str, Tensor | Quantized]) -> ModelConfig:
    """The model that the metadata describes. Sizes of the vocabulary and what biases there are, the tensors say.

    Raises:
        ConfigError: the architecture is unknown, a key is missing or of the wrong type, or sets what we do not have.
    """
    architecture = _architecture(file)
    prefix = architecture + "."
    content = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
    for key, value in content.items():
        if isinstance(value, GgufArray):  # one value for each layer
            content[key] = _the_same_for_all(file.array(prefix + key), key)
    table = weights.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ConfigError("token_embd.weight is missing, or no matrix")
    keys = Keys(content)
    values = {
        "vocab_size": table.shape[0],
        "tie_embeddings": "output.weight" not in weights,
        "qkv_bias": "blk.0.attn_q.bias" in weights or "blk.0.attn_qkv.bias" in weights,
        "attention_output_bias": "blk.0.attn_output.bias" in weights,
        "mlp_bias": "blk.0.ffn_down.bias" in weights,
        "qk_norm": "blk.0.attn_q_norm.weight" in weights,
        **READERS[architecture](keys),
    }
    factors = weights.get(ROPE_FACTORS)
    if factors is not None:
        if not isinstance(factors, Tensor) or factors.ndim != 1 or values.get("rope_scaling") is not None:
            raise ConfigError(f"{ROPE_FACTORS} is no vector, or stands beside rope.scaling")
        values["rope_scaling"] = RopeScaling("factors", factors=tuple(factors.tolist()))
    keys.refuse_unread(IGNORED)
    return ModelConfig(**values)


def _the_same_for_all(items: list[Any] | None, key: str) -> Any:
    if not items or any(item != items[0] for item in items):
        raise ConfigError(f"{key} differs from layer to layer, which is not supported")
    return items[0]


def _sizes(keys: Keys, *, attention_norm: str = "layer_norm_rms_epsilon") -> dict[str, Any]:
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    require_positive_values(embedding_length=hidden_size, head_count=num_heads)
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    keys.must_be("attention.value_length", head_dim)
    keys.must_be("rope.dimension_count", head_dim)
    keys.must_be("attention.causal", True)
    return {
        "hidden_size": hidden_size,
        "num_layers": keys.integer("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": keys.integer("feed_forward_length"),
        "context_length": keys.integer("context_length"),
        "norm_eps": keys.number(f"attention.{attention_norm}"),
    }


def _rotary(keys: Keys) -> dict[str, Any]:
    kind, factor = keys.get("rope.scaling.type", "none"), keys.number("rope.scaling.factor", 1.0)
    keys.must_be("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear"):
        raise ConfigError(f"rope.scaling.type={kind!r} is not supported; it must be none or linear")
    old = keys.number("rope.scale_linear", 1.0)
    factor = factor if kind == "linear" else old
    return {
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_scaling": None if factor == 1.0 else RopeScaling("linear", factor),
    }


def _llama(keys: Keys) -> dict[str, Any]:
    keys.must_be("expert_count", 0)
    keys.must_be("expert_used_count", 0)
    window = keys.nullable_integer("attention.sliding_window")
    return {**_sizes(keys), **_rotary(keys), "sliding_window": window}


def _gemma(keys: Keys, window: int, every: int) -> dict[str, Any]:
    """Every layer has the window but each `every`-th. The largest models scale queries by another width, as llama.cpp
    knows by their number of layers.
    """
    sizes = _sizes(keys)
    num_layers = sizes["num_layers"]
    scalar = sizes["hidden_size"] / sizes["num_heads"]
    full = tuple(range(every - 1, min(num_layers, 1 << 12), every))
    return {
        **sizes,
        **_rotary(keys),
        "norm_placement": "around",
        "norm_weight_offset": 1.0,
        "activation": "gelu_tanh",
        "scale_embeddings": True,
        "query_pre_attn_scalar": scalar if num_layers in (46, 62) and scalar != sizes["head_dim"] else None,
        "sliding_window": keys.integer("attention.sliding_window", window),
        "full_attention_layers": full,
    }


def _gemma2(keys: Keys) -> dict[str, Any]:
    return {
        **_gemma(keys, 4096, 2),
        "attention_softcap": keys.number("attn_logit_softcapping", 50.0),
        "logit_softcap": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    every = keys.integer("attention.sliding_window_pattern", 6)
    require_positive_values(sliding_window_pattern=every)
    return {
        **_gemma(keys, 1024, every),
        "rope_local_theta": keys.number("rope.freq_base_swa", 10_000.0),
        "logit_softcap": keys.nullable_number("final_logit_softcapping"),
    }


def _gpt2(keys: Keys) -> dict[str, Any]:
    return {
        **_sizes(keys, attention_norm="layer_norm_epsilon"),
        "positions": "learned",
        "norm": "layer_norm",
        "activation": "gelu_tanh",
        "gated_mlp": False,
    }


READERS: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _llama,  # and Mistral, SOLAR and others that are Llama but for sizes
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "exaone": _llama,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
}
INTERLEAVED = ("llama", "mistral")  # rows of q and k are ordered for pairs (2i, 2i + 1)


def _to_ours(
    weights: dict[str, Tensor | Quantized], config: ModelConfig, architecture: str
) -> dict[str, Tensor | Quantized]:
    """The tensors under our names. Raises ConfigError for a name that is not known."""
    ours: dict[str, Tensor | Quantized] = {}
    mlp_norm = "post_attention_layernorm" if config.norm_placement == "before" else "pre_feedforward_layernorm"
    for name, weight in weights.items():
        if name == ROPE_FACTORS:
            continue
        if name in GLOBAL_NAMES:
            parts = [(GLOBAL_NAMES[name], weight)]
        else:
            parts = _of_layer(name, weight, config, {**LAYER_NAMES, "ffn_norm": mlp_norm})
        for our_name, part in parts:
            if architecture in INTERLEAVED and ".q_proj." in our_name:
                part = _halves_apart(part, config.num_heads, our_name)
            elif architecture in INTERLEAVED and ".k_proj." in our_name:
                part = _halves_apart(part, config.num_kv_heads, our_name)
            elif config.norm_weight_offset and "norm." in our_name and isinstance(part, Tensor):
                part = part - config.norm_weight_offset
            ours[our_name] = part
    return ours


def _of_layer(
    name: str, weight: Tensor | Quantized, config: ModelConfig, names: dict[str, str]
) -> list[tuple[str, Tensor | Quantized]]:
    fields = name.split(".")
    if len(fields) != 4 or fields[0] != "blk" or not fields[1].isdecimal() or fields[2] not in {*names, "attn_qkv"}:
        raise ConfigError(f"tensor {name!r} is not supported")
    layer = f"model.layers.{int(fields[1][:9])}"
    if fields[2] != "attn_qkv":
        return [(f"{layer}.{names[fields[2]]}.{fields[3]}", weight)]
    kv = config.num_kv_heads * config.head_dim
    sizes = [config.num_heads * config.head_dim, kv, kv]
    data = weight.data if isinstance(weight, Quantized) else weight
    if data.ndim == 0 or data.shape[0] != sum(sizes):
        raise ConfigError(f"{name} is {tuple(weight.shape)}, not {sum(sizes)} rows: {' + '.join(map(str, sizes))}")
    return [
        (f"{layer}.self_attn.{part}.{fields[3]}", _like(weight, rows))
        for part, rows in zip(("q_proj", "k_proj", "v_proj"), data.split(sizes), strict=True)
    ]


def _halves_apart(weight: Tensor | Quantized, num_heads: int, name: str) -> Tensor | Quantized:
    """Rows (0, 1, 2, 3, …) of each head in the order (0, 2, …, 1, 3, …): what a rotation of halves expects."""
    data = weight.data if isinstance(weight, Quantized) else weight
    if data.ndim == 0 or data.shape[0] % (2 * num_heads):
        raise ConfigError(f"{name} is {tuple(weight.shape)}, which makes no {num_heads} heads of an even width")
    pairs = data.reshape(num_heads, -1, 2, *data.shape[1:])
    return _like(weight, pairs.transpose(1, 2).reshape(data.shape))


def _like(weight: Tensor | Quantized, data: Tensor) -> Tensor | Quantized:
    return Quantized(data, weight.quantization) if isinstance(weight, Quantized) else data
