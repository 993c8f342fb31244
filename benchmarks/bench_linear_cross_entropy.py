"""Cross-entropy of the last linear layer beside `cross_entropy(linear(hidden, weight), targets)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor
from torch.nn import functional

from fastlm.ops import linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight), targets)


def forward_backward(function: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], tuple]:
    def step() -> tuple:
        loss = function(hidden, weight, targets)
        return (loss, *torch.autograd.grad(loss, (hidden, weight)))

    return step


def check(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        error = (left.float() - right.float()).norm() / right.float().norm()
        assert error < 2e-2, f"relative error {error:.1e}"


def cases(device: str) -> Iterable[Case]:
    gpu = device.startswith("cuda")
    shapes = ((4096, 4096, 128256), (16384, 2048, 128256)) if gpu else ((4096, 256, 2048), (4096, 256, 8192))
    peers = {"torch": plain} | ({"torch.compile": torch.compile(plain)} if gpu else {})
    for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
        for tokens, hidden_size, vocab_size in shapes:
            hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype)
            weight = (torch.randn(vocab_size, hidden_size, device=device) * hidden_size**-0.5).to(dtype)
            targets = torch.randint(0, vocab_size, (tokens,), device=device)
            name = (
                f"{tokens} tokens, hidden {hidden_size}, vocabulary {vocab_size}, {str(dtype).removeprefix('torch.')}"
            )
            product = 2.0 * tokens * hidden_size * vocab_size
            yield Case(
                name=f"forward {name}",
                ours=lambda h=hidden, w=weight, t=targets: (linear_cross_entropy(h, w, t),),
                peers={peer: (lambda f=f, h=hidden, w=weight, t=targets: (f(h, w, t),)) for peer, f in peers.items()},
                check=check,
                bound=Bound(flops=product, dtype=dtype),
                work=tokens,
                unit="tokens",
            )
            leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
            yield Case(
                name=f"forward + backward {name}",
                ours=forward_backward(linear_cross_entropy, leaves[0], leaves[1], targets),
                peers={peer: forward_backward(f, leaves[0], leaves[1], targets) for peer, f in peers.items()},
                check=check,
                bound=Bound(flops=3 * product, dtype=dtype),
                work=tokens,
                unit="tokens",
            )
