"""How well a model predicts a text, and which of several answers it finds most probable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastlm.errors import ConfigError, DataError
from fastlm.inference.llm import LLM

WINDOWS_AT_ONCE = 16
QUESTIONS_AT_ONCE = 16


@dataclass(frozen=True)
class TextScore:
    """`nats` is the sum of -log p over `tokens` tokens, which stand for `num_bytes` bytes."""

    nats: float
    tokens: int
    num_bytes: int
    context_length: int  # tokens that a prediction may look back on

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Does not depend on the vocabulary, so that models with different tokenizers compare."""
        return self.nats / math.log(2) / self.num_bytes


def score_text(llm: LLM, text: str, *, context_length: int, stride: int | None = None) -> Iterator[TextScore]:
    """Scores `text`, yielding the sum so far; the last is that of the whole.

    Windows of `context_length` tokens advance by `stride` (half of that by default), and each scores only the tokens
    that none before it did: so each token is scored once and, but in the first window, after at least context_length -
    stride others. A first token that nothing stands before, not even a token for the beginning, is left out, with its
    bytes.

    Raises:
        DataError: there is no token to score.
        ConfigError: context_length is below 2 or above the model's, or stride is not within it.
    """
    stride = max(1, context_length // 2) if stride is None else stride
    longest = llm.context_length or context_length
    if not 2 <= context_length <= longest:
        raise ConfigError(f"context_length must lie between 2 and {longest}, not {context_length}")
    ids = llm.tokenizer.encode(text, disallowed_special=())
    beginning = llm.prompt_ids(text)[: -len(ids)] if ids else []
    room = context_length - len(beginning)
    if not 1 <= stride <= room:
        raise ConfigError(f"stride must lie between 1 and {room}, not {stride}")
    first = 0 if beginning else 1
    if len(ids) <= first:
        raise DataError("the text has no token to score")
    windows = []  # (first token of the window, first to score, end)
    scored = first
    while scored < len(ids):
        end = min(len(ids), room if scored == first else scored + stride)
        windows.append((max(0, end - room), scored, end))
        scored = end
    nats, tokens = 0.0, 0
    for i in range(0, len(windows), WINDOWS_AT_ONCE):
        batch = windows[i : i + WINDOWS_AT_ONCE]
        scores = llm.score(
            [beginning + ids[start:end] for start, _, end in batch],
            since=[len(beginning) + since - start for start, since, _ in batch],
        )
        for (_, since, end), score in zip(batch, scores, strict=True):
            nats -= sum(score.logprobs)
            tokens += end - since
        num_bytes = len(llm.tokenizer.decode_bytes(ids[first : batch[-1][2]]))
        yield TextScore(nats, tokens, num_bytes, context_length)


@dataclass(frozen=True)
class Question:
    """`choices` are continuations of `prompt`; `answer` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answer:
    """The choice of the highest log-probability, and the one of the highest log-probability a byte.

    The first favours short choices; the second (lm-evaluation-harness's `acc_norm`) does not.
    """

    chosen: int
    chosen_by_byte: int
    logprobs: tuple[float, ...]


def answer_questions(llm: LLM, questions: Sequence[Question]) -> Iterator[Answer]:
    """The model's choice for each question, in order.

    Raises:
        CapacityError: a question is longer than the context.
    """
    for i in range(0, len(questions), QUESTIONS_AT_ONCE):
        batch = questions[i : i + QUESTIONS_AT_ONCE]
        whole = [llm.prompt_ids(q.prompt + choice) for q in batch for choice in q.choices]
        prompts = [prompt for q in batch for prompt in [llm.prompt_ids(q.prompt)] * len(q.choices)]
        common = [_common(*pair) for pair in zip(prompts, whole, strict=True)]
        since = [min(count, len(ids) - 1) for count, ids in zip(common, whole, strict=True)]
        scores = llm.score(whole, since=since)
        # An empty choice has nothing to predict.
        sums = iter([sum(s.logprobs) if c < len(w) else 0.0 for s, c, w in zip(scores, common, whole, strict=True)])
        for question in batch:
            logprobs = [next(sums) for _ in question.choices]
            by_byte = [p / max(1, len(c.encode())) for p, c in zip(logprobs, question.choices, strict=True)]
            yield Answer(_largest(logprobs), _largest(by_byte), tuple(logprobs))


def _common(prompt: list[int], ids: list[int]) -> int:
    """How many tokens the two begin with alike: a token may span the prompt's end."""
    common = 0
    while common < min(len(prompt), len(ids)) and prompt[common] == ids[common]:
        common += 1
    return common


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
