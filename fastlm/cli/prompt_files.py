"""Files of prompts, and files of what followed them, which grow row by row and can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastlm._files import write_atomic
from fastlm.errors import DataError

Place = tuple[int, int]  # number of the prompt, number of its sample


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Each prompt under "prompt", with the other fields of its row.

    A .jsonl file holds a JSON object with "prompt", or a JSON string, a line; any other file a prompt a line. Empty
    lines are passed over.

    Raises:
        DataError: the file is missing, not UTF-8, empty, or a line is no such row; the message has its number.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            rows.append({"prompt": line})
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from None
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{path}, line {number} must be a JSON object with a string "prompt"')
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no prompts")
    return rows


def read_text(path: Path) -> str:
    """Raises DataError when the file is missing or not UTF-8."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}") from None


class ResultFile:
    """JSON lines, one for each place in `expected`, which says what a row of that place must hold.

    A file that is there is gone on with: `done` are the places whose rows it holds. Rows that ended in an error, and a
    last line that was cut off, are dropped, to be done again. Each row is written when it is known; `finish` puts them
    in order.

    Raises:
        DataError: the file holds something else, or rows of other prompts or seeds.
    """

    def __init__(self, path: Path, expected: Mapping[Place, Mapping[str, Any]]) -> None:
        self._path = path
        self._rows = self._read(expected) if path.exists() else {}
        write_atomic(path, "".join(map(_line, self._rows.values())))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    @property
    def done(self) -> set[Place]:
        return set(self._rows)

    def add(self, row: dict[str, Any]) -> None:
        self._rows[row["index"], row["sample"]] = row
        self._file.write(_line(row))
        self._file.flush()

    def finish(self) -> None:
        self.close()
        write_atomic(self._path, "".join(_line(row) for _, row in sorted(self._rows.items(), key=lambda item: item[0])))

    def close(self) -> None:
        self._file.close()

    def _read(self, expected: Mapping[Place, Mapping[str, Any]]) -> dict[Place, dict[str, Any]]:
        rows: dict[Place, dict[str, Any]] = {}
        *lines, _cut_off = _lines_of_results(self._path)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                place = row["index"], row["sample"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise DataError(
                    f"{self._path}, line {number} is no row of results; give another --out, or remove the file"
                ) from None
            wanted = expected.get(place)
            if wanted is None or any(row.get(name) != value for name, value in wanted.items()):
                raise DataError(
                    f"{self._path}, line {number} is of another prompt or seed; give another --out, or remove the file"
                )
            if row.get("finish_reason") != "error":
                rows[place] = row
        return rows


def _lines_of_results(path: Path) -> list[str]:
    """The last one is empty unless it was cut off, perhaps inside a character."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return whole.decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; give another --out, or remove the file") from None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
