"""Text files for training, in chunks: plain UTF-8, `.gz`, `.zst`, JSON lines and standard input.

A chunk of text ends where every pattern would split it anyhow (after a line end that stands between two texts, or
before the space between two words), so what is counted does not depend on the chunks. Memory does not grow with the
file.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import os
import select
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastlm._core import native
from fastlm.errors import DataError

CHUNK_BYTES = 16 << 20  # large enough to keep every thread busy, small against the tables of a large corpus
MAX_TEXT_BYTES = 1 << 30  # of a text, or part of a file, that cannot be cut; the native core counts to 4 GiB
STDIN = Path("-")
JSON_LINES = (".jsonl", ".ndjson")
SIGNAL_WAIT = 100  # ms; the longest time for which Ctrl-C may go unseen while a pipe gives nothing
PIPE_READ_BYTES = 1 << 20  # at a time; the most that Linux lets a user's pipe hold


class Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass
class Chunk:
    """Texts counted together, and where they come from."""

    texts: list[bytes]
    path: Path | None = None
    offset: int = 0  # of the one text in its file
    first_index: int = 0  # of the first text among the iterator's
    by_line: bool = False  # each line is a text

    def too_long(self, what: str) -> DataError:
        where = f"{self.path}, from offset {self.offset}" if self.path else f"texts from {self.first_index}"
        return DataError(f"{where}: {what}; put line ends or spaces into the text, or leave such data out")

    def invalid_utf8(self, index: int, offset: int) -> DataError:
        where = f"{self.path}" if self.path else f"text {self.first_index + index}"
        byte = self.texts[index][offset]
        return DataError(
            f"{where}: not UTF-8: byte 0x{byte:02x} at offset {self.offset + offset}; "
            "convert it first, for example with: iconv -f CP949 -t UTF-8"
        )


def total_bytes(paths: Iterable[Path]) -> int | None:
    """Bytes of text in all files; None if that shows only when they are read. Raises DataError for a bad path."""
    sizes = [_checked_size(path) for path in paths]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def read_files(paths: Iterable[Path], field: str | None = None, *, by_line: bool = False) -> Iterator[Chunk]:
    """The text of files one after the other. `-` is standard input; `.gz` and `.zst` are decompressed as they are read.

    With `field`, every file holds one JSON object a line, each of which is a text of its own: the value of that field.
    With `by_line`, each line of a file, its end included, is a text of its own.

    Raises:
        DataError: a file is missing or damaged, a line is no JSON object with the field, or `.zst` needs a package.
    """
    for path in paths:
        inner = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
        if field is None and inner.suffix in JSON_LINES:
            raise DataError(f"{path}: JSON lines; say which field holds the text: --field text")
        with open_stream(path) as stream:
            yield from _read_text(path, stream, by_line) if field is None else _read_json_lines(path, stream, field)


def gather(texts: Iterable[str]) -> Iterator[Chunk]:
    """Texts in groups of about CHUNK_BYTES."""
    group: list[bytes] = []
    size = first_index = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} is a {type(text).__name__}, not a str")
        try:  # here and not by _encoded: there may be millions of short texts
            data = text.encode()
        except UnicodeEncodeError:
            data = b""
        if len(data) > MAX_TEXT_BYTES or not data:
            data = _encoded(text, f"text {index}")  # which says what is wrong
        group.append(data)
        size += len(data)
        if size >= CHUNK_BYTES:
            yield Chunk(group, first_index=first_index)
            group, size, first_index = [], 0, index + 1
    if group:
        yield Chunk(group, first_index=first_index)


def _checked_size(path: Path) -> int | None:
    if path == STDIN:
        return None
    if path.is_dir():
        raise DataError(f"{path}: is a directory; give its text files")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the path of a UTF-8 text file") from None
    if size == 0 and path.is_file():
        raise DataError(f"{path}: the file is empty; there is nothing to learn from")
    if path.suffix == ".zst":
        _zstandard(path)
    return None if path.suffix in (".gz", ".zst") else size


def _zstandard(path: Path) -> Any:
    if importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{path}: reading .zst needs the zstandard package: pip install fastlm[zstd]")
    return importlib.import_module("zstandard")


@contextmanager
def open_stream(path: Path) -> Iterator[Reader]:
    """The bytes of a file or of standard input, decompressed. Raises DataError when they cannot be had."""
    if path == STDIN:
        stdin = sys.stdin.buffer
        yield _interruptible(getattr(stdin, "raw", stdin))  # nothing was read, so nothing is buffered
        return
    try:
        handle = path.open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    with handle:
        stream = _interruptible(handle)
        if path.suffix == ".gz":
            yield _Checked(path, gzip.GzipFile(fileobj=stream), (EOFError, gzip.BadGzipFile, zlib.error))
        elif path.suffix == ".zst":
            zstandard = _zstandard(path)
            yield _Checked(path, _Zstd(stream, zstandard), (EOFError, zstandard.ZstdError))
        else:
            yield stream


def _interruptible(stream: Any) -> Any:
    """`stream`, or where a read of it may wait (a pipe, a terminal, a socket) an `_Interruptible`."""
    try:
        descriptor = stream.fileno()
    except OSError:  # bytes in memory
        return stream
    if stat.S_ISREG(os.fstat(descriptor).st_mode) or not hasattr(select, "poll"):
        return stream
    return _Interruptible(stream)


class _Interruptible:
    """Reads as `stream` does, but never waits in a read, where Ctrl-C may go unseen for as long as nothing comes.

    A read that waits is broken off only if the signal comes after the wait began, and to this very thread. The system
    may hand it to another, such as one of NumPy's, and does when the process was stopped meanwhile. So this waits by
    short turns, between which Python looks for signals.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)

    def read(self, size: int, /) -> bytes:
        """`size` bytes, or fewer at the end."""
        parts: list[bytes] = []
        missing = size
        while missing > 0:
            while not self._poll.poll(SIGNAL_WAIT):
                pass
            part = self._stream.read(min(missing, PIPE_READ_BYTES))
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class _Checked:
    """Reads as `stream` does; what it raises on damaged data becomes a DataError."""

    def __init__(self, path: Path, stream: Reader, errors: tuple[type[Exception], ...]) -> None:
        self._path = path
        self._stream = stream
        self._errors = errors

    def read(self, size: int, /) -> bytes:
        try:
            return self._stream.read(size)
        except self._errors as error:
            raise DataError(f"{self._path}: damaged or cut off: {error}") from None


