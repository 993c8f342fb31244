"""Layers with a window, whose keys and values lie in blocks that come back as the window passes."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from fastlm.errors import CapacityError
from fastlm.inference import Engine, SamplingParams
from fastlm.inference.block_manager import BlockManager, BlockTable, blocks_touched
from fastlm.inference.memory import CacheLayout
from fastlm.inference.paged_cache import PagedCache
from fastlm.inference.scheduler import Chunk
from fastlm.inference.sequence import Sequence
from fastlm.model import ModelConfig, Transformer
from fastlm.tokenizer import Tokenizer
from tests.inference.conftest import random_model
from tests.inference.test_engine import (
    Asked,
    assert_equal_or_tied,
    expected_tokens,
    run,
    serve_at_random,
    tokens_of,
)

CONTEXT, WINDOW = 160, 9
KINDS = {
    "some layers": {"sliding_window": WINDOW, "full_attention_layers": (1,), "rope_local_theta": 100.0},
    "all layers": {"sliding_window": WINDOW},
    "a window of one token": {"sliding_window": 1, "full_attention_layers": (0,)},
    "a window as long as the context": {"sliding_window": CONTEXT, "full_attention_layers": (1,)},
}


def model_of(tokenizer: Tokenizer, kind: str, context: int = CONTEXT) -> Transformer:
    model = random_model(ModelConfig(tokenizer.vocab_size, 32, 3, 4, 2, 8, 48, context, qk_norm=True, **KINDS[kind]))
    assert isinstance(model, Transformer)
    return model


@pytest.fixture(scope="module", params=KINDS)
def windowed(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Transformer:
    return model_of(tokenizer, request.param)


@pytest.fixture
def mixed(tokenizer: Tokenizer) -> Transformer:
    return model_of(tokenizer, "some layers")


def engine_of(model: Transformer, tokenizer: Tokenizer, pools: tuple[int, int], block_size: int, **options) -> Engine:
    """An engine of so many full and windowed blocks, that are full of NaN when they are taken, and when nobody can
    have a use for their contents any more."""
    if CacheLayout.of(model, block_size).window is None:
        pools = pools[0], 0
    with patch.object(CacheLayout, "split", lambda *_: pools):
        engine = Engine(model, tokenizer, block_size=block_size, **options)
    cache, manager = engine.runner.cache, engine.blocks
    assert isinstance(cache, PagedCache)
    assert (manager.num_blocks, manager.num_window_blocks) == pools
    for pool, is_windowed in ((manager._full, False), (manager._windowed, True)):
        layers = [i for i, its in enumerate(cache.windowed) if its == is_windowed]

        def poison(block: int, layers: list[int] = layers) -> None:
            for layer in layers:
                cache.keys[layer][block] = cache.values[layer][block] = torch.nan

        def take(pool=pool, poison=poison, original=pool.take) -> tuple[int, bool]:
            taken = original()
            poison(taken[0])
            return taken

        def drop(block: int, pool=pool, poison=poison, original=pool.drop) -> None:
            original(block)
            if pool._users[block] == 0 and pool._keys[block] is None:
                poison(block)

        pool.take, pool.drop = take, drop
        for block in pool.free:
            poison(block)
    return engine


def random_engine(rng: random.Random, model: Transformer, tokenizer: Tokenizer) -> Engine:
    """With pools from the smallest in which a sequence of full length can be computed."""
    block_size = rng.choice([1, 2, 3, 4, 7, 16, 100])
    one, window = -(-CONTEXT // block_size), min(model.config.sliding_window or 1, CONTEXT)
    full = rng.choice([one, one + 1, 3 * one, 10 * one])
    least = blocks_touched(window, block_size)
    return engine_of(
        model,
        tokenizer,
        (full, min(full, rng.choice([least, least, least + 1, 2 * least, 10 * least]))),
        block_size,
        max_batch_tokens=rng.choice([1, 2, 5, 17, 64, 512]),
        max_sequences=rng.choice([1, 2, 5, 64]),
        prefix_caching=rng.random() < 0.7,
        num_drafts=rng.choice([0, 0, 1, 4, 7]),
    )


def random_requests(rng: random.Random, vocab_size: int, count: int) -> list[Asked]:
    """From shorter than the window to many times as long; many begin alike, and some repeat themselves."""
    stems = [[rng.randrange(vocab_size) for _ in range(CONTEXT)] for _ in range(2)]
    requests = []
    for _ in range(count):
        prompt = rng.choice(stems)[: rng.choice([0, 0, rng.randint(1, 130), 130])]
        prompt = prompt + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))]
        if rng.random() < 0.3:
            prompt = (prompt[:6] * 20)[:60]
        params = SamplingParams(
            max_tokens=rng.choice([1, 3, 10, 40]),
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
            seed=rng.randrange(1 << 63),
            ignore_eos=True,
        )
        requests.append(Asked(prompt, params))
    return requests


@pytest.mark.parametrize("_", [*range(4), *[pytest.param(i, marks=pytest.mark.slow) for i in range(4, 40)]])
def test_tokens_are_those_of_the_request_alone_however_it_is_served(_: int, windowed, tokenizer, fresh_seed) -> None:
    rng = random.Random(fresh_seed)
    engine = random_engine(rng, windowed, tokenizer)
    requests = random_requests(rng, tokenizer.vocab_size, 8)
    got, cancelled = serve_at_random(rng, engine, requests)
    for i, asked in enumerate(requests):
        expected = expected_tokens(windowed, tokenizer, asked)
        tokens = tokens_of(got[i])
        assert_equal_or_tied(windowed, asked, tokens, expected[: len(tokens)] if i in cancelled else expected)
    stats = engine.stats()
    assert (stats.blocks_used, stats.window_blocks_used) == (0, 0)


@pytest.mark.parametrize("count", [240, pytest.param(1000, marks=pytest.mark.slow)])
def test_mixed_requests_with_random_cancellations_leave_no_block_in_use(count, windowed, tokenizer, fresh_seed) -> None:
    rng = random.Random(fresh_seed)
    options = {"max_batch_tokens": 48, "num_drafts": 3}
    engine = engine_of(windowed, tokenizer, (-(-CONTEXT // 4) + 20, 20), 4, **options)
    cancelled = added = 0
    requests = random_requests(rng, tokenizer.vocab_size, count)
    while added < count or engine.has_work:
        if added < count and rng.random() < 0.8:
            params = replace(
                requests[added].params, n=rng.choice([1, 1, 3]), prompt_logprobs=rng.choice([None, None, None, 1])
            )
            engine.add_request(added, requests[added].prompt, params)
            added += 1
        if rng.random() < 0.1:
            cancelled += engine.cancel(rng.randint(max(0, added - 10), added))
        assert all(piece.finish_reason != "error" for piece in engine.step())
    stats = engine.stats()
    assert (stats.blocks_used, stats.window_blocks_used, stats.waiting, stats.running) == (0, 0, 0, 0)
    assert stats.finished + stats.cancelled == count
    assert stats.cancelled == cancelled > 0
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert engine.blocks.num_free == stats.blocks_total


def test_samples_of_a_long_prompt_share_what_is_in_the_window(mixed, tokenizer) -> None:
    """The others begin in the step in which the first has read the prompt up to their start, or later."""
    prompt = [i % 250 for i in range(101)]
    for max_batch_tokens in (512, 30):
        engine = engine_of(mixed, tokenizer, (80, 60), 4, max_batch_tokens=max_batch_tokens)
        engine.add_request(0, prompt, SamplingParams(max_tokens=4, n=5, seed=3, ignore_eos=True))
        pieces = run(engine)[0]
        assert engine.stats().preemptions == 0
        assert engine.stats().prefix_hit_tokens >= 4 * 28
        for index in range(5):
            asked = Asked(prompt, SamplingParams(max_tokens=4, seed=3 + index, ignore_eos=True))
            tokens = [p.token_id for p in pieces if p.index == index]
            assert_equal_or_tied(mixed, asked, tokens, expected_tokens(mixed, tokenizer, asked))


def test_a_prefix_whose_windowed_blocks_were_needed_is_a_hit_up_to_where_they_are_left(mixed, tokenizer) -> None:
    """Window of 9 tokens and blocks of 4: the token after n blocks sees the last two of these."""
    engine = engine_of(mixed, tokenizer, (200, 20), 4, max_batch_tokens=16)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    prompt = list(range(81))  # 20 full blocks

    def hit(ids: list[int]) -> int:
        before = engine.stats().prefix_hit_tokens
        engine.add_request("x", ids, params)
        (piece,) = run(engine)["x"]
        asked = Asked(ids, params)
        assert_equal_or_tied(mixed, asked, [piece.token_id], expected_tokens(mixed, tokenizer, asked))
        return engine.stats().prefix_hit_tokens - before

    assert hit(prompt) == 0
    assert hit(prompt) == 80
    assert hit([*prompt[:42], 99]) == 40
    assert hit([200] * 30) == 0  # eight blocks, which the windows of the beginning of `prompt` are given up for
    assert len(engine.blocks.match([*prompt[:9], 99])) == 0
    assert hit([*prompt[:9], 99]) == 0
    assert hit(prompt) == 80


def test_a_long_sequence_holds_the_blocks_of_its_window_and_of_a_chunk(tokenizer) -> None:
    config = ModelConfig(
        tokenizer.vocab_size, 16, 6, 1, 1, 16, 16, 2048, sliding_window=512, full_attention_layers=(5,)
    )
    model = random_model(config)
    engine = Engine(model, tokenizer, max_sequences=1)
    assert (engine.blocks.num_blocks, engine.blocks.num_window_blocks) == (128, 49)
    engine.add_request(0, [i % 300 for i in range(1948)], SamplingParams(max_tokens=100, ignore_eos=True))
    reading = generating = 0
    while engine.has_work:
        drawn = engine.step()
        used = engine.stats().window_blocks_used
        if drawn and engine.has_work and len(drawn) == 1 and engine.stats().generated_tokens > 1:
            generating = max(generating, used)
        reading = max(reading, used)
    assert engine.stats().generated_tokens == 100
    assert reading <= 49
    assert generating == 33  # 512 tokens in blocks of 16, of which the first and the last are seen in part
    assert engine.stats().preemptions == 0


def test_a_smaller_pool_is_read_into_by_smaller_chunks(mixed, tokenizer) -> None:
    asked = Asked([i * 7 % 250 for i in range(120)], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    engine = engine_of(mixed, tokenizer, (40, 3), 4, max_batch_tokens=64)  # 9 tokens lie in up to 3 blocks
    engine.add_request(0, asked.prompt, asked.params)
    tokens = tokens_of(run(engine)[0])
    assert_equal_or_tied(mixed, asked, tokens, expected_tokens(mixed, tokenizer, asked))
    assert engine.stats().preemptions == 0
    with pytest.raises(CapacityError, match=r"need 3 blocks of 4 tokens; the cache has 2 \(8 tokens\)"):
        engine_of(mixed, tokenizer, (40, 2), 4).add_request(0, [1] * 9, SamplingParams(max_tokens=1))


@pytest.mark.parametrize("kind", ["some layers", "all layers"])
def test_the_text_goes_on_past_the_context(kind, tokenizer) -> None:
    model = model_of(tokenizer, kind, context=32)
    prompt, new = [i % 250 for i in range(30)], 60
    engine = engine_of(model, tokenizer, (12, 5), 4, max_batch_tokens=8, past_context="reread", num_drafts=3)
    engine.add_request(0, prompt, SamplingParams(max_tokens=new, temperature=0, ignore_eos=True))
    ids, start = list(prompt), 0
    for token in tokens_of(run(engine)[0]):
        if len(ids) - start > 32:
            start = len(ids) - 16
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:]]))[0, -1]
        assert logits.max() - logits[token] < 1e-4
        ids.append(token)
    assert len(ids) == len(prompt) + new
    assert engine.stats().window_blocks_used == 0


def test_a_step_that_breaks_off_loses_nothing(mixed, tokenizer, monkeypatch) -> None:
    engine = engine_of(mixed, tokenizer, (80, 20), 4, max_batch_tokens=32)
    asked = Asked(list(range(90)), SamplingParams(max_tokens=12, seed=9, ignore_eos=True))
    engine.add_request(0, asked.prompt, asked.params)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(mixed, "hidden_states", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            engine.step()
    assert (engine.stats().blocks_used, engine.stats().window_blocks_used) == (0, 0)
    engine.add_request(1, asked.prompt, asked.params)
    pieces = run(engine)
    for i in range(2):
        assert_equal_or_tied(mixed, asked, tokens_of(pieces[i]), expected_tokens(mixed, tokenizer, asked))


def test_random_use_keeps_the_books_of_both_pools(fresh_seed: int) -> None:
    """What a table says of the window is what its blocks hold, and the next token sees no block that is not there."""
    rng = random.Random(fresh_seed)
    block_size, window = 3, 7
    manager = BlockManager(40, block_size, window=window, window_blocks=20)
    stems = [[rng.randrange(2) for _ in range(30)] for _ in range(2)]
    tables: list[tuple[BlockTable, list[int]]] = []
    contents: dict[int, list[int]] = {}
    hits = short = 0
    for _ in range(4000):
        action = rng.random()
        if tables and action < 0.3:
            manager.release(tables.pop(rng.randrange(len(tables)))[0])
        elif tables and action < 0.65:
            table, ids = rng.choice(tables)
            start = len(ids)
            manager.slide(table, start)
            more = [rng.randrange(2) for _ in range(rng.randint(1, 5))]
            if manager.grow(table, start + len(more)):
                ids += more
                for i in range(start // block_size, len(table.blocks)):
                    contents[table.window_blocks[i]] = ids[: (i + 1) * block_size]
                manager.register(table, ids)
        else:
            ids = rng.choice(stems)[: rng.randint(0, 30)] + [rng.randrange(2) for _ in range(rng.randint(1, 4))]
            table, found = BlockTable(), manager.match(ids)
            manager.share(table, found)
            hits += len(found)
            short += len(found) > 0 and table.num_released > 0
            first = max(0, len(found) * block_size + 1 - window) // block_size
            assert table.num_released == first
            for i in range(first, len(found)):
                assert contents[table.window_blocks[i]] == ids[: (i + 1) * block_size]
            if not manager.grow(table, len(ids)):
                manager.release(table)
                continue
            for i in range(len(found), len(table.blocks)):
                contents[table.window_blocks[i]] = ids[: (i + 1) * block_size]
            manager.register(table, ids)
            tables.append((table, ids))
        held = [block for table, _ in tables for block in table.window_blocks if block >= 0]
        assert manager.num_window_used == len(set(held))
        assert manager.num_used == len({block for table, _ in tables for block in table.blocks})
        for table, ids in tables:
            assert len(table.window_blocks) == len(table.blocks)
            for i in range(table.num_released, len(table.blocks)):
                assert contents[table.window_blocks[i]] == ids[: (i + 1) * block_size]
    assert hits > short > 0
    for table, _ in tables:
        manager.release(table)
    assert (manager.num_used, manager.num_window_used) == (0, 0)


def test_memory_of_gemma_3_270m() -> None:
    gemma = CacheLayout(16, 3 * 16384, 15 * 16384, 512)  # 18 layers of 1 head of 256 in fp16
    assert gemma.bytes_for(1, 2048, 256) < 18 << 20 < 36 << 20 == gemma.blocks_for(1, 2048, 256)[0] * 18 * 16384
    assert gemma.bytes_for(1, 32768, 256) * 5 < 2048 * 18 * 16384


def test_memory_is_parted_so_that_neither_long_nor_short_sequences_go_without(fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    for _ in range(300):
        block_size, length = rng.choice([1, 4, 16]), rng.randint(2, 600)
        window = rng.randint(1, length - 1)
        layout = CacheLayout(block_size, rng.randint(0, 60), rng.randint(1, 60), window)
        each = layout.full_bytes + layout.window_bytes
        needs = rng.choice([1, 2, 64]), length, rng.choice([1, 256, 8192])
        memory = rng.randint(each, 2 * layout.bytes_for(*needs))
        full, windowed = layout.split(memory, *needs)
        assert full * layout.full_bytes + windowed * layout.window_bytes <= memory
        assert full >= windowed >= 1
        of_each = memory // each
        assert full >= of_each  # no long sequence that could be served if all layers kept all tokens is refused
        most_windowed = layout.blocks_for(*needs)[1]
        assert windowed >= min(of_each // 2, most_windowed)
        manager = BlockManager(full, block_size, window=window, window_blocks=windowed)
        assert manager.longest_sequence >= min(full, -(-length // block_size)) >= min(of_each, -(-length // block_size))
        enough = layout.split(layout.bytes_for(*needs), *needs)
        if layout.full_bytes:
            assert enough == layout.blocks_for(*needs)


@pytest.mark.parametrize("native", [True, False])
@torch.inference_mode()
def test_hidden_states_have_the_bits_that_they_have_where_all_tokens_are_kept(native: bool, mixed) -> None:
    caches = PagedCache(mixed, 64, 4), PagedCache(mixed, 64, 4, 24)
    lengths = [(17, 1), (0, 3), (30, 1), (45, 8), (40, 20), (8, 12)]
    ids = [torch.randint(0, 250, (start + new,)).tolist() for start, new in lengths]
    results = []
    for cache in caches:
        for tensor in cache.keys + cache.values:
            tensor.fill_(torch.nan)
        if not native:
            cache._native = None
        manager = BlockManager(64, 4, window=WINDOW, window_blocks=24)
        chunks = []
        for (start, new), its_ids in zip(lengths, ids, strict=True):
            sequence = Sequence("", 0, its_ids, SamplingParams(), seed=0)
            for begin in range(0, start, 5):
                manager.slide(sequence.table, begin)
                assert manager.grow(sequence.table, min(start, begin + 5))
                cache.hidden_states(mixed, [Chunk(sequence, begin, its_ids[begin : min(start, begin + 5)])])
            manager.slide(sequence.table, start)
            assert manager.grow(sequence.table, start + new)
            chunks.append(Chunk(sequence, start, its_ids[start:]))
        results += [cache.hidden_states(mixed, [chunk]) for chunk in chunks]
        results.append(cache.hidden_states(mixed, chunks[:4]))
    half = len(results) // 2
    assert all(one.isfinite().all() for one in results)
    assert all(map(torch.equal, results[:half], results[half:]))
