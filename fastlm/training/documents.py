"""The documents of source files, and which split each belongs to.

A text file, plain or compressed, is one document: its last tenth by bytes is for validation, from the line that begins
at or before 90 % of it (from the character there, when no line begins in the last 64 KiB before). In a file of rows
each row is a document, and in a text file read by lines each line that is not blank; there the text itself decides, so
that the same text is never in both splits, and neither the order of files nor the number of workers plays a part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastlm.errors import DataError
from fastlm.tokenizer.text_reader import Reader, open_stream, read_lines
from fastlm.training.data import sha256_file
from fastlm.training.records import is_table, read_records

CHUNK_BYTES = 4 << 20  # text handled at once; bounds memory
LINE_SEARCH_BYTES = 64 << 10  # how far back from 90 % a line start is looked for

Split = Literal["train", "valid"]


class Source(Protocol):
    """What is encoded as a whole, by one process."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int:
        """For the display of progress."""

    @property
    def train_bytes(self) -> int:
        """About how much of them is for training."""

    def identity(self) -> list[Any]:
        """What, if it is the same, is the same source; of JSON's types."""

    def sha256(self) -> str:
        """Of the content."""

    def documents(self) -> Iterator[tuple[Split, Iterator[str]]]:
        """Each document's split and its text in pieces, which are to be read before the next document is.

        Raises:
            DataError: the source is damaged, not UTF-8, or a row has no text; names the place.
        """


@dataclass(frozen=True)
class FileSource:
    """A file to prepare. `cut` and `size`: of a text that is one document, the byte where validation starts, and the
    last; else None."""

    path: Path
    column: str
    by_line: bool
    valid_fraction: float
    cut: int | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def train_bytes(self) -> int:
        return self.num_bytes if self.cut is None else self.cut

    def identity(self) -> list[Any]:
        return [str(self.path.resolve()), self.path.stat().st_mtime_ns, self.num_bytes, repr(self)]

    def sha256(self) -> str:
        return sha256_file(self.path)

    def documents(self) -> Iterator[tuple[Split, Iterator[str]]]:
        if self.cut is not None and self.size is not None:
            yield "train", read_text(self.path, 0, self.cut)
            yield "valid", read_text(self.path, self.cut, self.size)
            return
        for text in self._rows():
            yield split_of(text, self.valid_fraction), iter((text,))

    def _rows(self) -> Iterator[str]:
        if is_table(self.path):
            yield from (record.text(self.column) for record in read_records(self.path))
            return
        with open_stream(self.path) as stream:
            for number, line in read_lines(self.path, stream):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.path}, line {number} is not UTF-8: byte {line[error.start]:#04x}") from None
                if text:
                    yield text


def open_source(path: Path, *, column: str, by_line: bool, valid_fraction: float) -> FileSource:
    """Raises DataError for a missing or empty file, or a text too short to split."""
    if not path.is_file():
        raise DataError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; give a text file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with text")
    if by_line or is_table(path):
        return FileSource(path, column, by_line, valid_fraction)
    size = path.stat().st_size if _is_plain(path) else sum(map(len, _blocks(path)))
    return FileSource(path, column, by_line, valid_fraction, _split_point(path, size, valid_fraction), size)


def split_of(text: str, valid_fraction: float) -> Split:
    """Which split a document is in: by a hash of it."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "little") < valid_fraction * 2**64 else "train"


def read_text(path: Path, start: int, stop: int) -> Iterator[str]:
    """The bytes of text from `start` to `stop`, in pieces that end at a line end, or a character's where a line is
    long. Offsets are those of the text, decompressed.

    Raises:
        DataError: the bytes are not UTF-8; names the offset.
    """
    with open_stream(path) as stream:
        _skip(stream, start)
        position, rest = start, b""
        while position + len(rest) < stop or rest:
            new = stream.read(min(CHUNK_BYTES, stop - position - len(rest)))
            chunk = rest + new
            last = position + len(chunk) >= stop or not new
            end = len(chunk) if last else (chunk.rfind(b"\n") + 1 or _character_end(chunk))
            try:
                yield chunk[:end].decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is not UTF-8: byte {chunk[error.start]:#04x} at offset {position + error.start}; "
                    "convert it, for example by `iconv -t UTF-8`"
                ) from None
            position, rest = position + end, chunk[end:]
            if last:
                return


def _is_plain(path: Path) -> bool:
    return path.suffix not in (".gz", ".zst")


def _blocks(path: Path) -> Iterator[bytes]:
    with open_stream(path) as stream:
        while block := stream.read(CHUNK_BYTES):
            yield block


def _skip(stream: Reader, count: int) -> None:
    seek = getattr(stream, "seek", None)
    if seek is not None:
        seek(count)
        return
    while count > 0:
        count -= len(stream.read(min(CHUNK_BYTES, count))) or count


def _character_end(chunk: bytes) -> int:
    """The end of the last whole character, looking at no more than the four bytes that one can have."""
    for back in range(1, min(4, len(chunk)) + 1):
        byte = chunk[-back]
        if byte & 0xC0 != 0x80:  # not a continuation byte: a character begins here
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(chunk) if length <= back else len(chunk) - back
    return len(chunk)


def _split_point(path: Path, size: int, valid_fraction: float) -> int:
    """The byte at which validation starts."""
    target = int(size * (1.0 - valid_fraction))
    begin = max(0, target - LINE_SEARCH_BYTES)
    before = b""
    with open_stream(path) as stream:
        _skip(stream, begin)
        while len(before) < target - begin and (block := stream.read(target - begin - len(before))):
            before += block
    cut = begin + (before.rfind(b"\n") + 1 or _character_end(before))
    if not 0 < cut < size:
        raise DataError(f"{path} has {size} bytes: too short to split into training and validation; give more text")
    return cut
