from __future__ import annotations

import random

import pytest
import torch

from fastlm.inference import Engine, SamplingParams, paged_step
from fastlm.inference.shared_prefix import for_kernels, num_shared_tokens
from fastlm.model import ModelConfig
from tests.inference.conftest import random_model
from tests.inference.test_engine import run, tokens_of


def test_counts_the_blocks_that_all_begin_with() -> None:
    assert num_shared_tokens([[5, 3, 9], [5, 3, 2], [5, 3]], [12, 10, 8], 4) == 8
    assert (
        num_shared_tokens([[5, 3, 9], [5, 3, 9]], [11, 12], 4) == 8
    )  # the last block is not full of the first's tokens
    assert num_shared_tokens([[5, 3], [4, 3]], [8, 8], 4) == 0
    assert num_shared_tokens([[5, 3]], [8], 4) == 0
    assert for_kernels([[1], [1]], [4, 4], 4, torch.device("cpu")) is None


@pytest.mark.parametrize("_", range(20))
def test_agrees_with_looking_at_every_block(_, fresh_seed: int) -> None:
    rng = random.Random(fresh_seed)
    tables = [[rng.choice([1, 1, 1, 2]) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(2, 4))]
    shared = 0
    while all(shared < len(table) and table[shared] == tables[0][shared] for table in tables):
        shared += 1
    assert num_shared_tokens(tables, [3 * len(table) for table in tables], 3) == 3 * shared


def test_the_engine_promises_what_holds(paged, tokenizer, monkeypatch) -> None:
    """On the CPU the op looks whether the promise is kept, and refuses one that is not."""
    promised = []

    def on_the_cpu_too(tables, lengths, block_size, device):
        promised.append(num_shared_tokens(tables, lengths, block_size))
        return torch.tensor(promised[-1], dtype=torch.int32) if promised[-1] else None

    prompts = [[7, 8, 9, 10] * 5 + tail for tail in ([1], [2, 3], [4, 5, 6], [7] * 9)]
    answers = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(paged_step, "for_kernels", on_the_cpu_too)
        engine = Engine(paged, tokenizer, block_size=4)
        engine.runner.cache._native = None  # so that steps go through the op
        engine.add_request(0, prompts[0], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        engine.step()  # its prompt is in the cache when the others come
        for i, prompt in enumerate(prompts[1:], 1):
            engine.add_request(i, prompt, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        answers.append({i: tokens_of(pieces) for i, pieces in run(engine).items()})
    assert answers[0] == answers[1]
    assert max(promised) == 20


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_sharing_changes_no_token_on_a_gpu(cuda_graphs, tokenizer, monkeypatch, fresh_seed) -> None:
    rng = random.Random(fresh_seed)
    model = random_model(ModelConfig(tokenizer.vocab_size, 128, 2, 8, 2, 64, 256, 1024)).to("cuda", torch.bfloat16)
    prefix = [rng.randrange(tokenizer.vocab_size) for _ in range(400)]
    prompts = [prefix + [rng.randrange(tokenizer.vocab_size)] * (i + 1) for i in range(9)]
    answers = []
    for worthwhile in (2**31, 128):
        monkeypatch.setattr("fastlm.inference.shared_prefix.WORTHWHILE", worthwhile)
        engine = Engine(model, tokenizer, cuda_graphs=cuda_graphs)
        for i, prompt in enumerate(prompts):
            engine.add_request(i, prompt, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
            engine.step()
        answers.append({i: tokens_of(pieces) for i, pieces in run(engine).items()})
    assert answers[0] == answers[1]
