"""How architectures of Hugging Face name and pack their tensors, where that differs from ours.

Most are ours already. GPT-2 has other names, its q, k and v in one tensor, and weights as (in, out); EXAONE 3 has other
names; Phi-3 packs q, k, v and gate, up. Reading gives views, so memory-mapped weights stay where they are.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fastlm.errors import CheckpointError
from fastlm.model.config import ModelConfig

# theirs, ours
GPT2_NAMES = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.wpe.", "model.embed_positions."),
    ("transformer.ln_f.", "model.norm."),
    ("transformer.h.", "model.layers."),
    (".ln_1.", ".input_layernorm."),
    (".ln_2.", ".post_attention_layernorm."),
    (".attn.c_attn.", ".self_attn.qkv_proj."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".mlp.c_fc.", ".mlp.up_proj."),
    (".mlp.c_proj.", ".mlp.down_proj."),
)
EXAONE_NAMES = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.ln_f.", "model.norm."),
    ("transformer.h.", "model.layers."),
    (".ln_1.", ".input_layernorm."),
    (".ln_2.", ".post_attention_layernorm."),
    (".attn.attention.out_proj.", ".self_attn.o_proj."),
    (".attn.attention.", ".self_attn."),
    (".mlp.c_fc_0.", ".mlp.gate_proj."),
    (".mlp.c_fc_1.", ".mlp.up_proj."),
    (".mlp.c_proj.", ".mlp.down_proj."),
)
NAMES = {"gpt2": GPT2_NAMES, "exaone": EXAONE_NAMES}
# Tables that old exports hold and the model computes.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.rotary\.inv_freq$")


def to_ours(theirs: dict[str, Tensor], model_type: str, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors under our names, unpacked.

    Raises:
        CheckpointError: a packed tensor is not of the size of its parts, or two tensors have one name.
    """
    if model_type == "gpt2" and not any(name.startswith("transformer.") for name in theirs):
        theirs = {f"transformer.{name}": tensor for name, tensor in theirs.items()}
    ours: dict[str, Tensor] = {}
    for their_name, tensor in theirs.items():
        if COMPUTED.search(their_name):
            continue
        name = their_name
        for old, new in NAMES.get(model_type, ()):
            name = name.replace(old, new)
        if model_type == "gpt2" and ".layers." in name and tensor.ndim == 2:
            tensor = tensor.t()
        for part, rows in _unpacked(name, tensor, config):
            if part in ours:
                raise CheckpointError(f"holds {part} twice")
            ours[part] = rows
    if config.tie_embeddings and "lm_head.weight" in ours:
        _drop_tied_head(ours)
    return ours


def _unpacked(name: str, tensor: Tensor, config: ModelConfig) -> list[tuple[str, Tensor]]:
    packed = name.split(".")[-2] if "." in name else name
    parts: tuple[str, ...]
    kv = config.num_kv_heads * config.head_dim
    if packed == "qkv_proj":
        parts, sizes = ("q_proj", "k_proj", "v_proj"), [config.num_heads * config.head_dim, kv, kv]
    elif packed == "gate_up_proj":
        parts, sizes = ("gate_proj", "up_proj"), [config.intermediate_size] * 2
    else:
        return [(name, tensor)]
    if tensor.ndim == 0 or tensor.shape[0] != sum(sizes):
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}, not {sum(sizes)} rows: {' + '.join(map(str, sizes))}")
    return [(name.replace(packed, part), rows) for part, rows in zip(parts, tensor.split(sizes), strict=True)]


def _drop_tied_head(ours: dict[str, Tensor]) -> None:
    head, table = ours.pop("lm_head.weight"), ours.get("model.embed_tokens.weight")
    if table is not None and (head.dtype != table.dtype or not torch.equal(head, table)):
        raise CheckpointError("lm_head.weight differs from the embedding table, though config.json ties them")


def from_ours(ours: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The reverse of `to_ours` for the architectures that are written."""
    if model_type != "gpt2":
        return {name: tensor.contiguous() for name, tensor in ours.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([ours[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("q_proj", "qkv_proj")
        if ".layers." in name and tensor.ndim == 2:
            tensor = tensor.t()
        for old, new in GPT2_NAMES:
            name = name.replace(new, old)
        theirs[name] = tensor.contiguous()
    return theirs
