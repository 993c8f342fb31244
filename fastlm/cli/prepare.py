"""`fastlm prepare`: from text files to token shards that training maps into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console


def command(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="UTF-8 text, JSON lines, CSV, TSV or Parquet, also .gz and .zst; or ids of Hugging Face data sets.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="tokenizer.json to encode with. [default: train one]")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", "-v", help="Of the trained tokenizer. [default: by amount of text]")
    ] = None,
    valid_fraction: Annotated[
        float, typer.Option("--valid-fraction", help="Share kept for validation: a text's end, or some of the rows.")
    ] = 0.1,
    column: Annotated[str, typer.Option("--column", help="Of rows, the one that holds the text.")] = "text",
    subset: Annotated[str | None, typer.Option("--subset", help="Of a Hugging Face data set.")] = None,
    split: Annotated[str, typer.Option("--split", help="Of a Hugging Face data set.")] = "train",
    by_line: Annotated[bool, typer.Option("--by-line", help="Each line of a text file is a document.")] = False,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Leave out repeated documents.")] = False,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes, each a file at a time.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Encode on the Ray cluster of RAY_ADDRESS, or a new one of this machine.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Encode files once, for any number of training runs. What is interrupted goes on when asked again.

    A text file is one document; each row of the others is one.

    Example: fastlm prepare reviews.txt --out reviews-8k --vocab-size 8000

    Example: fastlm prepare web-*.jsonl.zst --out web --workers 4 --deduplicate

    Example: fastlm prepare HuggingFaceFW/fineweb-2 --subset kor_Hang --out fineweb
    """
    from fastlm.tokenizer import Tokenizer
    from fastlm.training import prepare

    given = Tokenizer.from_file(tokenizer) if tokenizer is not None else None
    with status_console.status("reading") as status:
        dataset = prepare(
            data,
            out,
            tokenizer=given,
            vocab_size=vocab_size,
            valid_fraction=valid_fraction,
            column=column,
            subset=subset,
            split=split,
            by_line=by_line,
            deduplicate=deduplicate,
            workers=workers,
            ray=ray,
            on_progress=lambda stage, done, total: status.update(
                f"{stage}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
            ),
        )
    manifest = dataset.manifest
    counts = {
        name: {key: manifest.splits[name][key] for key in ("tokens", "bytes", "documents")}
        for name in ("train", "valid")
    }
    if as_json:
        print_json(
            {"out": str(out), "vocab_size": dataset.tokenizer.vocab_size, **counts, "duplicates": manifest.duplicates}
        )
        return
    for name, count in counts.items():
        console.print(
            f"{name}: {count['tokens']:,} tokens, {count['bytes']:,} bytes, {count['documents']:,} documents",
            highlight=False,
        )
    if deduplicate:
        console.print(f"{manifest.duplicates:,} documents had occurred before and are left out", highlight=False)
    console.print(f"{out}: vocabulary of {dataset.tokenizer.vocab_size:,}", highlight=False, markup=False)
