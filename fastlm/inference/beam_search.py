"""Beam search: the continuations of highest probability, a few at a time, as far as a beam sees.

Each step asks the engine for the 2 · width most probable next tokens of every beam. A beam's keys are in the prefix
cache, so a step computes only the tokens since its last full block.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastlm.errors import ConfigError, InferenceError
from fastlm.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastlm.inference.llm import LLM


@dataclass(frozen=True)
class Beam:
    """A continuation. `logprob` is the sum over its tokens, and `score` = logprob / (number of tokens) ** penalty."""

    token_ids: list[int]
    text: str
    logprob: float
    score: float
    finished: bool  # it ended with an end-of-text token, which `token_ids` holds last


def beam_search(llm: LLM, prompt_ids: list[int], *, width: int, max_tokens: int, length_penalty: float) -> list[Beam]:
    """The best `width` continuations found, best score first.

    Of all one-token continuations of the current beams, the best `width` that do not end the text are the next beams;
    those among the best `width` of all that end it are set aside. The search is over at `max_tokens`, or when `width`
    have ended and no beam can do better than the worst of them. Wu et al., 2016 (arXiv 1609.08144), section 7, without
    coverage; transformers' beam search with early_stopping="never".

    Raises:
        ConfigError: a setting is out of range.
        InferenceError: the model's logits are not finite.
    """
    if width < 1 or max_tokens < 1:
        raise ConfigError(f"width and max_tokens must be positive, not {width} and {max_tokens}")
    eos = llm.tokenizer.eos_token_id
    num_candidates = min(2 * width, llm.tokenizer.vocab_size)
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=num_candidates, ignore_eos=True)

    def scored(logprob: float, length: int) -> float:
        return logprob / length**length_penalty

    beams: list[tuple[float, list[int]]] = [(0.0, [])]  # (sum of log-probabilities, tokens)
    finished: list[tuple[float, float, list[int]]] = []  # (score, sum, tokens): a heap, worst first
    for length in range(1, max_tokens + 1):
        completions = llm.generate([prompt_ids + ids for _, ids in beams], [params] * len(beams))
        candidates = []
        for (logprob, ids), completion in zip(beams, completions, strict=True):
            if completion.logprobs is None:
                raise InferenceError(f"beam search cannot go on: {completion.error}")
            candidates += [(logprob + value, [*ids, token]) for token, value in completion.logprobs[0].top]
        candidates.sort(key=lambda candidate: -candidate[0])
        beams = []
        for rank, (logprob, ids) in enumerate(candidates):
            if ids[-1] != eos:
                beams.append((logprob, ids))
            elif rank >= width:
                continue
            elif len(finished) < width:
                heapq.heappush(finished, (scored(logprob, length), logprob, ids))
            else:
                heapq.heappushpop(finished, (scored(logprob, length), logprob, ids))
            if len(beams) == width:
                break
        if not beams:
            break
        # A beam's sum can only fall; its score is at most its sum over the greatest length it may reach.
        longest = max_tokens if length_penalty > 0 else length
        if len(finished) == width and scored(beams[0][0], longest) <= finished[0][0]:
            break
    else:
        finished += [(scored(logprob, len(ids)), logprob, ids) for logprob, ids in beams]
    best = sorted(finished, key=lambda entry: -entry[0])[:width]
    return [
        Beam(
            token_ids=ids,
            text=llm.tokenizer.decode([i for i in ids if i != eos], errors="ignore"),
            logprob=logprob,
            score=score,
            finished=ids[-1] == eos,
        )
        for score, logprob, ids in best
    ]
