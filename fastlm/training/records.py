"""Rows of data files, one at a time: JSON lines, CSV, TSV and Parquet, also as .gz and .zst (but for Parquet).

TSV has no quoting: a field holds neither tab nor line end. CSV is quoted as RFC 4180 says. Both begin with a line of
column names.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import DataError
from fastlm.tokenizer.text_reader import JSON_LINES, MAX_TEXT_BYTES, open_stream, read_lines

SUFFIXES = (*JSON_LINES, ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Record:
    """`where` names the file and the line or row."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str:
        """The string in a column. Raises DataError when there is none."""
        value = self.get(column)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {column!r} is a {type(value).__name__}, not a string")
        return value

    def get(self, column: str) -> Any:
        """Raises DataError when there is no such column."""
        if column not in self.values:
            names = ", ".join(map(repr, list(self.values)[:8]))
            raise DataError(f"{self.where}: no {column!r}, but {names or 'nothing'}")
        return self.values[column]


def is_table(path: Path) -> bool:
    """Whether a file's name says that it holds rows, not plain text."""
    return _format(path) in SUFFIXES


def read_records(path: str | Path) -> Iterator[Record]:
    """The rows of a file in order.

    Raises:
        DataError: the file is missing, of an unknown kind, damaged, not UTF-8, or a row does not fit its header.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; give a data file")
    kind = _format(path)
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    if kind not in SUFFIXES:
        raise DataError(f"{path}: rows are read from {', '.join(SUFFIXES)}, also with .gz or .zst; convert it")
    with open_stream(path) as stream:
        lines = read_lines(path, stream)
        yield from {".csv": _read_csv, ".tsv": _read_tsv}.get(kind, _read_json)(path, lines)


def _format(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    return inner.suffix.lower()


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not UTF-8: byte {line[error.start]:#04x}; "
            "convert it, for example by `iconv -t UTF-8`"
        ) from None


def _read_json(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(_decoded(path, number, line))
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: not a JSON object but a {type(values).__name__}")
        yield Record(where, values)


def _read_tsv(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
    header: list[str] | None = None
    for number, line in lines:
        fields = _decoded(path, number, line).removesuffix("\r").split("\t")
        if header is None:
            header = _header(path, fields)
        elif fields != [""]:
            yield _row(f"{path}, line {number}", header, fields)


def _read_csv(path: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[Record]:
    csv.field_size_limit(MAX_TEXT_BYTES)
    reader = csv.reader((_decoded(path, number, line) + "\n" for number, line in lines), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if header is None:
                header = _header(path, fields)
            elif fields:
                yield _row(f"{path}, line {reader.line_num}", header, fields)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _header(path: Path, fields: list[str]) -> list[str]:
    if len(set(fields)) != len(fields) or not all(fields):
        raise DataError(f"{path}: the first line must hold the columns' names, each once, not {', '.join(fields[:8])}")
    return fields


def _row(where: str, header: list[str], fields: list[str]) -> Record:
    if len(fields) != len(header):
        raise DataError(f"{where}: {len(fields)} fields, but {len(header)} columns ({', '.join(header[:8])})")
    return Record(where, dict(zip(header, fields, strict=True)))


def _read_parquet(path: Path) -> Iterator[Record]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{path}: reading Parquet needs the pyarrow package: pip install fastlm[parquet]")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    arrow: Any = importlib.import_module("pyarrow")
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", values)
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged or no Parquet file: {error}") from None
