"""The gated activation, forward and backward, beside plain PyTorch, eager and (on a GPU) compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor
from torch.nn import functional

from fastlm.ops import swiglu


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def forward_backward(function: Callable, gate: Tensor, up: Tensor, grad: Tensor) -> Callable[[], tuple]:
    def step() -> tuple:
        y = function(gate, up)
        return (y, *torch.autograd.grad(y, (gate, up), grad))

    return step


def check(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left.float(), right.float(), rtol=3e-2, atol=3e-2 * right.float().std().item())


def cases(device: str) -> Iterable[Case]:
    gpu = device.startswith("cuda")
    rows, sizes = (16384, (4096, 11008)) if gpu else (4096, (704, 2048))
    peers = {"torch": plain} | ({"torch.compile": torch.compile(plain)} if gpu else {})
    for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
        for size in sizes:
            gate, up = torch.randn(rows, 2 * size, device=device, dtype=dtype).chunk(2, -1)  # of a fused projection
            grad = torch.randn(rows, size, device=device, dtype=dtype)
            one = grad.numel() * grad.element_size()
            name = f"{rows}×{size} {str(dtype).removeprefix('torch.')}"
            yield Case(
                name=f"forward {name}",
                ours=lambda g=gate, u=up: (swiglu(g, u),),
                peers={peer: (lambda f=f, g=gate, u=up: (f(g, u),)) for peer, f in peers.items()},
                check=check,
                bound=Bound(bytes=3 * one),
            )
            leaves = [t.detach().requires_grad_() for t in (gate, up)]
            yield Case(
                name=f"forward + backward {name}",
                ours=forward_backward(swiglu, leaves[0], leaves[1], grad),
                peers={peer: forward_backward(f, leaves[0], leaves[1], grad) for peer, f in peers.items()},
                check=check,
                bound=Bound(bytes=8 * one),  # and reads grad, gate, up, writes two gradients
            )
