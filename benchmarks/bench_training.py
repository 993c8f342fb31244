"""A training step of our model beside the same model in plain PyTorch, and compiled on a GPU.

Both hold the same weights and read the same tokens; loss and gradients are compared before anything is timed. The
optimizer is left out: it is torch's own on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor, nn
from torch.nn import functional as F

from fastlm.model import ModelConfig, Transformer


class PlainTransformer(nn.Module):
    """The same arithmetic by torch's own functions: logits are kept, nothing is fused."""

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        self.ours = ours  # for its parameters alone
        self.config = ours.config

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        c = self.config
        decoder: Any = self.ours.model
        batch, seq = input_ids.shape
        cos, sin = (t[:seq, None].repeat(1, 1, 2) for t in decoder.rotary.tables(0, seq, input_ids.device))
        hidden = F.embedding(input_ids, decoder.embed_tokens.weight)
        for block in decoder.layers:
            attn, mlp = block.self_attn, block.mlp
            x = self.norm(hidden, block.input_layernorm.weight)
            q, k, v = (
                F.linear(x, p.weight).view(batch, seq, -1, c.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            if c.qk_norm:
                q, k = self.norm(q, attn.q_norm.weight), self.norm(k, attn.k_norm.weight)
            q, k = ((t * cos + self.rotate_half(t) * sin).to(v.dtype) for t in (q, k))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.num_kv_heads != c.num_heads)
            hidden = hidden + F.linear(out.transpose(1, 2).reshape(batch, seq, -1), attn.o_proj.weight)
            x = self.norm(hidden, block.post_attention_layernorm.weight)
            gated = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
            hidden = hidden + F.linear(gated, mlp.down_proj.weight)
        logits = F.linear(self.norm(hidden, decoder.norm.weight), self.ours.output_weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.config.norm_eps)

    @staticmethod
    def rotate_half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)


def step(
    loss_of: Callable[[Tensor, Tensor], Tensor], parameters: list[Tensor], ids: Tensor, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; returns the loss and every gradient."""

    def run() -> tuple[Tensor, ...]:
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(ids[:, :-1], ids[:, 1:].contiguous())
        return (loss.detach(), *torch.autograd.grad(loss, parameters))

    return run


def check(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours[0].float(), peer[0].float(), rtol=1e-2, atol=0)
    for a, b in zip(ours[1:], peer[1:], strict=True):
        error = (a - b).norm() / b.norm().clamp(min=1e-12)
        assert error < 0.06, f"a gradient of shape {tuple(b.shape)} differs by {error:.1%}"


def cases(device: str) -> Iterable[Case]:
    sizes = ((192, 4, 1024, 256, 8), (256, 4, 8192, 512, 16)) if device == "cpu" else ((768, 12, 32768, 1024, 16),)
    for hidden_size, num_layers, vocab_size, seq, batch in sizes:
        heads = hidden_size // 64
        config = ModelConfig(
            vocab_size, hidden_size, num_layers, heads, heads, 64, hidden_size * 8 // 3 // 32 * 32, seq, qk_norm=True
        )
        model = Transformer(config).to(device)
        for parameter in model.parameters():  # not zero anywhere, so that every gradient is compared
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        parameters: list[Tensor] = list(model.parameters())
        ids = torch.randint(vocab_size, (batch, seq + 1), device=device)
        plain = PlainTransformer(model)
        for dtype in (torch.float32, torch.bfloat16):
            matrices = sum(p.numel() for p in parameters if p.ndim == 2)
            peers = {"torch": step(plain, parameters, ids, dtype)}
            if device != "cpu":
                peers["torch.compile"] = step(torch.compile(plain), parameters, ids, dtype)
            yield Case(
                name=f"hidden {hidden_size}, {num_layers} layers, {seq} tokens × {batch}, "
                f"vocabulary {vocab_size} {str(dtype).removeprefix('torch.')}",
                ours=step(model.loss, parameters, ids, dtype),
                peers=peers,
                check=check,
                bound=Bound(flops=6 * matrices * batch * seq, dtype=dtype),
                work=batch * seq,
                unit="tokens",
            )
