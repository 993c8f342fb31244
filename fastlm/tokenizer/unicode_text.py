"""Texts and bytes that are not quite Unicode."""

from __future__ import annotations

from collections.abc import Iterator


def without_surrogates(text: str) -> str:
    """`text` with surrogates that pair up joined to their character, and lone ones as U+FFFD, as tiktoken does it."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_unicode(text: str) -> bool:
    """Whether `text` holds no surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def utf8_runs(data: bytes) -> Iterator[str | bytes]:
    """The stretches of `data` that are UTF-8 as str, and what lies between them as bytes."""
    begin = 0
    while begin < len(data):
        try:
            yield data[begin:].decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[begin : begin + error.start].decode()
            yield data[begin + error.start : begin + error.end]
            begin += error.end
