"""One number for a tokenizer, so that data and checkpoints can say which one they were made with."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from fastlm.tokenizer.sentencepiece import SentencePieceTokenizer

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) over vocabulary, merges, pattern, normalizer and added tokens."""
    digest = hashlib.sha256()

    def add(*values: bytes | int | str) -> None:
        for value in values:
            data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)

    pattern = tokenizer.pattern
    add("fastlm tokenizer 1", *([pattern] if isinstance(pattern, str) else pattern))
    if isinstance(tokenizer, SentencePieceTokenizer):
        scores = tokenizer.piece_scores
        add("pieces", len(tokenizer.pieces), repr(tokenizer.spaces), str(tokenizer.unknown), tokenizer.fuse_unknown)
        for piece, i in sorted(tokenizer.pieces.items(), key=lambda item: item[1]):
            add(piece, i, repr(None if scores is None else scores.get(piece)))
        add("merges", -1 if tokenizer.piece_merges is None else len(tokenizer.piece_merges))
        for pair in tokenizer.piece_merges or ():
            add(*pair)
    else:
        add("ranks", len(tokenizer.mergeable_ranks))
        for token, rank in sorted(tokenizer.mergeable_ranks.items(), key=lambda item: item[1]):
            add(token, rank)
        add("merges", -1 if tokenizer.merges is None else len(tokenizer.merges))
        for left, right in tokenizer.merges or ():
            add(left, right)
    add("special tokens", len(tokenizer.special_tokens))
    for special, rank in sorted(tokenizer.special_tokens.items()):
        add(special, rank)
    if tokenizer.settings.normalizer:
        add("normalizer", repr(tokenizer.settings.normalizer.definition))
    for added in tokenizer.settings.added_tokens:
        add("added token", repr(added))
    return digest.hexdigest()
