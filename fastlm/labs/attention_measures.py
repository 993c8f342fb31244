"""What the attention lab measures: the weights of every head, and in words where they go."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.model import Transformer
from fastlm.model.checkpoint import LanguageModel
from fastlm.nn.attention_weights import AttentionRecorder


class EveryHead(AttentionRecorder):
    """Records all heads of all layers while a model reads one text: `maps` is `(layers, heads, seq, seq)`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, 0, device)
        self._maps: list[Tensor] = []

    @property
    def maps(self) -> Tensor:
        return torch.stack(self._maps)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.layer = layer
        heads = []
        for self.head in range(q.shape[2]):
            out = super().attend(layer, q, k, v, **options)
            heads.append(self.weights)
        self._maps.append(torch.stack(heads))
        return out


@torch.inference_mode()
def attention_maps(model: Transformer, ids: list[int]) -> Tensor:
    """`(layers, heads, seq, seq)`: what each token's query gives to the tokens up to it; rows sum to 1."""
    recorder = EveryHead(model.output_weight.device)
    model.hidden_states(torch.tensor([ids], device=model.output_weight.device), recorder)
    return recorder.maps.cpu()


class Where(NamedTuple):
    """`(layers, heads)` each: averages over queries from the third on, whose token before is not the first."""

    first: Tensor  # share of the first token
    previous: Tensor  # share of the token before
    itself: Tensor
    entropy: Tensor  # nats
    distance: Tensor  # tokens back, on average


def where(maps: Tensor) -> Where:
    rows = maps[:, :, 2:].double()
    place = torch.arange(2, maps.shape[2])
    back = (place[:, None] - torch.arange(maps.shape[3])).clamp(min=0).double()
    index = torch.arange(len(place))
    return Where(
        rows[..., 0].mean(-1),
        rows[:, :, index, place - 1].mean(-1),
        rows[:, :, index, place].mean(-1),
        -(rows * rows.clamp(min=1e-30).log()).sum(-1).mean(-1),
        (rows * back).sum(-1).mean(-1),
    )


def looks(model: LanguageModel, texts: list[list[int]]) -> Where:
    """Averages over texts."""
    assert isinstance(model, Transformer)
    return average([where(attention_maps(model, ids)) for ids in texts])


def average(found: list[Where]) -> Where:
    """Over texts."""
    return Where(*(torch.stack(values).mean(0) for values in zip(*found, strict=True)))


def uniform(seq: int) -> Where:
    """Of attention that gives each token the same."""
    even = torch.ones(seq, seq).tril() / torch.arange(1, seq + 1)[:, None]
    return where(even[None, None])


def induction(maps: Tensor, length: int) -> Tensor:
    """Of a text of which the last `length` tokens repeat the `length` before them: what the queries of the second half
    give to the token that followed their token's first occurrence (Olsson et al. 2022). `(layers, heads)`."""
    queries = torch.arange(maps.shape[2] - length, maps.shape[2])
    return maps[:, :, queries, queries - length + 1].mean(-1)


def shuffled(ids: list[int], generator: torch.Generator) -> list[int]:
    """The same tokens in random order, save the first, which begins the text."""
    order = torch.randperm(len(ids) - 1, generator=generator) + 1
    return [ids[0], *[ids[i] for i in order.tolist()]]


def largest(values: Tensor) -> tuple[int, int]:
    """Layer and head."""
    layer, head = divmod(int(values.argmax()), values.shape[1])
    return layer, head
