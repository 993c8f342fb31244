from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
import transformers

from fastlm.errors import CapacityError, ConfigError
from fastlm.inference import Engine, Piece, SamplingParams
from fastlm.inference.paged_cache import PagedCache
from fastlm.model import ModelConfig, Transformer, save_model
from fastlm.ops import sample
from fastlm.ops.sampling.reference import filtered, penalized, typical, uniform
from fastlm.tokenizer import Tokenizer
from tests.inference.conftest import CONTEXT, random_model


def engine_of(model: Transformer, tokenizer: Tokenizer, *, num_blocks: int, block_size: int = 4, **options) -> Engine:
    """An engine whose memory holds NaN, so that a slot read before it is written shows."""
    memory = num_blocks * PagedCache.bytes_per_block(model, block_size)
    engine = Engine(model, tokenizer, memory=memory, block_size=block_size, **options)
    for tensor in engine.runner.cache.keys + engine.runner.cache.values:
        tensor.fill_(float("nan"))
    return engine


def run(engine: Engine) -> dict[object, list[Piece]]:
    pieces: dict[object, list[Piece]] = {}
    while engine.has_work:
        for piece in engine.step():
            pieces.setdefault(piece.request_id, []).append(piece)
    return pieces


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [piece.token_id for piece in pieces if piece.token_id is not None]


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    params: SamplingParams


def expected_tokens(model: Transformer, tokenizer: Tokenizer, asked: Asked) -> list[int]:
    """The whole sequence computed anew for each token, without an engine or a cache."""
    ids, p = list(asked.prompt), asked.params
    with torch.no_grad():
        while len(ids) - len(asked.prompt) < p.max_tokens and len(ids) < model.config.context_length:
            drawn = sample(
                model(torch.tensor([ids]))[:, -1],
                temperature=p.temperature,
                top_k=p.top_k,
                top_p=p.top_p,
                min_p=p.min_p,
                repetition_penalty=p.repetition_penalty,
                presence_penalty=p.presence_penalty,
                frequency_penalty=p.frequency_penalty,
                prompt_ids=torch.tensor([asked.prompt]),
                output_ids=torch.tensor([ids[len(asked.prompt) :]], dtype=torch.int64),
                seed=p.seed,
                position=len(ids) - len(asked.prompt),
                order=p.order,
                typical_p=p.typical_p,
            )
            ids.append(int(drawn.ids))
            if ids[-1] == tokenizer.eos_token_id and not p.ignore_eos:
                break
    return ids[len(asked.prompt) :]


def assert_equal_or_tied(model: Transformer, asked: Asked, got: list[int], expected: list[int]) -> None:
    """Equal tokens; or, where they part, a draw that lies within rounding of the boundary between the two."""
    if got == expected:
        return
    at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
    p = asked.params
    exact = Transformer(model.config).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = exact(torch.tensor([asked.prompt + expected[:at]]))[:, -1]

    def row(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    logits = penalized(
        logits,
        row(p.repetition_penalty),
        row(p.presence_penalty),
        row(p.frequency_penalty),
        torch.tensor([asked.prompt]),
        torch.tensor([expected[:at]], dtype=torch.int64),
    )
    if p.temperature == 0:
        best = logits.max()
        assert max(best - logits[0, got[at]], best - logits[0, expected[at]]) < 1e-4
        return
    kept, weights = filtered(
        logits,
        row(p.temperature),
        torch.tensor([p.top_k or 0]),
        row(1.0 if p.top_p is None else p.top_p),
        row(p.min_p or 0.0),
        p.order == "vllm",
    )
    if p.typical_p is not None:
        kept &= typical(weights * kept, row(p.typical_p))
    shares = (weights * kept)[0].cumsum(0)
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), shares / shares[-1]])
    u = float(uniform(torch.tensor([p.seed]), torch.tensor([at])))
    for token in (got[at], expected[at]):
        assert shares[token] - 1e-5 <= u <= shares[token + 1] + 1e-5, (token, u, got, expected)


def random_requests(rng: random.Random, vocab_size: int, count: int) -> list[Asked]:
    """Some begin alike; settings of every kind."""
    stem = [rng.randrange(vocab_size) for _ in range(40)]
    requests = []
    for _ in range(count):
        shared = rng.choice([0, 0, rng.randint(1, 40)])
        prompt = stem[:shared] + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 24),
            temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 2.0]),
            top_k=rng.choice([None, None, 5, 50]),
            top_p=rng.choice([None, None, 0.5, 0.9]),
            min_p=rng.choice([None, None, None, 0.05]),
            typical_p=rng.choice([None, None, None, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.0, 0.7]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
            order=rng.choice(["hf", "vllm"]),
            seed=rng.randrange(1 << 63),
            ignore_eos=rng.random() < 0.5,
        )
        requests.append(Asked(prompt, params))
    return requests


