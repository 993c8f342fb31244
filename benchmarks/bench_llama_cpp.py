"""A GGUF model beside llama.cpp on the same file and threads: loading, reading a prompt, and generating.

The file is what FASTLM_BENCH_GGUF names, or Gemma 3 270M from `fastlm[gemma]`. Both quantize activations to 8 bits, in
other groups, so that greedy decoding parts where two tokens are about as probable. Therefore our model is asked what it
thinks of llama.cpp's tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from fastlm.benchmarks.bench_generation import serve
from fastlm.benchmarks.harness import Case, leave_out
from fastlm.benchmarks.llama_cpp_peer import LlamaCpp, llama_cpp

from fastlm.errors import CheckpointError
from fastlm.inference import Engine
from fastlm.inference.engine import CPU_BATCH_TOKENS
from fastlm.inference.memory import CacheLayout
from fastlm.model import Transformer, load
from fastlm.model.pretrained import pretrained
from fastlm.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, lets it. "
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n    ",
    "이 영화는 정말",
    "The three laws of motion are",
    "Dear Sir or Madam,",
    "1, 2, 3, 4, 5, 6,",
    "The recipe needs two eggs,",
]
PROMPT_TOKENS, NEW_TOKENS = 512, 64
MAX_BEHIND = 1.0  # logit; where two tokens are about as probable, rounding decides between them
CONTEXT = 2048  # tokens of each sequence that memory is taken for
BLOCK_SIZE = 16  # tokens


def cases(device: str) -> Iterable[Case]:
    path = gguf_file()
    if device != "cpu" or path is None or llama_cpp() is None:
        return
    yield Case(
        name="load the model and its tokenizer",
        ours=lambda: loaded(path).tokenizer.vocab_size,
        peers={"llama.cpp": lambda: vocab_size(path)},
        check=check_equal,
    )
    engine = loaded(path)
    prompts = [engine.prompt_ids(text) for text in PROMPTS]
    long = engine.prompt_ids(TEXT * PROMPT_TOKENS)[:PROMPT_TOKENS]
    for name, its_prompts, new_tokens, work in (
        (f"read a prompt of {PROMPT_TOKENS} tokens", [long], 1, PROMPT_TOKENS),
        (f"1 request, {NEW_TOKENS} tokens", prompts[:1], NEW_TOKENS, NEW_TOKENS),
        (f"{len(prompts)} requests at once, {NEW_TOKENS} tokens each", prompts, NEW_TOKENS, len(prompts) * NEW_TOKENS),
    ):
        peer = LlamaCpp(path, sequences=len(its_prompts), length=CONTEXT)
        yield Case(
            name=name,
            ours=serve(engine, its_prompts, [new_tokens] * len(its_prompts)),
            peers={"llama.cpp": lambda peer=peer, p=its_prompts, n=new_tokens: peer.generate(p, n)},
            check=check_near(engine, its_prompts),
            work=work,
            unit="tokens",
        )
        peer.close()


def gguf_file() -> str | None:
    named = os.environ.get("FASTLM_BENCH_GGUF")
    if named:
        return named
    try:
        return str(pretrained("gemma3-270m"))
    except CheckpointError:
        leave_out("neither FASTLM_BENCH_GGUF nor fastlm[gemma] gives a model, so llama_cpp is left out")
        return None


def loaded(path: str, sequences: int = len(PROMPTS)) -> Engine:
    model, _ = load(path)
    assert isinstance(model, Transformer)
    memory = CacheLayout.of(model, BLOCK_SIZE).bytes_for(sequences, CONTEXT, CPU_BATCH_TOKENS)
    tokenizer = Tokenizer.from_gguf(Path(path))
    return Engine(
        model,
        tokenizer,
        memory=memory,
        block_size=BLOCK_SIZE,
        max_batch_tokens=CPU_BATCH_TOKENS,
        max_sequences=sequences,
        prefix_caching=False,
    )


def vocab_size(path: str) -> int:
    peer = LlamaCpp(path, sequences=len(PROMPTS), length=CONTEXT)
    size = peer.vocab_size
    peer.close()
    return size


def check_equal(a: Any, b: Any) -> None:
    assert a == b, f"{a} and {b}"


def check_near(engine: Engine, prompts: list[list[int]]) -> Callable[[list[list[int]], list[list[int]]], None]:
    """Whether our model finds llama.cpp's tokens, given those before them, the most probable ones or nearly so."""

    @torch.inference_mode()
    def check(a: list[list[int]], b: list[list[int]]) -> None:
        for prompt, our_tokens, tokens in zip(prompts, a, b, strict=True):
            assert len(our_tokens) == len(tokens)
            hidden = engine.model.hidden_states(torch.tensor([prompt + tokens[:-1]]))
            logits = engine.model.logits(hidden[0, len(prompt) - 1 :])
            behind = logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert behind.max() < MAX_BEHIND, f"a token of llama.cpp has a logit {behind.max():.2f} below the highest"

    return check
