"""Writes a model as a GGUF file that llama.cpp runs, with its tokenizer.

Matrices are written as fp16, or as Q8_0: blocks of 32 weights that share an fp16 scale. Vectors stay fp32, as llama.cpp
wants them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from torch import Tensor

from fastlm._files import atomic_path
from fastlm._gguf import DEFAULT_ALIGNMENT, MAGIC
from fastlm.errors import CheckpointError, ConfigError
from fastlm.model.config import ModelConfig, require_one_of
from fastlm.model.gguf import GLOBAL_NAMES, LAYER_NAMES
from fastlm.model.tensor_files import read_json_object
from fastlm.model.transformer import Transformer

Quantization = Literal["f32", "f16", "q8_0"]
UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5  # types of metadata
F32, F16, Q8_0 = 0, 1, 8  # types of tensors
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
BLOCK = 32  # weights of a Q8_0 block
NORMAL, CONTROL = 1, 3  # types of tokens
# Our pattern -> what llama.cpp calls a tokenizer that splits text so. "dbrx" is the model that took over cl100k; a
# text that ends in a line break and spaces it splits once more than tiktoken does.
PRE_TOKENIZERS = {"gpt2": "gpt-2", "cl100k": "dbrx", "o200k": "gpt-4o", "llama3": "llama-bpe", "qwen2": "qwen2"}

# What the metadata says of a Llama; every other option must have its default.
WRITTEN = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "context_length", "rope_theta", "norm_eps", "tie_embeddings",
)  # fmt: skip

TENSOR_NAMES = {ours: theirs for theirs, ours in GLOBAL_NAMES.items()}
PART_NAMES = {ours: theirs for theirs, ours in LAYER_NAMES.items()} | {"post_attention_layernorm": "ffn_norm"}


def save_gguf(
    model: Transformer, path: str | Path, *, tokenizer: str | Path | None = None, quantization: Quantization = "f16"
) -> None:
    """Writes `path`, whole or not at all.

    Args:
        tokenizer: the tokenizer.json of the model, a byte-level BPE; without it llama.cpp does not load the file.
        quantization: of matrices, where their rows are multiples of 32; "f16" for the others.

    Raises:
        ConfigError: the model is no Llama, Qwen 2 or Qwen 3 in its options, or `quantization` is unknown.
        CheckpointError: the model's weights are quantized, or the tokenizer is missing, corrupt or of another kind.
        OSError: the file cannot be written.
    """
    require_one_of("quantization", quantization, get_args(Quantization))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.dtype == torch.uint8 for tensor in weights.values()):
        raise CheckpointError("the weights are quantized; load the model with dtype=torch.float32 to save it")
    architecture = _architecture(model.config)
    metadata = _metadata(model.config, architecture, quantization)
    if tokenizer is not None:
        metadata += _vocabulary(Path(tokenizer), model.config.vocab_size)
    tensors = [_tensor(name, t, model.config, architecture, quantization) for name, t in weights.items()]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        _write(file, metadata, tensors)


def _architecture(config: ModelConfig) -> str:
    """What llama.cpp calls a model with these options."""
    plain = ModelConfig(**{name: getattr(config, name) for name in WRITTEN})
    linear = config.rope_scaling is None or config.rope_scaling.kind == "linear"
    both = config.qk_norm and config.qkv_bias
    if replace(config, qk_norm=False, qkv_bias=False, rope_scaling=None) == plain and linear and not both:
        return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    raise ConfigError("only Llama, Qwen 2 and Qwen 3 models are written as GGUF, with plain or linear rotary positions")


def _metadata(config: ModelConfig, architecture: str, quantization: str) -> list[bytes]:
    def key(name: str) -> str:
        return f"{architecture}.{name}"

    entries = [
        _entry("general.architecture", STRING, architecture),
        _entry("general.file_type", UINT32, FILE_TYPES[quantization]),
        _entry("general.quantization_version", UINT32, 2),
        _entry(key("vocab_size"), UINT32, config.vocab_size),
        _entry(key("context_length"), UINT32, config.context_length),
        _entry(key("embedding_length"), UINT32, config.hidden_size),
        _entry(key("block_count"), UINT32, config.num_layers),
        _entry(key("feed_forward_length"), UINT32, config.intermediate_size),
        _entry(key("attention.head_count"), UINT32, config.num_heads),
        _entry(key("attention.head_count_kv"), UINT32, config.num_kv_heads),
        _entry(key("attention.key_length"), UINT32, config.head_dim),
        _entry(key("attention.value_length"), UINT32, config.head_dim),
        _entry(key("rope.dimension_count"), UINT32, config.head_dim),
        _entry(key("rope.freq_base"), FLOAT32, config.rope_theta),
        _entry(key("attention.layer_norm_rms_epsilon"), FLOAT32, config.norm_eps),
    ]
    if config.rope_scaling is not None:
        entries.append(_entry(key("rope.scaling.type"), STRING, "linear"))
        entries.append(_entry(key("rope.scaling.factor"), FLOAT32, config.rope_scaling.factor))
    return entries


def _vocabulary(path: Path, vocab_size: int) -> list[bytes]:
    """The tokenizer's metadata. A document begins with the end-of-text token, in llama.cpp as in training."""
    from fastlm.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    if tokenizer.pattern not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: llama.cpp has no name for the pattern {tokenizer.pattern!r:.60}; "
            f"it has one for {', '.join(PRE_TOKENIZERS)}"
        )
    content = read_json_object(path)
    vocabulary, merges, added = content["model"]["vocab"], content["model"]["merges"], content["added_tokens"]
    tokens = [f"[unused {i}]" for i in range(vocab_size)]
    kinds = [CONTROL] * vocab_size
    for token, i in vocabulary.items():
        if i >= vocab_size:
            raise CheckpointError(f"{path} has the id {i}, and the model {vocab_size} ids; give the model's tokenizer")
        tokens[i], kinds[i] = token, NORMAL
    for token in added:
        if token["id"] >= vocab_size:
            raise CheckpointError(f"{path} has the id {token['id']}, and the model {vocab_size} ids")
        tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL
    entries = [
        _entry("tokenizer.ggml.model", STRING, "gpt2"),
        _entry("tokenizer.ggml.pre", STRING, PRE_TOKENIZERS[tokenizer.pattern]),
        _array("tokenizer.ggml.tokens", STRING, tokens),
        _array("tokenizer.ggml.token_type", INT32, kinds),
        _array("tokenizer.ggml.merges", STRING, [m if isinstance(m, str) else " ".join(m) for m in merges]),
        _entry("tokenizer.ggml.add_bos_token", BOOL, tokenizer.eos_token_id is not None),
    ]
    if tokenizer.eos_token_id is not None:
        entries.append(_entry("tokenizer.ggml.bos_token_id", UINT32, tokenizer.eos_token_id))
        entries.append(_entry("tokenizer.ggml.eos_token_id", UINT32, tokenizer.eos_token_id))
    return entries


