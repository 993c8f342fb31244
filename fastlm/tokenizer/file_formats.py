"""Which kind of vocabulary file a path holds, told by its content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastlm._gguf import MAGIC
from fastlm.errors import TokenizerError

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

# In a directory, in the order in which they are looked for.
NAMES = ("tokenizer.json", "tekken.json", "tokenizer.model")


def load_file(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, or of a directory that holds one of `NAMES` or a single GGUF.

    Raises:
        TokenizerError: there is no such file, or it is none of the known kinds, or corrupt.
    """
    from fastlm.tokenizer import gguf_format, huggingface_format, sentencepiece_format, tekken_format

    path = Path(path)
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()] or sorted(path.glob("*.gguf"))
        if not found:
            raise TokenizerError(f"{path}: holds none of {', '.join(NAMES)}, *.gguf")
        path = found[0]
    try:
        with path.open("rb") as handle:
            start = handle.read(4)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TokenizerError(f"{path}: {reason}; give the path of a tokenizer.json") from None
    if start == MAGIC:
        return gguf_format.load_gguf(path)
    if path.suffix == ".model" or ".model." in path.name:
        return sentencepiece_format.load_sentencepiece(path)
    if path.name.startswith("tekken"):
        return tekken_format.load_tekken(path)
    return huggingface_format.load_tokenizer_json(path)
