"""Causal self-attention as a module: projections, optional QK-norm, rotary positions, grouped heads, KV cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastlm.nn.kv_cache import Cache
from fastlm.nn.normalization import RMSNorm
from fastlm.nn.projections import project
from fastlm.ops import attention, rotary


class Attention(nn.Module):
    """Grouped-query causal self-attention.

    Args:
        hidden_size: width of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`. Default: as many as query heads.
        head_dim: width of a head. Default: hidden_size / num_heads.
        qkv_bias, output_bias: whether those projections have one.
        qk_norm: RMSNorm over each head's query and key before the rotation, as in Qwen 3.
        norm_eps, norm_weight_offset: of that norm.
        window: tokens that a query sees, itself included. Default: all before it.
        softcap: bound on the logits' size, as in Gemma 2.
        scale: of the logits. Default: 1 / sqrt(head_dim).

    Vaswani et al. 2017 (attention), Shazeer 2019 (multi-query) and Ainslie et al. 2023 (grouped-query).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_weight_offset: float = 0.0,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.window = window
        self.softcap = softcap
        self.scale = scale
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=output_bias)
        self.q_norm = RMSNorm(self.head_dim, norm_eps, weight_offset=norm_weight_offset) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps, weight_offset=norm_weight_offset) if qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`(batch, seq, hidden_size)` -> the same shape.

        `cos` and `sin` are `fastlm.ops.rotary_tables`, or None for no rotation; `positions` `(batch, seq)` are the rows
        of them to use, by default 0, 1, 2, …. With `cache`, keys and values are kept at `layer` and queries see every
        token that the cache holds. With `cu_seqlens`, `(sequences + 1,)` int32, the batch · seq tokens are sequences
        one after the other, whatever row they are in, and none sees another's tokens.
        """
        projected = (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        return self.attend(*projected, cos, sin, positions, cache, layer, cu_seqlens)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What follows the projections: q, k and v are theirs, `(batch, seq, heads · head_dim)`."""
        batch, seq, _ = q.shape
        q = q.view(batch, seq, self.num_heads, self.head_dim)
        k = k.view(batch, seq, self.num_kv_heads, self.head_dim)
        v = v.view(batch, seq, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = rotary(q, k, cos, sin, positions=positions)
        options: dict[str, Any] = {"causal": True, "window": self.window, "softcap": self.softcap, "scale": self.scale}
        if cu_seqlens is not None:
            out = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **options, cu_seqlens_q=cu_seqlens)
            assert isinstance(out, Tensor)
        elif cache is None:
            out = attention(q, k, v, **options)
            assert isinstance(out, Tensor)
        else:
            out = cache.attend(layer, q, k, v, window=self.window, softcap=self.softcap, scale=self.scale)
        return project(self.o_proj, out.reshape(batch, seq, self.num_heads * self.head_dim))