def random_engine(rng: random.Random, model: Transformer, tokenizer: Tokenizer) -> Engine:
    block_size = rng.choice([1, 2, 3, 4, 7, 16, 100])
    enough_for_one = -(-CONTEXT // block_size)
    return engine_of(
        model,
        tokenizer,
        num_blocks=rng.choice([enough_for_one, enough_for_one + 1, 2 * enough_for_one, 10 * enough_for_one]),
        block_size=block_size,
        max_batch_tokens=rng.choice([1, 2, 5, 17, 64, 512]),
        max_sequences=rng.choice([1, 2, 5, 64]),
        prefix_caching=rng.random() < 0.7,
        num_drafts=rng.choice([0, 0, 1, 4, 7]),
    )


def serve_at_random(
    rng: random.Random, engine: Engine, requests: list[Asked]
) -> tuple[dict[object, list[Piece]], set[int]]:
    """The pieces of each request, which come while others do, and the requests that were cancelled."""
    cancelled: set[int] = set()
    got: dict[object, list[Piece]] = {i: [] for i in range(len(requests))}
    upcoming = list(enumerate(requests))
    while upcoming or engine.has_work:
        action = rng.random()
        if upcoming and action < 0.3:
            i, asked = upcoming.pop(0)
            engine.add_request(i, asked.prompt, asked.params)
        elif action < 0.33:
            victim = rng.randrange(len(requests))
            if engine.cancel(victim):
                cancelled.add(victim)
        else:
            for piece in engine.step():
                assert piece.error is None
                got[piece.request_id].append(piece)
    return got, cancelled


@pytest.mark.parametrize("_", range(12))
def test_tokens_are_those_of_the_request_alone_however_it_is_served(_: int, paged, tokenizer, fresh_seed) -> None:
    """Any interleaving, batch, chunking, block size, preemption, cache hit, guess and cancellation of neighbours."""
    rng = random.Random(fresh_seed)
    engine = random_engine(rng, paged, tokenizer)
    requests = random_requests(rng, tokenizer.vocab_size, 10)
    got, cancelled = serve_at_random(rng, engine, requests)
    for i, asked in enumerate(requests):
        expected = expected_tokens(paged, tokenizer, asked)
        tokens = tokens_of(got[i])
        assert_equal_or_tied(paged, asked, tokens, expected[: len(tokens)] if i in cancelled else expected)
        assert i in cancelled or got[i][-1].finish_reason in ("length", "eos")
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_mixed_requests_with_random_cancellations_leave_no_block_in_use(count, paged, tokenizer, fresh_seed) -> None:
    rng = random.Random(fresh_seed)
    engine = engine_of(paged, tokenizer, num_blocks=40, block_size=4, max_batch_tokens=48, num_drafts=3)
    cancelled = added = 0
    requests = random_requests(rng, tokenizer.vocab_size, count)
    while added < count or engine.has_work:
        if added < count and rng.random() < 0.5:
            params = replace(
                requests[added].params, n=rng.choice([1, 1, 3]), prompt_logprobs=rng.choice([None, None, 1])
            )
            engine.add_request(added, requests[added].prompt, params)
            added += 1
        if rng.random() < 0.15:
            cancelled += engine.cancel(rng.randint(max(0, added - 10), added))
        assert all(piece.finish_reason != "error" for piece in engine.step())
    stats = engine.stats()
    assert (stats.blocks_used, stats.waiting, stats.running) == (0, 0, 0)
    assert stats.finished + stats.cancelled == count
    assert stats.cancelled == cancelled > 0
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert engine.blocks.num_free == 40


def test_greedy_tokens_equal_those_of_transformers(llama, tokenizer, tmp_path) -> None:
    save_model(llama, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    engine = engine_of(llama, tokenizer, num_blocks=64, max_batch_tokens=16)
    prompts = [tokenizer.encode(text) for text in ("The film was", "이 영화는 정말 재미있었다.", "음")]
    for i, ids in enumerate(prompts):
        engine.add_request(i, ids, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True))
    got = run(engine)
    for i, ids in enumerate(prompts):
        out = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens_of(got[i]) == out[0, len(ids) :].tolist()


def test_prefix_hits_are_counted_and_save_their_computation(paged, tokenizer) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=64, block_size=4)
    prompt = list(range(10, 31))  # 21 tokens: five full blocks
    params = SamplingParams(max_tokens=3, temperature=0)
    engine.add_request("first", prompt, params)
    first = run(engine)["first"]
    assert engine.stats().prefix_hit_tokens == 0
    engine.add_request("again", prompt, params)
    chunk = engine.scheduler.schedule()[0]
    assert (chunk.start, chunk.ids) == (20, [30])
    engine.cancel("again")
    engine.add_request("again", prompt, params)
    assert tokens_of(run(engine)["again"]) == tokens_of(first)
    assert engine.stats().prefix_hit_tokens == 40  # of both attempts
    engine.add_request("half", [*prompt[:9], 7, 7, 7, 7], params)
    run(engine)
    assert engine.stats().prefix_hit_tokens == 48


