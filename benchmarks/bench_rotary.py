"""Rotary embedding of q and k, forward and backward, beside the usual rotate_half in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor

from fastlm.ops import rotary, rotary_tables


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat((t, t), -1)[None, : q.shape[1], None].to(q.dtype) for t in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return rotate(q), rotate(k)


def forward_backward(function: Callable, q: Tensor, k: Tensor, tables: tuple, grads: list) -> Callable[[], tuple]:
    def step() -> tuple:
        outputs = function(q, k, *tables)
        return (*outputs, *torch.autograd.grad(outputs, (q, k), grads))

    return step


def check(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left.float(), right.float(), rtol=3e-2, atol=3e-2 * right.float().std().item())


def cases(device: str) -> Iterable[Case]:
    gpu = device.startswith("cuda")
    batch, seq, heads, kv_heads, head_dim = (4, 4096, 32, 8, 128) if gpu else (8, 512, 8, 2, 64)
    peers = {"torch": plain} | ({"torch.compile": torch.compile(plain)} if gpu else {})
    for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
        fused = torch.randn(batch, seq, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype)
        q, k, _ = fused.split((heads, kv_heads, kv_heads), 2)  # of a fused projection
        grads = [torch.randn_like(t) for t in (q, k)]
        tables = rotary_tables(head_dim, seq, device=device)
        moved = 2 * (q.numel() + k.numel()) * q.element_size()
        name = f"{batch}×{seq}, {heads}+{kv_heads} heads of {head_dim}, {str(dtype).removeprefix('torch.')}"
        yield Case(
            name=f"forward {name}",
            ours=lambda q=q, k=k, t=tables: rotary(q, k, *t),
            peers={peer: (lambda f=f, q=q, k=k, t=tables: f(q, k, *t)) for peer, f in peers.items()},
            check=check,
            bound=Bound(bytes=moved),
        )
        leaves = [t.detach().requires_grad_() for t in (q, k)]
        yield Case(
            name=f"forward + backward {name}",
            ours=forward_backward(rotary, leaves[0], leaves[1], tables, grads),
            peers={peer: forward_backward(f, leaves[0], leaves[1], tables, grads) for peer, f in peers.items()},
            check=check,
            bound=Bound(bytes=2 * moved),
        )
