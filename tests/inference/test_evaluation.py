from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from fastlm.errors import CapacityError, ConfigError, DataError
from fastlm.inference import LLM
from fastlm.inference.evaluation import Question, answer_questions, score_text

TEXT = "이 영화는 정말 재미있었다. The film was good, 음악도 좋았다! 🎬\n" * 4


@pytest.fixture
def llm(model, tokenizer) -> Iterator[LLM]:
    with LLM(model, tokenizer) as made:
        yield made


def logprob(llm: LLM, ids: list[int], index: int) -> float:
    with torch.no_grad():
        return float(llm.model(torch.tensor([ids[:index]]))[0, -1].log_softmax(-1)[ids[index]])


@pytest.mark.parametrize(("context_length", "stride"), [(20, None), (20, 1), (20, 19), (33, 7), (64, None)])
def test_each_token_is_scored_once_by_a_window_that_ends_with_the_stride(llm, context_length, stride) -> None:
    *parts, whole = score_text(llm, TEXT, context_length=context_length, stride=stride)
    ids = llm.tokenizer.encode(TEXT)
    room, step = context_length - 1, stride or context_length // 2
    expected, end = 0.0, 0
    while end < len(ids):
        since, end = end, min(len(ids), end + step if end else room)
        window = [llm.tokenizer.eos_token_id, *ids[max(0, end - room) : end]]
        expected -= sum(logprob(llm, window, len(window) - (end - i)) for i in range(since, end))
    assert whole.nats == pytest.approx(expected, rel=1e-4)
    assert (whole.tokens, whole.num_bytes) == (len(ids), len(TEXT.encode()))
    assert whole.bits_per_byte == pytest.approx(expected / math.log(2) / len(TEXT.encode()), rel=1e-4)
    assert whole.perplexity == pytest.approx(math.exp(expected / len(ids)), rel=1e-3)
    assert all(part.tokens < whole.tokens for part in parts)


def test_what_cannot_be_scored_is_refused(llm) -> None:
    for text, options, error in (
        ("", {"context_length": 20}, DataError),
        ("a", {"context_length": 1}, ConfigError),
        ("a", {"context_length": 20, "stride": 20}, ConfigError),
        ("a", {"context_length": 20, "stride": 0}, ConfigError),
    ):
        with pytest.raises(error):
            list(score_text(llm, text, **options))
    if llm.context_length is not None:
        with pytest.raises(ConfigError, match="between 2 and 64"):
            list(score_text(llm, "a", context_length=65))


def test_the_choice_is_that_of_the_most_probable_continuation(llm) -> None:
    questions = [
        Question("이 영화는", (" 좋았다", " 재미있었다", " good and long"), 0),
        Question("The film", (" was", "s", "", " 🎬"), 1),
    ]
    for question, answer in zip(questions, answer_questions(llm, questions), strict=True):
        prompt = llm.prompt_ids(question.prompt)
        for choice, got in zip(question.choices, answer.logprobs, strict=True):
            ids = llm.prompt_ids(question.prompt + choice)
            common = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            assert got == pytest.approx(sum(logprob(llm, ids, i) for i in range(common, len(ids))), abs=1e-3)
        assert answer.chosen == max(range(len(question.choices)), key=lambda i: answer.logprobs[i])
        by_byte = [p / max(1, len(c.encode())) for p, c in zip(answer.logprobs, question.choices, strict=True)]
        assert answer.chosen_by_byte == by_byte.index(max(by_byte))
    if llm.context_length is not None:
        with pytest.raises(CapacityError):
            list(answer_questions(llm, [Question("a" * 200, ("b",), 0)]))


def test_scores_from_a_token_on_are_those_of_the_whole_and_read_what_is_shared_once(llm, fresh_seed) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    shared = torch.randint(300, (40,), generator=generator).tolist()
    texts = [shared + torch.randint(300, (n,), generator=generator).tolist() for n in (1, 5, 20)]
    whole = llm.score(texts)
    before = llm.stats().prefix_hit_tokens
    parts = llm.score(texts, since=[40, 41, 40])
    for text, start, part, full in zip(texts, (40, 41, 40), parts, whole, strict=True):
        assert part.token_ids == text[start:]
        assert part.logprobs == pytest.approx(full.logprobs[start - 1 :], abs=1e-4)
    if llm.context_length is not None:
        assert llm.stats().prefix_hit_tokens - before == 3 * 32  # two blocks of 16 a text
    with pytest.raises(ConfigError, match="41 tokens"):
        llm.score(texts[:1], since=[41])
