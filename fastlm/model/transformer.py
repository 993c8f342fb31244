"""The transformer: an embedding table, blocks of attention and a feed-forward layer, a norm, and an output layer.

Each block adds to a residual stream. The addition is fused into the norm that follows it, so a block takes and gives
the pair (what was just computed, the stream before it): one pass over memory instead of two.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm.model.config import ModelConfig
from fastlm.model.rope import RotaryTables
from fastlm.nn import (
    MLP,
    Attention,
    Cache,
    KVCache,
    LayerNorm,
    LinearCrossEntropyLoss,
    QuantizedEmbedding,
    RMSNorm,
    SwiGLU,
    can_recompute,
    norm_and_project,
)

Norm = RMSNorm | LayerNorm
LOGITS_AT_ONCE = 128  # tokens whose logits are held together when the output layer is quantized


def make_norm(config: ModelConfig) -> Norm:
    if config.norm == "layer_norm":
        return LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, weight_offset=config.norm_weight_offset)


def make_attention(config: ModelConfig, layer: int) -> Attention:
    scalar = config.query_pre_attn_scalar
    return Attention(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        qkv_bias=config.qkv_bias,
        output_bias=config.attention_output_bias,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        norm_weight_offset=config.norm_weight_offset,
        window=config.window(layer),
        softcap=config.attention_softcap,
        scale=None if scalar is None else scalar**-0.5,
    )


def make_mlp(config: ModelConfig) -> SwiGLU | MLP:
    kind = SwiGLU if config.gated_mlp else MLP
    return kind(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, activation=config.activation)  # type: ignore[arg-type]


class Block(nn.Module):
    """norm → attention → norm → MLP, on the pair (hidden, residual); or with the norms after, or on both sides.

    Hugging Face calls the norm before the MLP `post_attention_layernorm` where no norm follows attention, and gives
    that name to the one that does follow it where there is one. So do we.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.norm_after = after
        self.input_layernorm = make_norm(config) if before else None
        self.self_attn = make_attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.pre_feedforward_layernorm = make_norm(config) if before and after else None
        self.mlp = make_mlp(config)
        self.post_feedforward_layernorm = make_norm(config) if after else None

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        tables: tuple[Tensor, Tensor] | tuple[None, None],
        positions: Tensor | None,
        cache: Cache | None,
        layer: int,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.attend(hidden, residual, tables, positions, cache, layer, cu_seqlens)
        if self.norm_after:
            hidden = self.post_attention_layernorm(hidden)
            hidden, residual = self.feed_forward(self.pre_feedforward_layernorm, hidden, residual)
        else:
            hidden, residual = self.feed_forward(self.post_attention_layernorm, hidden, residual)
        if self.post_feedforward_layernorm is not None:
            hidden = self.post_feedforward_layernorm(hidden)
        return hidden, residual

    def attend(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        tables: tuple[Tensor, Tensor] | tuple[None, None],
        positions: Tensor | None,
        cache: Cache | None,
        layer: int,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        norm, attn = self.input_layernorm, self.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        if can_recompute(norm, *projections):
            assert isinstance(norm, RMSNorm)
            (q, k, v), residual = norm_and_project(norm, hidden, residual, *projections)
            cos, sin = tables
            return attn.attend(q, k, v, cos, sin, positions, cache, layer, cu_seqlens), residual
        hidden, residual = add_and_norm(norm, hidden, residual)
        hidden = attn(hidden, *tables, positions=positions, cache=cache, layer=layer, cu_seqlens=cu_seqlens)
        return hidden, residual

    def feed_forward(self, norm: Norm | None, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        mlp = self.mlp
        if isinstance(mlp, SwiGLU) and can_recompute(norm, mlp.gate_proj, mlp.up_proj):
            assert isinstance(norm, RMSNorm)
            (gate, up), residual = norm_and_project(norm, hidden, residual, mlp.gate_proj, mlp.up_proj)
            return mlp.combine(gate, up), residual
        hidden, residual = add_and_norm(norm, hidden, residual)
        return mlp(hidden), residual


def add_and_norm(norm: Norm | None, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The stream with `hidden` added, as the pair (normalised, as it is)."""
    if norm is None:
        stream = hidden if residual is None else hidden + residual
        return stream, stream
    if residual is None:  # the first block: nothing to add yet
        return norm(hidden), hidden
    return norm(hidden, residual)


class Decoder(nn.Module):
    """Token ids to hidden states; the part that Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context_length = config.context_length
        self.checkpoint_activations = False  # blocks are computed again on the way back instead of being kept
        self.embed_tokens: nn.Embedding | QuantizedEmbedding = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.context_length, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.rotary = None if learned else RotaryTables(config)
        self.embedding_scale = math.sqrt(config.hidden_size) if config.scale_embeddings else None

    def forward(self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        seq = input_ids.shape[1]
        positions, end = None, seq
        if cache is not None:
            positions, end = cache.positions(seq), cache.end(seq)
        elif cu_seqlens is not None:
            positions, end = packed_positions(cu_seqlens, input_ids)
        if end > self.context_length:
            raise ValueError(f"{end} tokens do not fit the context of {self.context_length}")
        hidden, residual = self.embed(input_ids, positions), None
        for layer, block in enumerate(self.layers):
            tables = (None, None) if self.rotary is None else self.rotary.tables(layer, end, hidden.device)
            arguments = (hidden, residual, tables, positions, cache, layer, cu_seqlens)
            if self.checkpoint_activations and torch.is_grad_enabled():
                hidden, residual = checkpoint(block, *arguments, use_reentrant=False)
            else:
                hidden, residual = block(*arguments)
        if cache is not None:
            cache.advance(seq)
        return self.norm(hidden, residual)[0]

    def embed(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        if self.embedding_scale is not None:  # rounded to the stream's dtype, as Gemma was trained
            hidden = hidden * torch.tensor(self.embedding_scale, dtype=hidden.dtype)
        if self.embed_positions is not None:
            if positions is None:
                positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            hidden = hidden + self.embed_positions(positions)
        if torch.is_autocast_enabled(hidden.device.type):  # the residual stream has the dtype that layers compute in
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return hidden


def packed_positions(cu_seqlens: Tensor, input_ids: Tensor) -> tuple[Tensor, int]:
    """Each token's place in its sequence, like `input_ids`, and the length of the longest sequence.

    Raises:
        ValueError: the sequences are not exactly the tokens of `input_ids`.
    """
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != input_ids.numel() or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {input_ids.numel()}, the number of tokens")
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    positions = torch.arange(input_ids.numel(), device=input_ids.device) - starts
    return positions.view_as(input_ids), int(lengths.amax())


class Transformer(nn.Module):
    """A causal language model. Its state dict has the names of Hugging Face's Llama, Qwen, Gemma and Exaone 4 models.

    Weights start random: embeddings N(0, 0.02²), projections N(0, 1 / (4 · fan_in)), and zero for biases and for the
    projections that write to the residual stream, so that every block starts as the identity.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = LinearCrossEntropyLoss(softcap=config.logit_softcap)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.constant_(parameter, 1.0 - self.config.norm_weight_offset)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif "embed_" in name or "lm_head" in name:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)

    @property
    def output_weight(self) -> Tensor:
        """`(vocab_size, hidden_size)`: logits are hidden states times this, transposed (before the softcap).

        Of a quantized output layer, its bytes.
        """
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, and so of the cache."""
        dtype = self.model.embed_tokens.weight.dtype
        return torch.float32 if dtype == torch.uint8 else dtype

    def hidden_states(self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """`(batch, seq)` int64 -> `(batch, seq, hidden_size)`, after the last norm.

        With `cu_seqlens`, `(sequences + 1,)` int32 offsets from 0 to batch · seq, the ids are sequences packed one
        after the other: each counts its positions from 0 and sees no other.

        Raises:
            ValueError: a sequence, with what `cache` holds, is longer than the context.
        """
        return self.model(input_ids, cache, cu_seqlens)

    def logits(self, hidden: Tensor) -> Tensor:
        """What `hidden_states` gave, `(..., hidden_size)` -> `(..., vocab_size)`."""
        table = self.model.embed_tokens
        if self.lm_head is not None:
            logits = self.lm_head(hidden)
        elif isinstance(table, QuantizedEmbedding):
            logits = table.as_output_layer(hidden)
        else:
            logits = nn.functional.linear(hidden, table.weight)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """`(batch, seq)` int64 -> logits `(batch, seq, vocab_size)`. With `cache`, ids go after the tokens it holds."""
        return self.logits(self.hidden_states(input_ids, cache))

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        reduction: Literal["mean", "sum", "none"] = "mean",
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Next-token cross-entropy in nats; `targets` `(batch, seq)`, -100 where none counts.

        A scalar, or like `targets` with reduction="none". `cu_seqlens` as in `hidden_states`.
        """
        hidden = self.hidden_states(input_ids, cu_seqlens=cu_seqlens)
        if self.output_weight.dtype == torch.uint8:
            return self._loss_of_logits(hidden, targets, reduction)
        return self.loss_function(hidden, self.output_weight, targets, reduction)

    def _loss_of_logits(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """With gradients, a chunk's logits are computed again on the way back instead of being kept."""
        counted = targets != -100

        def losses_of(hidden: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.logits(hidden).float(), targets, reduction="none")

        chunks = zip(hidden[counted].split(LOGITS_AT_ONCE), targets[counted].split(LOGITS_AT_ONCE), strict=True)
        if torch.is_grad_enabled():
            each = [checkpoint(losses_of, h, t, use_reentrant=False) for h, t in chunks]
        else:
            each = [losses_of(h, t) for h, t in chunks]
        losses = torch.cat(each)
        if reduction == "none":
            return torch.zeros(targets.shape, device=targets.device).index_put((counted,), losses)
        return losses.sum() if reduction == "sum" else losses.sum() / losses.numel()

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `capacity` tokens, `context_length` by default."""
        c = self.config
        return KVCache(
            c.num_layers,
            batch_size,
            c.context_length if capacity is None else capacity,
            c.num_kv_heads,
            c.head_dim,
            dtype=self.dtype,
            device=self.output_weight.device,
        )
