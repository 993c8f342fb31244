"""`fastlm tokenize`: one text at every size, in colour."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.cli.output import JsonFlag, console, print_json, status_console
from fastlm.errors import DataError, FastlmError, TokenizerError

if TYPE_CHECKING:
    from fastlm.tokenizer.granularity import Unit
    from fastlm.tokenizer.tokenizer import Tokenizer

MAX_BYTES = 8 << 20  # of text; each piece of it takes some 300 bytes of memory
SHOWN_UNITS = 2000  # a terminal's memory, and a reader's patience, end about there
COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta", "white on blue")


class Granularity(str, Enum):
    """What may be asked for."""

    character = "character"
    code_point = "code-point"
    word = "word"
    whitespace = "whitespace"
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
        typer.Option("--tokenizer", "-t", help="Vocabulary file, or a tiktoken name such as cl100k_base."),
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option("--by", "--granularity", "-g", help="Size of the pieces.")
    ] = Granularity.subword,
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids of subwords too.")] = False,
    as_tsv: Annotated[
        bool, typer.Option("--tsv", help="A line for each piece: size, begin, end, id or part of speech, text.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show how a text is cut into tokens, and into characters, words, morphemes, sentences and paragraphs.

    Example: fastlm tokenize "나는 학교에 갔다." --tokenizer tokenizer.json --by all --ids
    """
    from fastlm.tokenizer.granularity import GRANULARITIES, split

    if as_json and as_tsv:
        raise typer.BadParameter("give either --json or --tsv, not both")
    content = _read_text(text, file)
    wanted = list(GRANULARITIES) if granularity is Granularity.all else [granularity.value]
    subword_tokenizer = _load_tokenizer(tokenizer) if "subword" in wanted else None
    pieces: dict[str, list[Unit]] = {}
    unavailable: dict[str, str] = {}
    for one in wanted:
        try:
            pieces[one] = split(content, one, subword_tokenizer)
        except FastlmError as error:
            if granularity is not Granularity.all:
                raise
            unavailable[one] = str(error)

    size = len(content.encode())
    if as_json:
        print_json(
            {
                "bytes": size,
                "tokenizer": subword_tokenizer and subword_tokenizer.name,
                "granularities": {name: _to_json(units) for name, units in pieces.items()},
                "unavailable": unavailable,
            }
        )
        return
    for name, units in pieces.items():
        if as_tsv:
            _print_tsv(name, units)
        else:
            _show(name, units, size, ids)
    for name, reason in unavailable.items():
        status_console.print(f"{name}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _to_json(units: list[Unit]) -> dict[str, Any]:
    texts = [unit.text for unit in units]
    result: dict[str, Any] = {"count": len(units), "distinct": len(set(texts)), "units": texts}
    result["offsets"] = [[unit.begin, unit.end] for unit in units]
    for key in ("id", "tag"):
        if units and getattr(units[0], key) is not None:
            result[f"{key}s"] = [getattr(unit, key) for unit in units]
    return result


def _print_tsv(name: str, units: list[Unit]) -> None:
    """Tabs, line ends and backslashes of the text are escaped, so that a piece is one line."""
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    for unit in units:
        mark = unit.tag if unit.id is None else unit.id
        print(name, unit.begin, unit.end, "" if mark is None else mark, unit.text.translate(escapes), sep="\t")


def _show(name: str, units: list[Unit], size: int, with_ids: bool) -> None:
    """A line of figures, then the units: by colour on a terminal, else between bars."""
    from rich.text import Text

    count = len(units)
    each = f", {size / count:.2f} bytes of text each" if count else ""
    distinct = len({unit.text for unit in units})
    console.print(f"[bold]{name}[/]  {count:,} ({distinct:,} distinct{each})", highlight=False)
    line = Text()
    for i, unit in enumerate(units[:SHOWN_UNITS]):
        if console.is_terminal:
            line.append(unit.text.replace("\n", "↵\n"), style=COLOURS[i % len(COLOURS)])
        else:
            line.append(("|" if i else "") + unit.text.replace("\n", "↵"))
    console.print(line, soft_wrap=True)
    if with_ids and units and units[0].id is not None:
        ids = " ".join(str(unit.id) for unit in units[:SHOWN_UNITS])
        console.print(ids, style="dim", highlight=False, soft_wrap=True)
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
            with file.open("rb") as handle:
                data = handle.read(MAX_BYTES + 1)
        except IsADirectoryError:
            raise DataError(f"{file}: is a directory; give a text file") from None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
    elif sys.stdin.isatty():
        raise typer.BadParameter("give TEXT, --file, or a text on standard input")
    else:
        data, source = sys.stdin.buffer.read(MAX_BYTES + 1), "standard input"
    if not data:
        raise DataError(f"{source} is empty; there is nothing to tokenize")
    if len(data) > MAX_BYTES:
        raise DataError(
            f"{source}: more than {MAX_BYTES >> 20} MiB, too much to show; cut it first, as with: head -c 100000"
        )
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
    if Path(name).exists() or name.endswith((".json", ".gguf", ".model")):
        return Tokenizer.from_file(name)
    try:
        return Tokenizer.from_tiktoken(name)
    except FastlmError as error:
        raise TokenizerError(f"--tokenizer {name}: no such file, and as a tiktoken name: {error}") from None


def _stand_in() -> Tokenizer:
    from fastlm.data.stand_in import VOCAB_SIZE, stand_in_tokenizer

    status_console.print(
        f"no --tokenizer given: using one of {VOCAB_SIZE:,} ids, trained just now on Python's documentation "
        "(English) and a short Korean story; train your own with fastlm train-tokenizer",
        style="yellow",
        highlight=False,
        soft_wrap=True,
    )
    return stand_in_tokenizer()
