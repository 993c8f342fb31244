"""What a lab found: tables, pictures, and claims that its numbers bear out or refute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under column names. A `Spread` or other value is put in words before it comes here."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Picture:
    """A PNG file in the lab's directory."""

    file: str
    title: str


@dataclass(frozen=True)
class Finding:
    """A claim stated before the numbers were known, whether they bear it out, and the sentence that says so."""

    claim: str
    holds: bool
    statement: str


@dataclass
class LabResult:
    """All that a lab has to say. `missing`: parts that were left out, each with the command that mends it."""

    idea: str
    title: str
    settings: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LabResult:
        """Raises TypeError or KeyError when `content` is not what `to_json` gave."""
        lists: dict[str, Sequence[Any]] = {
            "tables": [Table(**table) for table in content["tables"]],
            "pictures": [Picture(**picture) for picture in content["pictures"]],
            "findings": [Finding(**finding) for finding in content["findings"]],
        }
        return cls(**{**content, **lists})


def in_words(cell: Cell) -> str:
    """A cell as it is printed: numbers to three significant digits or so, nothing for None."""
    if cell is None:
        return ""
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    if cell != cell:
        return "-"
    digits = 0 if abs(cell) >= 100 else 1 if abs(cell) >= 10 else 2 if abs(cell) >= 1 else 3
    return f"{cell:,.{digits}f}"
