"""The byte alphabet of byte-level BPE files: every byte is written as one printable character.

GPT-2's convention, kept by Hugging Face's formats: printable Latin-1 characters stand for themselves, and the other 68
bytes, in order, for U+0100, U+0101, …
"""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)).difference(_PRINTABLE))

CHAR_TO_BYTE = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
BYTE_TO_CHAR = [char for _, char in sorted((b, char) for char, b in CHAR_TO_BYTE.items())]


# Latin-1 maps bytes to code points one to one, so that translating strings does the rest at C speed. U+FFFF, which
# Latin-1 cannot encode, marks the characters below U+0100 that stand for no byte.
_TO_CHARS = dict(enumerate(BYTE_TO_CHAR))
_FROM_CHARS = dict.fromkeys(range(256), "\uffff") | {ord(char): chr(byte) for char, byte in CHAR_TO_BYTE.items()}


def to_chars(token: bytes) -> str:
    """`b" the"` -> `"Ġthe"`."""
    return token.decode("latin-1").translate(_TO_CHARS)


def from_chars(text: str) -> bytes:
    """The inverse of `to_chars`. Raises ValueError at a character outside the alphabet."""
    return text.translate(_FROM_CHARS).encode("latin-1")
