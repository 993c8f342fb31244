"""Questions to a model whose answer is one of a few words: read off the next token's probabilities, not sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastlm.inference import LLM
from fastlm.inference.evaluation import Question, answer_questions

PROMPTS_AT_ONCE = 32  # each gives a row of logits as long as the vocabulary


def next_logprobs(
    llm: LLM, prompts: Sequence[str], words: Sequence[str], on_progress: Callable[[float], None] = lambda fraction: None
) -> Tensor:
    """Log-probability that each word comes next, `(prompts, words)` fp32: of its first token, where it has several.

    What prompts begin with in common is computed once, by the engine's prefix cache.

    Raises ValueError when two words begin with the same token.
    """
    ids = [llm.tokenizer.encode(word, disallowed_special=())[0] for word in words]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the tokenizer begins two of {', '.join(map(repr, words))} with the same token")
    found = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        logits = llm.embed(prompts[start : start + PROMPTS_AT_ONCE], pooling="logits")
        found.append(torch.log_softmax(logits.float(), dim=-1)[:, ids])
        on_progress(min(1.0, (start + PROMPTS_AT_ONCE) / len(prompts)))
    return torch.cat(found)


def share_of_first(llm: LLM, prompts: Sequence[str], words: tuple[str, str]) -> list[float]:
    """For each prompt, P(first word) / (P(first) + P(second)) of what follows it, all tokens of the words counted."""
    answers = answer_questions(llm, [Question(prompt, words, 0) for prompt in prompts])
    return [1.0 / (1.0 + float(np.exp(a.logprobs[1] - a.logprobs[0]))) for a in answers]
