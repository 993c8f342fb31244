"""A decoding step on the CPU in one native call, `csrc/cpu/decoder.cpp`: all layers, over the blocks of the cache.

Layer by layer in Python, a step of a small model spends more time between its kernels than in them. Models, and steps,
that are not served here go through `Transformer.hidden_states`, with the same kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlm._core import native, native_missing
from fastlm.model import Transformer
from fastlm.model.transformer import Block, Decoder
from fastlm.nn import Attention, QuantizedEmbedding, QuantizedLinear, RMSNorm, SwiGLU

CLASSES = {  # by dtype of the model and of the cache
    (torch.float32, torch.float32): "DecoderFloat32",
    (torch.float32, torch.float16): "DecoderFloat32CacheFloat16",
    (torch.bfloat16, torch.bfloat16): "DecoderBFloat16",
}
MODULES = (
    Transformer, Decoder, nn.ModuleList, Block, Attention, SwiGLU, RMSNorm,
    nn.Linear, QuantizedLinear, nn.Embedding, QuantizedEmbedding,
)  # fmt: skip
Weights = tuple[str, int, tuple[int, int, int], int]  # quantization, address, (rows, columns, bytes a row), bias


@dataclass
class Group:
    """Sequences with the same small number of new tokens, in rows `rows` of the step."""

    rows: slice
    size: int
    query_len: int
    block_table: Tensor  # (size, max_blocks) int32
    window_table: Tensor  # of the windowed pool, or the same where there is none
    context_lens: Tensor  # (size,) int32
    num_shared_tokens: Tensor | None = None  # () int32


def unsupported(model: Transformer) -> str | None:
    """Why the native decoder does not serve `model`, or None."""
    config = model.config
    if model.output_weight.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        return "runs fp32 and bf16 models on the CPU"
    if config.norm != "rms_norm" or not config.gated_mlp:
        return "knows RMSNorm and gated MLPs alone"
    for module in (model, *model.model.modules()):
        if type(module) not in MODULES:
            return f"does not know {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return "calls no hooks"
        if isinstance(module, nn.Linear) and (module.weight.dtype != model.dtype or module.weight.stride(1) != 1):
            return "needs matrices of one dtype, with contiguous rows"
    return native_missing()


class NativeDecoder:
    """The layers of `model`, whose weights are used where they lie, over a cache of `keys` and `values` by layer.

    Those of `windowed` layers have `window_blocks` blocks, the others `num_blocks`.
    """

    def __init__(
        self,
        model: Transformer,
        keys: list[Tensor],
        values: list[Tensor],
        windowed: list[bool],
        num_blocks: int,
        window_blocks: int,
    ) -> None:
        config = model.config
        self._model = model
        self._kept: list[Tensor] = [*keys, *values]  # what the native decoder holds addresses of
        scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
        self._decoder = getattr(native(), CLASSES[model.dtype, keys[0].dtype])(
            hidden_size=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            blocks=(num_blocks, window_blocks),
            block_size=keys[0].shape[1],
            eps=config.norm_eps,
            scale=scalar**-0.5,
            softcap=config.attention_softcap or 0.0,
            gelu=config.activation == "gelu_tanh",
            norm=self._norm(model.model.norm),
        )
        rotary = model.model.rotary
        for layer, block in enumerate(model.model.layers):
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            assert isinstance(mlp, SwiGLU)
            after_attention = block.post_attention_layernorm if block.norm_after else None
            before_mlp = block.pre_feedforward_layernorm if block.norm_after else block.post_attention_layernorm
            norms = (block.input_layernorm, attention.q_norm, attention.k_norm, after_attention, before_mlp)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            self._decoder.add_layer(
                [self._norm(norm) for norm in (*norms, block.post_feedforward_layernorm)],
                [self._weights(linear) for linear in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)],
                config.window(layer) or 0,
                -1 if rotary is None else rotary.kind(layer),
                keys[layer].data_ptr(),
                values[layer].data_ptr(),
                windowed[layer],
            )

    def hidden_states(
        self, ids: Tensor, positions: Tensor, slots: tuple[Tensor, Tensor], groups: Sequence[Group], end: int
    ) -> Tensor | None:
        """What the model gives for a step of `groups`, `(tokens, hidden_size)`.

        None when another backend, or autocast, is wanted. ids, positions: `(tokens,)` int64; slots: alike, of both
        pools. end: above the last position.
        """
        if os.environ.get("FASTLM_BACKEND", "") not in ("", "cpu") or torch.is_autocast_enabled("cpu"):
            return None
        decoder = self._model.model
        hidden = decoder.embed(ids[None], positions[None])[0].contiguous()
        out = torch.empty_like(hidden)
        tables = [] if decoder.rotary is None else decoder.rotary.kinds(end, hidden.device)
        self._decoder.run(
            len(ids),
            hidden.data_ptr(),
            positions.data_ptr(),
            tuple(its_slots.data_ptr() for its_slots in slots),
            [
                (
                    g.rows.start,
                    g.size,
                    g.query_len,
                    g.block_table.shape[1],
                    (g.block_table.data_ptr(), g.window_table.data_ptr()),
                    g.context_lens.data_ptr(),
                )
                for g in groups
            ],
            [(cos.data_ptr(), sin.data_ptr(), cos.shape[0]) for cos, sin in tables],
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _norm(self, norm: nn.Module | None) -> int:
        """The address of its weights, with their offset, in fp32."""
        if norm is None:
            return 0
        assert isinstance(norm, RMSNorm)
        return self._keep((norm.weight.detach().float() + norm.weight_offset).contiguous())

    def _weights(self, linear: nn.Linear | QuantizedLinear) -> Weights:
        weight, bias = linear.weight.detach(), linear.bias
        shape = linear.out_features, linear.in_features, weight.stride(0) * weight.itemsize
        quantization = linear.quantization if isinstance(linear, QuantizedLinear) else ""
        its_bias = 0 if bias is None else self._keep(bias.detach().float().contiguous())
        return quantization, self._keep(weight), shape, its_bias

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()
