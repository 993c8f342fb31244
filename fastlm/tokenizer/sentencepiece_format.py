"""SentencePiece's own `tokenizer.model` (Llama 2, Mistral, Gemma), a protocol-buffers message, BPE models alone.

The fields are those of github.com/google/sentencepiece, sentencepiece_model.proto. The file is not trusted: lengths are
checked against the bytes that are left.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from fastlm.errors import TokenizerError
from fastlm.tokenizer.added_tokens import AddedToken, Settings
from fastlm.tokenizer.huggingface_reader import MAX_ID
from fastlm.tokenizer.sentencepiece import META, SentencePieceTokenizer, SpaceRules

MAX_FILE_BYTES = 64 << 20  # the largest published model (Gemma 3) has 4.7 MB

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_KINDS_OF_MODEL = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}


def load_sentencepiece(path: str | Path) -> SentencePieceTokenizer:
    """Reads a `tokenizer.model`. Ids equal those of the `sentencepiece` package.

    Raises:
        TokenizerError: the file is missing or corrupt, or not a BPE model without normalization.
    """
    path = Path(path)

    def fail(message: str) -> NoReturn:
        raise TokenizerError(f"{path}: {message}")

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            fail(f"larger than {MAX_FILE_BYTES >> 20} MiB, so no tokenizer.model")
        data = path.read_bytes()
    except OSError as error:
        fail(f"{error.strerror}; give the path of a tokenizer.model")
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                entry = dict(_fields(value))
                text, score, kind = entry.get(1, b""), entry.get(2, b"\0\0\0\0"), entry.get(3, _NORMAL)
                if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
                    raise ValueError("a piece is of the wrong form")
                pieces.append((text.decode(), *struct.unpack("<f", score), kind))
            elif number in (2, 3) and isinstance(value, bytes):
                (trainer if number == 2 else normalizer).update(_fields(value))
    except (ValueError, struct.error) as error:
        fail(f"is no tokenizer.model, or cut short: {error}")
    if not 0 < len(pieces) < MAX_ID:
        fail(f"holds {len(pieces)} pieces")
    model = trainer.get(3, 1)
    if model != 2:
        fail(f"a SentencePiece model of the kind {_KINDS_OF_MODEL.get(model, model)!r} is not supported; BPE is")  # type: ignore[arg-type]
    for number, default, what in ((2, b"", "normalizes text"), (4, 1, "removes spaces"), (5, 1, "")):
        value = normalizer.get(number, default)
        if (what and value) or (not what and not value):
            fail(f"a SentencePiece model that {what or 'keeps spaces as they are'} is not supported")
    if trainer.get(24):
        fail("a SentencePiece model that puts spaces after words is not supported")
    of_kind: dict[int, dict[str, int]] = {kind: {} for kind in range(1, 7)}
    for i, (piece, _, piece_kind) in enumerate(pieces):
        if piece_kind not in of_kind or not piece:
            fail(f"piece {i} is empty or of the kind {piece_kind}")
        if any(piece in found for found in of_kind.values()):
            fail(f"piece {i}, {piece!r:.60}, is there twice")
        of_kind[piece_kind][piece] = i
    if of_kind[_UNUSED]:
        fail("pieces of the type unused are not supported")
    has_prefix = bool(normalizer.get(3, 1))
    if has_prefix and any(META in text for text in of_kind[_USER_DEFINED]):
        fail("user-defined pieces with a space, and a space in front of the text, are not supported together")
    names = {i: text for found in of_kind.values() for text, i in found.items()}

    def token(field: int, default: int) -> str | None:
        i = trainer.get(field, default)
        return names.get(i) if isinstance(i, int) and names.get(i) in of_kind[_CONTROL] | of_kind[_UNKNOWN] else None

    bos, eos, pad = token(41, 1), token(42, 2), token(43, -1)
    mergeable = of_kind[_NORMAL] | of_kind[_USER_DEFINED]
    return SentencePieceTokenizer(
        {text: i for found in of_kind.values() for text, i in found.items()},
        scores={text: pieces[i][1] for text, i in mergeable.items()},
        unknown=next(iter(of_kind[_UNKNOWN]), None),
        fuse_unknown=True,
        spaces=SpaceRules(prefix="first" if has_prefix else "never", strip=has_prefix),
        special_tokens=of_kind[_CONTROL] | of_kind[_UNKNOWN],
        name=path.name,
        settings=Settings(
            added_tokens=tuple(
                AddedToken(text.replace(META, " "), i, special=False) for text, i in of_kind[_USER_DEFINED].items()
            ),
            prefix_ids=(of_kind[_CONTROL][bos],) if bos in of_kind[_CONTROL] else (),
            bos_token=bos,
            eos_token=eos,
            pad_token=pad,
        ),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message: a varint as int (negative ones too), anything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value - (1 << 64) if value >> 63 else value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at offset {at}")
        if size > len(data) - at:
            raise ValueError(f"{size} bytes are needed at offset {at}, and {len(data) - at} left")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends inside a number")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value & (1 << 64) - 1, at
    raise ValueError(f"a number at offset {at} has more than 64 bits")