def test_samples_of_one_prompt_share_its_blocks_from_the_first_step_on(paged, tokenizer) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=64, block_size=4)
    prompt = list(range(10, 31))
    engine.add_request(0, prompt, SamplingParams(max_tokens=4, n=5, seed=3, ignore_eos=True))
    pieces = engine.step()
    assert {piece.index for piece in pieces} == set(range(5))
    assert engine.stats().blocks_used == 5 + 5
    assert engine.stats().prefix_hit_tokens == 4 * 20
    pieces += run(engine)[0]
    for index in range(5):
        asked = Asked(prompt, SamplingParams(max_tokens=4, seed=3 + index, ignore_eos=True))
        tokens = [p.token_id for p in pieces if p.index == index]
        assert_equal_or_tied(paged, asked, tokens, expected_tokens(paged, tokenizer, asked))


def test_a_long_prompt_is_read_in_chunks_between_which_others_go_on(paged, tokenizer) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=64, max_batch_tokens=8)
    engine.add_request("short", [5], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
    engine.step()
    engine.add_request("long", list(range(50)), SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    for _ in range(7):  # 7 of 8 tokens a step are left for the prompt
        assert [piece.request_id for piece in engine.step()] == ["short"]
    assert [piece.request_id for piece in engine.step()] == ["short", "long"]


def test_when_memory_runs_out_the_latest_arrival_waits_and_loses_nothing(paged, tokenizer) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=8, block_size=4, prefix_caching=False)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    prompts = {name: [i + 1] * 10 for i, name in enumerate("ab")}
    for name, ids in prompts.items():
        engine.add_request(name, ids, params)
    order = []
    pieces: dict[object, list[Piece]] = {"a": [], "b": []}
    while engine.has_work:
        for piece in engine.step():
            pieces[piece.request_id].append(piece)
            order += [piece.request_id] if piece.finish_reason else []
    assert engine.stats().preemptions > 0
    assert order == ["a", "b"]
    for name, ids in prompts.items():
        asked = Asked(ids, params)
        assert_equal_or_tied(paged, asked, tokens_of(pieces[name]), expected_tokens(paged, tokenizer, asked))


def test_a_request_that_can_never_fit_is_refused_at_once_with_the_numbers(paged, tokenizer) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=5, block_size=4)
    with pytest.raises(CapacityError, match=r"12 tokens of prompt and 9 to generate need 6 blocks of 4 tokens.* has 5"):
        engine.add_request(0, [1] * 12, SamplingParams(max_tokens=9))
    engine.add_request(1, [1] * 12, SamplingParams(max_tokens=8))
    roomy = engine_of(paged, tokenizer, num_blocks=64, block_size=4)
    with pytest.raises(CapacityError, match="the prompt has 64 tokens and 1 to generate; the model's context holds 64"):
        roomy.add_request(0, [1] * 64, SamplingParams(max_tokens=1))
    assert not roomy.has_work
    roomy.add_request(1, [1] * 60, SamplingParams(max_tokens=100, ignore_eos=True))
    last = run(roomy)[1][-1]
    assert last.finish_reason == "length"
    assert roomy.stats().generated_tokens == 4
    with pytest.raises(CapacityError, match="holds no block"):
        Engine(paged, tokenizer, memory=100)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "no tokens"),
        ([1, 300], SamplingParams(), "token id 300"),
        ([1, -1], SamplingParams(), "token id -1"),
        ([1], SamplingParams(logit_bias={300: 1.0}), "logit_bias names the token 300"),
        ([1], SamplingParams(logprobs=301), "logprobs is 301"),
    ],
)
def test_requests_that_do_not_fit_the_model_are_refused(paged, tokenizer, prompt, params, message) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=64)
    with pytest.raises(ConfigError, match=message):
        engine.add_request(0, prompt, params)
    assert not engine.has_work


