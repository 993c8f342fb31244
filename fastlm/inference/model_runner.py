"""Runs the model on one step's chunks, and takes from the hidden states what each sequence wants."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastlm.inference.outputs import TokenLogprob
from fastlm.inference.paged_cache import PagedCache
from fastlm.inference.recurrent_cache import RecurrentCache
from fastlm.inference.sampler import Draw, Row, draw, token_logprobs
from fastlm.inference.scheduler import Chunk
from fastlm.model.checkpoint import LanguageModel

LOGITS_AT_ONCE = (
    1 << 22
)  # numbers, of a prompt's own probabilities: larger arrays than 32 MiB come new from the system each time


@dataclass
class ChunkResult:
    """What came of a chunk.

    draws: the token after the sequence, then after each draft; empty before the end of the prompt.
    prompt_logprobs: of the prompt's tokens that this chunk predicts and that were not known before.
    pooled: `(hidden_size,)` fp32, the sum, or the last, of the chunk's hidden states; or the logits after the prompt.
    """

    draws: list[Draw] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    pooled: Tensor | None = None


class ModelRunner:
    """`vocab_size` is the tokenizer's: a model may have more rows of padding, which are never drawn."""

    def __init__(
        self, model: LanguageModel, cache: PagedCache | RecurrentCache, vocab_size: int, eos_token_id: int | None
    ) -> None:
        self.model = model
        self.cache = cache
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id

    def run(self, chunks: list[Chunk]) -> list[ChunkResult]:
        hidden = self.cache.hidden_states(self.model, chunks)  # type: ignore[arg-type]  # the model's own kind
        results = [ChunkResult() for _ in chunks]
        rows: list[Row] = []
        places: list[int] = []  # of these rows in `hidden`
        owners: list[ChunkResult] = []
        end = 0
        for chunk, result in zip(chunks, results, strict=True):
            begin, end = end, end + len(chunk.ids)
            sequence = chunk.sequence
            if sequence.prompt_logprobs is not None:
                result.prompt_logprobs = self._prompt_logprobs(chunk, hidden[begin:end])
            if sequence.pooling == "logits":
                result.pooled = self._logits(hidden[end - 1 : end])[0].float() if chunk.reaches_end else None
            elif sequence.pooling is not None:
                states = hidden[begin:end].float()
                result.pooled = states.sum(0) if sequence.pooling == "mean" else states[-1]
            if sequence.draws and chunk.reaches_end:
                known = len(chunk.ids) - chunk.num_drafts
                for i in range(known, len(chunk.ids) + 1):
                    rows.append(Row(sequence, chunk.ids[known:i]))
                    places.append(begin + i - 1)
                    owners.append(result)
        if rows:
            logits = self._logits(hidden if len(places) == end else hidden[places])
            for owner, drawn in zip(owners, draw(logits, rows, self.eos_token_id), strict=True):
                owner.draws.append(drawn)
        return results

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)[:, : self.vocab_size]

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> list[TokenLogprob]:
        sequence = chunk.sequence
        assert sequence.prompt_logprobs is not None
        first = max(chunk.start + 1, len(sequence.prompt_logprobs))
        targets = sequence.tokens[first : min(chunk.start + len(chunk.ids) + 1, sequence.prompt_length)]
        hidden = hidden[first - chunk.start - 1 :][: len(targets)]
        found: list[TokenLogprob] = []
        at_once = max(1, LOGITS_AT_ONCE // self.vocab_size)
        for i in range(0, len(targets), at_once):
            logits = self._logits(hidden[i : i + at_once])
            found += token_logprobs(logits, targets[i : i + at_once], sequence.params.prompt_logprobs or 0)
        return found
