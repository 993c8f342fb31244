"""Differential fuzzing: our ids beside those of tiktoken and Hugging Face's tokenizers on random Unicode.

The engines of the three libraries follow different versions of Unicode, and `regex` (ours) decides what a pattern
means. Characters on which theirs classes or normalizes otherwise are found first, counted in the report, and left out.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import regex
from fastlm.benchmarks.fuzz_texts import FuzzTexts

from fastlm.errors import ConfigError, TokenizerError
from fastlm.tokenizer import Tokenizer
from fastlm.tokenizer.patterns import REGEXES
from fastlm.tokenizer.tiktoken_format import ENCODINGS

SHOWN = 5  # differences that are kept, each made as short as it stays different
CLASSES = (r"\p{L}", r"\p{N}", r"\s", r"[\p{Lu}\p{Lt}]", r"\p{Ll}", r"[\p{Lm}\p{Lo}]", r"\p{M}", r"\p{P}", r"\p{S}")

Encode = Callable[[str], list[int]]


@dataclass
class Outcome:
    """What one vocabulary came to."""

    vocabulary: str
    reference: str
    excluded: int
    """Characters on which the reference follows another Unicode."""
    strings: int = 0
    characters: int = 0
    seconds: float = 0.0
    num_differences: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """Our tokenizer and the one that defines its ids."""

    vocabulary: str
    reference: str
    ours: Encode
    theirs: Encode
    excluded: frozenset[str]
    ours_bytes: Callable[[bytes], list[int]] | None = None
    theirs_bytes: Callable[[bytes], list[int]] | None = None
    decode_bytes: Callable[[list[int]], bytes] | None = None


def pairs(paths: list[Path]) -> Iterator[Pair]:
    """Every published tiktoken encoding in its cache, and each tokenizer.json of `paths`; the small ones come last.

    Raises:
        ConfigError: tiktoken or tokenizers is not installed.
    """
    for path in paths:
        yield _hugging_face(path)
    if paths:
        return
    for name in ENCODINGS:
        try:
            ours = Tokenizer.from_tiktoken(name)
        except TokenizerError:
            continue  # not in the cache
        yield _tiktoken(name, ours)
    for pattern in REGEXES:
        ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258, "\u1161".encode(): 259}
        yield _tiktoken(f"bytes, {pattern}", Tokenizer(ranks, pattern=pattern))


def fuzz(pair: Pair, count: int, seed: int) -> Iterator[Outcome]:
    """Compares `count` strings, and as many of them as are bytes to both. Yields the same outcome as it grows."""
    texts = FuzzTexts(seed, pair.excluded, with_surrogates=pair.theirs_bytes is not None)
    outcome = Outcome(pair.vocabulary, pair.reference, len(pair.excluded))
    start = time.perf_counter()
    for number in range(count):
        if number % 10 == 9 and pair.ours_bytes and pair.theirs_bytes and pair.decode_bytes:
            data = texts.draw_bytes()
            ours, theirs = pair.ours_bytes(data), pair.theirs_bytes(data)
            if pair.excluded and not pair.excluded.isdisjoint(data.decode("utf-8", "replace")):
                continue
            if ours != theirs or pair.decode_bytes(ours) != data:
                outcome.num_differences += 1
                if len(outcome.differences) < SHOWN:
                    outcome.differences.append({"bytes": data.hex(), "ours": ours[:50], "theirs": theirs[:50]})
            outcome.strings += 1
            continue
        text = texts.draw()
        outcome.strings += 1
        outcome.characters += len(text)
        if pair.ours(text) != pair.theirs(text):
            outcome.num_differences += 1
            if len(outcome.differences) < SHOWN:
                text = shorten(text, lambda part: pair.ours(part) != pair.theirs(part))
                found = {"text": ascii(text), "ours": pair.ours(text)[:50], "theirs": pair.theirs(text)[:50]}
                outcome.differences.append(found)
        if number % 1000 == 999:
            outcome.seconds = time.perf_counter() - start
            yield outcome
    outcome.seconds = time.perf_counter() - start
    yield outcome


def shorten(text: str, differs: Callable[[str], bool]) -> str:
    """A shortest part of `text` that still differs, by leaving out ever smaller stretches."""
    size = len(text) // 2
    while size:
        at = 0
        while at < len(text):
            shorter = text[:at] + text[at + size :]
            if shorter and differs(shorter):
                text = shorter
            else:
                at += size
        size //= 2
    return text


def _tiktoken(name: str, ours: Tokenizer) -> Pair:
    tiktoken = _package("tiktoken")
    pattern = REGEXES[str(ours.pattern)]
    theirs = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ours.mergeable_ranks, special_tokens=ours.special_tokens
    )
    return Pair(
        name,
        "tiktoken",
        ours.encode_ordinary,
        theirs.encode_ordinary,
        _tiktoken_excluded(),
        ours.encode_bytes,
        theirs._encode_bytes,
        ours.decode_bytes,
    )


def _hugging_face(path: Path) -> Pair:
    tokenizers = _package("tokenizers")
    ours = Tokenizer.from_huggingface(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    theirs = tokenizers.Tokenizer.from_file(str(path))
    normalizer = json.loads(path.read_bytes()).get("normalizer")
    excluded = _hugging_face_excluded()
    if ours.settings.normalizer:
        excluded |= _normalizer_excluded(json.dumps(normalizer), ours)
    return Pair(
        path.parent.name or path.stem,
        "tokenizers",
        lambda text: ours.encode(text, allowed_special="all"),
        lambda text: theirs.encode(text, add_special_tokens=False).ids,
        excluded,
    )


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ConfigError(f"--fuzz compares with {name}; install it with: pip install {name}") from None


_EVERYTHING = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)


@cache
def _tiktoken_excluded() -> frozenset[str]:
    tiktoken = _package("tiktoken")
    single_bytes = {bytes([i]): i for i in range(256)}
    differ: set[str] = set()
    for pattern in CLASSES:
        theirs = tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        kept = theirs.decode(theirs.encode_ordinary(_EVERYTHING))
        differ |= set(kept) ^ set(regex.findall(pattern, _EVERYTHING))
    return frozenset(differ)


@cache
def _hugging_face_excluded() -> frozenset[str]:
    tokenizers = _package("tokenizers")
    differ: set[str] = set()
    for pattern in CLASSES:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
        theirs = {piece for piece, _ in split.pre_tokenize_str(_EVERYTHING)}
        differ |= theirs ^ set(regex.findall(pattern, _EVERYTHING))
    return frozenset(differ)


def _normalizer_excluded(definition: str, ours: Tokenizer) -> frozenset[str]:
    """Characters that the two sides' tables decompose, compose or order differently."""
    tokenizers = _package("tokenizers")
    assert ours.settings.normalizer is not None
    theirs = tokenizers.Tokenizer.from_str(
        json.dumps({"normalizer": json.loads(definition), "model": {"type": "BPE", "vocab": {}, "merges": []}})
    ).normalizer
    differ: set[str] = set()
    composed = [unicodedata.normalize("NFD", char) for char in _EVERYTHING if unicodedata.decomposition(char)]
    for text in composed:
        if len(text) > 1 and theirs.normalize_str(text) != ours.settings.normalizer(text):
            differ |= set(text)
    for before, after in (
        ("", ""),
        ("a\u0301", ""),
        ("a", "\u0323"),
        ("a\u0323", "\u0301"),
        ("\u05d0\u05b0", "\u05bf"),
    ):
        for char in _EVERYTHING:
            text = before + char + after
            if theirs.normalize_str(text) != ours.settings.normalizer(text):
                differ.add(char)
    return frozenset(differ)
