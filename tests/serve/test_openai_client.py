from __future__ import annotations

import asyncio
import base64
import json
import math

import numpy as np
import openai
import pytest
import torch

from fastlm.inference import SamplingParams

PROMPT = "이 영화는 The film"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(server, prompt, **params) -> str:
    return server.llm.generate([prompt], SamplingParams(**params))[0].text


def test_a_completion_is_what_the_model_says_alone(server, client) -> None:
    for seed in range(3):
        got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=seed, temperature=0.9)
        text = alone(server, PROMPT, max_tokens=20, seed=seed, temperature=0.9)
        assert got.choices[0].text == text
        assert got.usage.prompt_tokens == len(server.llm.prompt_ids(PROMPT))
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.model == "tiny"
    assert got.object == "text_completion"


def test_a_stream_holds_the_same_text_and_usage(client) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "seed": 5, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**asked)
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 30
    assert len(events) > 10


def test_async_clients_at_once_get_their_own_texts(server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                if seed % 2:
                    stream = await client.completions.create(
                        model="tiny", prompt=PROMPT, max_tokens=15, seed=seed, stream=True
                    )
                    return "".join([event.choices[0].text async for event in stream])
                got = await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=15, seed=seed)
                return got.choices[0].text

            return await asyncio.gather(*(one(seed) for seed in range(24)))

    texts = asyncio.run(ask())
    assert texts == [alone(server, PROMPT, max_tokens=15, seed=seed) for seed in range(24)]


def test_several_prompts_and_samples_come_in_order_and_can_be_drawn_alone(server, client) -> None:
    got = client.completions.create(model="tiny", prompt=["The", "이 영화"], n=3, max_tokens=8, seed=7)
    texts = [choice.text for choice in got.choices]
    assert [choice.index for choice in got.choices] == list(range(6))
    expected = [alone(server, p, max_tokens=8, seed=7 + i) for i, p in enumerate(["The"] * 3 + ["이 영화"] * 3)]
    assert texts == expected
    ids = [server.llm.prompt_ids(p) for p in ("The", "이 영화")]
    assert [
        c.text for c in client.completions.create(model="tiny", prompt=ids, n=3, max_tokens=8, seed=7).choices
    ] == texts


def test_without_a_seed_texts_differ(client) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 1.5}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(4)}) > 1


def test_stop_ends_the_text_before_the_string(server, client) -> None:
    text = alone(server, PROMPT, max_tokens=60, seed=1, ignore_eos=True)
    stop = text[len(text) // 2 :][:2]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "seed": 1, "extra_body": {"ignore_eos": True}}
    for given in (stop, [stop, "never there"]):
        got = client.completions.create(**asked, stop=given)
        assert got.choices[0].text == text[: text.index(stop)]
        assert got.choices[0].finish_reason == "stop"
        streamed = client.completions.create(**asked, stop=given, stream=True)
        assert "".join(event.choices[0].text for event in streamed) == text[: text.index(stop)]


def test_logprobs_are_the_models_own(server, client) -> None:
    ids = server.llm.prompt_ids(PROMPT)
    got = client.completions.create(
        model="tiny", prompt=ids, max_tokens=6, temperature=0, logprobs=5, extra_body={"return_token_ids": True}
    )
    found = got.choices[0].logprobs
    drawn = found.token_ids
    logits = server.llm.model(torch.tensor([ids + drawn]))[0].double().log_softmax(-1)
    for i, token in enumerate(drawn):
        row = logits[len(ids) + i - 1]
        assert found.token_logprobs[i] == pytest.approx(row[token].item(), abs=1e-4)
        assert [top["id"] for top in found.top_tokens[i]] == row.topk(5).indices.tolist()
        assert max(found.top_logprobs[i].values()) == found.token_logprobs[i]  # greedy
    streamed = client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0, logprobs=5, stream=True)
    tokens = [token for event in streamed for token in event.choices[0].logprobs.tokens]
    assert tokens == found.tokens


def test_echo_with_logprobs_scores_the_prompt(server, client) -> None:
    ids = server.llm.prompt_ids(PROMPT)
    got = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    found = got.choices[0].logprobs
    assert got.choices[0].text == PROMPT
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(server.llm.score([ids])[0].logprobs, abs=1e-5)
    offsets = found.text_offset[1:]
    assert offsets == sorted(offsets)


