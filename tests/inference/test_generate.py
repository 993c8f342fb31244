from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastlm.errors import ConfigError
from fastlm.inference import SamplingParams, generate, stream
from fastlm.inference.sampler import Draw
from fastlm.model.checkpoint import LanguageModel
from fastlm.tokenizer import Tokenizer

PROMPTS = ["이 영화", "", "The film was very good and the music", "좋"]


def greedy_without_cache(model: LanguageModel, tokenizer: Tokenizer, prompt: str, count: int) -> list[int]:
    ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt)]
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_greedy_tokens_equal_those_of_the_whole_sequence_computed_anew_each_time(model, tokenizer) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    for completion, prompt in zip(generate(model, tokenizer, PROMPTS, params), PROMPTS, strict=True):
        assert completion.token_ids == greedy_without_cache(model, tokenizer, prompt, 20)
        assert completion.finish_reason == "length"


def test_a_row_does_not_depend_on_the_rows_beside_it(model, tokenizer) -> None:
    params = [
        SamplingParams(max_tokens=5 + 6 * i, temperature=0.7 + 0.2 * i, seed=40 + i, ignore_eos=True) for i in range(4)
    ]
    together = generate(model, tokenizer, PROMPTS, params)
    for i in range(4):
        assert generate(model, tokenizer, [PROMPTS[i]], [params[i]])[0] == together[i]
    assert generate(model, tokenizer, PROMPTS[::-1], params[::-1]) == together[::-1]


def test_the_same_seed_gives_the_same_text_and_row_i_has_seed_plus_i(model, tokenizer) -> None:
    params = SamplingParams(max_tokens=12, seed=7)
    first = generate(model, tokenizer, ["이 영화"] * 3, params)
    assert generate(model, tokenizer, ["이 영화"] * 3, params) == first
    assert generate(model, tokenizer, ["이 영화"], replace(params, seed=9))[0] == first[2]
    assert len({tuple(c.token_ids) for c in first}) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.5, 10.0])
def test_text_is_whole_characters_at_every_seed_and_temperature(model, tokenizer, temperature: float) -> None:
    rows = 24
    completions = generate(
        model, tokenizer, ["이 영화 🎬"] * rows, SamplingParams(max_tokens=17, temperature=temperature, seed=100)
    )
    for completion in completions:
        assert "\ufffd" not in completion.text
        assert completion.text.encode().decode() == completion.text
        ids = [i for i in completion.token_ids if i != tokenizer.eos_token_id]
        assert completion.text == tokenizer.decode(ids, errors="ignore")
    if temperature == 10.0:  # the case is there: random bytes are seldom UTF-8
        assert any("\ufffd" in tokenizer.decode(c.token_ids) for c in completions)


def test_streamed_pieces_joined_are_the_text(model, tokenizer) -> None:
    params = SamplingParams(max_tokens=25, seed=3)
    pieces = list(stream(model, tokenizer, ["이 영화"], params))
    completion = generate(model, tokenizer, ["이 영화"], params)[0]
    assert "".join(p.text for p in pieces) == completion.text
    assert [p.token_id for p in pieces] == completion.token_ids
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == completion.finish_reason


def test_past_the_context_each_token_follows_from_the_latest_half_to_whole_context(transformer, tokenizer) -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompts = ["The film", "이 영화는 정말 재미있었다. The film was good, 음악도 좋았다!", "a"]
    for prompt, completion in zip(prompts, generate(transformer, tokenizer, prompts, params), strict=True):
        ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt)]
        window = list(ids) if len(ids) <= 16 else ids[-8:]
        for token in completion.token_ids:
            with torch.no_grad():
                assert int(transformer(torch.tensor([window]))[0, -1].argmax()) == token
            ids.append(token)
            window = [*window, token] if len(window) < 16 else ids[-8:]


def test_end_of_text_ends_a_row_and_the_others_go_on(tokenizer, model, monkeypatch) -> None:
    script = {0: [10, 11, tokenizer.eos_token_id], 1: [12, 13, 14, 15, 16]}

    def scripted(logits, rows, eos_token_id):
        return [Draw(script[row.sequence.request_id][row.generated]) for row in rows]

    monkeypatch.setattr("fastlm.inference.model_runner.draw", scripted)
    first, second = generate(model, tokenizer, ["a", "b"], SamplingParams(max_tokens=5))
    assert (first.token_ids, first.finish_reason) == (script[0], "eos")
    assert (second.token_ids, second.finish_reason) == (script[1], "length")
    assert "<|endoftext|>" not in first.text


def test_generation_ends_before_a_stop_string_that_spans_tokens(tokenizer, model, monkeypatch) -> None:
    ids = tokenizer.encode("The film was 좋았다! and more")

    monkeypatch.setattr("fastlm.inference.model_runner.draw", lambda _, rows, eos: [Draw(ids[rows[0].generated])])
    params = SamplingParams(max_tokens=len(ids), stop=("았다!", "zzz"))
    completion = generate(model, tokenizer, ["x"], params)[0]
    assert completion.text == "The film was 좋"
    assert completion.finish_reason == "stop"
    whole = generate(model, tokenizer, ["x"], replace(params, stop=("more!",)))[0]
    assert whole.text == "The film was 좋았다! and more"  # "more" was held back, and is given at the end


def test_filters_and_penalty_have_their_effect(model, tokenizer) -> None:
    base = SamplingParams(max_tokens=15, temperature=1.0, seed=5, ignore_eos=True)
    greedy = generate(model, tokenizer, ["이"], replace(base, temperature=0))[0].token_ids
    for narrow in (replace(base, top_k=1), replace(base, top_p=1e-9), replace(base, min_p=1.0)):
        assert generate(model, tokenizer, ["이"], narrow)[0].token_ids == greedy
    assert generate(model, tokenizer, ["이"], base)[0].token_ids != greedy
    penalised = generate(model, tokenizer, ["이"], replace(base, temperature=0, repetition_penalty=1e6))[0].token_ids
    assert len(set(penalised)) == 15


def test_no_tokens_asked_for_gives_none(model, tokenizer) -> None:
    completion = generate(model, tokenizer, ["이"], SamplingParams(max_tokens=0))[0]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [], "length")
    assert generate(model, tokenizer, [], SamplingParams()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.1}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number"),
        ({"max_tokens": -1}, "max_tokens must be 0 or a positive integer"),
        ({"seed": -1}, "seed must lie between"),
        ({"stop": "end"}, "stop must be a tuple"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**changes)


def test_a_tokenizer_of_another_model_and_a_bare_string_are_refused(model, tokenizer) -> None:
    other = Tokenizer({bytes([i]): i for i in range(256)}, pattern="gpt2", special_tokens={"<|endoftext|>": 256})
    with pytest.raises(ConfigError, match="257 ids"):
        generate(model, other, ["a"], SamplingParams())
    with pytest.raises(ConfigError, match="list of strings"):
        generate(model, tokenizer, "a", SamplingParams())
    with pytest.raises(ConfigError, match="2 sampling parameters for 1 prompts"):
        generate(model, tokenizer, ["a"], [SamplingParams()] * 2)
