"""Training a byte-level BPE tokenizer: the merges and ids that Hugging Face's `BpeTrainer` gives for the same text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastlm._core import native
from fastlm.errors import ConfigError, DataError
from fastlm.tokenizer.byte_level import BYTE_TO_CHAR, CHAR_TO_BYTE
from fastlm.tokenizer.text_reader import STDIN, Chunk, gather, read_files, total_bytes
from fastlm.tokenizer.tokenizer import Tokenizer

MAX_THREADS = 8
MIN_MEMORY = 256 << 20  # of which the interpreter, the libraries and the chunks of text take about half
COUNTER_SHARE = 0.3  # of memory; turning the counted words into symbols and listing pairs takes as much again twice
MAX_VOCAB_SIZE = 1 << 22  # sixteen times the largest vocabularies in use


@dataclass(frozen=True)
class TrainingProgress:
    """How far training is. `total` is None while the amount of text is not known."""

    stage: Literal["reading", "merging"]
    done: int  # bytes of text counted, or ids in use
    total: int | None


@dataclass(frozen=True)
class TrainingReport:
    """What one training run did."""

    bytes_read: int
    words: int  # pre-tokens
    distinct_words: int
    forgotten_words: int  # of `words`: occurrences of rare words that had to make room, for lack of memory
    merges: int
    vocab_size: int
    requested_vocab_size: int
    reading_seconds: float
    merging_seconds: float

    @property
    def stopped_early(self) -> bool:
        """True when no pair was frequent enough to reach the requested size, as happens with little text."""
        return self.vocab_size < self.requested_vocab_size


ProgressCallback = Callable[[TrainingProgress], None]


class BpeTrainer:
    """Trains a byte-level BPE vocabulary (Sennrich, Haddow and Birch 2016, arXiv:1508.07909).

    Merges and ids equal those of Hugging Face's `trainers.BpeTrainer(initial_alphabet=ByteLevel.alphabet())`, ties
    included: ids are special tokens, then the 256 bytes, then merged tokens in order.

    Args:
        vocab_size: ids in all: special tokens, 256 bytes and merges. Training stops early, and says so in `report`,
            when no pair of tokens is left that occurs `min_frequency` times (and at least once).
        pattern: how text is split into the words that merges stay inside: "gpt2", "cl100k", "o200k", "llama3" or
            "qwen2". They treat Hangul alike; "gpt2" alone keeps line ends out of punctuation and treats only lower-case
            contractions as such, which costs 2 % more tokens in Korean reviews and 9 % in English plays.
        special_tokens: strings that get the first ids and that merging never makes part of.
        min_frequency: least number of occurrences of a pair that is merged.
        memory: bytes that training may take, the interpreter included; None sets no limit. Memory grows with the
            distinct words of the text. When they would need more, the rarest are forgotten, as in lossy counting
            (Manku and Motwani 2002): merges are then no longer exact, and `report.forgotten_words` says how many
            occurrences are not in the counts.

    Raises:
        ConfigError: an option makes no sense, such as a vocabulary without room for the 256 bytes.
    """

    def __init__(
        self,
        vocab_size: int = 8000,
        *,
        pattern: str = "cl100k",
        special_tokens: Sequence[str] = ("<|endoftext|>",),
        min_frequency: int = 0,
        memory: int | None = None,
    ) -> None:
        if isinstance(special_tokens, str):
            raise ConfigError(f"special_tokens must be a list of strings, not the string {special_tokens!r}")
        self.vocab_size = vocab_size
        self.pattern = pattern
        self.special_tokens = tuple(special_tokens)
        self.min_frequency = min_frequency
        self.memory = memory
        self.report: TrainingReport | None = None
        """What the last run did; None before the first."""
        self._check_options()

    def train(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        field: str | None = None,
        by_line: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Tokenizer:
        """Trains on UTF-8 text files, each read as one text, in chunks, so that memory does not grow with their size.

        `-` is standard input; `.gz` and `.zst` are decompressed. With `field`, files hold one JSON object a line, and
        each value of that field is a text of its own. The result does not depend on the chunks; a file without any
        place to cut is read whole. Line ends are part of the text, as they are when it is encoded; with `by_line` each
        line, its end included, is a text of its own, which is how Hugging Face's trainer reads files.

        `progress` is called after each chunk and about ten times a second while merging. What it raises ends
        training, and so does Ctrl-C.

        Raises:
            ConfigError: both `field` and `by_line` are given.
            DataError: a file is missing, a directory, empty, damaged, or not UTF-8 (with the byte offset), a line is
                no JSON object with the field, or a word is longer than 16 MiB.
        """
        files = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
        if not files:
            raise DataError("no file to train on was given")
        if files.count(STDIN) > 1:
            raise DataError("standard input (-) is given twice; it can be read once")
        if field is not None and by_line:
            raise ConfigError("by_line is for files of text; with a field, each of its values is a text")
        return self._run(read_files(files, field, by_line=by_line), total_bytes(files), progress)

    def train_from_iterator(self, texts: Iterable[str], *, progress: ProgressCallback | None = None) -> Tokenizer:
        """Trains on strings, each a text of its own: no merge depends on where one ends and the next begins.

        Raises:
            DataError: there is no text, or a string holds a lone surrogate.
        """
        if isinstance(texts, str):
            raise DataError("train_from_iterator takes an iterable of texts; put the one text into a list")
        return self._run(gather(texts), None, progress)

    def _check_options(self) -> None:
        least = 256 + len(self.special_tokens)
        if self.vocab_size < least:
            raise ConfigError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes and {len(self.special_tokens)} special tokens "
                f"need {least}; give at least that, or more to have merges"
            )
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ConfigError(f"vocab_size {self.vocab_size} is above the limit of {MAX_VOCAB_SIZE}")
        if self.memory is not None and self.memory < MIN_MEMORY:
            raise ConfigError(f"memory is {self.memory:,} bytes; training takes at least {MIN_MEMORY:,}")
        if self.min_frequency < 0:
            raise ConfigError(f"min_frequency is {self.min_frequency}; give 0 or more")
        for token in self.special_tokens:
            if not isinstance(token, str) or not token:
                raise ConfigError(f"special token {token!r} is not a non-empty string")
            if token in BYTE_TO_CHAR:
                raise ConfigError(
                    f"special token {token!r} is the name of a single byte; give it two or more characters"
                )
            if self.special_tokens.count(token) > 1:
                raise ConfigError(f"special token {token!r} is given twice")
        try:
            native().WordCounter(self.pattern, 1)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _run(self, chunks: Iterable[Chunk], size: int | None, progress: ProgressCallback | None) -> Tokenizer:
        self.report = None
        counter_bytes = int((self.memory or 0) * COUNTER_SHARE)
        counter = native().WordCounter(self.pattern, min(_num_processors(), MAX_THREADS), counter_bytes)
        started = time.perf_counter()
        for chunk in chunks:
            try:
                invalid = counter.add(chunk.texts, chunk.by_line)
            except ValueError as error:
                raise chunk.too_long(str(error)) from None
            if invalid is not None:
                raise chunk.invalid_utf8(*invalid)
            if progress is not None:
                progress(TrainingProgress("reading", counter.total_bytes, size))
        words, distinct_words = counter.total_words, counter.distinct_words
        forgotten_words = counter.forgotten_words
        if words == 0:
            raise DataError("there is no text to train on")
        counted = time.perf_counter()

        tokens = [*(t.encode() for t in self.special_tokens), *map(bytes, zip(_BYTES_IN_ID_ORDER))]
        first_byte_id = len(self.special_tokens)
        byte_ids = [0] * 256
        for i, byte in enumerate(_BYTES_IN_ID_ORDER):
            byte_ids[byte] = first_byte_id + i

        def report_merging(ids_in_use: int) -> None:
            if progress is not None:
                progress(TrainingProgress("merging", ids_in_use, self.vocab_size))

        merged = counter.train(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            byte_ids=byte_ids,
            first_new_id=len(tokens),
            known_tokens=self._spelled_in_bytes(),
            progress=report_merging,
        )
        merges = []
        for left, right, token in merged:
            merges.append((tokens[left], tokens[right]))
            if token < first_byte_id:
                raise ConfigError(
                    f"special token {self.special_tokens[token]!r} is also an ordinary word of this text; "
                    "choose one that no text spells, such as <|name|>"
                )
            tokens.append(tokens[left] + tokens[right])
        self.report = TrainingReport(
            bytes_read=counter.total_bytes,
            words=words,
            distinct_words=distinct_words,
            forgotten_words=forgotten_words,
            merges=len(merges),
            vocab_size=len(tokens),
            requested_vocab_size=self.vocab_size,
            reading_seconds=counted - started,
            merging_seconds=time.perf_counter() - counted,
        )
        if progress is not None:
            progress(TrainingProgress("merging", len(tokens), len(tokens)))
        return Tokenizer(
            {token: i for i, token in enumerate(tokens) if i >= first_byte_id},
            pattern=self.pattern,
            special_tokens={token: i for i, token in enumerate(self.special_tokens)},
            merges=merges,
        )

    def _spelled_in_bytes(self) -> dict[bytes, int]:
        """The special tokens that merges of bytes could spell in the format's byte alphabet, as those bytes."""
        return {
            bytes(CHAR_TO_BYTE[char] for char in token): i
            for i, token in enumerate(self.special_tokens)
            if all(char in CHAR_TO_BYTE for char in token)
        }


# Hugging Face orders the alphabet by the code points that stand for bytes, so "!" comes first and 0xAD last.
_BYTES_IN_ID_ORDER = sorted(range(256), key=BYTE_TO_CHAR.__getitem__)


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
