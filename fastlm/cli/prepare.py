"""`fastlm prepare`: from text files to token shards that training maps into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.output import JsonFlag, console, print_json


def command(
    data: Annotated[list[Path], typer.Argument(help="UTF-8 text files; each is one document.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="tokenizer.json to encode with. [default: train one]")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", "-v", help="Of the trained tokenizer. [default: by amount of text]")
    ] = None,
    valid_fraction: Annotated[
        float, typer.Option("--valid-fraction", help="Share of each file, at its end, kept for validation.")
    ] = 0.1,
    as_json: JsonFlag = False,
) -> None:
    """Encode text files once, for any number of training runs.

    Example: fastlm prepare reviews.txt --out reviews-8k --vocab-size 8000
    """
    from fastlm.tokenizer import Tokenizer
    from fastlm.training import prepare

    given = Tokenizer.from_file(tokenizer) if tokenizer is not None else None
    dataset = prepare(data, out, tokenizer=given, vocab_size=vocab_size, valid_fraction=valid_fraction)
    splits = {
        name: {"tokens": len(split), "bytes": split.num_bytes}
        for name, split in (("train", dataset.train), ("valid", dataset.valid))
    }
    if as_json:
        print_json({"out": str(out), "vocab_size": dataset.tokenizer.vocab_size, **splits})
        return
    for name, split in splits.items():
        console.print(f"{name}: {split['tokens']:,} tokens, {split['bytes']:,} bytes", highlight=False)
    console.print(f"{out}: vocabulary of {dataset.tokenizer.vocab_size:,}", highlight=False, markup=False)
