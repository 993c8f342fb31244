"""RMSNorm with its residual, forward and backward, beside plain PyTorch, eager and (on a GPU) compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor

from fastlm.ops import rms_norm


def plain(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6), h


def ours(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, residual=residual, eps=1e-6)  # type: ignore[return-value]


def forward_backward(function: Callable, tensors: list[Tensor], grads: list[Tensor]) -> Callable[[], tuple]:
    def step() -> tuple:
        outputs = function(*tensors)
        return (*outputs, *torch.autograd.grad(outputs, tensors, grads))

    return step


def check(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left.float(), right.float(), rtol=3e-2, atol=3e-2 * right.float().std().item())


def cases(device: str) -> Iterable[Case]:
    rows, dtype = (16384, torch.bfloat16) if device == "cuda" else (4096, torch.float32)
    for hidden_size in (1024, 4096) if device == "cuda" else (256, 1024):
        x, residual, grad_y, grad_h = (torch.randn(rows, hidden_size, device=device, dtype=dtype) for _ in range(4))
        weight = torch.randn(hidden_size, device=device, dtype=dtype)
        tensors = [t.requires_grad_() for t in (x, weight, residual)]
        peers = {"torch": plain} | ({"torch.compile": torch.compile(plain)} if device == "cuda" else {})
        one = x.numel() * x.element_size()

        with torch.no_grad():
            frozen = [t.detach() for t in tensors]
        yield Case(
            name=f"forward {rows}×{hidden_size} {str(dtype).removeprefix('torch.')}",
            ours=lambda t=frozen: ours(*t),
            peers={name: (lambda f=f, t=frozen: f(*t)) for name, f in peers.items()},
            check=check,
            bound=Bound(bytes=4 * one),  # reads x and residual, writes y and h
        )
        yield Case(
            name=f"forward + backward {rows}×{hidden_size} {str(dtype).removeprefix('torch.')}",
            ours=forward_backward(ours, tensors, [grad_y, grad_h]),
            peers={name: forward_backward(f, tensors, [grad_y, grad_h]) for name, f in peers.items()},
            check=check,
            bound=Bound(bytes=8 * one),  # and reads grad_y, grad_h, h, writes grad_x
        )
