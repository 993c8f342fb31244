"""Attention, forward and with its backward, beside plain PyTorch, SDPA and, on a GPU, cuDNN and FlexAttention.

On Hopper our Gluon kernels have a row of their own, whichever backend `ours` is. FASTLM_BENCH_GLUON=0 leaves it out, as
`run_gpu.sh` does where their tests fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastlm.ops import attention
from fastlm.ops._registry import missing
from fastlm.ops.features import forced

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out = attention(q, k, v, causal=causal)
    assert isinstance(out, Tensor)
    return out


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What a model without fused attention runs: logits, mask, softmax and product, each in memory."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend | None = None) -> Tensor:
    call = partial(
        scaled_dot_product_attention,
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    if backend is None:
        return call().transpose(1, 2)
    with sdpa_kernel(backend):
        return call().transpose(1, 2)


@cache
def compiled_flex(seq: int, causal: bool, device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seq, seq, device=device) if causal else None
    return partial(torch.compile(flex_attention), block_mask=mask)


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    function = compiled_flex(q.shape[1], causal, q.device.type)
    return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def forward_only(function: Function, tensors: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (function(*tensors),)


def with_backward(function: Function, tensors: list[Tensor], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        out = function(*tensors)
        return (out, *torch.autograd.grad(out, tensors, grad))

    return step


def on_gluon(step: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The same step, served by the Gluon kernels."""

    def run() -> tuple[Tensor, ...]:
        with forced("gluon"):
            return step()

    return run


def has_gluon(device: str) -> bool:
    return (
        device == "cuda"
        and torch.cuda.get_device_capability()[0] == 9
        and missing("gluon") is None
        and os.environ.get("FASTLM_BENCH_GLUON") != "0"
    )


def check(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left.float(), right.float(), rtol=3e-2, atol=3e-2 * right.float().std().item())


def cases(device: str) -> Iterable[Case]:
    if device == "cuda":  # batch · seq = 16k tokens, hidden size 2048
        shapes = [(16384 // seq, seq, 2048 // d, 2048 // d, d, causal)
                  for d in (64, 128) for seq in (4096, 16384) for causal in (True, False)]  # fmt: skip
        dtype = torch.bfloat16
        peers: dict[str, Callable[..., Tensor]] = {
            "SDPA flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
            "FlexAttention": flex,
        }
    else:
        shapes = [(16, 256, 8, 8, 32, True), (2, 1024, 8, 2, 64, True)]
        dtype = torch.float32
        peers = {"eager": eager, "SDPA": sdpa}
    for batch, seq, heads, kv_heads, head_dim, causal in shapes:
        q, grad = (torch.randn(batch, seq, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
        k, v = (torch.randn(batch, seq, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
        frozen, tensors = [q, k, v], [t.detach().requires_grad_() for t in (q, k, v)]
        # Two products of 2 · seq² · head_dim a head, half of them under a causal mask; the backward has five.
        flops = 4.0 * batch * heads * seq * seq * head_dim / (2 if causal else 1)
        forward = {p: forward_only(partial(f, causal=causal), frozen) for p, f in peers.items()}
        both = {p: with_backward(partial(f, causal=causal), tensors, grad) for p, f in peers.items()}
        if has_gluon(device):
            forward["gluon"] = on_gluon(forward_only(partial(ours, causal=causal), frozen))
            both["gluon"] = on_gluon(with_backward(partial(ours, causal=causal), tensors, grad))
        name = f"{batch}×{seq}×{heads}/{kv_heads}×{head_dim} {'causal' if causal else 'full'}"
        yield Case(
            name=f"forward {name}",
            ours=forward_only(partial(ours, causal=causal), frozen),
            peers=forward,
            check=check,
            bound=Bound(flops=flops, dtype=dtype),
            work=flops,
            unit="FLOP",
        )
        yield Case(
            name=f"forward + backward {name}",
            ours=with_backward(partial(ours, causal=causal), tensors, grad),
            peers=both,
            check=check,
            bound=Bound(flops=3.5 * flops, dtype=dtype),
            work=3.5 * flops,
            unit="FLOP",
        )
