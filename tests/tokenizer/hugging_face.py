"""Hugging Face's tokenizers, as the outside fact that training and the file format are tested against."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PATTERNS = ("gpt2", "cl100k", "o200k", "llama3", "qwen2")

# As published with the models; cl100k is tiktoken's, written without possessive repeats.
REGEXES = {
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(REGEXES[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(
    texts: Iterable[str] | Path,
    pattern: str,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    min_frequency: int = 0,
) -> Tokenizer:
    """`texts` may be the path of one file, which it reads in its own way."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    if isinstance(texts, Path):
        tokenizer.train([str(texts)], trainer)
    else:
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def random_character(rng: random.Random) -> str:
    """Any character that this Python's Unicode assigns: the regex engine of tokenizers knows no newer ones.

    U+0295 is left out, whose category changed in Unicode 17.
    """
    while True:
        char = chr(rng.choice([rng.randrange(1, 0x3000), rng.randrange(1, 0x110000)]))
        if unicodedata.category(char) not in ("Cn", "Cs") and char != "\u0295":
            return char


def random_text(rng: random.Random, length: int) -> str:
    """Text where patterns differ: scripts, marks, digits, contractions, white space, any code point."""
    kinds = [
        lambda: rng.choice("abcABC"),
        lambda: rng.choice("가나다한국어"),
        lambda: rng.choice(" \t\n\r\u00a0\u3000"),
        lambda: rng.choice("0123٣½"),
        lambda: rng.choice(".,'’!/-_\"("),
        lambda: rng.choice(["'s", "'LL", "'Re", "\r\n", "\n\n", "  ", "the", " and"]),
        lambda: rng.choice("\u0301\u0903ʰǅ日本é\U0001f600"),
        lambda: random_character(rng),
    ]
    weights = [rng.random() ** 2 for _ in kinds]
    weights[-1] *= 0.1
    return "".join(kind() for kind in rng.choices(kinds, weights, k=length))
