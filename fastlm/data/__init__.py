"""Texts that every installation has: the interpreter's own documentation, and a short Korean story of ours."""

from __future__ import annotations

from importlib import resources


def english_text() -> str:
    """The language reference that `help()` shows, about 460 kB; empty where Python was installed without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ""
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def korean_text() -> str:
    """korean.txt: 16 kB about a library, a bakery and a machine that learns to read."""
    return resources.files("fastlm.data").joinpath("korean.txt").read_text(encoding="utf-8")
