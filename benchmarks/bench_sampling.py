"""Drawing the next token beside transformers' warpers and beside plain PyTorch, whose draws come from multinomial.

Logits are normal: a flat distribution, whose nuclei of 100,000 tokens and more are the hardest for us to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from fastlm.benchmarks.harness import Bound, Case, optional
from torch import Tensor

from fastlm.ops import sample
from fastlm.ops.sampling import Sample

TEMPERATURE = 0.8


def draw(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    return torch.multinomial(probabilities, 1)[:, 0], probabilities


def with_transformers(
    logits: Tensor, top_k: int | None, top_p: float | None, typical_p: float | None = None
) -> tuple[Tensor, Tensor]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

    ids = torch.empty((logits.shape[0], 0), dtype=torch.int64)
    scores = TemperatureLogitsWarper(TEMPERATURE)(ids, logits.float())
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if typical_p is not None:
        scores = TypicalLogitsWarper(typical_p)(ids, scores)
    return draw(scores.softmax(-1))


def with_torch(logits: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Only the k largest are looked at where there is a top_k; top_p alone must sort the vocabulary."""
    scores = logits.float() / TEMPERATURE
    if top_k is None and top_p is None:
        return draw(scores.softmax(-1))
    values, order = scores.sort(-1, descending=True) if top_k is None else scores.topk(top_k)
    probabilities = values.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    chosen = torch.multinomial(probabilities, 1)
    scattered = torch.zeros_like(scores).scatter_(-1, order, probabilities / probabilities.sum(-1, keepdim=True))
    return order.gather(-1, chosen)[:, 0], scattered


Drawn = tuple[Tensor, Callable[..., Sample]]  # the ids, and the call that gave them, to ask for log-probabilities too


def ours(logits: Tensor, top_k: int | None, top_p: float | None, typical_p: float | None = None) -> Drawn:
    settings = partial(sample, temperature=TEMPERATURE, top_k=top_k, top_p=top_p, typical_p=typical_p)
    call = partial(settings, logits, seed=7, position=0)
    return call().ids, call


def check(a: Drawn, b: tuple[Tensor, Tensor], rtol: float = 1e-3, atol: float = 0.0) -> None:
    """The peer gives our tokens the probabilities that we drew them with."""
    ids, call = a
    again = call(return_logprobs=True)
    assert again.processed_logprobs is not None
    assert torch.equal(ids, again.ids)
    theirs = b[1].gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(again.processed_logprobs.exp(), theirs, rtol=rtol, atol=atol)


def cases(device: str) -> Iterable[Case]:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    settings: list[tuple[int, int, int | None, float | None]]  # batch, vocabulary, top_k, top_p
    if gpu:
        filters = ((50, 0.9), (None, 0.9), (None, None))
        settings = [(batch, 128256, top_k, top_p) for batch in (1, 128) for top_k, top_p in filters]
    else:
        settings = [(8, 152064, 50, 0.9), (1, 262144, None, 0.9), (8, 262144, None, 0.9), (8, 8192, None, None)]
    peers: dict[str, Callable] = {"torch": with_torch}
    if optional("transformers"):
        peers["transformers"] = with_transformers
    for batch, vocab_size, top_k, top_p in settings:
        logits = torch.randn(batch, vocab_size, device=device).to(dtype)
        steps = ["temperature", *([f"top-k {top_k}"] if top_k else []), *([f"top-p {top_p}"] if top_p else [])]
        yield Case(
            name=f"{' + '.join(steps)}, batch {batch}, vocabulary {vocab_size}, {str(dtype).removeprefix('torch.')}",
            ours=partial(ours, logits, top_k, top_p),
            peers={name: partial(peer, logits, top_k, top_p) for name, peer in peers.items()},
            check=check,
            bound=Bound(bytes=logits.numel() * logits.element_size()),  # the logits, read once
            work=batch,
            unit="tokens",
        )
    if "transformers" in peers:
        yield typical_case(torch.randn(128 if gpu else 8, 128256 if gpu else 152064, device=device).to(dtype))


def typical_case(logits: Tensor) -> Case:
    batch, vocab_size = logits.shape
    dtype = str(logits.dtype).removeprefix("torch.")
    return Case(
        name=f"temperature + typical-p 0.9, batch {batch}, vocabulary {vocab_size}, {dtype}",
        ours=partial(ours, logits, None, None, 0.9),
        peers={"transformers": partial(with_transformers, logits, None, None, 0.9)},
        check=check,
        bound=Bound(bytes=logits.numel() * logits.element_size()),  # the logits, read once
        work=batch,
        unit="tokens",
    )
