"""The real model through the engine, with its weights quantized as they are in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fastlm.errors import CheckpointError
from fastlm.inference import LLM, SamplingParams
from fastlm.model.pretrained import pretrained

PROMPTS = [
    "The capital of France is",
    "one two three one two three one two",
    "이 영화는 정말 재미있",
    "def add(a, b):\n    return",
]


@pytest.fixture(scope="module")
def path() -> str:
    try:
        return str(pretrained("gemma3-270m"))
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def llm(path: str) -> Iterator[LLM]:
    with LLM(path, memory=1 << 28) as made:
        yield made


def test_a_prompt_begins_with_bos_and_goes_on_sensibly(llm) -> None:
    assert llm.prompt_ids("The capital of France is") == [2, 818, 5279, 529, 7001, 563]
    completion = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=8, temperature=0))[0]
    assert completion.text.startswith(" the capital of the country of France")
    right, wrong = llm.score(["The capital of France is Paris", "The capital of France is green"])
    assert right.logprobs[:5] == pytest.approx(wrong.logprobs[:5], abs=1e-3)
    assert right.logprobs[5] > wrong.logprobs[5] + 3


def test_batches_and_guesses_change_no_token(llm) -> None:
    """Exact, although activations are quantized: no row's arithmetic depends on the rows beside it."""
    params = SamplingParams(max_tokens=16, temperature=0.9, seed=7, ignore_eos=True)
    together = llm.generate(PROMPTS, params)
    for i, prompt in enumerate(PROMPTS):
        alone = llm.generate([[*llm.prompt_ids(prompt)]], replace(params, seed=7 + i))[0]
        assert alone.token_ids == together[i].token_ids
    with LLM(llm.model, llm.tokenizer, memory=1 << 28, num_drafts=7) as guessing:
        assert guessing.generate(PROMPTS, params) == together
        assert guessing.stats().accepted_draft_tokens > 0
