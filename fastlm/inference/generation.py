"""Continuations of a list of prompts, over an `Engine` of their own.

What a row says does not depend on the rows beside it. A transformer whose context is full reads the latest half of its
tokens anew and goes on, see `Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fastlm.errors import ConfigError
from fastlm.inference.engine import Engine
from fastlm.inference.outputs import Completion, Piece, completion
from fastlm.inference.sampling_params import SamplingParams
from fastlm.model.checkpoint import LanguageModel
from fastlm.tokenizer import Tokenizer

Prompt = str | list[int]


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[Completion]:
    """Continues each prompt: n completions of the first, then of the second, …

    With one `params` for several prompts, the i-th completion is drawn with seed + i.

    Raises:
        ConfigError: the model and the tokenizer do not fit, or the number of `params` differs from that of prompts.
        CapacityError: a prompt is longer than the memory for it.
    """
    prompts = list_of_prompts(prompts)
    return collect(prompts, stream(model, tokenizer, prompts, params))


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
) -> Iterator[Piece]:
    """Like `generate`, a piece at a time, of whole characters. `request_id` is the number of the prompt."""
    prompts = list_of_prompts(prompts)
    settings = params_of_each(prompts, params)
    was_training = model.training
    engine = Engine(model, tokenizer, past_context="reread")
    try:
        for i, (prompt, its_params) in enumerate(zip(prompts, settings, strict=True)):
            engine.add_request(i, prompt, its_params)
        while engine.has_work:
            yield from engine.step()
    finally:
        model.train(was_training)


def list_of_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        raise ConfigError("prompts must be a list of strings; put the one prompt into a list")
    return list(prompts)


def params_of_each(prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams]) -> list[SamplingParams]:
    """One for each prompt. A single one is given seeds that go on from prompt to prompt."""
    if isinstance(params, SamplingParams):
        return [replace(params, seed=(params.seed + i * params.n) % (1 << 63)) for i in range(len(prompts))]
    if len(params) != len(prompts):
        raise ConfigError(f"{len(params)} sampling parameters for {len(prompts)} prompts")
    return list(params)


def collect(prompts: list[Prompt], pieces: Iterator[Piece]) -> list[Completion]:
    """The pieces of prompts 0, 1, … put together, in the order of prompts and their samples."""
    found: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        assert isinstance(piece.request_id, int)
        found.setdefault((piece.request_id, piece.index), []).append(piece)
    return [completion(prompts[row], found[row, index]) for row, index in sorted(found)]