class _Tensor:
    """What is written of one tensor; its bytes are made when it is their turn."""

    def __init__(self, name: str, shape: tuple[int, ...], kind: int, size: int, data: Callable[[], bytes]) -> None:
        self.name = name
        self.shape = shape
        self.kind = kind
        self.size = size
        self.data = data


def _tensor(name: str, tensor: Tensor, config: ModelConfig, architecture: str, quantization: str) -> _Tensor:
    if name in TENSOR_NAMES:
        their_name = TENSOR_NAMES[name]
    else:
        _, _, layer, part = name.split(".", 3)  # model.layers.<layer>.<part>.weight
        part, _, leaf = part.rpartition(".")
        their_name = f"blk.{layer}.{PART_NAMES[part]}.{leaf}"
    if architecture == "llama" and ".q_proj." in name:
        tensor = _neighbours_paired(tensor, config.num_heads)
    elif architecture == "llama" and ".k_proj." in name:
        tensor = _neighbours_paired(tensor, config.num_kv_heads)
    elements = tensor.numel()
    if tensor.ndim == 1 or quantization == "f32":
        return _Tensor(their_name, tuple(tensor.shape), F32, 4 * elements, lambda: _bytes(tensor.float()))
    if quantization == "f16" or tensor.shape[-1] % BLOCK:
        return _Tensor(their_name, tuple(tensor.shape), F16, 2 * elements, lambda: _half(tensor, their_name))
    size = elements // BLOCK * (BLOCK + 2)
    return _Tensor(their_name, tuple(tensor.shape), Q8_0, size, lambda: _bytes(quantize_q8_0(tensor)))


def _neighbours_paired(rows: Tensor, num_heads: int) -> Tensor:
    """The reverse of what reading does to q and k: halves of each head become neighbouring rows."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _half(tensor: Tensor, name: str) -> bytes:
    half = tensor.half()
    if not half.isfinite().all():
        raise CheckpointError(f"{name} has weights beyond the range of fp16; write it as f32")
    return _bytes(half)


def quantize_q8_0(tensor: Tensor) -> Tensor:
    """`(rows, columns)` to `(rows, columns / 32 · 34)` uint8: ggml's own blocks, to the last bit."""
    blocks = tensor.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    scaled = blocks * inverse
    rounded = torch.trunc(scaled + torch.where(scaled < 0, -0.5, 0.5))  # halves away from zero, as C's roundf
    packed = torch.cat([scale.half().view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)], 1)
    return packed.reshape(tensor.shape[0], -1)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    return struct.pack("<" + {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}[kind], value)


def _entry(key: str, kind: int, value: Any) -> bytes:
    return _text(key) + struct.pack("<I", kind) + _value(kind, value)


def _array(key: str, kind: int, values: list[Any]) -> bytes:
    head = _text(key) + struct.pack("<IIQ", ARRAY, kind, len(values))
    return head + b"".join(_value(kind, value) for value in values)


def _padding(size: int) -> bytes:
    return bytes(-size % DEFAULT_ALIGNMENT)


def _write(file: BinaryIO, metadata: list[bytes], tensors: list[_Tensor]) -> None:
    file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for piece in (*metadata, *_tensor_infos(tensors)):
        file.write(piece)
    file.write(_padding(file.tell()))
    for tensor in tensors:
        data = tensor.data()
        assert len(data) == tensor.size
        file.write(data + _padding(tensor.size))


def _tensor_infos(tensors: list[_Tensor]) -> Iterator[bytes]:
    offset = 0
    for tensor in tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        yield _text(tensor.name) + shape + struct.pack("<IQ", tensor.kind, offset)
        offset += tensor.size + len(_padding(tensor.size))
