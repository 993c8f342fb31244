from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fastlm.errors import ConfigError
from fastlm.inference import LLM, SamplingParams
from fastlm.model import ModelConfig
from tests.inference.conftest import random_model

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"enum": ["good", "bad", "긴"]}, "maxItems": 3},
    },
    "required": ["name", "stars", "tags"],
    "additionalProperties": False,
}
ARITHMETIC = """
start: sum
sum: product ("+" product)*
product: atom ("*" atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
PARAMS = SamplingParams(max_tokens=150, temperature=1.3)


@pytest.fixture(scope="module")
def llm(tokenizer) -> Iterator[LLM]:
    model = random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 256))
    with LLM(model, tokenizer, num_drafts=4) as made:
        yield made


def test_text_of_a_random_model_is_json_of_the_schema(llm) -> None:
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        ended = 0
        for completion in llm.generate(["영화:"] * 8, replace(PARAMS, json_schema=schema)):
            assert completion.finish_reason in ("stop", "eos", "length")
            if completion.finish_reason == "length":  # white space and escapes may go on for long
                continue
            ended += 1
            value = json.loads(completion.text)
            assert set(value) == {"name", "stars", "tags"}
            assert len(value["name"]) <= 6
            assert value["stars"] in range(1, 6)
            assert len(value["tags"]) <= 3
            assert set(value["tags"]) <= {"good", "bad", "긴"}
        assert ended > 0


def test_text_matches_a_regular_expression_as_a_whole(llm) -> None:
    pattern = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2]) (좋|나쁨)+!"
    texts = [c.text for c in llm.generate(["날짜"] * 8, replace(PARAMS, regex=pattern)) if c.finish_reason != "length"]
    assert texts
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_text_follows_a_grammar_with_recursion(llm) -> None:
    completions = llm.generate(["1"] * 12, replace(PARAMS, grammar=ARITHMETIC, max_tokens=60))
    ended = [c.text for c in completions if c.finish_reason != "length"]
    assert ended
    for text in ended:
        assert re.fullmatch(r"[0-9+*()]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=[0-9])", "", text), {}), int)  # Python refuses leading zeros


def test_samples_and_neighbours_keep_their_own_place_in_the_grammar(llm) -> None:
    params = replace(PARAMS, regex="[ab]{10}c", n=4, seed=2)
    together = [c.text for c in llm.generate(["x", "y"], params)]
    assert all(re.fullmatch("[ab]{10}c", text) for text in together)
    assert len(set(together)) > 1
    alone = [llm.generate(["xy"[i // 4]], replace(params, n=1, seed=2 + i))[0].text for i in range(8)]
    assert alone == together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regex": "(a"}, "regex is not valid"),
        ({"json_schema": "{"}, "json_schema is not valid"),
        ({"json_schema": {"type": "nothing"}}, "json_schema is not valid"),
        ({"grammar": "start: missing"}, "grammar is not valid"),
    ],
)
def test_a_grammar_that_is_not_valid_is_refused_at_once(llm, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llm.generate(["a"], replace(PARAMS, **changes))
    assert llm.stats().running == 0


def test_two_grammars_and_a_missing_parser_are_refused_by_name(tokenizer, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        SamplingParams(regex="a", grammar="start: a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model = random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 256))
    with LLM(model, tokenizer) as fresh, pytest.raises(ConfigError, match=r"pip install fastlm\[grammar\]"):
        fresh.generate(["a"], replace(PARAMS, regex="a"))
