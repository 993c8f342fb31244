"""The transformer: an embedding table, blocks of attention and SwiGLU, a norm, and an output layer.

Each block adds to a residual stream. The addition is fused into the norm that follows it, so a block takes and gives
the pair (what was just computed, the stream before it): one pass over memory instead of two.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastlm.model.config import ModelConfig
from fastlm.nn import Attention, Cache, KVCache, LinearCrossEntropyLoss, RMSNorm, SwiGLU
from fastlm.ops import rotary_tables


class Block(nn.Module):
    """norm → attention → norm → SwiGLU, on the pair (hidden, residual)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        cache: Cache | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:  # the first block: nothing to add yet
            hidden, residual = self.input_layernorm(hidden), hidden
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos, sin, positions=positions, cache=cache, layer=layer)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Decoder(nn.Module):
    """Token ids to hidden states; the part that Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        cos, sin = rotary_tables(config.head_dim, config.context_length, config.rope_theta)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        positions = None
        if cache is not None:
            positions = cache.positions(input_ids.shape[1])
        hidden, residual = self.embed_tokens(input_ids), None
        if torch.is_autocast_enabled(hidden.device.type):  # the residual stream has the dtype that layers compute in
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        for layer, block in enumerate(self.layers):
            hidden, residual = block(hidden, residual, self.cos, self.sin, positions, cache, layer)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(hidden, residual)[0]


class Transformer(nn.Module):
    """A causal language model. Its state dict has the names of Hugging Face's LlamaForCausalLM / Qwen3ForCausalLM.

    Weights start random: embeddings N(0, 0.02²), projections N(0, 1 / (4 · fan_in)), and zero for the projections that
    write to the residual stream, so that every block starts as the identity.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = LinearCrossEntropyLoss()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim != 2:
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif "embed_tokens" in name or "lm_head" in name:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)

    @property
    def output_weight(self) -> Tensor:
        """`(vocab_size, hidden_size)`: logits are hidden states times this, transposed."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """`(batch, seq)` int64 -> `(batch, seq, hidden_size)`, after the last norm.

        Raises:
            ValueError: the sequence, with what `cache` holds, is longer than the context.
        """
        end = input_ids.shape[1] if cache is None else cache.end(input_ids.shape[1])
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.context_length}")
        return self.model(input_ids, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """What `hidden_states` gave, `(..., hidden_size)` -> `(..., vocab_size)`."""
        return nn.functional.linear(hidden, self.output_weight)

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """`(batch, seq)` int64 -> logits `(batch, seq, vocab_size)`. With `cache`, ids go after the tokens it holds."""
        return self.logits(self.hidden_states(input_ids, cache))

    def loss(self, input_ids: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """Next-token cross-entropy in nats; `targets` `(batch, seq)`, -100 where none counts.

        A scalar, or like `targets` with reduction="none".
        """
        return self.loss_function(self.hidden_states(input_ids), self.output_weight, targets, reduction)

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `context_length` tokens."""
        weight = self.model.embed_tokens.weight
        c = self.config
        return KVCache(
            c.num_layers,
            batch_size,
            c.context_length,
            c.num_kv_heads,
            c.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
