"""The byte alphabet of byte-level BPE files: every byte is written as one printable character.

GPT-2's convention, kept by Hugging Face's formats: printable Latin-1 characters stand for themselves, and the other 68
bytes, in order, for U+0100, U+0101, …
"""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)).difference(_PRINTABLE))

CHAR_TO_BYTE = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
BYTE_TO_CHAR = [char for _, char in sorted((b, char) for char, b in CHAR_TO_BYTE.items())]


def to_chars(token: bytes) -> str:
    """`b" the"` -> `"Ġthe"`."""
    return "".join([BYTE_TO_CHAR[byte] for byte in token])


def from_chars(text: str) -> bytes:
    """The inverse of `to_chars`. Raises KeyError at a character outside the alphabet."""
    return bytes([CHAR_TO_BYTE[char] for char in text])
