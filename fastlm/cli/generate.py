"""`fastlm generate`: text from a trained model."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastlm.cli.output import JsonFlag, print_json
from fastlm.errors import ConfigError

if TYPE_CHECKING:
    from fastlm.inference import Completion, SamplingParams
    from fastlm.model.checkpoint import LanguageModel
    from fastlm.tokenizer import Tokenizer


def command(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", "-c", help="Directory of a run or a model.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="How the text begins; repeat for more.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from this many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest tokens that have this share together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Drop tokens less likely than this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: tokens that were used become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Same seed, same text. Sample i has seed + i.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this string; repeat for more.")] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Texts for each prompt.")] = 1,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes. [default: for one text]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Continue a prompt. The text holds whole characters only, and is the same each time for the same seed.

    Example: fastlm generate --checkpoint run --prompt "Once upon a time" --temperature 0.8 --seed 1
    """
    from fastlm.inference import SamplingParams, generate
    from fastlm.model import load_model
    from fastlm.tokenizer import Tokenizer

    if num_samples < 1:
        raise ConfigError(f"--num-samples must be a positive integer, not {num_samples}")
    prompts = [text for text in map(_as_typed, prompt) for _ in range(num_samples)]
    if stream and (as_json or len(prompts) > 1):
        raise ConfigError("--stream shows one text; leave it out with --json, or for several texts")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    model = load_model(checkpoint)
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    if len(prompts) == 1 and not as_json and stream is not False:
        _show_as_it_comes(model, tokenizer, prompts[0], params)
        return
    started = time.perf_counter()
    completions = generate(model, tokenizer, prompts, params)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(_result(completions, params, seconds))
        return
    for i, completion in enumerate(completions):
        if len(completions) > 1:
            _write(f"--- {i + 1} (seed {params.seed + i}, {completion.finish_reason})\n")
        _write(f"{completion.prompt}{completion.text}\n")


def _show_as_it_comes(model: LanguageModel, tokenizer: Tokenizer, prompt: str, params: SamplingParams) -> None:
    from fastlm.inference import stream

    _write(prompt)
    for piece in stream(model, tokenizer, [prompt], params):
        _write(piece.text)
    _write("\n")


def _result(completions: list[Completion], params: SamplingParams, seconds: float) -> dict[str, object]:
    tokens = sum(len(c.token_ids) for c in completions)
    return {
        "completions": [
            {
                "prompt": c.prompt,
                "text": c.text,
                "seed": params.seed + i,
                "tokens": len(c.token_ids),
                "finish_reason": c.finish_reason,
            }
            for i, c in enumerate(completions)
        ],
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def _as_typed(argument: str) -> str:
    """The argument as UTF-8, whatever the locale says."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt is not UTF-8: byte {error.object[error.start]:#04x}") from None


def _write(text: str) -> None:
    """UTF-8 whatever the locale says: Korean must not fail in a C locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()
