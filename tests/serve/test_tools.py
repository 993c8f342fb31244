from __future__ import annotations

import json
import random

import pytest

from fastlm.errors import ConfigError
from fastlm.inference.chat import chat_prompt
from fastlm.serve.protocol import Tool
from fastlm.serve.tools import ToolParser, forced_schema

CALLS = {
    "qwen": '<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "서울"}}, {"name": "time", "arguments": {}}]',
    "llama": '{"name": "weather", "parameters": {"city": "서울"}}; {"name": "time", "parameters": {}}',
    "llama with a tag": '<|python_tag|>{"name": "weather", "parameters": {"city": "서울"}}'
    '{"name": "time", "parameters": {}}',
}


def parse(text: str) -> tuple[str, list[tuple[str, object]]]:
    """In pieces of random size, as they come from a model."""
    parser = ToolParser({"weather", "time"})
    said = ""
    while text:
        size = random.randint(1, 5)
        said += parser.push(text[:size])
        text = text[size:]
    rest, calls = parser.finish()
    return said + rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("form", CALLS)
def test_calls_are_found_however_the_text_is_cut(form: str) -> None:
    expected = [("weather", {"city": "서울"}), ("time", {})]
    for _ in range(20):
        assert parse(CALLS[form]) == ("", expected)
        if form in ("qwen", "mistral"):
            assert parse("Let me look. " + CALLS[form]) == ("Let me look. ", expected)


@pytest.mark.parametrize(
    "text",
    [
        "plain words, a < b and [TOOL",
        '{"name": "unknown", "arguments": {}}',
        '{"name": "weather", "arguments": "none"}',
        '{"broken": ',
        '<tool_call>{"name": "weather"',
        "{" * 5000,
        "",
    ],
)
def test_what_is_no_call_is_text_to_the_last_character(text: str) -> None:
    for _ in range(5):
        assert parse(text) == (text, [])


def test_definitions_of_a_tool_stand_at_the_root_of_its_schema() -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"const": 1}}}
    tool = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": parameters}})
    assert json.loads(forced_schema([tool], "f"))["$defs"] == {"A": {"const": 1}}


def test_a_model_whose_template_knows_no_tools_says_so(tokenizer) -> None:
    with pytest.raises(ConfigError, match="knows no tools"):
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}], [{"type": "function"}])


def test_a_tools_description_must_not_spell_a_special_token(chat_tokenizer) -> None:
    special = next(iter(chat_tokenizer.special_tokens))
    with pytest.raises(ConfigError, match="special token"):
        chat_prompt(chat_tokenizer, [{"role": "user", "content": "a"}], [{"function": {"description": special}}])
