"""Data sets of the Hugging Face hub as sources to prepare, read by the `datasets` package; each row is a document.

A large one is cut into pieces of whole rows, so that several processes share it. The cut depends on the data alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.errors import ConfigError, DataError
from fastlm.training.documents import Split, split_of
from fastlm.training.records import is_table

PIECE_BYTES = 128 << 20  # of rows, as Arrow holds them: some seconds of encoding
ROWS_AT_ONCE = 1000
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves


@dataclass(frozen=True)
class DatasetSource:
    """Rows `first` to `last` of a split of a data set."""

    dataset: str  # its id, or the directory that it was saved to
    subset: str | None
    split: str
    column: str
    valid_fraction: float
    fingerprint: str
    num_bytes: int
    first: int
    last: int

    @property
    def name(self) -> str:
        parts = (self.dataset, self.subset, self.split, f"{self.first}-{self.last}")
        return ":".join(part for part in parts if part)

    @property
    def train_bytes(self) -> int:
        return round(self.num_bytes * (1.0 - self.valid_fraction))

    def identity(self) -> list[Any]:
        return [repr(self)]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for text in self._texts():
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def documents(self) -> Iterator[tuple[Split, Iterator[str]]]:
        for text in self._texts():
            yield split_of(text, self.valid_fraction), iter((text,))

    def _texts(self) -> Iterator[str]:
        rows = _load(self.dataset, self.subset, self.split).select_columns([self.column])
        for start in range(self.first, self.last, ROWS_AT_ONCE):
            for i, text in enumerate(rows[start : min(start + ROWS_AT_ONCE, self.last)][self.column]):
                if not isinstance(text, str):
                    what = f"{self.dataset}, row {start + i + 1}: {self.column!r}"
                    raise DataError(f"{what} is a {type(text).__name__}, not a string; name another --column")
                yield text


def is_dataset(path: Path) -> bool:
    """Whether this names a data set, not a file: a directory that `save_to_disk` wrote, or what can be an id."""
    if path.exists():
        return any((path / name).is_file() for name in _SAVED)
    plain = path.suffix in (".txt", ".gz", ".zst") or is_table(path)
    return not plain and _ID.fullmatch(str(path)) is not None


def open_dataset(
    path: Path, *, subset: str | None, split: str, column: str, valid_fraction: float
) -> list[DatasetSource]:
    """The pieces of a data set, downloaded where it is not yet.

    Raises:
        ConfigError: the `datasets` package is not installed.
        DataError: there is no such data set, subset, split or column, or it is empty.
    """
    rows = _load(str(path), subset, split)
    if column not in rows.column_names:
        raise DataError(
            f"{path} has no column {column!r}, but {', '.join(rows.column_names[:8])}; name one by --column"
        )
    if not len(rows):
        raise DataError(f"{path}: the split {split!r} is empty; give another --split")
    size = rows.data.nbytes
    pieces = min(len(rows), math.ceil(size / PIECE_BYTES)) or 1
    cuts = [len(rows) * i // pieces for i in range(pieces + 1)]
    return [
        DatasetSource(
            str(path), subset, split, column, valid_fraction, rows._fingerprint, size // pieces, cuts[i], cuts[i + 1]
        )
        for i in range(pieces)
    ]


@functools.lru_cache(maxsize=4)  # each piece asks; the hub need not be asked each time
def _load(name: str, subset: str | None, split: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        missing = "" if Path(name).exists() else f"{name} is no file here; "
        raise ConfigError(
            f"{missing}reading a Hugging Face data set needs the datasets package: pip install fastlm[datasets]"
        )
    datasets: Any = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    try:
        if not Path(name).exists():
            return datasets.load_dataset(name, subset, split=split)
        saved = datasets.load_from_disk(name)
        return saved[split] if isinstance(saved, dict) else saved
    except KeyError:
        raise DataError(f"{name} has no split {split!r}, but {', '.join(saved)}; give one by --split") from None
    except (OSError, ValueError, RuntimeError) as error:  # no such data set, subset or split; no network; damaged
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        where = "" if Path(name).exists() else " is no file here, and as a data set of Hugging Face"
        raise DataError(f"{name}{where} cannot be loaded: {reason}") from None
