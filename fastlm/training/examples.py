"""Examples to fine-tune on, read from rows of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastlm.errors import DataError
from fastlm.training.records import Record, read_records


@dataclass(frozen=True)
class Labelled:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class Conversation:
    """Messages with "role" and "content"; the assistant's are what is learned."""

    messages: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, prompt: str, response: str) -> Conversation:
        return cls(({"role": "user", "content": prompt}, {"role": "assistant", "content": response}))


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, of which one is preferred."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what."""

    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    response: str = "response"
    chosen: str = "chosen"
    rejected: str = "rejected"


Example = TypeVar("Example", Labelled, Conversation, Preference)


def read_labelled(path: str | Path, columns: Columns | None = None) -> list[Labelled]:
    """Raises DataError when the file holds no rows, or one has no text or no label."""
    columns = columns or Columns()

    def labelled(record: Record) -> Labelled:
        label = record.get(columns.label)
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            raise DataError(f"{record.where}: the label {columns.label!r} must be a name or an integer, not {label!r}")
        return Labelled(record.text(columns.text), str(label))

    return _read(path, labelled)


def read_conversations(path: str | Path, columns: Columns | None = None) -> list[Conversation]:
    """Rows with "messages", or with a prompt and a response.

    Raises DataError when the file holds no rows, or one holds no answer.
    """
    columns = columns or Columns()

    def conversation(record: Record) -> Conversation:
        messages = record.values.get("messages")
        if messages is None:
            return Conversation.of(record.text(columns.prompt), record.text(columns.response))
        try:
            return Conversation(tuple({"role": str(m["role"]), "content": m["content"]} for m in messages))
        except (TypeError, KeyError):
            raise DataError(f'{record.where}: "messages" must be a list of objects with "role" and "content"') from None

    return _read(path, conversation)


def read_preferences(path: str | Path, columns: Columns | None = None) -> list[Preference]:
    """Raises DataError when the file holds no rows, or one lacks a column."""
    c = columns or Columns()
    return _read(path, lambda record: Preference(*(record.text(name) for name in (c.prompt, c.chosen, c.rejected))))


def _read(path: str | Path, make: Callable[[Record], Example]) -> list[Example]:
    examples = [make(record) for record in read_records(path)]
    if not examples:
        raise DataError(f"{path} holds no examples; there is nothing to learn from")
    return examples


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """A random share of the examples apart, at least one: (the rest, the share).

    Raises DataError when there are fewer than two.
    """
    if len(examples) < 2:
        raise DataError("one example cannot be split into training and validation; give more, or a validation file")
    apart = set(np.random.default_rng(seed).permutation(len(examples))[: max(1, round(len(examples) * fraction))])
    kept = [example for i, example in enumerate(examples) if i not in apart]
    return kept, [example for i, example in enumerate(examples) if i in apart]


def fingerprint_of(*groups: Iterable[Any]) -> str:
    """Changes with any example and with their order."""
    digest = hashlib.sha256()
    for group in groups:
        for example in group:
            digest.update(json.dumps(asdict(example), ensure_ascii=True).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


class ExampleOrder:
    """Which examples each training step reads: every epoch all of them once, in an order of its own.

    The answer depends on the seed and the step alone.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of a step, counted from 0."""
        return [self._index(step * self.batch_size + i) for i in range(self.batch_size)]

    def _index(self, place: int) -> int:
        epoch, place = divmod(place, self.count)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[place])


def spread(count: int, size: int) -> list[int]:
    """`size` indices below `count`, evenly apart; all of them where there are no more."""
    return list(range(count)) if size >= count else np.linspace(0, count - 1, size).round().astype(int).tolist()
