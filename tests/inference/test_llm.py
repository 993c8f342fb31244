from __future__ import annotations

import asyncio
import gc
import itertools
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import transformers

from fastlm.errors import CapacityError, ConfigError, InferenceError
from fastlm.inference import LLM, SamplingParams, generate
from fastlm.model import ModelConfig, save_model
from tests.inference.conftest import random_model

PROMPTS = ["이 영화", "", "The film was very good and the music", "좋"]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture
def llm(model, tokenizer) -> Iterator[LLM]:
    """Over a transformer, an LSTM and a GRU."""
    with LLM(model, tokenizer) as made:
        yield made


@pytest.fixture
def paged(tokenizer) -> Iterator[LLM]:
    model = random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 64))
    with LLM(model, tokenizer, block_size=4, max_batch_tokens=16) as made:
        yield made


def wait_until(condition) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def exact_logprobs(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Of the next token after each of `ids`, `(tokens, vocab_size)`."""
    with torch.no_grad():
        return llm.model(torch.tensor([ids]))[0].log_softmax(-1)


def test_text_is_that_of_the_plain_functions(llm) -> None:
    params = SamplingParams(max_tokens=15, temperature=0.9, seed=11)
    assert llm.generate(PROMPTS, params) == generate(llm.model, llm.tokenizer, PROMPTS, params)
    assert llm.generate([], params) == []


def test_streams_of_several_threads_do_not_disturb_each_other(llm) -> None:
    params = [SamplingParams(max_tokens=20, seed=i) for i in range(6)]
    expected = [llm.generate([PROMPTS[i % 4]], [params[i]])[0].text for i in range(6)]
    got: dict[int, str] = {}

    def read(i: int) -> None:
        got[i] = "".join(piece.text for piece in llm.stream([PROMPTS[i % 4]], [params[i]]))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(6)] == expected


def test_coroutines_are_served_together(paged) -> None:
    async def ask() -> list:
        async def streamed() -> str:
            return "".join([piece.text async for piece in paged.astream([PROMPTS[2]], GREEDY)])

        return await asyncio.gather(*(paged.agenerate([p], GREEDY) for p in PROMPTS), streamed())

    *completions, text = asyncio.run(ask())
    assert [c[0] for c in completions] == [paged.generate([p], GREEDY)[0] for p in PROMPTS]
    assert text == completions[2][0].text
    assert paged.stats().steps < 12 * 9  # fewer than one after the other


def test_what_is_abandoned_is_freed(paged) -> None:
    long = SamplingParams(max_tokens=50, ignore_eos=True)
    stream = paged.stream(["a"], long)
    next(stream)
    stream.close()
    wait_until(lambda: paged.stats().blocks_used == 0)

    async def begin() -> None:
        async for _ in paged.astream(["a"], replace(long, n=2)):
            break
        task = asyncio.create_task(paged.agenerate(["b"], long))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(begin())
    wait_until(lambda: paged.stats().blocks_used == 0)
    assert paged.stats().running == paged.stats().waiting == 0


def test_a_prompt_that_is_refused_takes_those_beside_it_along(paged) -> None:
    with pytest.raises(CapacityError, match="context holds 64"):
        paged.generate([[1], [1] * 70], SamplingParams(max_tokens=30))
    wait_until(lambda: paged.stats().blocks_used == 0)
    with pytest.raises(ConfigError, match="list of strings"):
        paged.generate("a")
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        LLM(paged.model)


def test_a_failing_model_fails_its_requests_and_not_the_next(paged, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            paged._engine.runner.cache, "hidden_states", lambda *_: (_ for _ in ()).throw(MemoryError("too large"))
        )
        completions = paged.generate(["a", "b"], replace(GREEDY, n=2))
        assert [c.finish_reason for c in completions] == ["error"] * 4
        assert "MemoryError: too large" in completions[0].error
        with pytest.raises(InferenceError, match="too large"):
            paged.score(["a"])
        with pytest.raises(InferenceError, match="too large"):
            paged.embed(["a"])
    assert paged.generate(["a"], GREEDY)[0].finish_reason == "length"


def test_closing_ends_what_is_served_and_the_thread(paged) -> None:
    stream = paged.stream(["a"], SamplingParams(max_tokens=60, ignore_eos=True))
    next(stream)
    paged.close()
    assert [p.finish_reason for p in stream][-1] in ("error", "length")
    with pytest.raises(RuntimeError, match="closed"):
        paged.generate(["a"])


def test_a_model_that_is_forgotten_takes_its_thread_along(tokenizer) -> None:
    before = threading.active_count()
    llm = LLM(random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 64)), tokenizer)
    llm.generate(["a"], GREEDY)
    assert threading.active_count() == before + 1
    del llm
    gc.collect()
    assert threading.active_count() == before


def test_a_directory_is_loaded(model, tokenizer, tmp_path) -> None:
    save_model(model, tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    with LLM(tmp_path) as llm:
        assert llm.generate(["a"], GREEDY) == generate(model, tokenizer, ["a"], GREEDY)


def test_n_samples_have_seeds_that_follow_and_come_prompt_by_prompt(llm) -> None:
    params = SamplingParams(max_tokens=8, seed=5, n=3)
    completions = llm.generate(["a", "b"], params)
    assert [(c.prompt, c.index) for c in completions] == [(p, i) for p in "ab" for i in range(3)]
    for i, completion in enumerate(completions):
        alone = llm.generate([completion.prompt], replace(params, n=1, seed=5 + i))[0]
        assert (alone.text, alone.token_ids) == (completion.text, completion.token_ids)


def test_logprobs_are_the_log_softmax_of_the_model_whatever_was_done_to_the_logits(llm) -> None:
    params = SamplingParams(
        max_tokens=10, temperature=2.0, top_k=20, repetition_penalty=1.5, logit_bias={3: 4.0}, logprobs=4,
        prompt_logprobs=2, ignore_eos=True, seed=3,
    )  # fmt: skip
    completion = llm.generate(["The film was good"], params)[0]
    prompt = llm.prompt_ids("The film was good")
    exact = exact_logprobs(llm, prompt + completion.token_ids)
    assert completion.prompt_logprobs[0] is None
    entries = completion.prompt_logprobs[1:] + completion.logprobs
    assert [entry.token_id for entry in entries] == prompt[1:] + completion.token_ids
    for i, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(exact[i, entry.token_id]), abs=1e-4)
        best = exact[i].topk(2 if i < len(prompt) - 1 else 4)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_scores_equal_teacher_forcing(llm) -> None:
    texts = ["The film was very good.", "이 영화는 정말 재미있었다", "", [5, 9, 200, 31]]
    for text, score in zip(texts, llm.score(texts), strict=True):
        ids = llm.prompt_ids(text) if isinstance(text, str) else text
        with torch.no_grad():
            loss = llm.model.loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), "none")[0] if len(ids) > 1 else []
        assert score.token_ids == ids[1:]
        assert score.logprobs == pytest.approx([-float(value) for value in loss], abs=1e-4)
        assert score.total == pytest.approx(sum(score.logprobs))
    with torch.no_grad():
        llm.model.output_weight.fill_(float("nan"))
    with pytest.raises(InferenceError, match="not be scored"):
        llm.score(["a"])


def test_embeddings_are_the_pooled_hidden_states_and_similar_texts_are_near(llm) -> None:
    texts = ["The film was very good and the music too, 정말 좋았다.", "이 영화", ""]
    for pooling in ("mean", "last"):
        got = llm.embed(texts, pooling=pooling)
        assert got.shape == (3, llm.hidden_size)
        for vector, text in zip(got, texts, strict=True):
            with torch.no_grad():
                hidden = llm.model.hidden_states(torch.tensor([llm.prompt_ids(text)]))[0]
            expected = torch.nn.functional.normalize(hidden.mean(0) if pooling == "mean" else hidden[-1], dim=0)
            torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)
    assert llm.embed([]).shape == (0, llm.hidden_size)


def test_an_embedding_does_not_depend_on_chunks(paged) -> None:
    """The prompt is longer than a step's 16 tokens, and read after the same prompt is in the cache."""
    ids = list(range(40))
    paged.generate([ids], GREEDY)
    with torch.no_grad():
        hidden = paged.model.hidden_states(torch.tensor([ids]))[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    torch.testing.assert_close(paged.embed([ids])[0], expected, rtol=1e-4, atol=1e-5)


def test_presence_and_frequency_penalties_and_bias_move_the_draw_as_defined(paged) -> None:
    first = paged.generate(["a"], GREEDY)[0].token_ids
    once = paged.generate(["a"], replace(GREEDY, presence_penalty=1e6))[0].token_ids
    assert len(set(once)) == len(once)
    biased = paged.generate(["a"], replace(GREEDY, logit_bias={77: 1e6}))[0].token_ids
    assert biased == [77] * 12
    both = paged.generate(["a"], replace(GREEDY, logit_bias={77: 1e6, 78: 1e6}, frequency_penalty=1e7))[0].token_ids
    assert set(both[:2]) == {77, 78}
    forbidden = paged.generate(["a"], replace(GREEDY, logit_bias=dict.fromkeys(first, -math.inf)))[0].token_ids
    assert not set(forbidden) & set(first)


def test_nothing_is_drawn_when_everything_is_forbidden(paged) -> None:
    bias = dict.fromkeys(range(paged.tokenizer.vocab_size), -math.inf)
    completion = paged.generate(["a"], replace(GREEDY, logit_bias=bias))[0]
    assert completion.finish_reason == "error"
    assert completion.token_ids == []


def test_stop_tokens_end_the_text_without_being_shown_and_not_before_min_tokens(paged) -> None:
    a, b = paged.tokenizer.encode("a")[0], paged.tokenizer.encode("b")[0]
    params = replace(GREEDY, logit_bias={a: 1e6}, stop_token_ids=(a,))
    completion = paged.generate(["x"], params)[0]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [a], "stop")
    later = paged.generate(["x"], replace(params, logit_bias={a: 1e6, b: 1e5}, min_tokens=3))[0]
    assert (later.text, later.token_ids, later.finish_reason) == ("bbb", [b, b, b, a], "stop")
    eos = paged.tokenizer.eos_token_id
    ended = paged.generate(["x"], replace(GREEDY, ignore_eos=False, logit_bias={eos: 1e6, b: 1e5}, min_tokens=2))[0]
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("bb", [b, b, eos], "eos")


@pytest.mark.parametrize("num_drafts", [0, 6])
def test_stop_strings_never_leak_into_a_stream(tokenizer, num_drafts: int) -> None:
    model = random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 64))
    with LLM(model, tokenizer, num_drafts=num_drafts) as llm:
        met = 0
        for seed in range(30):
            params = SamplingParams(max_tokens=40, temperature=1.0, seed=seed, ignore_eos=True)
            whole = llm.generate(["음악"], params)[0].text
            if len(whole) < 8:
                continue
            stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
            text = ""
            for piece in llm.stream(["음악"], replace(params, stop=(stop,))):
                text += piece.text
                assert stop not in text
            assert text == whole[: whole.index(stop)]
            assert piece.finish_reason == "stop"
            met += 1
        assert met > 10