class _Zstd:
    """Decompresses frame after frame. Raises EOFError where the last one is cut off, which zstandard's reader hides."""

    _INPUT_BYTES = 4096  # at a time, because even they may stand for 170 MB

    def __init__(self, stream: Reader, zstandard: Any) -> None:
        self._stream = stream
        # The window that `zstd --ultra` needs at most.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        self._frame: Any = None
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        parts: list[bytes] = []
        missing = size
        while missing > 0:
            data = self._rest or self._stream.read(self._INPUT_BYTES)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                break
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            parts.append(self._frame.decompress(data))
            missing -= len(parts[-1])
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        return b"".join(parts)


def _read_text(path: Path, stream: Reader, by_line: bool) -> Iterator[Chunk]:
    last_safe_cut = native().last_safe_cut
    rest, offset = b"", 0
    while block := stream.read(max(CHUNK_BYTES, len(rest))):
        rest += block
        if len(rest) > MAX_TEXT_BYTES:
            raise DataError(
                f"{path}: no line end and no space between words in {MAX_TEXT_BYTES:,} bytes from offset "
                f"{offset}; put line ends into the text"
            )
        cut = rest.rfind(b"\n") + 1 if by_line else last_safe_cut(rest)
        if cut:
            yield Chunk([rest[:cut]], path, offset, by_line=by_line)
            rest, offset = rest[cut:], offset + cut
    if rest:
        yield Chunk([rest], path, offset, by_line=by_line)


def _read_json_lines(path: Path, stream: Reader, field: str) -> Iterator[Chunk]:
    texts: list[bytes] = []
    size = 0
    for number, line in read_lines(path, stream):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: not a JSON object but a {type(value).__name__}")
        if field not in value:
            fields = ", ".join(map(repr, list(value)[:5]))
            raise DataError(f"{where}: no field {field!r}, but {fields}; choose another with --field")
        if not isinstance(value[field], str):
            raise DataError(f"{where}: field {field!r} is a {type(value[field]).__name__}, not a string")
        texts.append(_encoded(value[field], where))
        size += len(texts[-1])
        if size >= CHUNK_BYTES:
            yield Chunk(texts, path)
            texts, size = [], 0
    if texts:
        yield Chunk(texts, path)


def read_lines(path: Path, stream: Reader) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers from 1."""
    rest, number = b"", 0
    while block := stream.read(max(CHUNK_BYTES, len(rest))):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            yield number, line
        if len(rest) > MAX_TEXT_BYTES:
            raise DataError(f"{path}, line {number + 1}: longer than {MAX_TEXT_BYTES:,} bytes")
    if rest:
        yield number + 1, rest


def _encoded(text: str, where: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: lone surrogate at character {error.start} cannot be UTF-8") from None
    if len(data) > MAX_TEXT_BYTES:
        raise DataError(f"{where} has more than {MAX_TEXT_BYTES:,} bytes; give it in parts, or train on a file")
    return data
