"""Options that commands which generate text share."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fastlm.errors import ConfigError

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", "--checkpoint", "-c",
        help="Directory of a run or a model, a .gguf file, gemma3-270m, or an id of the Hugging Face hub.",
    ),
]  # fmt: skip
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Draw from this many likeliest tokens.")]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", help="Draw from the likeliest tokens that have this share together.")
]
MinPOption = Annotated[
    float | None, typer.Option("--min-p", help="Drop tokens less likely than this share of the likeliest.")
]
RepetitionPenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: tokens that were used become less likely.")
]
SeedOption = Annotated[int, typer.Option("--seed", "-s", help="Same seed, same text. Text i has seed + i.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", help="End before this string; repeat for more.")]
MemoryOption = Annotated[
    float | None, typer.Option("--memory", min=0, help="GiB for keys and values. [default: a quarter of what is free]")
]
SpeculateOption = Annotated[
    int,
    typer.Option("--speculate", min=0, max=7, help="Guess so many tokens ahead. Changes the speed alone."),
]


def memory_in_bytes(gibibytes: float | None) -> int | None:
    return None if gibibytes is None else int(gibibytes * (1 << 30))


def as_typed(argument: str, option: str) -> str:
    """A command line's argument as UTF-8, whatever the locale says."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} is not UTF-8: byte {error.object[error.start]:#04x}") from None


def write(text: str) -> None:
    """UTF-8 whatever the locale says: Korean must not fail in a C locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()
