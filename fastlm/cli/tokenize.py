"""`fastlm tokenize`: one text at every size, in colour."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.errors import DataError, FastlmError, TokenizerError

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

SHOWN_UNITS = 2000  # a terminal's memory, and a reader's patience, end about there
COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta", "white on blue")
STAND_IN_VOCAB_SIZE = 4096


class Granularity(str, Enum):
    """What may be asked for."""

    character = "character"
    word = "word"
    subword = "subword"
    morpheme = "morpheme"
    sentence = "sentence"
    paragraph = "paragraph"
    all = "all"


def command(
    text: Annotated[str | None, typer.Argument(help="The text; without it and --file, standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="UTF-8 text file to read instead.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "-t", help="tokenizer.json, or a tiktoken name such as cl100k_base."),
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option("--granularity", "-g", help="Size of the pieces.")
    ] = Granularity.subword,
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids of subwords too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show how a text is cut into tokens, and into characters, words, morphemes, sentences and paragraphs.

    Example: fastlm tokenize "나는 학교에 갔다." --tokenizer tokenizer.json --granularity all --ids
    """
    content = _read_text(text, file)
    wanted = [g for g in Granularity if g is not Granularity.all] if granularity is Granularity.all else [granularity]
    subword_tokenizer = _load_tokenizer(tokenizer) if Granularity.subword in wanted else None
    pieces: dict[str, _Pieces] = {}
    unavailable: dict[str, str] = {}
    for one in wanted:
        try:
            pieces[one.value] = _cut(content, one, subword_tokenizer)
        except FastlmError as error:
            if granularity is not Granularity.all:
                raise
            unavailable[one.value] = str(error)

    size = len(content.encode())
    if as_json:
        print_json(
            {
                "bytes": size,
                "tokenizer": subword_tokenizer and subword_tokenizer.name,
                "granularities": {name: found.to_json() for name, found in pieces.items()},
                "unavailable": unavailable,
            }
        )
        return
    for name, found in pieces.items():
        _show(name, found, size, ids)
    for name, reason in unavailable.items():
        status_console.print(f"{name}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Pieces:
    units: list[str]
    ids: list[int] | None = None

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"count": len(self.units), "distinct": len(set(self.units)), "units": self.units}
        return result if self.ids is None else result | {"ids": self.ids}


def _cut(text: str, granularity: Granularity, tokenizer: Tokenizer | None) -> _Pieces:
    from fastlm.tokenizer import granularity as functions

    if granularity is Granularity.subword:
        assert tokenizer is not None
        return _Pieces(functions.subwords(text, tokenizer), tokenizer.encode(text, allowed_special="all"))
    function = {
        Granularity.character: functions.characters,
        Granularity.word: functions.words,
        Granularity.morpheme: functions.morphemes,
        Granularity.sentence: functions.sentences,
        Granularity.paragraph: functions.paragraphs,
    }[granularity]
    return _Pieces(function(text))


def _show(name: str, found: _Pieces, size: int, with_ids: bool) -> None:
    """A line of figures, then the units: by colour on a terminal, else between bars."""
    from rich.text import Text

    count = len(found.units)
    each = f", {size / count:.2f} bytes of text each" if count else ""
    console.print(f"[bold]{name}[/]  {count:,} ({len(set(found.units)):,} distinct{each})", highlight=False)
    line = Text()
    for i, unit in enumerate(found.units[:SHOWN_UNITS]):
        if console.is_terminal:
            line.append(unit.replace("\n", "↵\n"), style=COLOURS[i % len(COLOURS)])
        else:
            line.append(("|" if i else "") + unit.replace("\n", "↵"))
    console.print(line, soft_wrap=True)
    if with_ids and found.ids is not None:
        console.print(" ".join(map(str, found.ids[:SHOWN_UNITS])), style="dim", highlight=False, soft_wrap=True)
    if count > SHOWN_UNITS:
        console.print(f"… and {count - SHOWN_UNITS:,} more; --json prints all", style="dim", highlight=False)
    console.print()


def _read_text(text: str | None, file: Path | None) -> str:
    if text is not None and file is not None:
        raise typer.BadParameter("give either TEXT or --file, not both")
    if text is not None:
        try:
            data, source = text.encode(), "TEXT"
        except UnicodeEncodeError:  # the shell passed bytes that are not UTF-8
            raise DataError("TEXT is not valid UTF-8") from None
    elif file is not None:
        source = str(file)
        try:
            data = file.read_bytes()
        except IsADirectoryError:
            raise DataError(f"{file}: is a directory; give a text file") from None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
    elif sys.stdin.isatty():
        raise typer.BadParameter("give TEXT, --file, or a text on standard input")
    else:
        data, source = sys.stdin.buffer.read(), "standard input"
    if not data:
        raise DataError(f"{source} is empty; there is nothing to tokenize")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it to UTF-8 first"
        ) from None


def _load_tokenizer(name: str | None) -> Tokenizer:
    from fastlm.tokenizer.tokenizer import Tokenizer

    if name is None:
        return _stand_in()
    if Path(name).exists() or name.endswith(".json"):
        return Tokenizer.from_file(name)
    try:
        return Tokenizer.from_tiktoken(name)
    except FastlmError as error:
        raise TokenizerError(f"--tokenizer {name}: no such file, and as a tiktoken name: {error}") from None


def _stand_in() -> Tokenizer:
    """A tokenizer for whoever has none: trained in a fraction of a second on text that every Python carries."""
    from pydoc_data.topics import topics

    from fastlm.tokenizer.trainer import BpeTrainer

    status_console.print(
        f"no --tokenizer given: using one of {STAND_IN_VOCAB_SIZE:,} ids, trained just now on Python's documentation "
        "(English); train your own with fastlm train-tokenizer",
        style="yellow",
        highlight=False,
        soft_wrap=True,
    )
    return BpeTrainer(STAND_IN_VOCAB_SIZE).train_from_iterator(topics.values())