def test_a_bias_forces_and_penalties_prevent(server, client) -> None:
    token = server.llm.tokenizer.encode("!")[0]
    got = client.completions.create(model="tiny", prompt="a", max_tokens=5, temperature=0, logit_bias={str(token): 100})
    assert got.choices[0].text == "!" * 5
    got = client.completions.create(
        model="tiny", prompt="a", max_tokens=8, temperature=0, presence_penalty=2, frequency_penalty=2, seed=1
    )
    expected = alone(server, "a", max_tokens=8, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert got.choices[0].text == expected


def test_chat_follows_the_template_and_its_stream_is_the_same(server, client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "영화?"}]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    got = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    prompt = server.llm.chat_prompt(messages)
    text = alone(server, prompt.prompt, max_tokens=12, temperature=0.0, stop_token_ids=prompt.stop_token_ids)
    assert got.choices[0].message.content == text
    assert got.choices[0].message.role == "assistant"
    entry = got.choices[0].logprobs.content[0]
    assert entry.logprob == entry.top_logprobs[0].logprob
    assert bytes(entry.bytes).decode("utf-8", "ignore") == entry.token or entry.token.startswith("bytes:")
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == text
    assert events[-1].usage == got.usage


def test_chat_without_max_tokens_ends_where_the_context_does(server, client) -> None:
    messages = [{"role": "user", "content": "a"}]
    got = client.chat.completions.create(model="tiny", messages=messages, extra_body={"ignore_eos": True}, seed=1)
    assert got.choices[0].finish_reason in ("stop", "length")
    assert got.usage.total_tokens <= server.llm.context_length


def test_json_follows_its_schema(client) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    messages = [{"role": "user", "content": "a"}]
    for seed in range(3):
        got = client.chat.completions.create(
            model="tiny", messages=messages, response_format=response_format, seed=seed, max_tokens=200
        )
        value = json.loads(got.choices[0].message.content)
        assert 0 <= value["age"] <= 99
        assert isinstance(value["ok"], bool)
    got = client.chat.completions.create(
        model="tiny", messages=messages, response_format={"type": "json_object"}, max_tokens=200, seed=0, n=4
    )
    whole = [c.message.content for c in got.choices if c.finish_reason == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in whole)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "날씨",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Seoul", "Paris"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_a_tool_is_called_with_arguments_of_its_schema(client, choice) -> None:
    messages = [{"role": "user", "content": "a"}]
    asked = {"model": "tiny", "messages": messages, "tools": TOOLS, "tool_choice": choice, "max_tokens": 150, "seed": 3}
    got = client.chat.completions.create(**asked)
    assert got.choices[0].finish_reason == "tool_calls"
    call = got.choices[0].message.tool_calls[0]
    assert call.function.name in ("weather", "time") if choice == "required" else ("time",)
    assert json.loads(call.function.arguments)["city"] in ("Seoul", "Paris")
    events = list(client.chat.completions.create(**asked, stream=True))
    deltas = [c for e in events for c in e.choices[0].delta.tool_calls or ()]
    assert [(d.function.name, d.function.arguments) for d in deltas] == [(call.function.name, call.function.arguments)]
    answer = {"role": "tool", "tool_call_id": call.id, "content": "20 °C"}
    asked["messages"] = [*messages, got.choices[0].message, answer]
    assert client.chat.completions.create(**{**asked, "tool_choice": "none"}).choices[0].message.tool_calls is None


def test_embeddings_have_length_1_and_equal_the_models(server, client) -> None:
    texts = [PROMPT, "a"]
    got = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64 and decodes it
    expected = server.llm.embed(texts)
    for entry, row in zip(got.data, expected, strict=True):
        assert entry.embedding == pytest.approx(row.tolist(), abs=1e-5)
        assert math.hypot(*entry.embedding) == pytest.approx(1, abs=1e-5)
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(got.data[0].embedding, abs=1e-7)
    raw = client.embeddings.with_raw_response.create(model="tiny", input="a", encoding_format="base64")
    data = json.loads(raw.text)["data"][0]["embedding"]
    assert len(np.frombuffer(base64.b64decode(data), "<f4")) == server.llm.hidden_size


def test_models_are_listed_and_another_is_not_found(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fastlm"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")


def test_a_prompt_past_the_context_is_refused_with_both_numbers(server, client) -> None:
    ids = [1] * (server.llm.context_length + 1)
    with pytest.raises(openai.BadRequestError, match=r"has 769 tokens.* holds 768") as caught:
        client.completions.create(model="tiny", prompt=ids, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"
