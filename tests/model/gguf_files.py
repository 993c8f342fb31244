"""GGUF files of models of transformers, written by the `gguf` package as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

# The K formats: at which bytes of a block its fp16 scales are, and what they are for weights around zero.
SCALES = {"Q4_K": {0: 2e-4, 2: 7.5 * 2e-4}, "Q5_K": {0: 1e-4, 2: 15.5 * 1e-4}, "Q6_K": {208: 1e-4}}


def quantize(values: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Blocks of `values`; for the K formats, which `gguf` only reads, random blocks in the place of them."""
    number = gguf.GGMLQuantizationType[kind]
    if kind not in SCALES:
        return gguf.quants.quantize(values, number)
    size, block_bytes = gguf.GGML_QUANT_SIZES[number]
    blocks = rng.integers(0, 256, (values.size // size, block_bytes), dtype=np.uint8)
    factors = rng.uniform(0.5, 2.0, len(blocks))
    for at, scale in SCALES[kind].items():
        blocks[:, at : at + 2] = (scale * factors).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(values.shape[0], -1)


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp's converter orders them for the llama architecture."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    return (
        values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def write_gguf(
    path: Path, model: torch.nn.Module, architecture: str, kind_of: Callable[[str], str], *, rope_factors: bool = False
) -> None:
    """Writes `model`, each matrix as `kind_of(name)` says, and puts into `model` the values that the file holds."""
    config, rng = model.config, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config, architecture)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            file_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert file_name is not None
            values = parameter.float().numpy()
            heads = {"q": config.num_attention_heads, "k": getattr(config, "num_key_value_heads", None)}
            head = heads.get(name.split(".")[-2][0]) if architecture == "llama" and "self_attn" in name else None
            conv = architecture == "gpt2" and ".h." in name and values.ndim == 2
            if head is not None and ("q_proj" in name or "k_proj" in name):
                values = permuted(values, head)
            elif conv:
                values = values.T
            elif architecture.startswith("gemma") and name.endswith("norm.weight"):
                values = values + 1
            values = np.ascontiguousarray(values)
            kind = kind_of(file_name) if values.ndim == 2 and "position_embd" not in file_name else "F32"
            number = gguf.GGMLQuantizationType[kind]
            data = values if kind == "F32" else quantize(values, kind, rng)
            writer.add_tensor(file_name, data, raw_dtype=None if kind in ("F32", "F16") else number)
            values = gguf.quants.dequantize(data, number)
            if head is not None and ("q_proj" in name or "k_proj" in name):
                values = unpermuted(values, head)
            elif conv:
                values = values.T
            elif architecture.startswith("gemma") and name.endswith("norm.weight"):
                values = values - 1
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        if rope_factors:
            inverse = model.model.rotary_emb.inv_freq.double()
            theta = config.rope_parameters["rope_theta"]
            plain = theta ** -(torch.arange(0, 2 * len(inverse), 2, dtype=torch.float64) / (2 * len(inverse)))
            writer.add_tensor("rope_freqs.weight", (plain / inverse).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, config, architecture: str) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
