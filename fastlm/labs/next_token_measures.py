"""What the next-token lab measures: a model's guesses on held-out text, beside what counting alone predicts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.model.checkpoint import LanguageModel
from fastlm.training import TokenDataset


class Ngrams:
    """Of a stream of ids: `unigram` `(vocab_size,)` and `bigram` `(vocab_size, vocab_size)`, rows summing to 1.

    The unigram counts each token once more than it occurs; a bigram row blends its counts with the unigram in the
    proportion of Witten and Bell (1991): by how many different tokens were seen to follow.
    """

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        counts = ids.bincount(minlength=vocab_size).double() + 1
        self.unigram = counts / counts.sum()
        pairs = (ids[:-1] * vocab_size + ids[1:]).bincount(minlength=vocab_size**2).double()
        pairs = pairs.view(vocab_size, vocab_size)
        kinds = (pairs > 0).sum(1, keepdim=True).clamp(min=1)
        self.bigram = (pairs + kinds * self.unigram) / (pairs.sum(1, keepdim=True) + kinds)


def perplexity(probabilities: Tensor) -> float:
    """Of the tokens that were given these probabilities."""
    return math.exp(float(-probabilities.log().mean()))


def divergence(p: Tensor, q: Tensor) -> float:
    """Kullback-Leibler divergence of `q` from `p` in nats, averaged over rows."""
    return float((p * (p.clamp(min=1e-30).log() - q.log())).sum(-1).mean())


class Reading(NamedTuple):
    """Of the model at one moment, over the same held-out windows."""

    perplexity: float
    accuracy: float  # share of tokens that were the first guess
    entropy: float  # nats
    from_unigram: float  # divergence of the model's distribution from that of counting, nats
    from_bigram: float
    shuffled: float  # perplexity when the tokens of each window come in random order


def windows(dataset: TokenDataset, context_length: int, count: int) -> Tensor:
    """`(count, context_length + 1)` ids from all over the validation text."""
    length = context_length + 1
    starts = torch.linspace(0, len(dataset.valid) - length, count).long().tolist()
    return torch.stack([torch.from_numpy(dataset.valid.read(start, length)) for start in starts])


class HeldOut:
    """Held-out text to read again and again, and what counting predicts of it."""

    def __init__(self, dataset: TokenDataset, context_length: int, count: int) -> None:
        ids = windows(dataset, context_length, count)
        self.inputs, self.targets = ids[:, :-1], ids[:, 1:]
        self.counted = self.targets != dataset.eos_token_id
        mixing = torch.Generator().manual_seed(0)
        mixed = torch.stack([row[torch.randperm(len(row), generator=mixing)] for row in ids])
        self.mixed_inputs, self.mixed_targets = mixed[:, :-1], mixed[:, 1:]
        train = torch.from_numpy(dataset.train.read(0, len(dataset.train)))
        counts = Ngrams(train, dataset.tokenizer.vocab_size)
        self.unigram = counts.unigram
        self.bigram = counts.bigram[self.inputs[self.counted]]
        right = self.targets[self.counted]
        self.unigram_perplexity = perplexity(self.unigram[right])
        self.bigram_perplexity = perplexity(self.bigram.gather(1, right[:, None]))

    @torch.inference_mode()
    def read(self, model: LanguageModel) -> Reading:
        p = model(self.inputs).double().softmax(-1)[self.counted]
        right = self.targets[self.counted]
        in_disorder = model(self.mixed_inputs).double().softmax(-1).gather(-1, self.mixed_targets[..., None])
        return Reading(
            perplexity(p.gather(1, right[:, None])),
            float((p.argmax(-1) == right).double().mean()),
            float(-(p * p.log()).sum(-1).mean()),
            divergence(p, self.unigram),
            divergence(p, self.bigram),
            perplexity(in_disorder),
        )