def test_an_id_in_use_is_refused(paged, tokenizer) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=64)
    engine.add_request("x", [1], SamplingParams())
    with pytest.raises(ConfigError, match="'x' is being served"):
        engine.add_request("x", [2], SamplingParams())


def test_cancelling_frees_blocks_at_once_and_the_others_do_not_notice(paged, tokenizer) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=64)
    asked = Asked([3, 4, 5], SamplingParams(max_tokens=12, seed=9, ignore_eos=True))
    engine.add_request("stays", asked.prompt, asked.params)
    engine.add_request("goes", [1] * 30, SamplingParams(max_tokens=20))
    pieces = engine.step() + engine.step()
    used = engine.stats().blocks_used
    assert engine.cancel("goes")
    assert engine.stats().blocks_used < used
    assert not engine.cancel("goes")
    later = run(engine)
    assert set(later) == {"stays"}
    tokens = tokens_of([p for p in pieces if p.request_id == "stays"] + later["stays"])
    assert_equal_or_tied(paged, asked, tokens, expected_tokens(paged, tokenizer, asked))


def test_logits_that_are_not_finite_end_that_request_alone(tokenizer) -> None:
    model = random_model(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, CONTEXT, tie_embeddings=False))
    assert isinstance(model, Transformer)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    asked = Asked([3, 4, 5], SamplingParams(max_tokens=12, seed=9, ignore_eos=True, logit_bias={7: -torch.inf}))
    engine = engine_of(model, tokenizer, num_blocks=64)
    engine.add_request("good", asked.prompt, asked.params)
    engine.add_request("bad", [3, 7, 5], SamplingParams(max_tokens=12))
    engine.add_request("bad embedding", [7], SamplingParams(), pooling="mean")
    pieces = run(engine)
    for name in ("bad", "bad embedding"):
        (piece,) = pieces[name]
        assert piece.finish_reason == "error"
        assert "not finite" in piece.error
        assert piece.token_id is None
    assert len(tokens_of(pieces["good"])) == 12
    alone = engine_of(model, tokenizer, num_blocks=64)
    alone.add_request("good", asked.prompt, asked.params)
    assert tokens_of(run(alone)["good"]) == tokens_of(pieces["good"])
    assert engine.stats().failed == 2
    assert engine.stats().blocks_used == 0


def test_a_step_that_breaks_off_loses_nothing(paged, tokenizer, monkeypatch) -> None:
    engine = engine_of(paged, tokenizer, num_blocks=64)
    asked = Asked(list(range(30)), SamplingParams(max_tokens=12, seed=9, ignore_eos=True))
    engine.add_request(0, asked.prompt, asked.params)
    with monkeypatch.context() as patch:
        patch.setattr(paged, "hidden_states", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            engine.step()
    assert engine.stats().blocks_used == 0
    engine.add_request(1, asked.prompt, asked.params)  # must not find the keys that were never computed
    pieces = run(engine)
    for i in range(2):
        assert_equal_or_tied(paged, asked, tokens_of(pieces[i]), expected_tokens(paged, tokenizer, asked))


def test_guessed_tokens_change_the_number_of_steps_and_nothing_else(paged, tokenizer) -> None:
    prompt = tokenizer.encode("The film was good, The film was good, The film was")
    requests = [
        Asked(
            prompt, SamplingParams(max_tokens=30, temperature=t, seed=s, ignore_eos=True, logit_bias={5: 9.0, 6: 9.0})
        )
        for s, t in enumerate([0.0, 0.1, 0.5, 1.0])
    ]
    steps, tokens = {}, {}
    for num_drafts in (0, 5):
        engine = engine_of(paged, tokenizer, num_blocks=128, num_drafts=num_drafts)
        for i, asked in enumerate(requests):
            engine.add_request(i, asked.prompt, asked.params)
        pieces = run(engine)
        tokens[num_drafts] = [tokens_of(pieces[i]) for i in range(len(requests))]
        steps[num_drafts] = engine.stats().steps
        assert (engine.stats().accepted_draft_tokens > 0) == (num_drafts > 0)
    assert tokens[5] == tokens[0]
    assert steps[5] < steps[0]
