"""`fastlm train-tokenizer`: from text files to tokenizer.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.errors import ConfigError

if TYPE_CHECKING:
    from fastlm.tokenizer.trainer import TrainingProgress

SAMPLE_BYTES = 1 << 20


def command(
    data: Annotated[
        list[Path],
        typer.Option("--data", "-d", help="UTF-8 text, also .gz or .zst, or - for standard input; repeat for more."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write tokenizer.json.")],
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", "-v", help="Ids in all: special tokens, 256 bytes, merges.")
    ] = 8000,
    pattern: Annotated[
        str, typer.Option("--pattern", help="How words are split: gpt2, cl100k, o200k, llama3 or qwen2.")
    ] = "cl100k",
    special: Annotated[
        list[str] | None, typer.Option("--special", help="Special token; repeat for more. [default: <|endoftext|>]")
    ] = None,
    min_frequency: Annotated[int, typer.Option("--min-frequency", help="Merge only pairs that occur this often.")] = 0,
    field: Annotated[
        str | None, typer.Option("--field", help="The files are JSON lines; each text is the value of this field.")
    ] = None,
    by_line: Annotated[
        bool, typer.Option("--by-line", help="Each line is a text of its own, as Hugging Face's trainer reads files.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Most memory to take, such as 1GB; past it the rarest words are forgotten."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a byte-level BPE tokenizer and write it as tokenizer.json, which Hugging Face reads with equal ids.

    Example: fastlm train-tokenizer --data reviews.txt --vocab-size 8000 --out tokenizer.json

    JSON lines, compressed, in bounded memory: fastlm train-tokenizer --data web.jsonl.zst --field text --memory 1GB
    --out tokenizer.json
    """
    from fastlm.tokenizer.trainer import BpeTrainer

    _check_output(out)
    trainer = BpeTrainer(
        vocab_size,
        pattern=pattern,
        special_tokens=("<|endoftext|>",) if special is None else special,
        min_frequency=min_frequency,
        memory=None if memory is None else _bytes_of(memory),
    )
    with _ProgressBars() as bars:
        tokenizer = trainer.train(data, field=field, by_line=by_line, progress=bars.update)
    report = trainer.report
    assert report is not None
    sample = _sample(data[0], field)
    bytes_per_token = len(sample.encode()) / len(tokenizer.encode_ordinary(sample)) if sample else None
    tokenizer.save(out)
    seconds = report.reading_seconds + report.merging_seconds
    if as_json:
        print_json(
            {
                "out": str(out),
                "vocab_size": report.vocab_size,
                "merges": report.merges,
                "stopped_early": report.stopped_early,
                "bytes_read": report.bytes_read,
                "words": report.words,
                "distinct_words": report.distinct_words,
                "forgotten_words": report.forgotten_words,
                "seconds": round(seconds, 3),
                "bytes_per_token": bytes_per_token and round(bytes_per_token, 3),
            }
        )
        return
    console.print(
        f"{out}: {report.vocab_size:,} ids, {report.merges:,} merges, "
        f"from {report.bytes_read / 1e6:,.1f} MB and {report.distinct_words:,} distinct words "
        f"in {seconds:.2f} s ({report.reading_seconds:.2f} s reading, {report.merging_seconds:.2f} s merging)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if bytes_per_token:
        console.print(
            f"{bytes_per_token:.2f} bytes per token on the first {len(sample.encode()) / 1e6:.2f} MB of {data[0]}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if report.forgotten_words:
        status_console.print(
            f"[yellow]{report.forgotten_words:,} of {report.words:,} words were forgotten[/] to stay within --memory "
            f"{memory}: the rarest ones, so late merges may differ from exact ones; more memory gives exact ones",
            highlight=False,
            soft_wrap=True,
        )
    if report.stopped_early:
        status_console.print(
            f"[yellow]stopped at {report.vocab_size:,} of {vocab_size:,} ids:[/] no pair of tokens is left that occurs "
            f"{max(1, min_frequency)} times; more text gives more",
            highlight=False,
            soft_wrap=True,
        )


class _ProgressBars:
    """Two bars on stderr, where it is a terminal: text read, in MB/s, and merges done; both with the time left."""

    def __init__(self) -> None:
        from rich import progress as rich

        self._bars = rich.Progress(
            rich.TextColumn("{task.description:8}"),
            rich.BarColumn(),
            rich.TextColumn("{task.fields[amount]}"),
            rich.TimeRemainingColumn(),
            console=status_console,
            disable=not status_console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, now: TrainingProgress) -> None:
        if now.stage not in self._tasks:
            self._tasks[now.stage] = self._bars.add_task(now.stage, total=now.total, amount="")
        task = self._tasks[now.stage]
        if now.stage == "reading":
            elapsed = self._bars.tasks[task].elapsed or 0
            rate = f" {now.done / 1e6 / elapsed:,.0f} MB/s" if elapsed > 0.05 else ""
            amount = f"{now.done / 1e6:,.1f} MB{rate}"
        else:
            amount = f"{now.done:,} / {now.total:,} ids"
        self._bars.update(task, completed=now.done, total=now.total, amount=amount)


def _check_output(out: Path) -> None:
    """Fails before minutes of training, not after."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; give a file name, such as {out / 'tokenizer.json'}")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the directory {out.absolute().parent} does not exist; create it first")


def _bytes_of(memory: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)(I?)B?", memory.strip().upper())
    if match is None:
        raise ConfigError(f"--memory {memory!r} is no size; give one such as 1GB, 512MB or 2GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMG".index(prefix or " "))


def _sample(path: Path, field: str | None) -> str:
    """The first text of the first file, to say how well it is compressed; "" if it cannot be read again."""
    from fastlm.tokenizer.text_reader import read_files

    if not path.is_file():  # standard input or a pipe, which has been read to its end
        return ""
    chunk = next(read_files([path], field))
    return b"\n".join(chunk.texts)[:SAMPLE_BYTES].decode(errors="ignore")