class Letters:
    """A tokenizer of six tokens."""

    vocab_size = 6
    eos_token_id = 5
    special_tokens: ClassVar = {"<|endoftext|>": 5}

    def token_bytes(self, token: int) -> bytes:
        return b"abcde"[token : token + 1]

    def decode(self, ids: list[int], errors: str = "strict") -> str:
        return "".join("abcde"[i] for i in ids)


@pytest.fixture
def tiny() -> Iterator[LLM]:
    """A model so small that all its continuations can be looked at."""
    with LLM(random_model(ModelConfig(6, 16, 1, 2, 2, 8, 16, 32)), Letters(), block_size=2) as llm:
        yield llm


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_continuations(tiny, length_penalty: float) -> None:
    length, eos = 4, 5
    everything = []
    for ids in itertools.chain.from_iterable(itertools.product(range(6), repeat=n) for n in range(1, length + 1)):
        complete = ids[-1] == eos or len(ids) == length
        if complete and eos not in ids[:-1]:
            exact = exact_logprobs(tiny, [0, 1, *ids])[1:]
            logprob = sum(float(exact[i, token]) for i, token in enumerate(ids))
            everything.append((logprob / len(ids) ** length_penalty, list(ids)))
    everything.sort(reverse=True)
    beams = tiny.beam_search([0, 1], width=5**3, max_tokens=length, length_penalty=length_penalty)
    scores = {tuple(ids): score for score, ids in everything}
    assert [beam.score for beam in beams[:10]] == pytest.approx([score for score, _ in everything[:10]], abs=1e-4)
    for beam in beams:
        assert beam.score == pytest.approx(scores[tuple(beam.token_ids)], abs=1e-4)
        assert beam.finished == (beam.token_ids[-1] == eos)
        assert beam.text == tiny.tokenizer.decode([i for i in beam.token_ids if i != eos])


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0])
def test_a_narrow_beam_finds_what_that_of_transformers_finds(tiny, tmp_path, width: int, length_penalty: float) -> None:
    save_model(tiny.model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    out = theirs.generate(
        torch.tensor([[0, 1]]),
        attention_mask=torch.ones(1, 2, dtype=torch.int64),
        max_new_tokens=9,
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=length_penalty,
        early_stopping="never",
        eos_token_id=5,
        pad_token_id=5,
        output_scores=True,
        return_dict_in_generate=True,
    )
    beams = tiny.beam_search([0, 1], width=width, max_tokens=9, length_penalty=length_penalty)
    for beam, sequence in zip(beams, out.sequences[:, 2:].tolist(), strict=True):
        assert beam.token_ids == (sequence[: sequence.index(5) + 1] if 5 in sequence else sequence)
    assert [beam.score for beam in beams] == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)


def test_a_step_of_beam_search_computes_only_what_is_new(tiny) -> None:
    tiny.beam_search([0, 1] * 8, width=4, max_tokens=3, length_penalty=0.0)
    assert tiny.stats().prefix_hit_tokens >= 4 * 14
    with pytest.raises(ConfigError, match="width and max_tokens"):
        tiny.beam_search([0], width=0)
    with pytest.raises(CapacityError):
        tiny.beam_search([0] * 40, max_tokens=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presence_penalty": float("inf")}, "presence_penalty must be a finite number"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite number"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must map"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias must map"),
        ({"n": 0}, "n must be an integer from 1"),
        ({"stop_token_ids": [1]}, "stop_token_ids must be a tuple"),
        ({"min_tokens": 300}, r"min_tokens \(300\) is above max_tokens"),
        ({"logprobs": -1}, "logprobs must be 0 or"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs must be 0 or"),
        ({"order": "random"}, "order must be"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**changes)
