"""The output layer and the draw of a token beside torch's linear, softmax and multinomial, which write all logits."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from fastlm.benchmarks.bench_sampling import Drawn, check
from fastlm.benchmarks.harness import Bound, Case
from torch import Tensor
from torch.nn import functional

from fastlm.ops import fused_linear_sample

TEMPERATURE = 0.8


def plain(hidden: Tensor, weight: Tensor, top_p: float | None) -> tuple[Tensor, Tensor]:
    """The ids and what they were drawn from; with top_p the vocabulary is sorted."""
    scores = functional.linear(hidden, weight).float() / TEMPERATURE
    if top_p is None:
        probabilities = scores.softmax(-1)
        return torch.multinomial(probabilities, 1)[:, 0], probabilities
    shares, ids = scores.softmax(-1).sort(-1, descending=True)
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0)
    probabilities = torch.zeros_like(scores).scatter_(-1, ids, shares / shares.sum(-1, keepdim=True))
    return torch.multinomial(probabilities, 1)[:, 0], probabilities


def ours(hidden: Tensor, weight: Tensor, top_p: float | None) -> Drawn:
    call = partial(fused_linear_sample, hidden, weight, temperature=TEMPERATURE, top_p=top_p, seed=7, position=0)
    return call().ids, call


def cases(device: str) -> Iterable[Case]:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    sizes = [(1, 4096, 128256), (64, 4096, 128256)] if gpu else [(1, 640, 32768), (8, 640, 32768)]
    for batch, hidden_size, vocab_size in sizes:
        hidden = torch.randn(batch, hidden_size, device=device).to(dtype)
        weight = (torch.randn(vocab_size, hidden_size, device=device) * 3 * hidden_size**-0.5).to(dtype)
        for top_p in (None, 0.9):
            filters = f", top-p {top_p}" if top_p else ""
            yield Case(
                name=f"batch {batch}, hidden {hidden_size}, vocabulary {vocab_size}{filters}",
                ours=partial(ours, hidden, weight, top_p),
                peers={"torch": partial(plain, hidden, weight, top_p)},
                check=partial(check, rtol=6e-2, atol=1e-6),  # the peer rounds its logits
                bound=Bound(
                    bytes=weight.numel() * weight.element_size(), flops=2.0 * batch * weight.numel(), dtype=dtype
                ),
                work=batch,
                unit="tokens",
            )
